"""Kill real trainings at random moments, resume them, and compare with an unbroken run bit by bit.

    python bench/faults.py                      8 runs, on one and two ranks in turn, ten minutes
    python bench/faults.py --cases 3 --seed 7   fewer, at other moments
    python bench/faults.py --damage 10          also damage the newest checkpoint, ten times

SimPO and DPO with a cached reference take turns. Each run is hit up to three times; the same
command then resumes it. A hit is SIGKILL to a worker, SIGKILL to torchrun, or SIGTERM to torchrun,
as Slurm sends it. In the first case torchrun starts the workers again, and they resume. In the
second, the workers notice, save and leave. The run saves at every step, so that many hits fall into
a save.

After a hit that ended torchrun, `--damage` changes the newest checkpoint as DAMAGES lists it. The
same command must then be refused, must change nothing, and must offer the older checkpoint by its
path, from which the run goes on.

Weights and metrics must be identical in the end; anything else is an error.
"""

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = {"tokens_per_second", "pairs_per_second", "peak_memory_gib", "mfu"}
FAULTS = ("worker SIGKILL", "launcher SIGKILL", "launcher SIGTERM")
STEPS = 20
WAYS = {"simpo": [], "dpo": ["--reference=cached"]}  # objective → its flags


def start(
    out: Path,
    ranks: int,
    log: TextIO,
    objective: str = "dpo",
    resume: str = "auto",
    more: Sequence[str] = (),
) -> subprocess.Popen:
    """Start `torchrun train.py` on the toy, evaluated halfway. more: its last flags."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    launcher += ["--max-restarts=2", "--monitor-interval=0.1", "--standalone"]
    command = [*launcher, str(ROOT / "train.py"), *flags_of(out, objective, resume, more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"stdout": log, "stderr": log, "env": environment, "cwd": out.parent}
    return subprocess.Popen(command, **options, start_new_session=True)


def flags_of(
    out: Path, objective: str = "dpo", resume: str = "auto", more: Sequence[str] = ()
) -> list[str]:
    """Return the flags of train.py in a run that `start` starts."""
    flags = [f"--objective={objective}", *WAYS[objective], f"--max-steps={STEPS}", "--device=cpu"]
    flags += ["--save-every=1", "--eval-every=10", f"--out={out}", f"--resume={resume}"]
    return [*flags, *more]


def workers(launcher: int) -> list[int]:
    """Return the ids of the processes that torchrun has started and that still live."""
    command = ["ps", "-o", "pid=", "--ppid", str(launcher)]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def status_within(process: int, seconds: float) -> int | None:
    """Return the exit status of a child, negative for a signal; None if it takes longer."""
    deadline = time.time() + seconds
    while time.time() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def strike(run: subprocess.Popen, fault: str, rng: random.Random) -> None:
    """Send the signal of a fault to the launcher or to a random worker."""
    target, name = fault.split()
    pid = run.pid if target == "launcher" else rng.choice(workers(run.pid) or [run.pid])
    try:
        os.kill(pid, getattr(signal, name))
    except ProcessLookupError:
        pass  # it ended just before


def saved(out: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(p for p in out.glob("checkpoints/step-*") if p.name[5:].isdigit())


def saved_steps(out: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 without one."""
    return int(saved(out)[-1].name[5:]) if saved(out) else 0


