"""Time to save a checkpoint and to resume from it, with digests and without, in turns.

    python bench/resuming.py --model DIR --data FILE            five rounds
    python bench/resuming.py --rounds 1                         the toy, to see that it works

Each round saves a checkpoint in two runs of one step, and resumes it in two runs of one more step;
one of the two writes and checks no digests. Before each, the files of model and checkpoint are
dropped from the page cache, so that they are read from the disk. Times are wall clock seconds: of
the save alone, and from the start of the process to the end of the first resumed step. A run ends
there. Compare the ratios of one round, since other work on the machine meets both sides alike.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Runs train.py up to the first save, or from there to the end of the next step; prints the seconds.
SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
from runtime import resume, run
if not {digests}:
    class Blank:
        def update(self, data): pass
        def hexdigest(self): return ""
    init = resume._DigestedFile.__init__
    def without(self, path):
        init(self, path)
        self.sha = Blank()
    resume._DigestedFile.__init__ = without
    resume.digests = lambda files, known=None: {{
        path.name: {{"sha256": "", "stat": []}} for path in files
    }}
    read_state = resume._read_state
    def blank(path):
        state = read_state(path)
        for entry in state["files"].values():
            entry["sha256"] = ""
        return state
    resume._read_state = blank
save, log_step = resume.save_checkpoint, run.Run.log_step
def end(seconds):
    print(seconds, flush=True)
    os._exit(0)
def timed(*args):
    began = time.perf_counter()
    save(*args)
    end(time.perf_counter() - began)
def mark(self, step, *args):
    log_step(self, step, *args)
    if step:
        end(time.time() - {began})
resume.save_checkpoint, run.Run.log_step = timed, mark
train.main()
"""


def drop_from_cache(*folders: Path) -> None:
    """Drop every file of the folders from the page cache."""
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(flags: list[str], digests: bool) -> float:
    """Run train.py on one rank; return the seconds of its save, or up to its first resumed step."""
    script = SCRIPT.format(root=str(ROOT), digests=digests, began=time.time())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "toy" / "checkpoint", help="default: the toy's")
    add("--data", default=ROOT / "toy" / "heldout.jsonl", help="default: the toy's")
    add("--rounds", type=int, default=5)
    add("--folder", type=Path, help="where to save; default: a temporary folder")
    flags = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="resuming-", dir=flags.folder))
    common = [f"--model={flags.model}", f"--data={flags.data}", "--device=cpu", "--dtype=fp32"]
    common += ["--batch-size=1", "--max-length=256", "--max-steps=2", "--save-every=1"]
    rows = []
    for index in range(flags.rounds):
        row = {}
        for digests in (True, False) if index % 2 else (False, True):
            out = work / f"{'with' if digests else 'without'}"
            shutil.rmtree(out, ignore_errors=True)
            drop_from_cache(flags.model)
            saved = run([*common, f"--out={out}"], digests)
            size = sum(path.stat().st_size for path in out.rglob("step-*/*"))
            drop_from_cache(flags.model, out)
            resumed = run([*common, f"--out={out}"], digests)
            row[digests] = saved, resumed
        rows.append(row)
        ratios = " ".join(f"{a / b:.3f}" for a, b in zip(row[True], row[False]))
        seconds = (f"{a:.2f} and {b:.2f} s" for a, b in (row[True], row[False]))
        line = "save and resume with digests {}, without {}: ratios {}".format(*seconds, ratios)
        print(f"round {index}: {line}", flush=True)
    print(f"{size / 1e9:.2f} GB, {flags.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for what, i in (("save", 0), ("start to the first resumed step", 1)):
        both = [[row[digests][i] for row in rows] for digests in (True, False)]
        seconds = " and ".join(f"{statistics.median(times):.2f} s" for times in both)
        ratio = statistics.median(a / b for a, b in zip(*both))
        print(f"{what}: {seconds} with digests and without; ratio {ratio:.3f}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
