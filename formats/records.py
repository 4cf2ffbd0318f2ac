"""Read data sets: files of any known kind to records, records of any known format to `Example`.

    data_files      the argument of --data   →  paths
    read_records    the same                 →  (where, record)     where = "pairs.jsonl:17"
    parse_record    one record               →  (format, Example)   prompt and responses, as text

A new file type starts in `_read_file` and `hub.SUFFIXES`, a new record format in `_parse_pair` or
`_parse_single`. `where` goes along with every record, so that each error names file and line. Read
formats/tokenizer.py next, which turns the text of an `Example` into tokens.
"""

import gzip
import marshal
import os
import re
from collections.abc import Iterator
from pathlib import Path

from data import Example, Messages
from formats import sandbox
from formats.errors import DataError
from formats.files import parse_json, reading, regular
from formats.hub import SUFFIXES, from_hub

MOST_UNPACKED = 2**28  # bytes of records, unless their file has a 200th of it
LONGEST_LINE = 2**26  # bytes of one record; a small .gz may unpack to a line of any length
ASSISTANT_MARK = "\n\nAssistant:"  # opens the assistant's turn in HH-RLHF's transcripts


# --------------------------------------------------------------------------------------------------
# Names → files


def data_files(name: str) -> list[Path]:
    """Return the files that `--data` names, sorted by name.

    `name` is a file, a folder or a hub id `owner/name[@revision]`. `NAME:SPLIT` selects the files
    named after the split (train-00000-of-00003.parquet belongs to train) or in a folder named after
    it. A hub data set with several splits requires one, so nobody trains on the test split by
    accident.

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
        if not split and len(names) > 1 and not local.exists():
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


def read_records(name: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, record) for every record that `name` holds, in file order.

    `name` is what `data_files` takes. `where` is a file and the number of a line, row or record.

    Raises:
        DataError: a file cannot be read, or a record is not a JSON object. The message names file
            and line.
    """
    for path in data_files(name):
        with reading(path, DataError):
            for where, record in _read_file(path):
                if not isinstance(record, dict):
                    raise DataError(f"{where}: expected an object, not {type(record).__name__}")
                yield where, record


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    """Choose the reader by the name of the file."""
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith(".json"):
        return _read_list(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path)
    raise DataError(f"{path}: not one of {', '.join(SUFFIXES)}")


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
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
                [answer] = child.ask(program, "next", [None])
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


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    unpacked = 0
    with gzip.open(regular(path)) if path.suffix == ".gz" else open(regular(path), "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            where = f"{path}:{number}"
            if len(line) == LONGEST_LINE:
                raise DataError(f"{where}: a line of more than {LONGEST_LINE} bytes")
            unpacked += len(line)
            _check_unpacked(unpacked, path, where)
            if line.strip():
                with reading(where, DataError, "not JSON"):
                    record = parse_json(line)
                yield where, record


# --------------------------------------------------------------------------------------------------
# Records → examples


class Dropped(Exception):
    """Says why a sound record cannot teach anything. It is counted and left out, never an error."""


def parse_record(record: dict, where: str, paired: bool = True) -> tuple[str, Example]:
    """Recognize the format of a record; return the format's name and the example.

    A field that is null counts as absent. Formats of pairs:

    messages      chosen, rejected: message lists that both hold the prompt (UltraFeedback)
    explicit      prompt + chosen + rejected: strings, or message lists
    transcripts   chosen, rejected: strings that share a prompt up to the last "\\n\\nAssistant:"
                  (HH-RLHF)
    candidates    prompt + responses + scores: the best against the worst

    With `paired=False`, for SFT, the example has one response: that of `messages` which end with
    the assistant's, of `prompt` + `completion`, or the chosen one of a pair.

    Raises:
        DataError: the record is malformed.
        Dropped: the record is sound but useless, such as a pair of equal responses.
    """
    fields = {key for key, value in record.items() if value is not None}
    if not paired and ("messages" in fields or {"prompt", "completion"} <= fields):
        return _parse_single(record, fields, where)
    if {"prompt", "responses", "scores"} <= fields and "chosen" not in fields:
        kind, example = "candidates", _from_candidates(record, where)
    else:
        for key in ("chosen", "rejected"):
            if key not in fields:
                expected = "expected chosen and rejected, or prompt, responses and scores"
                expected += "" if paired else ", or messages, or prompt and completion"
                raise DataError(f"{where}: no {key!r} field; {expected}")
        kind, example = _parse_pair(record, fields, where)
    chosen, rejected = example.responses
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an empty response")
    if chosen == rejected:
        raise Dropped("chosen equal to rejected")
    return kind, example if paired else example._replace(responses=(chosen,))


def _parse_single(record: dict, fields: set[str], where: str) -> tuple[str, Example]:
    """Parse a record that holds one response: `messages`, or `prompt` and `completion`."""
    prompt: str | Messages
    if "messages" in fields:
        kind = "messages"
        prompt, response = _split_messages(record["messages"], where, "messages")
    else:
        kind, prompt = "completions", check_prompt(record["prompt"], where)
        response = _response(record["completion"], where, "completion")
    if not response.strip():
        raise Dropped("an empty response")
    return kind, Example(prompt, (response,), where)


def _parse_pair(record: dict, fields: set[str], where: str) -> tuple[str, Example]:
    """Parse a record with the fields `chosen` and `rejected`."""
    chosen, rejected = record["chosen"], record["rejected"]
    if type(chosen) is not type(rejected):
        types = f"chosen is a {type(chosen).__name__} and rejected a {type(rejected).__name__}"
        raise DataError(f"{where}: {types}")
    if isinstance(chosen, list) and len(chosen) > 1:
        return "messages", _from_messages(chosen, rejected, where)
    if "prompt" in fields:
        responses = _response(chosen, where, "chosen"), _response(rejected, where, "rejected")
        return "explicit", Example(check_prompt(record["prompt"], where), responses, where)
    if isinstance(chosen, str):
        return "transcripts", _from_transcripts(chosen, rejected, where)
    raise DataError(f"{where}: no 'prompt' field, and chosen holds no prompt either")


def _from_messages(chosen: object, rejected: object, where: str) -> Example:
    """Parse two message lists that differ in the last message, the assistant's, only."""
    prompt, chosen_response = _split_messages(chosen, where, "chosen")
    other_prompt, rejected_response = _split_messages(rejected, where, "rejected")
    if prompt != other_prompt:
        problem = "chosen and rejected answer different prompts"
        raise DataError(f"{where}: {problem} (they may differ in the last message only)")
    return Example(prompt, (chosen_response, rejected_response), where)


def _from_transcripts(chosen: str, rejected: str, where: str) -> Example:
    """Split two transcripts where they part: after the last mark that they have in common."""
    cut = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT_MARK)
    if cut < 0:
        missing = f"no 'prompt' field, and no common text up to {ASSISTANT_MARK!r}"
        raise DataError(f"{where}: chosen and rejected share no prompt: {missing}")
    cut += len(ASSISTANT_MARK)
    if any("\n\nHuman:" in text[cut:] for text in (chosen, rejected)):
        raise Dropped("a conversation that goes on after the two part")
    return Example(chosen[:cut], (chosen[cut:], rejected[cut:]), where)


