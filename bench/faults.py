"""Kill real trainings at random moments, resume them, and compare with an unbroken run bit by bit.

    python bench/faults.py                      8 runs, on one and two ranks in turn, ten minutes
    python bench/faults.py --cases 3 --seed 7   fewer, at other moments

Each run is hit up to three times; the same command then resumes it. A hit is SIGKILL to a worker,
SIGKILL to torchrun, or SIGTERM to torchrun, as Slurm sends it. In the first case torchrun starts
the workers again, and they resume. In the second, the workers notice, save and leave. The run saves
at every step, so that many hits fall into a save.

Weights and metrics must be identical in the end; anything else is an error.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = {"tokens_per_second", "pairs_per_second", "peak_memory_gib", "mfu"}
FAULTS = ("worker SIGKILL", "launcher SIGKILL", "launcher SIGTERM")
STEPS = 20


def start(out: Path, ranks: int, log: TextIO) -> subprocess.Popen:
    """Start `torchrun train.py` on the toy: DPO with a cached reference, evaluated halfway."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += ["--max-restarts=2", "--monitor-interval=0.1", "--standalone"]
    command = [str(ROOT / "train.py"), "--objective=dpo", "--reference=cached", f"--out={out}"]
    command += [f"--max-steps={STEPS}", "--save-every=1", "--eval-every=10", "--device=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": log, "stderr": log, "env": environment, "cwd": out.parent}
    return subprocess.Popen([*launcher, *command], **options, start_new_session=True)


def workers(launcher: int) -> list[int]:
    """Return the ids of the processes that torchrun has started and that still live."""
    command = ["ps", "-o", "pid=", "--ppid", str(launcher)]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def strike(run: subprocess.Popen, fault: str, rng: random.Random) -> None:
    """Send the signal of a fault to the launcher or to a random worker."""
    target, name = fault.split()
    pid = run.pid if target == "launcher" else rng.choice(workers(run.pid) or [run.pid])
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        pass  # it ended just before


def saved(out: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 without one."""
    names = (path.name[5:] for path in out.glob("checkpoints/step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def results(out: Path) -> tuple[bytes, list[dict]]:
    """Return the trained weights, and the metrics without speed and memory."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = (out / "model" / "model.safetensors").read_bytes()
    return weights, [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def one_case(
    out: Path, ranks: int, seconds: float, rng: random.Random, seen: Counter, hits: int = 3
) -> None:
    """Start a run and hit it at a random moment, at most `hits` times; then let it finish.

    seconds: how long an unbroken run takes. seen: counts what happened.
    """
    deadline = time.time() + 40 * seconds
    with open(out.with_suffix(".log"), "a") as log:
        while True:
            run = start(out, ranks, log)
            if hits:
                fault, in_start_up = rng.choice(FAULTS), rng.random() < 0.2
                last = STEPS - 1
                step = rng.randrange(saved(out) + 1, STEPS) if saved(out) < last else last
                while run.poll() is None and not in_start_up and saved(out) < step:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.3 * seconds if in_start_up else 0.2))
                if run.poll() is None:
                    seen["during a save"] += any(out.glob("checkpoints/*.incomplete"))
                    strike(run, fault, rng)
                    seen[fault] += 1
                    hits -= 1
            run.wait()
            if (out / "model").exists():
                return
            if time.time() > deadline:
                raise SystemExit(f"{out}: does not finish; see {log.name}")


def campaign(cases: list[int], seed: int, folder: Path) -> Counter:
    """Run a case on each number of ranks in `cases`, and compare it with an unbroken run.

    Returns how often each thing happened. Exits with status 1 at the first difference.
    """
    rng, seen, unbroken = random.Random(seed), Counter(), {}
    for ranks in sorted(set(cases)):
        out, began = folder / f"unbroken-{ranks}", time.time()
        one_case(out, ranks, 60, rng, seen, hits=0)
        unbroken[ranks] = time.time() - began, *results(out)
        print(f"unbroken on {ranks}: {unbroken[ranks][0]:.0f} s", flush=True)
    for case, ranks in enumerate(cases):
        seconds, weights, rows = unbroken[ranks]
        out = folder / f"case-{case}"
        one_case(out, ranks, seconds, rng, seen)
        same_weights, same_rows = (a == b for a, b in zip(results(out), (weights, rows)))
        resumed = out.with_suffix(".log").read_text().count("resumed from")
        seen["resumed"] += resumed
        verdicts = (
            f"weights {'identical' if same_weights else 'DIFFER'}, "
            f"metrics {'identical' if same_rows else 'DIFFER'}"
        )
        on = f"{ranks} rank{'s' * (ranks > 1)}"
        print(f"case {case}, {on}, resumed {resumed} times: {verdicts}", flush=True)
        if not (same_weights and same_rows):
            raise SystemExit(f"case {case} of seed {seed} differs from the unbroken run: {out}")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", type=int, default=8, help="runs that are hit (default: 8)")
    add("--seed", type=int, default=0, help="of the moments and the faults (default: 0)")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    seen = campaign([1 + case % 2 for case in range(flags.cases)], flags.seed, folder)
    counts = ", ".join(f"{n} × {what}" for what, n in seen.items())
    print(f"{flags.cases} runs, each bit-identical to the unbroken one: {counts}")


if __name__ == "__main__":
    main()
