"""Measure what it takes to read and tokenize a large data set, on one rank and on several.

    python bench/scale.py --model DIR --records 20000 --tokens 80 --ranks 1 2

Writes made-up pairs, reads them with `runtime.inputs.open_pairs` on each number of ranks, keeps
them in a folder and opens them again, as a restart does. Prints a table: CPU seconds of the busiest
rank by phase, which other programs on this machine change less than the time on the clock, and the
most memory of a rank. Seconds of a phase include those of the limited processes that a rank starts.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import wraps
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenizing import cpu

WORDS = (ROOT / "README.md").read_text().split()
PHASES = ("read + parse", "render", "tokenize", "exchange", "digest", "keep", "restart")


def write_pairs(path: Path, count: int, tokens: int) -> None:
    """Write pairs of about `tokens` tokens, prompt and both responses: a fifth, two and two."""
    rng, words = random.Random(0), tokens * 0.38  # README.md has 2.6 tokens a word

    def text(mean: float) -> str:
        size = max(1, round(mean * rng.lognormvariate(-0.125, 0.5)))
        start = rng.randrange(len(WORDS))
        return " ".join((WORDS[start:] + WORDS * (size // len(WORDS) + 1))[:size])

    with open(path, "w") as file:
        for i in range(count):
            chosen, rejected = (text(0.4 * words) for _ in range(2))
            record = {"prompt": text(0.2 * words), "chosen": chosen, "rejected": f"{i} {rejected}"}
            file.write(json.dumps(record) + "\n")


def peak_mib() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def worker(model: Path, data: Path, out: Path) -> None:
    """Measure this rank; print one line of JSON."""
    import torch.distributed as dist

    from formats import sandbox
    from formats.tokenizer import Tokenizer
    from runtime import inputs, processes, tokens
    from runtime.settings import Settings

    seconds = dict.fromkeys(PHASES, 0.0)

    def child_seconds() -> float:
        """Return the CPU time of the tokenizer's and the template's processes."""
        total = 0.0
        for child in (sandbox.TEMPLATES.child, sandbox.TOKENIZERS.child):
            if child:
                fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return total

    def timed(phase: str, function):
        @wraps(function)
        def measured(*args, **options):
            start, child = time.process_time(), child_seconds()
            result = function(*args, **options)
            seconds[phase] += time.process_time() - start + child_seconds() - child
            return result

        return measured

    def timed_blocks(real):
        def blocks(*args):
            source = real(*args)
            following = timed("read + parse", lambda: next(source, None))
            while block := following():
                yield block

        return blocks

    settings = Settings(model=str(model), data=str(data), out=str(out), device="cpu")
    processes.start_ranks(settings)
    tokenizer, before = Tokenizer(model), peak_mib()
    inputs.read_blocks = timed_blocks(inputs.read_blocks)
    tokenizer.texts = timed("render", tokenizer.texts)
    tokenizer.backend.encode = timed("tokenize", tokenizer.backend.encode)
    inputs.broadcast = timed("exchange", inputs.broadcast)
    dist.all_gather_object = timed("exchange", dist.all_gather_object)
    start, cpu = time.perf_counter(), time.process_time() + child_seconds()
    found, key = inputs.open_pairs("data", tokenizer, settings)
    seconds["clock"] = time.perf_counter() - start
    seconds["all of it"] = time.process_time() + child_seconds() - cpu
    peak, exchange = peak_mib(), seconds["exchange"]
    timed("digest", lambda: found.pairs.digest)()
    if dist.get_rank() == 0:
        timed("keep", lambda: tokens.save(out, "data", key, found))()
    dist.barrier()
    timed("restart", lambda: inputs.open_pairs("data", tokenizer, settings))()
    arrays = found.pairs.tokens, found.pairs.lengths, found.pairs.where
    row = seconds | {"exchange": exchange, "memory of a rank, MiB": peak}
    row |= {"of that before reading, MiB": before}
    row["pairs in memory, MiB"] = sum(array.nbytes for array in arrays) / 2**20
    row["tokens a pair"] = float(found.pairs.lengths.sum() / len(found.pairs))
    print(f"\nROW{json.dumps(row)}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ:
        return worker(*map(Path, sys.argv[1:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint, for its tokenizer")
    add("--records", type=int, default=20000, metavar="N")
    add("--tokens", type=int, default=80, metavar="N", help="of a pair, about")
    add("--ranks", type=int, nargs="+", default=[1, 2], metavar="N")
    flags = parser.parse_args()
    columns = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.jsonl"
        write_pairs(data, flags.records, flags.tokens)
        for ranks in flags.ranks:
            (out := Path(folder) / f"out-{ranks}").mkdir()
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks]
            command += ["--standalone", __file__, flags.model, data, out]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
            words = list(map(str, command))
            done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
            rows = [json.loads(x[3:]) for x in done.stdout.splitlines() if x.startswith("ROW")]
            columns.append({name: max(row[name] for row in rows) for name in rows[0]})
        size = data.stat().st_size / 2**20
    print(f"{date.today()}, {cpu()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{flags.records:,} records of {size:,.0f} MiB\n")
    print(f"| | {' | '.join(f'{n} rank' + 's' * (n > 1) for n in flags.ranks)} |")
    print("|---" * (1 + len(columns)) + "|")
    for name in columns[0]:
        unit = "" if name.endswith("MiB") or name == "tokens a pair" else ", s"
        print(f"| {name}{unit} | {' | '.join(f'{column[name]:,.1f}' for column in columns)} |")


if __name__ == "__main__":
    main()
