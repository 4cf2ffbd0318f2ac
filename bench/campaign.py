"""Try what goes wrong around a run; check that nothing is lost and nothing false taken for whole.

    python bench/campaign.py                    every case, and a table of what happened
    python bench/campaign.py --kinds signals    one kind; several with commas
    python bench/campaign.py --smallest         a few of each kind, in seconds: what CI runs

A case is the real command in a process of its own, hit by one fault. It is forked from this
process, which has imported torch already. A case is right if the command

- ends with the status that the fault calls for, and without a traceback;
- leaves a `model/` only if that holds all bytes of the old model or of the new one;
- run again as it was, without the fault, ends with status 0 and with the weights and metrics of a
  run that nothing hit.

`bench/faults.py` kills runs of one and two ranks at random moments.
"""

import argparse
import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faults
import torch

import sample
import train
from formats import candidates, checkpoint
from runtime import inputs, reference, resume, run, signals

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy"
RESUME_ME = signals.RESUME_ME
PATIENCE = 120  # seconds until a case counts as one that hangs

Hook = Callable[[], object]


@dataclass
class Case:
    """Holds a fault, the flags of the run that it hits, and what the run must do."""

    kind: str
    name: str
    hook: Hook  # called in the process before the command
    status: tuple[int, ...]  # any of these; negative: the signal that killed it
    flags: list[str] = field(default_factory=list)
    before: Callable[[Path], object] = lambda out: None  # prepares OUT, in this process
    after: Callable[[Path], object] = lambda out: None  # takes the fault away
    again: bool = True  # the same command must then succeed
    says: str = ""  # in the output


# --------------------------------------------------------------------------------------------------
# One process


def fork(argv: list[str], hook: Hook, log: Path, command: Any = train) -> int:
    """Run a command in a forked process, with its output in `log`; return the process's id."""
    process = os.fork()
    if process:
        return process
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for name, number in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True))
        name = Path(command.__file__).name
        sys.argv = [name, *argv]
        if command is train:
            signals.listen(name)
        hook()
        command.main()
        sys.stdout.flush()
        os._exit(0)
    except SystemExit as e:
        if isinstance(e.code, str):
            with contextlib.suppress(OSError):  # the disk is full for the log, too
                print(e.code, file=sys.stderr)
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(99)


def wait(process: int) -> int:
    """Return the exit status of a process; negative for a signal, 124 if it hangs."""
    status = faults.status_within(process, PATIENCE)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return 124
    return status


def at(owner: Any, name: str, action: Hook, call: int = 1) -> Hook:
    """Return a hook: do something just before a function is called, at its n-th call."""

    def hook() -> None:
        real, calls = getattr(owner, name), []

        def wrapped(*args, **options):
            calls.append(1)
            if len(calls) == call:
                action()
            return real(*args, **options)

        setattr(owner, name, wrapped)

    return hook


def both(*hooks: Hook) -> Hook:
    """Return a hook that does what several do."""
    return lambda: [hook() for hook in hooks]


def nothing() -> None:
    """Hit a run with no fault."""


# --------------------------------------------------------------------------------------------------
# A run, and what is left of it


