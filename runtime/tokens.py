"""Hold the pairs of a run in a few flat arrays, and keep them in OUT/tokens for a restart.

Half a million pairs are several million Python objects, and tokenizing them takes minutes. `Pairs`
makes the objects of a pair only while it is used. OUT/tokens/data.safetensors and eval_data.*, for
`--eval-data`, hold the arrays and what was printed about them, so that a restart maps them into
memory and parses no data. They are safe to delete: what is missing, damaged or made of something
else is made again. `load_pairs` in runtime/inputs.py makes the arrays.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data import Pair
from formats.checkpoint import content_files
from formats.errors import printable
from formats.files import digests, stat_of
from formats.records import data_files
from formats.tokenizer import Tokenizer
from methods.objectives import OBJECTIVES
from runtime.processes import gather, print0
from runtime.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
ARRAYS = "tokens", "lengths", "where"
SHAPE_TOKENS = {"columns", "ignore_columns", "skip_unusable"}  # although a run may change them


class Pairs(Sequence[Pair]):
    """Holds pairs in flat arrays; an item is a `Pair` that views them.

    tokens: int32, pair after pair: the prompt, then each response.
    lengths: int32 [pairs, 3], of prompt and responses; 0 for a second response that is not there.
    where: bytes [pairs], the file and line of each.
    first: the `Pair.index` of the first pair.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, where: np.ndarray, first: int = 0):
        self.tokens, self.lengths, self.where, self.first = tokens, lengths, where, first
        sizes = lengths.sum(1, dtype=np.int64)
        self._starts = np.cumsum(sizes) - sizes

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i, parts = range(len(self))[i], []
        end = int(self._starts[i])
        for length in filter(None, self.lengths[i].tolist()):
            parts.append(self.tokens[end : end + length])
            end += length
        return Pair(parts[0], tuple(parts[1:]), os.fsdecode(self.where[i]), self.first + i)

    def none(self) -> "Pairs":
        """Return no pairs."""
        return Pairs(self.tokens[:0], self.lengths[:0], self.where[:0])

    @cached_property
    def digest(self) -> str:
        """Return the number of pairs, and a hash of all lengths and tokens in order."""
        return digest([(pair.prompt, *pair.responses) for pair in self])


def digest(items: Sequence[Sequence[np.ndarray]]) -> str:
    """Return the number of items, and a hash of their arrays in order."""
    sha = hashlib.sha256()
    for item in items:
        for array in item:
            sha.update(len(array).to_bytes(8, "little") + array.tobytes())
    return f"{len(items)} with sha256 {sha.hexdigest()[:16]}"


@dataclass
class Tokenized:
    """Holds the pairs of a data set, and what is to be said about them.

    counts: records read, cut and dropped.
    messages: what is printed about them.
    path: the file that they were mapped from, if they were.
    """

    pairs: Pairs
    counts: dict[str, int]
    messages: list[str]
    path: Path | None = None


# --------------------------------------------------------------------------------------------------
# OUT/tokens


@dataclass
class Key:
    """Says what the tokens of a data set are made of.

    sha256: of all that shapes them.
    stats: of the data files, before they were read.
    """

    sha256: str
    stats: dict[Path, list[int]]


def key_of(which: str, tokenizer: Tokenizer, settings: Settings) -> Key:
    """Digest data, tokenizer, template, settings, our own code and the packages that it uses.

    which: "data" or "eval_data".
    """
    stats = {path: stat_of(path) for path in data_files(getattr(settings, which))}
    companions = [p for p in content_files(tokenizer.folder) if p.suffix != ".safetensors"]
    code = [ROOT / "data.py", ROOT / "runtime/inputs.py", Path(__file__)]
    code += sorted((ROOT / "formats").glob("*.py"))
    versions = {}
    for name in ("tokenizers", "jinja2", "pyarrow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    ours = {f.name for f in fields(settings) if not f.metadata["may_change"]} - {"model"}
    responses = OBJECTIVES[settings.objective].responses
    content = [
        [which, tokenizer.template, tokenizer.date, versions, responses],
        {name: str(getattr(settings, name)) for name in sorted(ours | SHAPE_TOKENS)},
        [[str(path), *digests([path]).values()] for path in stats],
        [entry["sha256"] for entry in digests([*companions, *code]).values()],
    ]
    return Key(hashlib.sha256(json.dumps(content).encode()).hexdigest(), stats)


def find(which: str, key: Key, settings: Settings) -> Tokenized | None:
    """Map the tokens of this key from OUT, or from the run to resume, if every rank sees them.

    Call it on all ranks. What is damaged is no error: a warning says so.
    """
    folders = [Path(settings.out)] if settings.out else []
    if settings.resume not in ("auto", "never"):
        folders.append(Path(settings.resume).parent.parent)
    for folder in folders:
        path = folder / "tokens" / f"{which}.safetensors"
        found, problem = None, ""
        if path.exists():
            try:
                found = read(path, key)
            except (SafetensorError, OSError, ValueError, LookupError, TypeError) as e:
                problem = f"{e}" or type(e).__name__
        everywhere = gather((found is not None, problem))
        if all(usable for usable, _ in everywhere):
            return found
        if problem := next((problem for _, problem in everywhere if problem), ""):
            print0(printable(f"warning: {path} cannot be used, tokenizing again: {problem}"))
    return None


def read(path: Path, key: Key) -> Tokenized | None:
    """Map the tokens in a file; None if they have another key.

    Raises:
        SafetensorError, OSError, ValueError, LookupError, TypeError: they are not what was saved.
    """
    with safe_open(path, "pt") as file:  # unlike NumPy's, these arrays are maps of the file
        about = json.loads((file.metadata() or {})["about"])
        if about["key"] != key.sha256:
            return None
        tokens, lengths, where = (file.get_tensor(name).numpy() for name in ARRAYS)
    where = where.view(f"S{where.shape[1]}")[:, 0]
    if about.pop("sha256") != _sha256(about, lengths, where):
        raise ValueError("its bytes have changed")
    pairs = Pairs(tokens, lengths, where)
    if about["pairs"] != pairs.digest:
        raise ValueError("its tokens have changed")
    return Tokenized(pairs, about["counts"], about["messages"], path)


def save(out: Path, which: str, key: Key, tokenized: Tokenized) -> None:
    """Write the tokens of a data set to OUT, complete or not at all.

    A file that cannot be written costs no more than the next start: a warning says so.
    """
    path, pairs = out / "tokens" / f"{which}.safetensors", tokenized.pairs
    if path == tokenized.path:
        return
    about = {"key": key.sha256, "counts": tokenized.counts, "messages": tokenized.messages}
    about["pairs"] = pairs.digest
    about["sha256"] = _sha256(about, pairs.lengths, pairs.where)
    where = pairs.where.view(np.uint8).reshape(len(pairs), -1)
    arrays = dict(zip(ARRAYS, (pairs.tokens, pairs.lengths, where)))
    temporary = path.with_suffix(".incomplete")
    try:
        if any(stat_of(file) != stat for file, stat in key.stats.items()):
            return  # the data were changed while they were read
        path.parent.mkdir(exist_ok=True)
        save_file(arrays, temporary, {"about": json.dumps(about)})
        temporary.rename(path)
    except (OSError, SafetensorError) as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        print0(printable(f"warning: {path} is not kept, a restart will tokenize again: {e}"))


def _sha256(about: dict, *arrays: np.ndarray) -> str:
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for array in arrays:
        sha.update(array.tobytes())
    return sha.hexdigest()
