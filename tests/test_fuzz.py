"""Run a short campaign of fuzz.py, and pass hostile input to the two commands.

A command must end with one line on stderr and exit status 1, and write nothing.
"""

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
    """Each of 120 mutated inputs is either read or refused with one line that names a path."""
    # `python tests/fuzz.py --cases 5000` runs more cases, starting with the same ones.
    results = fuzz.campaign(seed=0, cases=120, work=tmp_path)
    assert [r for r in results if "FAILED" in r["outcome"]] == []
    outcomes = Counter(r["outcome"] for r in results)
    assert len(results) == 120
    weakest = min(outcomes["read"], outcomes["refused"])
    assert weakest > 12, "the mutations are too weak or too wild"


def move_config_out(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def write_endless_template(folder: Path) -> None:
    endless = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)


def write_duplicate_key(folder: Path) -> None:
    (folder / "config.json").write_text('{"a": 1, "a": 2}')


@pytest.mark.parametrize(
    "command, damage, named",
    [
        ("sample.py", move_config_out, "config.json: a link to"),
        ("train.py", write_endless_template, "chat_template.jinja"),
        ("train.py", write_duplicate_key, "config.json"),
    ],
)
def test_commands(command, damage, named, tmp_path):
    """A command refuses a damaged checkpoint with one line that names the file."""
    fuzz.write_base(tmp_path)
    folder, out = tmp_path / "checkpoint", tmp_path / "out.jsonl"
    damage(folder)
    flags = ["--model", str(folder), "--out", str(out)]
    if command == "train.py":
        flags += ["--data", str(tmp_path / "data" / "data.jsonl")]
    else:
        flags += ["--prompt", "Hi"]
    done = subprocess.run(
        [sys.executable, str(ROOT / command), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not out.exists()
    *progress, line = done.stderr.splitlines()  # a slow machine says that it is still reading
    assert "error" not in "".join(progress) and "Traceback" not in done.stderr
    assert line.startswith(f"{command}: error: {folder}") and named in line