class Bench:
    """Keeps the folder of the campaign, the flags of its run, and what that run leaves."""

    def __init__(self, folder: Path):
        self.folder = folder
        lines = (TOY / "heldout.jsonl").read_text().splitlines(keepends=True)
        self.data = folder / "few.jsonl"
        self.data.write_text("".join(lines[:10]))
        common = [f"--model={TOY / 'checkpoint'}", f"--data={self.data}", "--device=cpu"]
        common += [f"--eval-data={self.data}", "--lr=1e-3", "--batch-size=4", "--dtype=fp32"]
        self.flags = [*common, "--max-steps=3", "--save-every=1", "--objective=dpo"]
        self.flags += ["--reference=cached", "--keep=9"]
        self.unbroken = self.one_run("unbroken", [])
        self.old = self.one_run("old", ["--lr=1e-2"])
        self.results, self.old_results = faults.results(self.unbroken), faults.results(self.old)

    def one_run(self, name: str, flags: list[str], hook: Hook = nothing, status: int = 0) -> Path:
        """Train once into a new folder; return it."""
        out, log = self.folder / name, self.folder / f"{name}.log"
        found = wait(fork([*self.flags, f"--out={out}", *flags], hook, log))
        if found != status:
            raise SystemExit(f"{out}: status {found}, expected {status}: {log.read_text()}")
        return out

    def begun(self, out: Path, steps: int = 2) -> None:
        """Copy the unbroken run as it was after some steps."""
        shutil.copytree(self.unbroken, out)
        shutil.rmtree(out / "model")
        for path in resume.checkpoints(out)[steps:]:
            shutil.rmtree(path)

    def finished(self, out: Path) -> None:
        """Copy a finished run of other settings."""
        shutil.copytree(self.old, out)

    def verdict(self, case: Case, number: int) -> str:
        """Run a case; return what was wrong, "" if nothing."""
        out, log = self.folder / f"case-{number}", self.folder / f"case-{number}.log"
        case.before(out)
        argv = [word.replace("{out}", str(out)) for word in case.flags]
        argv = [*self.flags, *([] if "--out" in " ".join(argv) else [f"--out={out}"]), *argv]
        status = wait(fork(argv, case.hook, log))
        text = log.read_text(errors="replace")
        problems = []
        if status not in case.status:
            problems.append(f"status {status}, expected {case.status}")
        if "Traceback" in text:
            problems.append("a traceback")
        if case.says not in text:
            problems.append(f"does not say {case.says!r}")
        if problem := self.false_model(out):
            problems.append(problem)
        case.after(out)
        if case.again and not problems:
            if not (out / "model").exists() or faults.results(out) != self.results:
                status = wait(fork(argv, nothing, log))
                if status:
                    problems.append(f"the same command then ends with status {status}")
            if not problems and faults.results(out) != self.results:
                problems.append("other weights or metrics than without the fault")
        if not problems:
            shutil.rmtree(out, ignore_errors=True)
            log.unlink()
        return "; ".join(problems)

    def false_model(self, out: Path) -> str:
        """Say what is wrong with OUT/model; "" if it is whole or absent."""
        if not (out / "model").exists():
            return ""
        for whole in (self.unbroken, self.old):
            names = {path.name for path in (whole / "model").iterdir()}
            if names == {path.name for path in (out / "model").iterdir()} and all(
                (whole / "model" / name).read_bytes() == (out / "model" / name).read_bytes()
                for name in names
            ):
                return ""
        return "model/ is neither the old one nor the new one"


# --------------------------------------------------------------------------------------------------
# The faults


START = {  # phases before the first step: (owner, function, call)
    "flags read": (train, "read_command", 1),
    "ranks joined": (train, "start_ranks", 1),
    "model opened": (inputs, "open_model", 1),
    "tokens looked for": (inputs, "find", 1),
    "tokenizing": (inputs, "load_pairs", 1),
    "tokenizing the held-out": (inputs, "load_pairs", 2),
    "model built": (train, "build_model", 1),
    "folder locked": (run, "open_output_folder", 1),
    "reference cached": (reference, "fill_table", 1),
    "folder cleared": (run.Run, "_reset_output_folder", 1),
    "first evaluation": (run.Run, "evaluate", 1),
}
STEPS = {
    "first step": (train, "learning_rate", 1),
    "backward": (train, "backward", 2),
    "clipping": (train, "clip_gradients", 2),
    "logging": (run.Run, "log_step", 2),
    "saving": (resume, "save_checkpoint", 2),
    "shards written": (resume.dcp, "save", 2),
}
END = {
    "last save": (resume, "save_checkpoint", 3),
    "last evaluation": (run.Run, "evaluate", 2),
    "model saved": (checkpoint, "save", 1),
    "model renamed": (checkpoint, "_publish", 1),
    "report": (train, "report", 1),
}


def send(*numbers: int) -> Hook:
    """Return an action: send this process signals, with half a second after each."""

    def action() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    return action


