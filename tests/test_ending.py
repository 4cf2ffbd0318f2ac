"""Stop, restart, overwrite and finish runs: folder and exit status always tell the truth."""

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from test_train import ROOT, fails, few_pairs, run

import train
from formats.candidates import AnswerFile
from formats.files import remove
from runtime import resume, signals
from runtime import run as runs
from runtime.run import continued_run
from runtime.settings import Settings, read_command

SHORT = {"max_steps": 2, "save_every": 1, "dtype": "fp32"}


# A program that listens, is told twice while it starts, and would then sleep.
PROGRAM = """
import os, signal, sys, time
from runtime import signals
signals.listen("train.py")
for number in map(int, sys.argv[1:]):
    os.kill(os.getpid(), number)
time.sleep(9)
"""


def status_of(*numbers: int, **options) -> int:
    """Return the exit status of PROGRAM after these signals; it imports no torch."""
    command = [sys.executable, "-c", PROGRAM, *map(str, numbers)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=20, **options).returncode


# A rank that waits in C for another rank, or for a file, and is told to end.
WAITING = """
import ctypes, os, signal, subprocess, sys
from runtime import signals
gone = subprocess.Popen(["true"])
gone.wait()
signals.listen("train.py")
phase, dead, publisher = sys.argv[1:]
signals._phase = getattr(signals, phase)
signals.peers[:] = [os.getpid(), gone.pid] if dead else [os.getpid()]
signals.rank_0 = gone.pid if publisher else os.getpid()
os.kill(os.getpid(), signal.SIGTERM)
ctypes.CDLL(None).sleep(4)
"""


@pytest.mark.parametrize(
    "phase, dead, publisher, leaves",
    [
        ("STEPS", "dead", "", True),  # the step never ends
        ("STEPS", "", "", False),  # it ends, and the run is saved
        ("SAVING", "dead", "", False),  # rank 0 may be at work
        ("SAVING", "dead", "rank 0", True),
    ],
)
def test_survivors_of_a_dead_rank_leave(phase, dead, publisher, leaves):
    """A rank that is told to end does so at once if it waits for one of this machine that died."""
    command = [sys.executable, "-c", WAITING, phase, dead, publisher]
    assert subprocess.run(command, cwd=ROOT, timeout=20).returncode == int(leaves)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_before_the_first_step_says_resume_me(name):
    """Each signal ends a program that is starting with 75, also if it comes twice."""
    number = getattr(signal, name)
    assert status_of(number, number) == signals.RESUME_ME


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup: SIGHUP does nothing, and SIGTERM still counts."""
    real = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            command = [sys.executable, "-c", PROGRAM, str(int(signal.SIGHUP))]
            subprocess.run(command, cwd=ROOT, timeout=1)
        assert status_of(signal.SIGHUP, signal.SIGTERM) == signals.RESUME_ME
    finally:
        signal.signal(signal.SIGHUP, real)


def test_the_launcher_is_named_by_its_process(monkeypatch):
    """Another parent has another name; the same one keeps its name."""
    assert signals._name_launcher() == signals.LAUNCHER
    for parent in {1, os.getpid()} - {signals.PARENT}:  # 1: a pytest whose parent has died
        monkeypatch.setattr(signals, "PARENT", parent)
        assert signals._name_launcher() != signals.LAUNCHER


# A torchrun that dies while its worker starts: the worker, told nothing, must leave by itself.
LAUNCHER = """
import os, subprocess, sys
worker = "import sys; open(sys.argv[1], 'w').close(); import time; from runtime import signals; "
worker += "signals.listen('train.py'); print(signals.LAUNCHER, flush=True); time.sleep(30)"
environment = os.environ | {"TORCHELASTIC_RUN_ID": "none"}
sign, late = sys.argv[1], sys.argv[2]
if late:
    worker = worker.replace("import time;", "import time; time.sleep(0.5);")
subprocess.Popen([sys.executable, "-c", worker, sign], env=environment, start_new_session=True)
while not os.path.exists(sign):
    pass
if not late:
    import time; time.sleep(0.7)
