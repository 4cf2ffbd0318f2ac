"""Kill real trainings at random moments, let the same command go on, and hold what comes out to the unbroken run, bit by bit.

    python bench/faults.py                        8 runs, on one and two processes in turn; about ten minutes
    python bench/faults.py --cases 3 --seed 7     fewer, other moments

Each run is hit three times before it may finish: SIGKILL to a worker (torchrun starts the workers again, and they
resume by themselves), SIGKILL to torchrun (its workers notice, save and leave), or SIGTERM to torchrun (as Slurm does). It
saves at every step, so that many a blow falls into a save.
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

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = {"tokens_per_second", "pairs_per_second", "peak_memory_gib", "mfu"}
FAULTS = ("worker SIGKILL", "launcher SIGKILL", "launcher SIGTERM")


def start(out: Path, processes: int, log) -> subprocess.Popen:
    """`torchrun train.py` on the toy: DPO with a cached reference, 20 steps, evaluation in between."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", "2"]
    command += ["--monitor-interval", "0.1", "--standalone", str(ROOT / "train.py"), "--objective", "dpo", "--out", str(out)]
    command += ["--reference", "cached", "--max-steps", "20", "--save-every", "1", "--eval-every", "10", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=out.parent, start_new_session=True)


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started, while they live."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def strike(run: subprocess.Popen, fault: str, rng: random.Random) -> None:
    who, name = fault.split()
    target = run.pid if who == "launcher" else rng.choice(workers(run.pid) or [run.pid])
    try:
        os.kill(target, getattr(signal, name))
    except ProcessLookupError:
        pass  # it was quicker


def saved(out: Path) -> int:
    """The step of the newest whole checkpoint."""
    return max((int(path.name[5:]) for path in out.glob("checkpoints/step-*") if path.name[5:].isdigit()), default=0)


def results(out: Path) -> tuple[bytes, list[dict]]:
    """The trained weights, and the metrics without what a clock or the machine says."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = (out / "model" / "model.safetensors").read_bytes()
    return weights, [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def one_case(out: Path, processes: int, seconds: float, rng: random.Random, seen: Counter, hits: int = 3) -> None:
    """Start, strike at a random moment, start again …, then let it finish. seconds: what a whole run takes."""
    deadline = time.time() + 40 * seconds
    with open(out.with_suffix(".log"), "a") as log:
        while True:
            run = start(out, processes, log)
            if hits:
                fault = rng.choice(FAULTS)
                start_up, step = rng.random() < 0.2, rng.randrange(saved(out) + 1, 20) if saved(out) < 19 else 19
                while run.poll() is None and not start_up and saved(out) < step:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.3 * seconds if start_up else 0.2))
                if run.poll() is None:
                    seen["during a save"] += any(out.glob("checkpoints/*.incomplete"))
                    strike(run, fault, rng)
                    seen[fault] += 1
                    hits -= 1
            run.wait()
            if (out / "model").exists():
                return
            if time.time() > deadline:
                raise SystemExit(f"{out}: does not come to an end; see {log.name}")


def campaign(cases: list[int], seed: int, folder: Path) -> Counter:
    """A case per number of processes in `cases`, which must end like the unbroken run on as many. How often what befell."""
    rng, seen, unbroken = random.Random(seed), Counter(), {}
    for processes in sorted(set(cases)):
        out, began = folder / f"unbroken-{processes}", time.time()
        one_case(out, processes, 60, rng, seen, hits=0)
        unbroken[processes] = time.time() - began, *results(out)
        print(f"unbroken on {processes}: {unbroken[processes][0]:.0f} s", flush=True)
    for case, processes in enumerate(cases):
        seconds, weights, rows = unbroken[processes]
        out = folder / f"case-{case}"
        one_case(out, processes, seconds, rng, seen)
        same_weights, same_rows = (a == b for a, b in zip(results(out), (weights, rows)))
        resumed = out.with_suffix(".log").read_text().count("resumed from")
        seen["resumed"] += resumed
        print(f"case {case}, {processes} processes, resumed {resumed} times: "
              f"weights {'identical' if same_weights else 'DIFFER'}, metrics {'identical' if same_rows else 'DIFFER'}", flush=True)  # fmt: skip
        if not (same_weights and same_rows):
            raise SystemExit(f"case {case} of seed {seed} is not the unbroken run: {out}")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=8, help="runs that are struck (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the faults (default: 0)")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    seen = campaign([1 + case % 2 for case in range(flags.cases)], flags.seed, folder)
    print(f"{flags.cases} runs, every one bit-identical to the unbroken one: " + ", ".join(f"{n} × {what}" for what, n in seen.items()))


if __name__ == "__main__":
    main()