def signal_cases(bench: Bench) -> Iterator[Case]:
    """Yield every signal in every phase; twice; Ctrl-C; SIGKILL."""
    term, usr1, hup = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP
    kinds = {"SIGTERM": [term], "SIGUSR1": [usr1], "SIGHUP": [hup], "two signals": [term, usr1]}
    for phases, status in ((START, RESUME_ME), (STEPS, RESUME_ME), (END, 0)):
        for phase, (owner, name, call) in phases.items():
            for what, numbers in kinds.items():
                hook = at(owner, name, send(*numbers), call)
                yield Case("signals", f"{what}: {phase}", hook, (status,))
            hook = at(owner, name, send(signal.SIGKILL), call)
            yield Case("signals", f"SIGKILL: {phase}", hook, (-9,))
            if phase != "flags read":
                hook = at(owner, name, send(signal.SIGINT), call)
                yield Case("signals", f"Ctrl-C: {phase}", hook, (130,), says="interrupted")
    ignore = both(lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))

    def nohup() -> None:
        signal.set_wakeup_fd(-1)
        ignore()
        signals.listen("train.py")
        at(train, "clip_gradients", send(hup))()

    yield Case("signals", "SIGHUP under nohup", nohup, (0,))
    for phase, (owner, name, call) in {**START, **STEPS}.items():
        if phase in ("tokens looked for", "folder cleared", "clipping"):  # it does not tokenize
            hook = at(owner, name, send(term), 1)
            yield Case("signals", f"a resumed run: {phase}", hook, (RESUME_ME,), before=bench.begun)


def count_calls(names: tuple[str, ...], number: int, action: Hook) -> Hook:
    """Return a hook: act before the n-th call of any of these functions of `os`."""

    def hook() -> None:
        calls: list[str] = []
        for name in names:

            def wrapped(*args, real=getattr(os, name), **options):
                calls.append(real.__name__)
                if len(calls) == number:
                    action()
                return real(*args, **options)

            setattr(os, name, wrapped)

    return hook


CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "remove", "fsync")


def fail(number: int) -> Hook:
    """Return an action that raises an error of the operating system."""

    def action() -> None:
        raise OSError(number, os.strerror(number))

    return action


def overwrite_cases(bench: Bench, most: int = 70) -> Iterator[Case]:
    """Yield --overwrite, killed or failing at each change of a name on disk."""
    for number in range(1, most):
        hook = count_calls(CHANGES, number, lambda: os._exit(77))
        yield Case(
            "overwrite", f"killed at change {number}", hook, (77, 0), ["--overwrite"],
            before=bench.finished,
        )  # fmt: skip
    for number in range(1, most, 3):
        hook = count_calls(CHANGES, number, fail(errno.EIO))
        yield Case(
            "overwrite", f"I/O error at change {number}", hook, (1, 0), ["--overwrite"],
            before=bench.finished,
        )  # fmt: skip


def limit(size: int) -> Hook:
    """Return a hook: let no file grow beyond some bytes, as on a full disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def disk_cases(bench: Bench) -> Iterator[Case]:
    """Yield full disks, from the start and from a step on."""
    for size in (0, 100, 1_000, 3_000, 10_000, 100_000, 300_000, 600_000):
        yield Case("disk", f"full at {size:,} bytes", limit(size), (0, 1))
    for phase in ("folder cleared", "first evaluation"):
        owner, name, call = START[phase]
        yield Case("disk", f"full: {phase}", at(owner, name, limit(100), call), (1,))
    for phase in STEPS:
        owner, name, call = STEPS[phase]
        yield Case("disk", f"full: {phase}", at(owner, name, limit(500), call), (1,))
    for phase in ("model saved", "model renamed"):
        owner, name, call = END[phase]
        yield Case("disk", f"full: {phase}", at(owner, name, limit(500), call), (0, 1))


def user(path: str, mode: int) -> dict:
    """Return the parts of a case: OUT belongs to another user, and a path in it is forbidden."""

    def after(out: Path) -> None:
        for root, folders, files in os.walk(out):
            for name in [root, *(os.path.join(root, name) for name in folders)]:
                os.chmod(name, 0o777)
            for name in files:
                os.chmod(os.path.join(root, name), 0o666)

    def prepare(begin: Callable[[Path], object]) -> Callable[[Path], None]:
        def before(out: Path) -> None:
            begin(out)
            after(out)
            os.chmod(out / path, mode)

        return before

    return {"prepare": prepare, "after": after}


def nobody() -> None:
    """Become a user without rights."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def user_cases(bench: Bench) -> Iterator[Case]:
    """Yield folders and files that this user may not write."""
    os.chmod(bench.folder, 0o777)
    "".encode("utf-8-sig")  # the codec's module may lie where nobody can read
    for path, mode, status in (
        ("", 0o555, (0, 1)), ("metrics.jsonl", 0o444, (1,)), ("checkpoints", 0o555, (1,)),
        ("config.json", 0o444, (1,)), ("checkpoints/step-000002", 0o000, (1,)),
        ("checkpoints/step-000001", 0o555, (0, 1)), ("metrics.jsonl", 0o000, (1,)),
        ("checkpoints/step-000002/state.json", 0o000, (1,)),
    ):  # fmt: skip
        parts = user(path, mode)
        yield Case(
            "users", f"{path or 'OUT'} with mode {mode:o}", nobody, status,
            before=parts["prepare"](bench.begun), after=parts["after"],
        )  # fmt: skip
    for path, mode in (("model", 0o555), ("", 0o555), ("checkpoints", 0o555)):
        parts = user(path, mode)
        yield Case(
            "users", f"--overwrite, {path or 'OUT'} with mode {mode:o}", nobody, (0, 1),
            ["--overwrite"], before=parts["prepare"](bench.finished), after=parts["after"],
        )  # fmt: skip