"""


@pytest.mark.parametrize("late", ["", "before it listens"])
def test_a_worker_leaves_when_its_torchrun_dies(tmp_path, late):
    """Also if that happens before the worker could ask who its parent is."""
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "sign"), late]
    # The worker holds stdout, so this returns when it has left, long before its 30 seconds.
    environment = os.environ | {"TRAIN_STOPPED": str(tmp_path / "stopped")}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 15}
    said = subprocess.run(command, env=environment, **options)
    assert "stopped by a signal" in said.stderr and (tmp_path / "stopped").exists()


@pytest.mark.parametrize("differs", ["starttime", "namespace", "boot", "nothing"])
def test_containers_with_one_host_name_have_launchers_of_their_own(monkeypatch, differs):
    """Each torchrun is process 1 of host "node", without an id; a restart keeps the name."""
    monkeypatch.setattr(signals, "PARENT", 1)
    monkeypatch.setattr(signals.platform, "node", lambda: "node")
    names = []
    for other in (False, True):
        ticks = 77 if other and differs == "starttime" else 76
        files = {
            "/proc/1/stat": "1 (a name) of) S " + " ".join(map(str, [*range(18), ticks, 0])),
            "/proc/sys/kernel/random/boot_id": "b" if other and differs == "boot" else "a",
        }
        link = "pid:[2]" if other and differs == "namespace" else "pid:[1]"
        monkeypatch.setattr(signals.os, "readlink", lambda path, link=link: link)
        opened = lambda path, files=files: io.StringIO(files[path])  # noqa: E731
        monkeypatch.setattr(signals, "open", opened, raising=False)
        names.append(signals._name_launcher())
    assert (names[0] == names[1]) == (differs == "nothing")


@pytest.mark.parametrize(
    "owner, name, call",
    [(Path, "rename", n) for n in range(3)]
    + [(shutil, "rmtree", n) for n in range(2)]
    + [(Path, "unlink", 0)],
)
def test_overwriting_can_be_killed_anywhere(monkeypatch, tmp_path, owner, name, call):
    """Whatever call is the last, the same command starts again and leaves one whole run."""
    out, flags = tmp_path / "run", few_pairs(tmp_path) | SHORT
    run(monkeypatch, out, **flags)
    real, left = getattr(owner, name), [call]

    def last(*values, **options):
        if str(out) in str(values[0]):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return real(*values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, last)
        try:
            run(patch, out, **flags, lr=2e-3, overwrite=True)
        except SystemExit as e:
            assert e.code == 130
    run(monkeypatch, out, **flags, lr=2e-3, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "model", "tokens",
    ]  # fmt: skip


def test_a_folder_never_keeps_its_name_half_deleted(monkeypatch, tmp_path):
    """A link is removed, not what it points to; a folder is renamed before it is emptied."""
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    remove(link)
    assert folder.exists() and not link.is_symlink()
    monkeypatch.setattr(shutil, "rmtree", lambda *values, **options: None)
    remove(folder)
    assert not folder.exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "closed"])
def test_what_people_read_costs_no_run(monkeypatch, tmp_path, encoding):
    """A stdout that is closed or cannot show × leaves status 0 and a model."""
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8" if encoding == "closed" else encoding)
    if encoding == "closed":
        stdout = open(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        run(patch, tmp_path / "run", **few_pairs(tmp_path) | SHORT)
    assert (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    "flags",
    [{"resume": "elsewhere"}, {"overwrite": True}, {"resume": "never", "overwrite": True}, {}],
)
def test_a_restart_goes_on_with_its_own_run(monkeypatch, tmp_path, flags):
    """Whatever flags began it; a start that is no restart, or another launcher's, does not."""
    config = {"launcher": "ours", "settings": {"resume": "auto"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(resume, "checkpoints", lambda out: [out / "checkpoints" / "step-000002"])
    settings = Settings(out=str(tmp_path), **flags)
    assert continued_run(settings, "ours", restarted=True) == (tmp_path, False)
    assert continued_run(settings, "ours", restarted=False) == (None, False)
    assert continued_run(settings, "theirs", restarted=True) == (None, False)
    (tmp_path / "model").mkdir()
    assert continued_run(settings, "ours", restarted=True) == (tmp_path, True)


def test_workers_leave_word_for_those_that_torchrun_starts_next(monkeypatch, tmp_path, capsys):
    """Of an error before the first step, too; the next read nothing, and the last tidy up."""
    monkeypatch.setattr(runs, "WORD", word := tmp_path / "word")
    flags, error = few_pairs(tmp_path) | SHORT, torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", Mock(side_effect=error))
        fails(monkeypatch, capsys, tmp_path / "run", 1, **flags)
        assert not word.exists()  # nobody comes next
        patch.setattr(signals, "MAX_RESTARTS", 2)
        fails(monkeypatch, capsys, tmp_path / "run", 1, **flags)
        assert word.read_text() == "CUDA out of memory" and not (tmp_path / "run").exists()
        for restart in (1, 2):
            patch.setattr(signals, "RESTARTS", restart)
            patch.setattr(train, "open_inputs", Mock(side_effect=AssertionError))
            assert "CUDA out of memory" in fails(monkeypatch, capsys, tmp_path, 1, **flags)
            assert word.exists() == (restart == 1)
    run(monkeypatch, tmp_path / "run", **flags)


@pytest.mark.parametrize(
    "error, closed",
    [(None, True), (SystemExit(75), True), (KeyboardInterrupt(), True), (RuntimeError(), False)],
)
def test_a_rank_that_fails_alone_closes_nothing(monkeypatch, error, closed):
    """Weights & Biases, say, would wait for its network while the other ranks wait for this one."""
    monkeypatch.setattr(runs.dist, "get_world_size", lambda: 2)
    unfinished = object.__new__(runs.Run)
    unfinished.settings, unfinished.files = Settings(), ExitStack()
    unfinished.files.callback(close := Mock())
    unfinished.__exit__(type(error), error, None)
    assert close.called == closed


@pytest.mark.parametrize("error", [ValueError, MemoryError, OSError])
def test_a_failing_report_is_a_warning(monkeypatch, tmp_path, error):
    """The model is saved before the report is made."""

    def report(*values):
        raise error("no report")

    monkeypatch.setattr(train, "report", report)
    run(monkeypatch, tmp_path / "run", **few_pairs(tmp_path) | SHORT)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_two_writers_of_one_answer_file(tmp_path):
    """The second is refused while the first writes, and after the first has finished."""
    first, second = (AnswerFile(tmp_path / "out.jsonl", [], {}) for _ in range(2))
    file = first.lock(overwrite=False)
    with pytest.raises(FileExistsError, match="another command is writing there"):
        second.lock(overwrite=True)
    first.work.rename(first.out)
    fcntl.flock(file, fcntl.LOCK_UN)
    with pytest.raises(FileExistsError, match="has just finished it"):
        second.lock(overwrite=False)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--out=a\0b", "NUL"),
        ("--data=a\0b", "NUL"),
        (f"--max-steps={2**70}", "less than 2^63"),
        (f"--batch-size={2**64}", "less than 2^63"),
    ],
)
def test_numbers_and_paths_beyond_a_machine(capsys, flag, words):
    """A usage error of one line names them."""
    with pytest.raises(SystemExit) as exit:
        read_command([flag], "")
    assert exit.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["out", "resume", "data", "model"])
