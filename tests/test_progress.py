"""Progress: when a terminal and a log see it, what it says, and that data stays as it is."""

import io
import itertools
import re
import sys
import time
from pathlib import Path

import pytest
from test_train import TOY

import train
from formats import progress, records
from formats.progress import Progress

ROOT = Path(__file__).resolve().parent.parent


class Screen(io.StringIO):
    """Stands in for stderr."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that the test moves; the thread that watches does nothing."""
    now = [1000.0]
    monkeypatch.setattr(progress, "_start_watching", lambda: None)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RANK", raising=False)

    def wait(seconds: float) -> None:
        for _ in range(round(2 * seconds)):
            now[0] += 0.5
            progress._show()

    return wait


def screen(monkeypatch, terminal: bool) -> Screen:
    found = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_a_log_gets_whole_lines_at_a_sane_rate(monkeypatch, clock):
    """The first after five seconds, then one every thirty; nothing that moves a cursor."""
    log = screen(monkeypatch, terminal=False)
    for _ in Progress("tokenizing", [1, 2, 3]):
        with Progress("micro-batches", [1] * 4) as inner:  # what is within adds no lines
            clock(100)
            inner.update()
    lines = log.getvalue().splitlines()
    assert lines[0] == "tokenizing 0 of 3, 0:05; micro-batches 0 of 4"
    assert lines[4] == "tokenizing 1 of 3, 2:05, 2:55 left; micro-batches 0 of 4"
    assert len(lines) == 10 and "\r" not in log.getvalue() and "\x1b" not in log.getvalue()


def test_a_terminal_sees_what_takes_more_than_two_seconds(monkeypatch, clock, capsys):
    """One line, redrawn within 80 columns and cleared at the end, and nothing before."""
    terminal = screen(monkeypatch, terminal=True)
    with Progress("quick"):
        clock(1.5)
    assert terminal.getvalue() == ""
    with Progress("reading a long folder" + "/name" * 20, total=10) as bar:
        bar.note = "loss 1.0000"
        clock(3)
        progress.write("data")
    *drawn, last = terminal.getvalue().split(progress.CLEAR)[1:]
    assert last == "" and all(len(line) < 80 for line in drawn) and "…" in drawn[0]
    assert capsys.readouterr().out == "data\n" and "\n" not in terminal.getvalue()


def test_only_rank_0_shows_progress(monkeypatch, clock):
    log = screen(monkeypatch, terminal=False)
    monkeypatch.setenv("RANK", "1")
    with Progress("tokenizing"):
        assert progress._open == []
    assert log.getvalue() == ""


def test_a_failure_closes_the_line_before_it_is_reported(monkeypatch, clock):
    """Also one within another, and one that an iteration was in the middle of."""
    terminal = screen(monkeypatch, terminal=True)
    with pytest.raises(ValueError):
        for _ in Progress("outer", [1]):
            with Progress("inner"):
                clock(3)
                raise ValueError
    assert progress._open == [] and terminal.getvalue().endswith(progress.CLEAR)


@pytest.mark.parametrize("stream", ["closed", "full"])
def test_a_stderr_that_fails_costs_nothing(monkeypatch, clock, stream):
    with open("/dev/full", "wb", buffering=0) as full:
        file = io.TextIOWrapper(full, write_through=True)
        if stream == "closed":
            file.close()
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr(progress, "on_terminal", lambda: False)
        with Progress("saving"):
            clock(10)


def test_a_single_long_item_is_visible(monkeypatch):
    """A thread shows it, which ends with what it shows."""
    log = screen(monkeypatch, terminal=False)
    monkeypatch.setattr(progress, "FIRST", 0.1)
    with Progress("drawing"):
        time.sleep(0.8)
    assert log.getvalue() == "drawing, 0:00\n" or log.getvalue() == "drawing, 0:01\n"
    for _ in itertools.takewhile(lambda _: progress._watching, range(40)):
        time.sleep(0.1)
    assert not progress._watching


def test_no_other_mechanism():
    """Whoever shows progress uses formats/progress.py; no tqdm, no carriage return."""
    for path in ROOT.glob("**/*.py"):
        if {"tests", "bench", ".venv"} & set(path.relative_to(ROOT).parts):
            continue
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) tqdm", text, re.M), path
        assert r"\r" not in text or path.name == "progress.py", path


def test_data_goes_to_stdout_and_progress_to_stderr(monkeypatch, capsys):
    read = records._read_lines

    def slowly(*arguments):
        time.sleep(0.8)
        yield from read(*arguments)

    monkeypatch.setattr(progress, "FIRST", 0.1)
    monkeypatch.setattr(records, "_read_lines", slowly)
    toy = [f"--model={TOY / 'checkpoint'}", f"--data={TOY / 'heldout.jsonl'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *toy, "--device=cpu", "--plan"])
    train.main()
    out, log = capsys.readouterr()
    assert re.search(r"^reading .*heldout.jsonl, 0:0\d$", log, re.M)
    assert "reading " not in out and "\r" not in out + log