def output(stdout: str, errors: str = "") -> Hook:
    """Return a hook: send stdout, or stderr, where writing fails."""

    def hook() -> None:
        for number, how in ((1, stdout), (2, errors)):
            if how == "closed":
                os.close(number)
                os.open(os.devnull, os.O_RDONLY)
            elif how == "pipe":
                read, write = os.pipe()
                os.dup2(write, number)
                os.close(read)
            elif how == "full":
                os.dup2(os.open("/dev/full", os.O_WRONLY), number)
            elif how:
                stream = sys.stdout if number == 1 else sys.stderr
                stream.reconfigure(encoding=how, errors="strict")

    return hook


def output_cases(bench: Bench) -> Iterator[Case]:
    """Yield outputs that are closed, full, or cannot show what is printed."""
    for how in ("closed", "pipe", "full", "ascii", "latin-1", "cp437", "utf-16", "shift_jis"):
        yield Case("output", f"stdout: {how}", output(how), (0,))
        yield Case("output", f"stdout and stderr: {how}", output(how, how), (0,))
    for phase in ("clipping", "report", "model saved", "first evaluation"):
        owner, name, call = {**START, **STEPS, **END}[phase]
        yield Case("output", f"pipe closed: {phase}", at(owner, name, output("pipe"), call), (0,))
    for error in (ValueError, RuntimeError, OSError, MemoryError, ZeroDivisionError):

        def broken(error=error) -> None:
            raise error("no report")

        hook = at(train, "report", broken)
        yield Case("output", f"report fails: {error.__name__}", hook, (0,), says="no report")


def clock_cases(bench: Bench) -> Iterator[Case]:
    """Yield clocks that jump, run backwards, stand still."""
    real = time.time
    for name, clock in (
        ("an hour back", lambda: real() - 3600), ("1970", lambda: 0.0), ("2106", lambda: 2.0**32),
        ("backwards", lambda: 4e9 - real()),
    ):  # fmt: skip
        yield Case("clocks", name, lambda clock=clock: setattr(time, "time", clock), (0,))
    hook = at(train, "clip_gradients", lambda: setattr(time, "perf_counter", lambda: 0.0))
    yield Case("clocks", "perf_counter stands still", hook, (0,))

    def future(out: Path, when: float = 4e9) -> None:
        bench.begun(out)
        for path in out.rglob("*"):
            os.utime(path, (when, when))

    yield Case("clocks", "files of the future", nothing, (0,), before=future)
    yield Case("clocks", "files of 1970", nothing, (0,), before=lambda out: future(out, 0.0))


