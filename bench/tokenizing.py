"""How many pairs a second are read, parsed, rendered and tokenized, beside the tokenizers library alone on the same texts?

    python bench/tokenizing.py --model DIR --data FILE

The first number is all that `train.load_trees` does in one process, from the file to the trees; the second is
`encode_batch_fast(…)` and `.ids` on the very texts that the first one came to. Both take the best of `--repeats` runs, in
turns. The library uses every core unless RAYON_NUM_THREADS says otherwise.
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

from data import Dropped, Example, Tokenizer, Tree, parse_record, read_records  # noqa: E402

BATCH, MAX_LENGTH, MAX_PROMPT_LENGTH = 256, 2048, 1800  # as in train.py


def read_examples(name: str) -> list[Example]:
    examples = []
    for where, record in read_records(name):
        try:
            examples.append(parse_record(record, where)[1])
        except Dropped:
            pass
    return examples


def ours(name: str, tokenizer: Tokenizer) -> list[Tree]:
    examples, counts = read_examples(name), Counter()
    batches = (examples[i : i + BATCH] for i in range(0, len(examples), BATCH))
    return [tree for batch in batches for tree in tokenizer.encode(batch, MAX_LENGTH, MAX_PROMPT_LENGTH, counts)]


def library(batches: list[list[str]], tokenizer: Tokenizer) -> list[list[int]]:
    return [e.ids for batch in batches for e in tokenizer.backend.encode_batch_fast(batch, add_special_tokens=False)]


def texts(name: str, tokenizer: Tokenizer) -> list[list[str]]:
    """What `Tokenizer.encode` gives to the library, in batches of the same pairs."""
    examples, batches = read_examples(name), []
    for i in range(0, len(examples), BATCH):
        batch = examples[i : i + BATCH]
        pairs = tokenizer.texts(batch)
        batches += [[answer for _, answers in pairs for answer in answers], [prompt for prompt, _ in pairs]]
    return batches


def cpu() -> str:
    try:
        return next(line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="checkpoint: its tokenizer and chat template"
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="pairs, in any format that train.py reads")
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs of each, of which the fastest counts (default: 5)"
    )
    flags = parser.parse_args()
    tokenizer = Tokenizer(flags.model)
    batches = texts(flags.data, tokenizer)
    works = {"file to trees": lambda: ours(flags.data, tokenizer), "library alone": lambda: library(batches, tokenizer)}
    best = dict.fromkeys(works, float("inf"))
    for _ in range(flags.repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
    trees = ours(flags.data, tokenizer)
    print(
        f"{date.today()}, {cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, tokenizers {tokenizers.__version__}"
    )
    print(f"{len(trees)} pairs of {sum(map(len, trees)) / len(trees):.0f} tokens in the mean")
    for name, seconds in best.items():
        print(f"{name}  {len(trees) / seconds:8.0f} pairs/s  {best['library alone'] / seconds:6.0%}")


if __name__ == "__main__":
    main()
