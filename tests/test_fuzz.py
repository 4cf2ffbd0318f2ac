"""A short campaign of `fuzz.py`, and what the two commands make of hostile input: one line, exit status 1, nothing written."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest

pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parent.parent


def test_mutated_input_is_read_or_refused(tmp_path):
    """120 cases; `python tests/fuzz.py --cases 5000` runs more of them, with the same numbers for the same seed."""
    results = fuzz.campaign(seed=0, cases=120, work=tmp_path)
    assert [r for r in results if "FAILED" in r["outcome"]] == []
    outcomes = Counter(r["outcome"] for r in results)
    assert len(results) == 120 and min(outcomes["read"], outcomes["refused"]) > 12, "the mutations are too weak or too wild"


def link_out(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def endless_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(fuzz.HOSTILE[4])


def name_twice(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": 1, "a": 2}')


@pytest.mark.parametrize(
    "command, damage, named",
    [
        ("sample.py", link_out, "config.json: a link to"),
        ("train.py", endless_template, "chat_template.jinja"),
        ("train.py", name_twice, "config.json"),
    ],
)
def test_commands(command, damage, named, tmp_path):
    fuzz.sound(tmp_path)
    folder = tmp_path / "checkpoint"
    damage(folder)
    flags = ["--data", str(tmp_path / "data" / "data.jsonl")] if command == "train.py" else ["--prompt", "Hi"]
    done = subprocess.run(
        [sys.executable, str(ROOT / command), "--model", str(folder), *flags, "--out", str(tmp_path / "out.jsonl")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "out.jsonl").exists()
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{command}: error: {folder}") and named in line