def change_cases(bench: Bench) -> Iterator[Case]:
    """Yield files that change, appear and vanish under a run."""
    data = bench.data.read_bytes()
    restore = lambda out: bench.data.write_bytes(data)  # noqa: E731
    step = lambda action: at(train, "clip_gradients", action, 2)  # noqa: E731
    number = iter(range(1000))

    def case(name: str, action: Callable[[Path], object], status: tuple, **more: Any) -> Case:
        out = bench.folder / f"changed-{next(number)}"
        hook = step(lambda: action(out))
        flags = ["--out", str(out), *more.pop("flags", [])]
        return Case("changes", name, hook, status, flags, again=False, **more)

    yield case("data deleted", lambda out: bench.data.unlink(), (0,), after=restore)
    yield case("data emptied", lambda out: bench.data.write_text(""), (0,), after=restore)
    yield case("data appended", lambda out: bench.data.write_bytes(data * 2), (0,), after=restore)
    yield case("OUT deleted", lambda out: shutil.rmtree(out), (0, 1))
    yield case("OUT renamed", lambda out: out.rename(f"{out}.away"), (0, 1))
    yield case("checkpoints deleted", lambda out: shutil.rmtree(out / "checkpoints"), (0,))
    yield case("metrics.jsonl deleted", lambda out: (out / "metrics.jsonl").unlink(), (0, 1))
    yield case("config.json deleted", lambda out: (out / "config.json").unlink(), (0,))
    yield case("model/ appears", lambda out: (out / "model").mkdir(), (1,), says="exists")
    yield case("model.incomplete appears", lambda out: (out / "model.incomplete").mkdir(), (0,))

    def link(out: Path) -> None:
        old = out / "checkpoints" / "step-000001"
        shutil.move(old, f"{out}.elsewhere")
        old.symlink_to(f"{out}.elsewhere")

    yield case("a checkpoint behind a link", link, (0,), flags=["--keep=1"])
    copy = bench.folder / "source"
    shutil.copytree(TOY / "checkpoint", copy)
    gone = case("the model read is deleted", lambda out: shutil.rmtree(copy), (0, 1))
    gone.flags = [*gone.flags, f"--model={copy}"]
    yield gone
    for name, text in (("empty", ""), ("cut", '{"launcher": "'), ("a list", "[]"), ("NUL", "\0")):

        def garbage(out: Path, text=text) -> None:
            bench.begun(out)
            (out / "config.json").write_text(text)

        yield Case("changes", f"config.json: {name}", nothing, (0,), before=garbage)


def restarted() -> None:
    """Be a worker that torchrun has started again."""
    signals.RESTARTS = 1


def restart_cases(bench: Bench) -> Iterator[Case]:
    """Yield restarts by torchrun, after each kind of start and of end."""
    starts: dict[str, tuple[list[str], Callable[[Path], object]]] = {
        "plain": ([], lambda out: None),
        "--overwrite": (["--overwrite"], bench.finished),
        "--resume never --overwrite": (["--resume=never", "--overwrite"], bench.begun),
        "--resume PATH elsewhere": (
            [f"--resume={bench.unbroken}/checkpoints/step-000002"], lambda out: None,
        ),
        "--resume PATH, pruned": (
            ["--resume={out}/checkpoints/step-000001", "--keep=1"], lambda out: bench.begun(out, 1),
        ),
    }  # fmt: skip
    for name, (flags, before) in starts.items():

        def first(out: Path, flags=flags, before=before, name=name) -> None:
            before(out)
            argv = [word.replace("{out}", str(out)) for word in flags]
            last = "elsewhere" in name
            hook = at(train, "clip_gradients", lambda: os._exit(77), 1 if last else 2)
            wait(fork([*bench.flags, f"--out={out}", *argv], hook, Path(f"{out}.log")))

        yield Case("restarts", f"killed: {name}", restarted, (0,), flags, before=first)

        def done(out: Path, flags=flags, before=before) -> None:
            before(out)
            argv = [word.replace("{out}", str(out)) for word in flags]
            abort = at(signals, "leave", lambda: os.abort())
            wait(fork([*bench.flags, f"--out={out}", *argv], abort, Path(f"{out}.log")))

        says = "holds the finished run"
        yield Case("restarts", f"finished: {name}", restarted, (0,), flags, done, says=says)
    errors: dict[str, Exception] = {
        "NaN": FloatingPointError("step 2: loss nan"),
        "GPU memory": torch.OutOfMemoryError("CUDA out of memory"),
        "CPU memory": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    }
    for name, error in errors.items():

        def broken(error=error) -> None:
            signals.MAX_RESTARTS = 1
            raise error

        def before(out: Path, broken=broken) -> None:
            hook = at(train, "clip_gradients", broken, 2)
            wait(fork([*bench.flags, f"--out={out}"], hook, Path(f"{out}.log")))

        yield Case(
            "restarts", f"not again: {name}", restarted, (1,), before=before, says=str(error)
        )