def test_links_in_a_circle_are_one_line(monkeypatch, capsys, tmp_path, flag):
    """Python raises RuntimeError or OSError for them, depending on its version."""
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "run").mkdir()
    flags = few_pairs(tmp_path) | SHORT | {"resume": "auto", flag: loop}
    fails(monkeypatch, capsys, flags.pop("out", tmp_path / "run"), 1, **flags)


@pytest.mark.parametrize("fault", ["a link", "no rights"])
def test_a_checkpoint_that_cannot_be_pruned_is_a_warning(monkeypatch, capsys, tmp_path, fault):
    """A link is removed alone; what cannot be deleted stays, and the run ends well."""
    out, flags = tmp_path / "run", few_pairs(tmp_path) | SHORT | {"keep": 1}
    real, elsewhere = resume.checkpoints, tmp_path / "elsewhere"

    def link_the_first(folder):
        found = real(folder)
        if len(found) > 1 and not elsewhere.exists():
            found[0].rename(elsewhere)
            found[0].symlink_to(elsewhere)
        return real(folder)

    def refuse(path):
        raise PermissionError(f"{path}: not yours")

    if fault == "a link":
        monkeypatch.setattr(resume, "checkpoints", link_the_first)
    else:
        monkeypatch.setattr(resume, "remove", refuse)
    run(monkeypatch, out, **flags)
    said = capsys.readouterr().out
    assert (out / "model").exists()
    if fault == "a link":
        assert [path.name for path in real(out)] == ["step-000002"]
        assert (elsewhere / "state.json").exists()
    else:
        assert "warning:" in said and "step-000001: cannot be deleted" in said


def test_a_clock_that_stands_still_costs_no_run(monkeypatch, tmp_path):
    """A step of no length has a speed all the same."""
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    rows = run(monkeypatch, tmp_path / "run", **few_pairs(tmp_path) | SHORT)
    assert all(row["pairs_per_second"] > 0 for row in rows if "loss" in row)


def test_the_smallest_campaign():
    """One case of most kinds of bench/campaign.py, each a real command that ends by itself."""
    command = [sys.executable, ROOT / "bench" / "campaign.py", "--smallest"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
