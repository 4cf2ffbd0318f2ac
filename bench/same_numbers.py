"""Compare this working tree with an earlier commit, bit by bit: metrics and weights on the toy.

    python bench/same_numbers.py 92e5cb8          about seven minutes on two cores

Both trees train on the earlier tree's toy: every objective below on one rank, some on two, and each
also stopped by SIGTERM and resumed by this tree. Compares metrics.jsonl, without speed and memory,
and model.safetensors. Exits with status 1 if anything differs.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = {"tokens_per_second", "pairs_per_second", "peak_memory_gib", "mfu"}
RUNS = {
    "simpo": ["--objective=simpo"],
    "simpo, sft": ["--objective=simpo", "--sft-weight=0.3"],
    "dpo, online": ["--objective=dpo", "--reference=online"],
    "dpo, cached": ["--objective=dpo", "--reference=cached"],
    "kto": ["--objective=kto"],
    "ipo": ["--objective=ipo"],
    "orpo": ["--objective=orpo"],
    "sft": ["--objective=sft"],
}
ON_TWO_RANKS = ("simpo", "dpo, cached")
RESUME_ME = 75


def command(tree: Path, toy: Path, out: Path, flags: list[str], ranks: int) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    objective = flags[0].partition("=")[2]
    pairs = [
        f"--model={toy}/checkpoint",
        f"--data={toy}/train.jsonl",
        f"--eval-data={toy}/heldout.jsonl",
    ]
    return [
        *launcher, tree / "train.py", f"--config={toy}/{objective}.toml", *pairs, *flags,
        "--max-steps=8", "--eval-every=3", "--save-every=2", "--device=cpu", f"--out={out}",
    ]  # fmt: skip


def run(words: list, out: Path, stop_after: int | None = None) -> int:
    """Run a training; with `stop_after`, send SIGTERM once that step's checkpoint is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=out.parent)
        while stop_after and process.poll() is None:
            if (out / "checkpoints" / f"step-{stop_after:06d}").exists():
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        return process.wait()


def results(out: Path) -> tuple[list[dict], bytes]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = (out / "model" / "model.safetensors").read_bytes()
    return [{key: v for key, v in row.items() if key not in TIMINGS} for row in rows], weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="same-numbers-"))
    archive = subprocess.run(
        ["git", "archive", flags.commit], cwd=ROOT, capture_output=True, check=True
    ).stdout
    tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder / "earlier", filter="data")
    toy, different = folder / "earlier" / "toy", 0
    cases = [(name, 1) for name in RUNS] + [(name, 2) for name in ON_TWO_RANKS]
    cases = [(name, ranks) for name, ranks in cases if flags.only in f"{name} on {ranks}"]
    for name, ranks in cases:
        outs = {way: folder / way / f"{name} on {ranks}" for way in ("before", "now", "resumed")}
        for way, tree in (("before", folder / "earlier"), ("now", ROOT)):
            run(command(tree, toy, outs[way], RUNS[name], ranks), outs[way])
            if not (outs[way] / "model").exists():  # a worker may abort after its run is complete
                sys.exit(f"{name}, {ranks} ranks, {way}: failed; see {outs[way]}.log")
        words = command(ROOT, toy, outs["resumed"], RUNS[name], ranks)
        status = run(words, outs["resumed"], stop_after=4)
        stopped = len(list(outs["resumed"].glob("checkpoints/step-*")))
        early = (outs["resumed"] / "model").exists()
        run(words, outs["resumed"])
        if early or not stopped or not (outs["resumed"] / "model").exists():
            sys.exit(f"{name}, {ranks} ranks: was not stopped and resumed (status {status})")
        rows, weights = results(outs["before"])
        verdicts = []
        for way in ("now", "resumed"):
            same = results(outs[way]) == (rows, weights)
            different += not same
            verdicts.append(f"{way}: {'identical' if same else 'DIFFERENT'}")
        print(
            f"{name:12} {ranks} rank{'s' * (ranks > 1):1}  {len(rows)} rows  {', '.join(verdicts)}",
            flush=True,
        )
    print(f"{2 * len(cases) - different} of {2 * len(cases)} identical to {flags.commit}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