ARGUMENTS = {
    "--max-steps 2**70": ["--max-steps", str(2**70)],
    "--max-steps 2**62": ["--max-steps", str(2**62), "--epochs", str(2**62)],
    "--epochs 10**9": ["--epochs", str(10**9), "--max-steps", str(10**9)],
    "--batch-size 2**64": ["--batch-size", str(2**64)],
    "--seed 2**64": ["--seed", str(2**64)],
    "--log-every 2**80": ["--log-every", str(2**80)],
    "a long --out": ["--out", "x" * 300],
    "--out under a file": ["--out", "{file}/run"],
    "--out is a file": ["--out", "{file}"],
    "--out is a loop": ["--out", "{loop}"],
    "--resume is a loop": ["--resume", "{loop}"],
    "--resume under a loop": ["--resume", "{loop}/step-000001"],
    "--resume of nothing": ["--resume", "{folder}/nothing"],
    "--resume is a file": ["--resume", "{file}"],
    "--data is a loop": ["--data", "{loop}"],
    "--model is a loop": ["--model", "{loop}"],
    "--config is a loop": ["--config", "{loop}"],
    "--config with NUL in a path": ["--config", "{nul}"],
    "--chat-template is a loop": ["--chat-template", "{loop}"],
    "--data ~nobody/x": ["--data", "~nobody-at-all/x.jsonl"],
}


def argument_cases(bench: Bench) -> Iterator[Case]:
    """Yield arguments and paths that nobody means, then paths that are strange but right."""
    paths = {"file": bench.data, "loop": bench.folder / "loop", "folder": bench.folder}
    paths["loop"].symlink_to(paths["loop"])
    paths["nul"] = bench.folder / "nul.toml"
    paths["nul"].write_text('resume = "a\\u0000b"\n')
    for name, flags in ARGUMENTS.items():
        words = [word.format(**paths, out="{out}") for word in flags]
        yield Case("arguments", name, nothing, (1, 2), words, again=False, says="error: ")
    os.environ["HOME"] = str(bench.folder)
    odd = ("with space", "it's", 'quo"te', "new\nline", "ünïcödé", "-dash", "$HOME", b"\xff\xfe")
    for name in odd:
        text = os.fsdecode(name)
        out = bench.folder / "odd" / text
        yield Case("arguments", f"--out {name!r}", nothing, (0,), ["--out", str(out)], again=False)
    home = ["--out=~/at-home"]
    found = lambda out: (bench.folder / "at-home" / "model").stat()  # noqa: E731
    yield Case("arguments", "--out=~/x", nothing, (0,), home, after=found, again=False)


def writer_cases(bench: Bench) -> Iterator[Case]:
    """Yield a second run into a folder, at every phase of the first."""
    for phase, (owner, name, call) in {**START, **STEPS, **END}.items():
        if phase in ("flags read", "ranks joined"):
            continue

        first: list[int] = []  # its process

        def second(out: Path, owner=owner, name=name, call=call, first=first) -> None:
            log, sign = Path(f"{out}.first.log"), Path(f"{out}.sign")

            def stay() -> None:
                sign.touch()
                time.sleep(4)

            hook = at(owner, name, stay, call)
            first.append(fork([*bench.flags, f"--out={out}"], hook, log))
            while not sign.exists():
                time.sleep(0.02)

        def both_end(out: Path, first=first) -> None:
            if status := wait(first.pop()):
                last = Path(f"{out}.first.log").read_text().strip().splitlines()[-1:]
                if not any(
                    "another run is writing there" in line or "holds" in line for line in last
                ):
                    raise AssertionError(f"the first run ends with status {status}: {last}")

        yield Case(
            "writers", f"a second run: {phase}", nothing, (0, 1), before=second, after=both_end
        )


