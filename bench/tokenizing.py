"""Measure how many pairs per second are read and tokenized, beside the tokenizers library alone.

    python bench/tokenizing.py --model DIR --data FILE

The first number covers all that `runtime.inputs.load_pairs` does on one rank, from the file to the
pairs. The second covers `encode_batch_fast(…)` and `.ids` alone, on the texts that the first one
came to. Both are the best of `--repeats` alternating runs. The library uses every core unless
RAYON_NUM_THREADS says otherwise.
"""

import argparse
import os
import platform
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import tokenizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import Example, Pair, encode
from formats.records import read_records
from formats.schemas import Dropped, parse_record
from formats.tokenizer import Tokenizer

BATCH, MAX_LENGTH, MAX_PROMPT_LENGTH = 256, 2048, 1800  # as in train.py


def read_examples(name: str) -> list[Example]:
    """Return all usable records of a data set as examples."""
    examples = []
    for where, record in read_records(name):
        try:
            examples.append(parse_record(record, where)[1])
        except Dropped:
            pass
    return examples


def batches_of(examples: list[Example]) -> list[list[Example]]:
    return [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]


def ours(name: str, tokenizer: Tokenizer) -> list[Pair]:
    """Go from the file to the pairs."""
    lengths, counts = (MAX_LENGTH, MAX_PROMPT_LENGTH), Counter()
    groups = [
        encode(batch, tokenizer, *lengths, counts) for batch in batches_of(read_examples(name))
    ]
    return [pair for group in groups for pair in group]


def library(batches: list[list[str]], folder: Path) -> list[list[int]]:
    """Encode the texts with the library alone, in this process."""
    encode_batch = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch_fast
    return [e.ids for batch in batches for e in encode_batch(batch, add_special_tokens=False)]


def texts(name: str, tokenizer: Tokenizer) -> list[list[str]]:
    """Return what `data.encode` gives to the library, in batches of the same pairs."""
    batches = []
    for batch in batches_of(read_examples(name)):
        rendered = tokenizer.texts(batch)
        responses = [response for _, responses in rendered for response in responses]
        batches += [responses, [prompt for prompt, _ in rendered]]
    return batches


def cpu() -> str:
    """Return the name of the processor."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = "checkpoint, for its tokenizer and chat template"
    add("--model", type=Path, required=True, metavar="DIR", help=model)
    add("--data", required=True, metavar="FILE", help="pairs, in any format that train.py reads")
    repeats = "runs of each; the fastest counts (default: 5)"
    add("--repeats", type=int, default=5, metavar="N", help=repeats)
    flags = parser.parse_args()
    tokenizer = Tokenizer(flags.model)
    batches = texts(flags.data, tokenizer)
    works = {
        "file to pairs": lambda: ours(flags.data, tokenizer),
        "library alone": lambda: library(batches, flags.model),
    }
    best = dict.fromkeys(works, float("inf"))
    for _ in range(flags.repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    pairs = ours(flags.data, tokenizer)
    versions = f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}"
    print(f"{date.today()}, {cpu()}, {os.cpu_count()} cores, {versions}")
    mean = sum(pair.tokens for pair in pairs) / len(pairs)
    print(f"{len(pairs)} pairs, {mean:.0f} tokens on average")
    for name, seconds in best.items():
        share = best["library alone"] / seconds
        print(f"{name}  {len(pairs) / seconds:8.0f} pairs/s  {share:6.0%}")


if __name__ == "__main__":
    main()
