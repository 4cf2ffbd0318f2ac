"""Read data sets: from a name to files, and from files of any known kind to records.

    data_files      the argument of --data   →  paths
    read_records    the same                 →  (where, record)     where = "pairs.jsonl:17"

A new file type starts in `_read_file` and `hub.SUFFIXES`. `where` goes along with every record, so
that each error names file and line. Read formats/schemas.py next, which makes an `Example` of a
record.
"""

import gzip
import marshal
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from formats import sandbox
from formats.errors import DataError
from formats.files import parse_json, reading, regular
from formats.hub import SUFFIXES, from_hub

MOST_UNPACKED = 2**28  # bytes of records, unless their file has a 200th of it
SPLIT_WORDS = {"train", "test", "valid", "validation", "val", "dev", "eval", "heldout"}
LONGEST_LINE = 2**26  # bytes of one record; a small .gz may unpack to a line of any length


# --------------------------------------------------------------------------------------------------
# Names → files


def data_files(name: str) -> list[Path]:
    """Return the files that `--data` names, sorted by name.

    `name` is a file, a folder or a hub id `owner/name[@revision]`. `NAME:SPLIT` selects the files
    named after the split (train-00000-of-00003.parquet belongs to train) or in a folder named after
    it. A data set with several splits requires one, so nobody trains on the test split by accident.
    In a folder, files are splits if one of them is called train, test or the like.

    Raises:
        DataError: there are no such files, a split must be chosen, or a part of one is missing.
    """
    root, split = name, ""
    if not Path(name).exists():
        before_revision, at, revision = name.partition("@")
        root, _, split = before_revision.partition(":")
        root += at + revision
    local = Path(os.path.expanduser(root))
    if local.is_file():
        return [local]

    def choose(files: list[str]) -> list[str]:
        splits = {file: _split_of(Path(file)) for file in sorted(files) if file.endswith(SUFFIXES)}
        names = sorted(set(splits.values()))
        splits_of_folder = any(SPLIT_WORDS & set(re.split("[^a-z]+", name)) for name in names)
        if not split and len(names) > 1 and (splits_of_folder or not local.exists()):
            listed = ", ".join(names)
            raise DataError(f"{name}: holds several splits, {listed}: pass one as {root}:SPLIT")
        chosen = [
            file
            for file, file_split in splits.items()
            if not split or split == file_split or split in Path(file).parts[:-1]
        ]
        if not chosen:
            of_split = f" of split {split!r}" if split else ""
            has = f": it has {', '.join(names)}" if names else ""
            folder = local if local.exists() else root
            raise DataError(f"{name}: no {', '.join(SUFFIXES)} file{of_split} in {folder}{has}")
        return chosen

    folder = local if local.exists() else from_hub(root, "dataset", choose)
    chosen = choose([str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
    _check_parts(name, folder, chosen)
    return [folder / file for file in chosen]


def _split_of(file: Path) -> str:
    """Return the split that a file belongs to, judging by its name.

    >>> _split_of(Path("data/train-00000-of-00002-0a1b2c.parquet"))
    'train'
    >>> _split_of(Path("train/0000.parquet"))
    'train'
    """
    suffixes = "|".join(map(re.escape, SUFFIXES))
    name = re.sub(rf"(-\d+-of-\d+(-\w+)?)?({suffixes})$", "", file.name)
    return file.parent.name if name.isdigit() and file.parent.name else name


def _check_parts(name: str, folder: Path, files: list[str]) -> None:
    """Raise DataError if only some of the files "…-00000-of-00003…" of a split exist."""
    matches = [re.search(r"^(.*)-(\d+)-of-(\d+)[^/]*$", file) for file in files]
    parts = {match.groups() for match in matches if match}
    for stem, _, count in parts:
        found = sum((other, total) == (stem, count) for other, _, total in parts)
        if found != int(count):
            raise DataError(
                f"{name}: {folder / stem}-…: {found} of {int(count)} parts are on this machine: "
                "complete the download or the copy"
            )


# --------------------------------------------------------------------------------------------------
# Files → records


def read_records(
    name: str, wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[tuple[str, Any]]:
    """Yield (where, record) for every record that `name` holds, in file order.

    `name` is what `data_files` takes. `where` is a file and the number of a line, row or record.
    wanted: takes the number of a record, 0-based over all files. A record that is not wanted is
    not parsed, as far as the format allows; None is yielded for it.

    Raises:
        DataError: a file cannot be read, or a record is not a JSON object. The message names file
            and line.
    """
    number = 0
    for path in data_files(name):
        with reading(path, DataError):
            for where, record in _read_file(path, partial(_shifted, wanted, number)):
                if wanted(number) and not isinstance(record, dict):
                    raise DataError(f"{where}: expected an object, not {type(record).__name__}")
                yield where, record if wanted(number) else None
                number += 1


def _shifted(wanted: Callable[[int], bool], first: int, number: int) -> bool:
    """Return whether the record with this number in a file is wanted; `first` is the file's."""
    return wanted(first + number)


def _read_file(path: Path, wanted: Callable[[int], bool]) -> Iterator[tuple[str, object]]:
    """Choose the reader by the name of the file. A record that is not wanted may be None."""
    if path.name.endswith(".parquet"):
        return _read_parquet(path, wanted)
    if path.name.endswith(".json"):
        return _read_list(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path, wanted)
    raise DataError(f"{path}: not one of {', '.join(SUFFIXES)}")


def _read_parquet(path: Path, wanted: Callable[[int], bool]) -> Iterator[tuple[str, object]]:
    """Yield rows as plain Python values, see `sandbox.load_parquet`, and read in its process.

    A batch that exceeds the limits is read again row by row.
    """
    child = sandbox.Sandbox("parquet", memory=2**32, seconds=600, room=2**28)
    row, rows, unpacked = 0, 64, 0
    program = (str(regular(path)), row, rows)
    try:
        while True:
            where = f"{path} row {row + 1}"
            try:
                needed = any(map(wanted, range(row, row + rows)))
                [answer] = child.ask(program, "next", [needed])
                _check_unpacked(unpacked + len(answer), path, where)
            except (sandbox.SandboxFailure, DataError) as e:
                if rows > 1:
                    rows = 1
                    program = (str(path), row, rows)
                    continue
                if isinstance(e, DataError):
                    raise
                what = f"{path}: not a whole parquet file" if e.number is None else where
                raise DataError(f"{what}: {e}") from None
            unpacked += len(answer)
            if not (records := marshal.loads(answer)):
                return
            for record in records:
                row += 1
                yield f"{path} row {row}", record
    finally:
        child.end()


def _check_unpacked(size: int, path: Path, where: str) -> None:
    """Raise DataError if a file has unpacked to far more than any data set does."""
    if size > MOST_UNPACKED and size > 200 * path.stat().st_size:
        raise DataError(f"{where}: {path} unpacks to more than 200 times its size")


def _read_list(path: Path) -> Iterator[tuple[str, object]]:
    raw = regular(path).read_bytes()
    with reading(path, DataError, "not JSON"):
        records = parse_json(raw)
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON list of records")
    for i, record in enumerate(records, 1):
        yield f"{path} record {i}", record


def _read_lines(path: Path, wanted: Callable[[int], bool]) -> Iterator[tuple[str, object]]:
    unpacked = count = 0
    with gzip.open(regular(path)) if path.suffix == ".gz" else open(regular(path), "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            where = f"{path}:{number}"
            if len(line) == LONGEST_LINE:
                raise DataError(f"{where}: a line of more than {LONGEST_LINE} bytes")
            unpacked += len(line)
            _check_unpacked(unpacked, path, where)
            if line.isspace():
                continue
            record = None
            if wanted(count):
                with reading(where, DataError, "not JSON"):
                    record = parse_json(line)
            yield where, record
            count += 1