KINDS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "signals": signal_cases,
    "overwrite": overwrite_cases,
    "disk": disk_cases,
    "users": user_cases,
    "output": output_cases,
    "clocks": clock_cases,
    "changes": change_cases,
    "restarts": restart_cases,
    "arguments": argument_cases,
    "writers": writer_cases,
}


# --------------------------------------------------------------------------------------------------
# sample.py --out


def sample_verdicts(bench: Bench) -> Iterator[tuple[str, str]]:
    """Hit `sample.py --out`; yield (what was done, what was wrong)."""
    folder = bench.folder
    asked = folder / "asked.txt"
    asked.write_text("".join(f"describe the fox and the {n} .\n" for n in ["moon", "owl"] * 6))
    out, log = folder / "answers.jsonl", folder / "answers.log"
    argv = ["--prompts", str(asked), "--out", str(out), "--max-new-tokens", "6", "--batch-size=1"]
    wait(fork(argv, nothing, log, sample))
    whole = out.read_bytes()

    def again(problem: str) -> str:
        status = 0 if out.exists() else wait(fork(argv, nothing, log, sample))
        problem = problem or (f"then status {status}" if status else "")
        return problem or ("" if out.read_bytes() == whole else "other answers")

    for call in (1, 2):
        out.unlink(missing_ok=True)
        sign = folder / f"sign-{call}"

        def stay(sign=sign) -> None:
            sign.touch()
            time.sleep(3)

        first = fork(argv, at(sample, "respond", stay, call), log, sample)
        while not sign.exists():
            time.sleep(0.02)
        statuses = wait(fork(argv, nothing, log, sample)), wait(first)
        problem = "" if statuses == (1, 0) else f"statuses {statuses}"
        yield f"a second command: group {call}", again(problem)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
        out.unlink(missing_ok=True)
        status = wait(fork(argv, at(sample, "respond", send(number), 2), log, sample))
        problem = "" if status == -number else f"status {status}"
        yield f"signal {number}", again(problem)
    for size in (0, 10, 500, 1500):
        out.unlink(missing_ok=True)
        status = wait(fork(argv, limit(size), log, sample))
        yield f"disk full at {size} bytes", again("" if status == 1 else f"status {status}")
    out.unlink(missing_ok=True)
    late = at(candidates.AnswerFile, "lock", lambda: out.write_bytes(whole))
    status = wait(fork(argv, late, log, sample))
    yield "another finishes first", again("" if status == 1 else f"status {status}")
    for flags in (["--num-samples", str(10**9), "--temperature=1"], ["--top-k", str(2**70)]):
        status = wait(fork([*argv[:2], *flags], nothing, log, sample))
        yield " ".join(flags[:2]), "" if status == 2 else f"status {status}"
    yield "tracebacks", "one" if "Traceback" in log.read_text(errors="replace") else ""


# --------------------------------------------------------------------------------------------------
# Two ranks

# train.py with a fault in one rank: raise in a step, or wait where torch is imported.
WORKER = """
import os, signal, sys, time
sys.path[:0] = [ROOT]
from runtime import signals
signals.listen("train.py")
fault, rank = os.environ["FAULT"], os.environ["RANK"]
if fault == "importing":
    open(os.environ["SIGN"] + rank, "w").close(); time.sleep(1)
import torch, train
real, calls = train.backward, []
def backward(loss):
    calls.append(1)
    if rank == "1" and len(calls) == 2:
        if fault == "raise":
            raise RuntimeError("only here")
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if fault == "stop":
            open(os.environ["SIGN"] + rank, "w").close()
            time.sleep(4)
    real(loss)
train.backward = backward
sys.argv[0] = "train.py"
train.main()
"""


