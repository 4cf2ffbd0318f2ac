"""Change one thing in the code at a time, and see which test fails.

    python bench/mutations.py --results runs/mutations.jsonl            what has no result yet
    python bench/mutations.py --results runs/mutations.jsonl --whole    survivors: all test files

Each mutation of bench/mutations.toml is a small slip that somebody could make: an off-by-one, a
wrong sign or dtype, an element that is skipped, a missing flush, another default, an edge. It is
applied in a copy of the tracked files. The test files named beside it run first, up to the first
failure; for a survivor with `--whole` all others follow. A test file that takes longer than
`--limit` seconds counts as failing. At the end, every failing test must pass without a mutation.

Results are appended to a file, so an interrupted command resumes. A result counts for as long as
the mutation is the same. The command keeps bench/MUTATIONS.md up to date, and exits with status 1
if a mutation survives without a reason. Each run is forked from a process that has imported torch,
so that a mutation costs little more than its tests.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# What takes seconds to import; none of it may be a module of this project.
SLOW = (
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.utils.checkpoint",
    "pytest",
)
SLOW += ("safetensors.torch", "tokenizers", "jinja2", "tqdm")


class Mutation(NamedTuple):
    """Holds a change of one place: `old` stands once in `file`; tests: nearest files, in order."""

    file: str
    old: str
    new: str
    tests: str  # "model train::test_x" is tests/test_model.py, then a test of tests/test_train.py
    survives: str = ""  # the reason why no test can, or need, fail

    @property
    def key(self) -> str:
        """Return a name that stays the same while the mutation does."""
        text = "\0".join((self.file, self.old, self.new))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


TABLE = tomllib.loads((ROOT / "bench" / "mutations.toml").read_text(encoding="utf-8"))
MUTATIONS = [Mutation(**row) for row in TABLE["mutation"]]


def copy_tree(folder: Path) -> Path:
    """Copy the tracked files; return the copy, which finds ../shared where this tree does."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, names.stdout.decode().split("\0")):
        (folder / "main" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "main" / name)
    if (shared := ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(shared.resolve())
    return folder / "main"


def mutated(mutation: Mutation, tree: Path = ROOT) -> str:
    """Return the file's text with the mutation. Exits with an error if it does not apply."""
    text = (tree / mutation.file).read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        sys.exit(f"error: {mutation.file}: stands {count} times, not once: {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def run_tests(tree: Path, targets: list[str], limit: float) -> str | None:
    """Run pytest in the tree up to the first failure; return what failed, None if all passed."""
    log = tree.parent / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout = sys.stderr = os.fdopen(output, "w")
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(tree)
        sys.dont_write_bytecode, sys.path[:] = (
            True,
            [p for p in sys.path if p != str(ROOT / "bench")],
        )
        import pytest

        status = 1
        try:
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *targets])
            sys.stdout.flush()
        finally:  # whatever happens, this copy of the process ends here
            os._exit(status)
    end = time.monotonic() + limit
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.1)
    if done == (0, 0):
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"{targets[0]}:  longer than {limit:.0f} s"
    if done[1] == 0:
        return None
    text = log.read_text(errors="replace")
    found = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", text, re.MULTILINE)
    return found[1] if found else f"{targets[0]}:  {text[-300:]}"


def target(name: str) -> str:
    file, colons, test = name.partition("::")
    return f"tests/test_{file}.py{colons}{test}"


def verdict(mutation: Mutation, tree: Path, targets: list[str], limit: float) -> str | None:
    """Return the test that kills a mutation in this tree, and leave the tree as it was."""
    path = tree / mutation.file
    original = path.read_text(encoding="utf-8")
    for one in targets:
        path.write_text(mutated(mutation, tree), encoding="utf-8")
        killed = run_tests(tree, [one], limit)
        path.write_text(original, encoding="utf-8")
        if killed:
            return killed
    return None


def read_results(path: Path) -> dict[str, dict]:
    """Return the newest result of every mutation, by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def campaign(results: Path, whole: bool, limit: float) -> Iterator[str]:
    """Try what has no result yet, and with `whole` survivors once more; yield a line for each."""
    for name in SLOW:
        importlib.import_module(name)
    every = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))
    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tree, known = copy_tree(Path(folder)), read_results(results)
        for number, mutation in enumerate(MUTATIONS, 1):
            old = known.get(mutation.key)
            if old and (old["killed"] or not whole or old["whole"]):
                continue
            names = mutation.tests.split()
            if whole:
                names = ([] if old else names) + [name for name in every if name not in names]
            killed = verdict(mutation, tree, list(map(target, names)), limit)
            result = {"key": mutation.key, "killed": killed, "whole": whole}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            place = f"{number}/{len(MUTATIONS)} {mutation.file}"
            yield f"{place}: {mutation.new}: {killed or 'SURVIVED'}"
        found = [result["killed"] or "" for result in read_results(results).values()]
        killers = {re.split(r":  |\[", killed)[0] for killed in found if killed}
        if failed := run_tests(tree, sorted(killers), 10 * limit):
            sys.exit(f"error: fails without any mutation: {failed}; delete its results")


def report(results: dict[str, dict]) -> str:
    """Return bench/MUTATIONS.md."""
    tried = [(m, results[m.key]) for m in MUTATIONS if m.key in results]
    lived = [m for m, result in tried if not result["killed"]]

    def cell(text: str) -> str:
        return "`" + " ".join(text.split()).replace("|", "\\|") + "`"

    lines = [
        "# Mutations",
        "",
        "Written by `bench/mutations.py`, which says what this is.",
        f"Of {len(MUTATIONS)} mutations {len(tried)} were tried; {len(tried) - len(lived)} are",
        f"killed, {len(lived)} survive.",
        "",
    ]
    if lived:
        lines += ["| survivor | becomes | why |", "|---|---|---|"]
        for m in lived:
            why = m.survives or "no reason yet"
            lines += [f"| {m.file}: {cell(m.old)} | {cell(m.new)} | {why} |"]
        lines += [""]
    lines += ["| file | code | becomes | killed by |", "|---|---|---|---|"]
    for m, result in tried:
        if result["killed"]:
            test = result["killed"].removeprefix("tests/").split("[")[0].replace("|", "\\|")
            lines += [f"| {m.file} | {cell(m.old)} | {cell(m.new)} | {' '.join(test.split())} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the campaign."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--results", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--whole", action="store_true", help="try survivors on all test files")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a test file")
    flags = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for mutation in MUTATIONS:
        mutated(mutation)
    for line in campaign(flags.results, flags.whole, flags.limit):
        print(line, flush=True)
        text = report(read_results(flags.results))
        (ROOT / "bench" / "MUTATIONS.md").write_text(text, encoding="utf-8")
    results = read_results(flags.results)
    sys.exit(any(not results[m.key]["killed"] and not m.survives for m in MUTATIONS))


if __name__ == "__main__":
    main()
