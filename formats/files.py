"""Read a stranger's files, and write ours so that they survive a crash.

`reading` turns whatever goes wrong while a file is read into one error that names it. `parse_json`
parses all JSON but tokenizer.json, which the tokenizers library reads; `dump_json` makes all JSON
that is written. `digests` says whether files are the same as before, whatever their path.
"""

import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.errors import InputError
from formats.progress import Progress


@contextmanager
def reading(
    path: Path | str,
    error: type[InputError],
    what: str = "cannot be read",
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn whatever goes wrong while reading `path` into one `error` that names the file.

    `path` may also be a place in a file, such as "pairs.jsonl:17". `also` lists exceptions of the
    library that reads the file; they need not derive from OSError or ValueError.
    """
    expected: tuple[type[Exception], ...]
    expected = (OSError, EOFError, ValueError, RecursionError, zlib.error, *also)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except expected as e:
        raise error(f"{path}: {what}: {e}") from None


def regular(path: Path) -> Path:
    """Return `path`. Raise OSError if it is, say, a pipe, on which a read may wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path


def parse_json(raw: bytes) -> object:
    """Parse UTF-8 JSON as Python does, but refuse what other readers would understand differently.

    A byte order mark is skipped, and NaN and Infinity are accepted.

    Raises:
        ValueError: not UTF-8 or not JSON. Also for a duplicate key, of which readers keep different
            values, and for half of a surrogate pair, which is not text.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(value := dict(pairs)) < len(pairs):
            name = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"duplicate key: {name}")
        return value

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except json.JSONDecodeError as e:  # it counts lines within `raw`, which may be one of many
        raise ValueError(f"{e.msg} at character {e.pos + 1}") from None
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def dump_json(value: object, **options) -> str:
    """Return JSON text; `options` are those of json.dumps.

    NaN and Infinity, which are no JSON, become null.
    """

    def finite(value: object) -> object:
        if isinstance(value, dict):
            return {key: finite(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), allow_nan=False, **options)


def read_json(path: Path, error: type[InputError], optional: bool = False) -> dict:
    """Read a JSON object. With `optional`, a missing file is an empty object.

    Raises:
        error: the file is missing, unreadable, not JSON or not an object. The message names it.
    """
    with reading(path, error, "cannot be read as JSON"):
        if optional and not path.exists():
            return {}
        value = parse_json(regular(path).read_bytes())
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object")
    return value


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stat_of(path: Path) -> list[int]:
    """Return size, times and inode of a file, which tell whether it was changed."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def digests(files: Iterable[Path], known: dict[str, dict] | None = None) -> dict[str, dict]:
    """Return {"sha256": hexadecimal digits, "stat": [...]} for each file, by name.

    A file whose name and stat (size, times, inode) are in `known` is not read again. SHA-256 takes
    0.5 s per GB on a CPU with instructions for it, twice as long as a CRC; unlike a CRC, it also
    tells apart files that were swapped on purpose, and `sha256sum` checks it.

    Raises:
        OSError: a file cannot be read.
    """
    found = {}
    for path in Progress("computing SHA-256 of files", files):
        stat = stat_of(path)
        entry = (known or {}).get(path.name, {})
        if entry.get("stat") != stat:
            with open(path, "rb") as file:
                entry = {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "stat": stat}
        found[path.name] = entry
    return found


def remove(path: Path) -> None:
    """Delete a folder; of a link, only the link.

    It is renamed first, so that a half-deleted folder never keeps its name.

    Raises:
        OSError: something in it cannot be deleted.
    """
    if path.is_symlink():
        path.unlink()
        return
    doomed = path
    if path.suffix != ".incomplete":
        doomed = path.with_name(path.name + ".incomplete")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
    shutil.rmtree(doomed)