def results(out: Path) -> tuple[bytes, list[dict]]:
    """Return the trained weights, and the metrics without speed and memory."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = (out / "model" / "model.safetensors").read_bytes()
    return weights, [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


# --------------------------------------------------------------------------------------------------
# Damage


def flip_bit(file: Path, rng: random.Random, kind: str = "") -> None:
    """Flip a bit of a file; with `kind`, of a tensor in it whose name starts so."""
    data = bytearray(file.read_bytes())
    first, end = 0, len(data)
    if kind:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        name = rng.choice([name for name in header if name.startswith(kind)])
        first, end = (start + offset for offset in header[name]["data_offsets"])
    data[rng.randrange(first, end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(file: Path, rng: random.Random) -> None:
    """Cut a file at a random byte."""
    os.truncate(file, rng.randrange(file.stat().st_size))


# What to do to the newest checkpoint, given one of its shards and the folder of the older one.
DAMAGES: dict[str, Callable[[Path, Path, random.Random], object]] = {
    "a missing shard": lambda shard, older, rng: shard.unlink(),
    "a shard of another step": lambda shard, older, rng: shutil.copy(older / shard.name, shard),
    "a flipped bit in a weight": lambda shard, older, rng: flip_bit(shard, rng, "model."),
    "a flipped bit in a moment": lambda shard, older, rng: flip_bit(shard, rng, "optimizer."),
    "state.json of another step": lambda shard, older, rng: shutil.copy(
        older / "state.json", shard.parent
    ),
    "a flipped bit in state.json": lambda shard, older, rng: flip_bit(
        shard.with_name("state.json"), rng
    ),
    "a cut shard": lambda shard, older, rng: cut(shard, rng),
    "an extra shard": lambda shard, older, rng: shutil.copy(
        older / shard.name, shard.with_name("shard-00009-model-00001-of-00001.safetensors")
    ),
    "metrics of another step": lambda shard, older, rng: shutil.copy(
        older / "metrics.jsonl", shard.parent
    ),
    "no metrics": lambda shard, older, rng: shard.with_name("metrics.jsonl").unlink(),
}


def damage(out: Path, kind: str, rng: random.Random) -> Path:
    """Damage the newest checkpoint; return the older one, which stays whole."""
    older, newest = saved(out)[-2:]
    DAMAGES[kind](rng.choice(sorted(newest.glob("*.safetensors"))), older, rng)
    return older


def contents(out: Path) -> dict[Path, bytes]:
    """Return every file of a run."""
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def wait_for_workers(out: Path) -> None:
    """Wait until no worker holds the run's lock: they outlive a torchrun that was killed."""
    with open(out / "metrics.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def refused(out: Path, ranks: int, objective: str, kind: str, rng: random.Random) -> str:
    """Damage the newest checkpoint; check that it is refused, and return the one that is offered.

    Exits with status 1 if the run starts all the same, changes a file or does not offer the older
    checkpoint.
    """
    older, log = damage(out, kind, rng), out.with_suffix(".refused")
    before = contents(out)
    with open(log, "w") as file:
        status = start(out, ranks, file, objective).wait()
    offered = f"{older.name} is whole: pass --resume {older}" in log.read_text()
    if not status or not offered or contents(out) != before:
        raise SystemExit(f"{out}: {kind}: status {status}, offered: {offered}; see {log}")
    return str(older)


# --------------------------------------------------------------------------------------------------
# The campaign


def one_case(
    out: Path,
    ranks: int,
    objective: str,
    seconds: float,
    rng: random.Random,
    seen: Counter,
    damages: list[str],
    hits: int = 3,
) -> None:
    """Start a run and hit it at a random moment, at most `hits` times; then let it finish.

    seconds: how long an unbroken run takes. seen: counts what happened. damages: what to do to the
    newest checkpoint; one of them is taken where two checkpoints are left, at most one in this run.
    """
    deadline, resume, damaged = time.time() + 60 * seconds, "auto", not damages
    made = 0  # when the damaged checkpoint was made, which the resumed run deletes
    with open(out.with_suffix(".log"), "a") as log:
        while True:
            run = start(out, ranks, log, objective, resume)
            if hits:
                # torchrun would start the workers again with the same --resume PATH
                faults = FAULTS if resume == "auto" else FAULTS[1:]
                fault, in_start_up = rng.choice(faults), rng.random() < 0.2
                first, last = saved_steps(out), STEPS - 1
                step = rng.randrange(first + 1, STEPS) if first < last else last
                while run.poll() is None and not in_start_up and saved_steps(out) < step:
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
            if made not in [path.stat().st_mtime_ns for path in saved(out)]:
                resume = "auto"
            if not damaged and len(saved(out)) > 1:
                wait_for_workers(out)
                if damaged := not (out / "model").exists():
                    resume = refused(out, ranks, objective, kind := damages.pop(0), rng)
                    made = saved(out)[-1].stat().st_mtime_ns
                    seen[f"refused: {kind}"] += 1


def campaign(cases: list[tuple[int, str]], seed: int, folder: Path, damages: list[str]) -> Counter:
    """Run a case for each (ranks, objective), and compare it with an unbroken run.

    Returns how often each thing happened. Exits with status 1 at the first difference.
    """
    rng, seen, unbroken = random.Random(seed), Counter(), {}
    for ranks, objective in sorted(set(cases)):
        out, began = folder / f"unbroken-{objective}-{ranks}", time.time()
        one_case(out, ranks, objective, 60, rng, seen, [], hits=0)
        unbroken[ranks, objective] = time.time() - began, *results(out)
        print(f"unbroken {objective} on {ranks}: {time.time() - began:.0f} s", flush=True)
    for case, (ranks, objective) in enumerate(cases):
        seconds, weights, rows = unbroken[ranks, objective]
        out = folder / f"case-{case}"
        one_case(out, ranks, objective, seconds, rng, seen, damages)
        same_weights, same_rows = (a == b for a, b in zip(results(out), (weights, rows)))
        resumed = out.with_suffix(".log").read_text().count("resumed from")
        seen["resumed"] += resumed
        verdicts = (
            f"weights {'identical' if same_weights else 'DIFFER'}, "
            f"metrics {'identical' if same_rows else 'DIFFER'}"
        )
        on = f"{objective} on {ranks} rank{'s' * (ranks > 1)}"
        print(f"case {case}, {on}, resumed {resumed} times: {verdicts}", flush=True)
        if not (same_weights and same_rows):
            raise SystemExit(f"case {case} of seed {seed} differs from the unbroken run: {out}")
        shutil.rmtree(out)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", type=int, default=8, help="runs that are hit (default: 8)")
    add("--seed", type=int, default=0, help="of the moments and the faults (default: 0)")
    add("--damage", type=int, default=0, help="checkpoints to damage, one per run (default: 0)")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    cases = [(1 + case % 2, list(WAYS)[case // 2 % 2]) for case in range(flags.cases)]
    damages = [list(DAMAGES)[i % len(DAMAGES)] for i in range(flags.damage)]
    seen = campaign(cases, flags.seed, folder, damages)
    hits = sum(seen[fault] for fault in FAULTS)
    counts = ", ".join(f"{n} × {what}" for what, n in seen.items())
    print(f"{flags.cases} runs, each bit-identical to the unbroken one; {hits} hits: {counts}")
    if damages:
        raise SystemExit(f"not damaged, because no run had two checkpoints: {', '.join(damages)}")


if __name__ == "__main__":
    main()