def rank_verdicts(bench: Bench) -> Iterator[tuple[str, str]]:
    """Hit one of two ranks, or their torchrun; yield (what was done, what was wrong)."""
    script = bench.folder / "worker.py"
    script.write_text(f"ROOT = {str(ROOT)!r}\n{WORKER}")

    def torchrun(number: int, fault: str, **environment: str) -> tuple[subprocess.Popen, Path]:
        out, sign = bench.folder / f"ranks-{number}", bench.folder / f"ranks-{number}.sign"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        command += ["--standalone", "--max-restarts=2", "--monitor-interval=0.1", str(script)]
        environment = os.environ | {"FAULT": fault, "SIGN": str(sign)} | environment
        with open(bench.folder / f"ranks-{number}.log", "w") as log:
            options = {"stdout": log, "stderr": log, "env": environment}
            return subprocess.Popen([*command, *bench.flags, f"--out={out}"], **options), sign

    def signed(sign: Path) -> None:
        deadline = time.time() + PATIENCE
        while not Path(f"{sign}1").exists() and time.time() < deadline:
            time.sleep(0.02)

    def orphans(number: int) -> int:
        """Count the workers that still live after some seconds."""
        name, deadline = f"--out={bench.folder}/ranks-{number}", time.time() + 15
        while time.time() < deadline:
            found = subprocess.run(["pgrep", "-f", "--", name], capture_output=True, text=True)
            if not found.stdout:
                return 0
            time.sleep(0.2)
        return len(found.stdout.split())

    def log(number: int) -> str:
        return (bench.folder / f"ranks-{number}.log").read_text(errors="replace")

    run, _ = torchrun(1, "raise")
    began, status = time.time(), run.wait(PATIENCE)
    told = "RuntimeError: only here" in log(1) and status == 0  # the restarts brought it to its end
    yield "an error on one rank", "" if told and time.time() - began < 60 else f"status {status}"
    run, _ = torchrun(2, "memory")
    status, times = run.wait(PATIENCE), log(2).count("resumed from")
    yield "no memory on one rank", "" if status == 1 and not times else f"tried {times} times again"
    for number, share in ((3, "0"), (4, "1")):
        run, sign = torchrun(number, "importing", TORCH_DISABLE_SHARE_RDZV_TCP_STORE=share)
        signed(sign)
        run.kill()
        left = orphans(number)
        what = (
            f"torchrun killed while workers import, store {'its own' if share == '1' else 'shared'}"
        )
        yield what, f"{left} orphans" if left else ""
    for number, fault in ((5, "importing"), (6, "stop")):
        stopped = bench.folder / f"stopped-{number}"
        run, sign = torchrun(number, fault, TRAIN_STOPPED=str(stopped))
        signed(sign)
        run.terminate()
        run.wait(PATIENCE)
        problem = "" if stopped.exists() else "did not leave with 75"
        problem = problem or ("a worker died" if "exitcode: -" in log(number) else "")
        run, _ = torchrun(number, "none")
        status = run.wait(PATIENCE)
        same = not status and faults.results(bench.folder / f"ranks-{number}")[1]
        yield f"SIGTERM to torchrun: {fault}", problem or ("" if same else f"then status {status}")


def smallest(kind: str, cases: list[Case]) -> list[Case]:
    """Return one case of a kind, from its middle; of signals, the first of each group of phases."""
    middle = cases[len(cases) // 2 : len(cases) // 2 + 1]
    return [cases[0], cases[70]] if kind == "signals" else middle


OTHERS: dict[str, Callable[[Bench], Iterator[tuple[str, str]]]] = {
    "sample": sample_verdicts,
    "ranks": rank_verdicts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", default=",".join([*KINDS, *OTHERS]), help="of these")
    parser.add_argument("--smallest", action="store_true", help="one case of most kinds")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    os.chdir(folder)
    bench, tried, wrong = Bench(folder), Counter[str](), []
    for kind in flags.kinds.split(","):
        began, count = time.time(), 0
        if kind in OTHERS:
            verdicts = [] if flags.smallest else list(OTHERS[kind](bench))
        else:
            cases = list(KINDS[kind](bench))
            cases = smallest(kind, cases) if flags.smallest else cases
            verdicts = []
            for case in cases:
                count += 1
                verdicts.append((case.name, bench.verdict(case, 1000 * len(tried) + count)))
                if verdicts[-1][1]:
                    print(f"WRONG  {kind}: {case.name}: {verdicts[-1][1]}", flush=True)
        tried[kind] = len(verdicts)
        wrong += [(kind, *verdict) for verdict in verdicts if verdict[1]]
        print(f"{kind:10} {len(verdicts):4} cases  {time.time() - began:5.0f} s", flush=True)
    print(f"{sum(tried.values())} cases, {len(wrong)} wrong; logs in {folder}")
    for verdict in wrong:
        print("  ".join(verdict))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