def _from_candidates(record: dict, where: str) -> Example:
    """Make a pair of the candidate with the highest score and the one with the lowest."""
    responses, scores = record["responses"], record["scores"]
    both_lists = isinstance(responses, list) and isinstance(scores, list)
    if not both_lists or len(responses) != len(scores) or len(scores) < 2:
        expected = "expected two lists of one length, at least 2"
        raise DataError(f"{where}: responses and scores: {expected}")
    if not all(isinstance(score, (int, float)) and score == score for score in scores):
        raise DataError(f"{where}: scores: expected numbers")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if best == worst:
        raise Dropped("candidates that all score the same")
    texts = tuple(_response(responses[i], where, f"responses[{i}]") for i in (best, worst))
    return Example(check_prompt(record["prompt"], where), texts, where)


# --------------------------------------------------------------------------------------------------
# The parts of a record


def check_prompt(value: object, where: str, field: str = "prompt") -> str | Messages:
    """Return a prompt: a string, or a message list that the assistant has yet to answer.

    Raises:
        DataError: it is neither, or not valid Unicode. The message names `where` and `field`.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {field}: not valid Unicode text") from None
        return value
    messages = _check_messages(value, where, field)
    if messages[-1]["role"] == "assistant":
        problem = "ends with the assistant's message, so there is nothing to answer"
        raise DataError(f"{where}: {field}: {problem}")
    return messages


def _check_messages(value: object, where: str, field: str) -> Messages:
    """Return a non-empty list of {"role": str, "content": str}, without any other keys."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field}: expected a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            expected = "expected a message with role and content as strings"
            raise DataError(f"{where}: {field}[{i}]: {expected}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _response(value: object, where: str, field: str) -> str:
    """Return the text of a response, which is a string or a list of one assistant message."""
    if isinstance(value, str):
        return value
    messages = _check_messages(value, where, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{where}: {field}: expected one assistant message")
    return messages[0]["content"]


def _split_messages(value: object, where: str, field: str) -> tuple[Messages, str]:
    """Split a message list into the prompt and the text of the assistant message at its end."""
    messages = _check_messages(value, where, field)
    if [message["role"] == "assistant" for message in messages[-2:]] != [False, True]:
        expected = "expected a prompt and then one assistant message at the end"
        raise DataError(f"{where}: {field}: {expected}")
    return messages[:-1], messages[-1]["content"]
