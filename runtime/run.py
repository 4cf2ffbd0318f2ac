"""Keep the output folder of one run: who may write there, what is in it, and how a run ends.

    OUT/config.json      everything resolved: settings, versions, what was read, cut and dropped
    OUT/metrics.jsonl    one object per logged step or evaluation; locked while the run lasts
    OUT/checkpoints/     what the run can resume from, see `runtime/resume.py`
    OUT/model/           the trained model, a Hugging Face folder; written last
    OUT/model.replaced/  with --overwrite: the model that was there, until the new one is
    OUT/tokens/          the pairs as token ids, for a restart, see `runtime/tokens.py`

`train.train` calls `open`, `start` and `steps`; in every step `log_step`, `evaluate_if_due` and
`save_if_due`; at the end `finish`. All ranks call them. Rank 0 writes, but each rank writes its own
shards of a checkpoint.
"""

import contextlib
import fcntl
import math
import os
import platform
import resource
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from data import Pair
from formats import checkpoint, sandbox
from formats.errors import CheckpointError, DataError, InputError
from formats.files import dump_json, read_json, remove
from formats.progress import Progress, on_terminal
from methods.objectives import OBJECTIVES
from model import Config, Llama, train_flops
from runtime import resume, signals, tokens
from runtime.gpus import peak_flops
from runtime.inputs import Inputs
from runtime.processes import (
    AGREED,
    Unfailing,
    agree,
    any_rank,
    gather,
    is_rank_0,
    on_rank_0,
    out_of_memory,
    peak_resident,
    print0,
)
from runtime.settings import AUTO, Settings

# Where a worker leaves word of an error that would come again, for those that torchrun starts next.
# A run that fails early has no folder yet.
WORD = Path(tempfile.gettempdir()) / f"train-{signals.LAUNCHER}"

Metrics = dict[str, float]


class Run:
    """Owns one run and its output folder; an interrupted run resumes in the same folder."""

    def __init__(self, settings: Settings, device: torch.device):
        """Check the output folder before anything is read; see `continued_run` for a restart.

        Sets `settings.date`.

        Raises:
            FileExistsError: see `check_output_folder`.
            DataError: see `refuse_to_repeat`.
            SystemExit: the run was finished before torchrun restarted its workers.
        """
        self.settings, self.device = settings, device
        self.files = contextlib.ExitStack()  # closed, and OUT unlocked, however the run ends
        self.asked_to_resume = settings.resume
        agree(refuse_to_repeat)
        starts = gather((signals.LAUNCHER, signals.RESTARTS))
        self.launcher = " ".join(sorted({launcher for launcher, _ in starts}))
        restarted = any(restarts for _, restarts in starts)
        out, finished = on_rank_0(lambda: continued_run(settings, self.launcher, restarted))
        if finished:
            print0(f"{out} holds the finished run")
            sys.exit(0)
        if out:
            settings.out, settings.resume = str(out), "auto"
        on_rank_0(lambda: check_output_folder(settings))
        settings.date = on_rank_0(lambda: settings.date or day_of_run(settings))
        self.auto = {name for name in AUTO if getattr(settings, name) == "auto"}
        self.hardware = {"processes": dist.get_world_size(), "device": name_of(device)}
        chosen, self.too_many = on_rank_0(lambda: chosen_before(settings, self.auto, self.hardware))
        for name, value in chosen.items():
            setattr(settings, name, value)
            print0(f"--{name.replace('_', '-')} auto: {value}, as config.json of OUT says")
        self.begun = False  # is OUT this run's already?

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Unlock the output folder. Note on a KeyboardInterrupt what is saved.

        Leave word of an error that would come again to the workers that torchrun starts next. Lack
        of memory does not come again if `--microbatch-tokens auto` can take half. A rank that fails
        alone closes nothing, which could take long: it is going to leave at once.
        """
        alone = isinstance(error, Exception) and AGREED not in getattr(error, "__notes__", [])
        if not alone or dist.get_world_size() == 1:
            self.files.close()
        if isinstance(error, KeyboardInterrupt) and self.settings.out:
            error.add_note(what_is_saved(Path(self.settings.out)))
        elif error and would_repeat(error):
            with contextlib.suppress(OSError, CheckpointError):
                if not self._halve(error) and signals.RESTARTS < signals.MAX_RESTARTS:
                    with open(WORD, "x", encoding="utf-8") as word:
                        word.write(out_of_memory(error) or str(error))

    def open(self, inputs: Inputs, policy: Llama, optimizer: torch.optim.AdamW) -> None:
        """Lock the output folder until the run ends, and find what to resume from.

        Raises:
            CheckpointError: the newest checkpoint is damaged, or of another run.
        """
        self.inputs, self.policy, self.optimizer = inputs, policy, optimizer
        self.metrics_file = agree(
            lambda: open_output_folder(self.settings, self.files) if is_rank_0() else None
        )
        self.settings.out = on_rank_0(lambda: self.settings.out)
        self.out = Path(self.settings.out)
        found = resume.find_checkpoint(self.settings, self.out, inputs)
        self.resumed, self.state, self.rows = found
        if is_rank_0():
            for name, (tokenized, key) in inputs.tokens.items():
                tokens.save(self.out, name, key, tokenized)
        # The model is saved with what the run began with, whatever becomes of the source meanwhile.
        source, tokenizer = inputs.source, inputs.tokenizer
        self.companions = agree(
            lambda: {**checkpoint.companions(source), **tokenizer.changed_files()}
        )

    def start(
        self, score_held_out: Callable[[], Metrics], tensors: dict[str, torch.Tensor]
    ) -> None:
        """Restore the checkpoint, if there is one; else evaluate the untrained policy.

        Once the checkpoint is loaded, everything that this run will produce again is deleted from
        the output folder. score_held_out: returns the metrics of an evaluation. tensors: what the
        reference saves with each checkpoint.
        """
        self._score_held_out, self._reference_tensors = score_held_out, tensors
        if self.resumed:
            saved, others = self.state["optimizer"], self._reference_tensors
            resume.load_checkpoint(self.resumed, self.policy, self.optimizer, others, saved)
            print0(f"resumed from {self.resumed}")
        on_rank_0(self._reset_output_folder)
        self.begun = True
        self.writers = open_writers(self) if self.metrics_file else []
        print0(self._headline())
        self.before = self.state["before"] if self.resumed else self.evaluate(0)

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps (0-based) and show progress. From here on, SIGTERM saves."""
        self.stopped = self.files.enter_context(signals.stop_requested())
        self.pairs_seen = np.cumsum([len(step) for step in self.inputs.steps])
        first, count = self.state["step"], len(self.inputs.steps)
        self.bar = Progress(self.settings.objective, range(first, count), first=first)
        for step in self.bar:
            self.step_started = time.perf_counter()
            yield step

    def log_step(self, step: int, batch: list[Pair], metrics: Metrics) -> None:
        """Log a step's metrics, with speed and memory, every `--log-every` steps and at the end."""
        if self.device.type == "cuda":  # the optimizer may still be at work
            torch.cuda.synchronize(self.device)
        seconds = max(time.perf_counter() - self.step_started, 1e-9)  # a clock may stand still
        row = {
            "step": step + 1,
            "epoch": float(self.pairs_seen[step]) / len(self.inputs.pairs),
            **metrics,
            **speed(self.inputs.config, batch, seconds, self.device),
            **peak_memory(self.device),
        }
        count = len(self.inputs.steps)
        due = (step + 1) % self.settings.log_every == 0 or step + 1 == count
        if due:
            self._log(row)
        self.bar.note = describe(row)
        if due and not (on_terminal() and sys.stdout.isatty()):
            few = f" ({len(batch)} pairs)" if len(batch) < self.settings.batch_size else ""
            rates = f"lr {row['learning_rate']:.2e}  {row['pairs_per_second']:.2f} pairs/s"
            print0(f"step {step + 1}/{count}{few}  {describe(row)}  {rates}")

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate every `--eval-every` steps, but not after the last step: `finish` does that."""
        every, last = self.settings.eval_every, step + 1 == len(self.inputs.steps)
        if every and (step + 1) % every == 0 and not last:
            self.evaluate(step + 1)

    def evaluate(self, step: int) -> Metrics:
        """Evaluate on the held-out pairs and log it; return {} if there are none.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if not self.inputs.held_out:
            return {}
        print0(f"evaluating on {len(self.inputs.held_out)} held-out pairs …")
        with Progress(f"after {step} steps"):
            metrics = self._score_held_out()
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"held out, after {step} steps: loss {metrics['loss']}")
        self._log({"step": step} | {f"eval_{name}": value for name, value in metrics.items()})
        print0(f"held out, after {step} steps:  {describe(metrics)}")
        return metrics

    def save_if_due(self, step: int) -> None:
        """Save a checkpoint every `--save-every` steps and after the last; exit if told to stop.

        The exit status after a signal is RESUME_ME, on all ranks at the same step.
        """
        every, last = self.settings.save_every, step + 1 == len(self.inputs.steps)
        stop = any_rank(self.stopped(), self.device)
        if stop:
            signals.protect()
        if stop or (every and (last or (step + 1) % every == 0)):
            numbers = resume.optimizer_scalars(self.policy, self.optimizer)
            optimizer = {"class": type(self.optimizer).__name__, "numbers": numbers}
            self.state |= {"step": step + 1, "before": self.before, "optimizer": optimizer}
            tensors, keep = self._tensors(), self.settings.keep
            path = resume.save_checkpoint(self.out, tensors, self.state, keep)
        if stop:
            command = f"run the same command with {_out_flag(self.out)} to continue"
            print0(f"stopped by a signal; saved {path}; {command}")
            sys.exit(signals.RESUME_ME)

    def finish(self) -> dict:
        """Evaluate the trained policy and write OUT/model; return its path and both evaluations.

        The keys are "out", "model", "steps", "before" and "after". A signal changes nothing here.
        """
        signals.protect()
        after = self.evaluate(len(self.inputs.steps))
        inputs, model = self.inputs, self.out / "model"
        source, dtypes = inputs.source, inputs.weights.dtypes
        replace = self.companions
        with Progress(f"saving {model}"):
            checkpoint.save(self.policy, source, model, dtypes, is_rank_0(), replace=replace)
        if (replaced := self.out / "model.replaced").exists():
            warn_of_failure(lambda: remove(replaced))
        return {
            "out": self.out,
            "model": model,
            "steps": len(inputs.steps),
            "before": self.before,
            "after": after,
        }

    # -- parts of the above

    def _halve(self, error: BaseException) -> bool:
        """Let the next start take half of `--microbatch-tokens`, once; return True if it will.

        The rank without memory cannot ask the others: they wait for it, in the middle of a step, in
        a collective that it will not join. So it writes what the restarted ranks will read. If
        several ranks do, they write the same.
        """
        tokens = self.settings.microbatch_tokens
        if not (self.begun and out_of_memory(error) and "microbatch_tokens" in self.auto):
            return False
        out = self.out
        if self.too_many:
            less = "pass fewer, or what --plan says saves memory"
            error.add_note(f"half of --microbatch-tokens {self.too_many} is too much, too: {less}")
            return False
        config = read_json(out / "config.json", CheckpointError)
        config["settings"]["microbatch_tokens"] = max(1, tokens // 2)
        config["too_many_tokens"] = tokens
        temporary = out / f"config.json.{dist.get_rank()}"
        temporary.write_text(dump_json(config, indent=2) + "\n", encoding="utf-8")
        temporary.replace(out / "config.json")
        half = f"--microbatch-tokens {max(1, tokens // 2)} instead of {tokens}"
        error.add_note(f"the same command with {_out_flag(out)} will take {half}")
        return True

    def _tensors(self) -> dict[str, torch.Tensor]:
        return resume.training_tensors(self.policy, self.optimizer) | self._reference_tensors

    def _log(self, row: dict) -> None:
        """Write a row to metrics.jsonl and to the extra sinks; only rank 0 has any."""
        if self.metrics_file:
            self.metrics_file.write(dump_json(row) + "\n")
            self.metrics_file.flush()
        for write in self.writers:
            write(row)

    def _headline(self) -> str:
        """Return the lines that say what is about to be trained, and on what."""
        s, steps = self.settings, self.inputs.steps
        named = [f"{name} {getattr(s, name)}" for name in OBJECTIVES[s.objective].defaults]
        objective = ", ".join([s.objective, *named])
        parameters = sum(p.numel() for p in self.policy.parameters())
        size = f"{len(steps)} steps of {len(steps[0])} pairs, {parameters:,} parameters"
        ranks = f"{dist.get_world_size()} × {self.device.type} in {s.dtype}"
        return f"{objective}\n  {size}, {ranks}\n  → {self.out}"

    def _reset_output_folder(self) -> None:
        """Delete everything this run will produce again, then write config.json.

        A finished run's model keeps its name until everything else of that run is gone. Killed at
        any moment, this leaves a folder in which the same command starts again.
        """
        folder, step = self.out / "checkpoints", self.state["step"]
        ours = self.resumed and os.path.realpath(self.resumed.parent) == os.path.realpath(folder)
        for path in reversed(resume.checkpoints(self.out)):
            if not ours or resume.step_of(path) > step:
                remove(path)
        if (model := self.out / "model").exists():
            if (replaced := self.out / "model.replaced").exists():
                remove(replaced)
            model.rename(replaced)
        self.metrics_file.truncate(0)
        self.metrics_file.write(self.rows)
        self.metrics_file.flush()  # the next checkpoint copies what is on disk
        (self.out / "config.json").write_text(dump_json(self._summary(), indent=2) + "\n")

    def _summary(self) -> dict:
        """Return what config.json holds."""
        inputs, settings = self.inputs, self.settings
        asked = {"gamma": settings.gamma, "resume": self.asked_to_resume}
        packages = ("torch", "numpy", "safetensors", "tokenizers")
        versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
        return {
            "settings": asdict(settings) | asked,
            "source": str(inputs.source),
            "resumed": str(self.resumed) if self.resumed else None,
            "architecture": asdict(inputs.config),
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            **inputs.counts,
            "steps": len(inputs.steps),
            **self.hardware,
            "auto": sorted(self.auto),
            "too_many_tokens": self.too_many,
            "launcher": self.launcher,
            "versions": versions,
        }


# --------------------------------------------------------------------------------------------------
# The folder


def check_output_folder(settings: Settings) -> None:
    """Refuse an output folder that this run must not write to. Writes nothing.

    Raises:
        FileExistsError: it holds files of something else, a finished run, or checkpoints that
            `--resume` would not continue. The message says which flag would replace them.
    """
    if settings.out is None or not (out := Path(settings.out)).exists():
        return
    if any(out.iterdir()) and not (out / "metrics.jsonl").exists():
        raise FileExistsError(f"{out} is not empty and holds no run of ours: pass another --out")
    if settings.overwrite:
        return
    if (out / "model").exists():
        model = shlex.quote(str(out / "model"))
        further = (
            f"to train it further, start a new run, with a schedule of its own: --model {model}"
        )
        what = f"{out} holds a finished run"
        raise FileExistsError(
            f"{what}: pass --overwrite to replace it, or another --out; {further} and another --out"
        )
    # Either the link that --resume names may be in this folder, or what it leads to.
    paths = os.path.abspath(settings.resume), os.path.realpath(settings.resume)
    places = {os.path.realpath(os.path.dirname(path)) for path in paths}
    resumes_here = settings.resume == "auto" or os.path.realpath(out / "checkpoints") in places
    if not resumes_here and resume.checkpoints(out):
        what = f"{out} holds checkpoints of a run"
        raise FileExistsError(f"{what}: pass --overwrite to replace them, or another --out")


def open_output_folder(settings: Settings, files: contextlib.ExitStack) -> TextIO:
    """Choose and lock the output folder: a new one, an empty one, or an unfinished run to resume.

    Sets `settings.out`. Returns OUT/metrics.jsonl, open and locked until this process ends.

    Raises:
        FileExistsError: as in `check_output_folder`, or another run is writing there.
    """
    if settings.out is None:
        settings.out = str(_new_folder(settings.objective))
    out = Path(settings.out)
    check_output_folder(settings)
    out.mkdir(parents=True, exist_ok=True)
    metrics = files.enter_context(open(out / "metrics.jsonl", "a+", encoding="utf-8"))
    try:
        fcntl.flock(metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(f"{out}: another run is writing there") from None
    check_output_folder(settings)  # another run may have finished since
    return metrics


def refuse_to_repeat() -> None:
    """Do nothing, unless torchrun has restarted its workers after an error that would come again.

    Raises:
        DataError: that error.
    """
    error = ""
    if signals.RESTARTS:
        with contextlib.suppress(OSError):
            error = WORD.read_text(encoding="utf-8")
            if signals.RESTARTS >= signals.MAX_RESTARTS:  # nobody will come after us
                WORD.unlink()
    if error:
        raise DataError(error)


def continued_run(settings: Settings, launcher: str, restarted: bool) -> tuple[Path | None, bool]:
    """Return the folder of the run that this start continues whatever its flags say; is it done?

    A restarted worker continues the run of its own torchrun. The same command continues a run that
    began with `--resume PATH`, unless --overwrite takes it back to PATH. (None, False): neither.
    """
    given = settings.out and Path(settings.out)
    for config in [given / "config.json"] if given else Path("runs").glob("*/config.json"):
        with contextlib.suppress(CheckpointError):  # another process may still be writing it
            found, out = read_json(config, CheckpointError), config.parent
            finished = (out / "model").exists()
            launchers = str(found.get("launcher")).split()
            ours = restarted and not {*launchers}.isdisjoint(launcher.split())
            if ours and (finished or resume.checkpoints(out) or not given):
                return out, finished
            same = found.get("settings", {}).get("resume") == settings.resume
            begun = same and settings.resume not in ("auto", "never") and not settings.overwrite
            if given and begun and not finished and resume.checkpoints(out):
                return out, False
    return None, False


def chosen_before(
    settings: Settings, auto: set[str], hardware: dict
) -> tuple[dict[str, Any], int | None]:
    """Return what auto means in the unfinished run in OUT, and with how many tokens memory failed.

    Another number of ranks, another device, or other settings than those of the output: ({}, None).
    """
    out = Path(settings.out or os.devnull)
    if not auto or (out / "model").exists():
        return {}, None
    try:
        found = read_json(out / "config.json", CheckpointError)
    except CheckpointError:
        return {}, None
    names = [f.name for f in fields(Settings)]
    same = {*names[: names.index("out")]} - {*auto, "date"}  # all that could need memory, and more
    begun, now = found.get("settings", {}), asdict(settings)
    if not auto <= {*found.get("auto", ())} or any(begun.get(name) != now[name] for name in same):
        return {}, None
    if any(found.get(name) != value for name, value in hardware.items()):
        return {}, None
    return {name: begun[name] for name in sorted(auto)}, found.get("too_many_tokens")


def name_of(device: torch.device) -> str:
    """Return the name of a GPU, or of this machine's kind of processor."""
    gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if gpu else platform.processor() or "cpu"


def day_of_run(settings: Settings) -> str:
    """Return the day on which the run to resume began, YYYY-MM-DD; for a new run, today."""
    path = resume.checkpoint_to_resume(settings, Path(settings.out) if settings.out else None)
    day = None
    with contextlib.suppress(CheckpointError):  # `resume.find_checkpoint` will report it
        day = resume.read_state(path)["identity"]["date"] if path else None
    return day or sandbox.today()


def _new_folder(objective: str) -> Path:
    """Create runs/OBJECTIVE-N with the first free N, which another run may take meanwhile."""
    n = 1
    while True:
        path = Path("runs") / f"{objective}-{n}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            n += 1


# --------------------------------------------------------------------------------------------------
# Metrics


def open_writers(run: Run) -> list[Callable[[dict], object]]:
    """Open the optional extra sinks for metrics (TensorBoard, W&B); they continue a resumed run."""
    writers: list[Callable[[dict], object]] = []
    if run.settings.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        folder, purge = str(run.out / "tensorboard"), run.state["step"] + 1
        board = run.files.enter_context(SummaryWriter(folder, purge_step=purge))

        def write(row: dict) -> None:
            for name, value in row.items():
                board.add_scalar(name, value, row["step"])
            board.flush()  # a rank that fails alone does not close it

        writers.append(write)
    if run.settings.wandb:
        import wandb

        # The id stays the same when a run resumes.
        options = {"project": "simpo", "name": run.out.name, "id": run.state["run"]}
        online = run.files.enter_context(
            wandb.init(**options, resume="allow", dir=run.out, config=asdict(run.settings))
        )
        writers.append(lambda row: online.log(row, step=row["step"]))
    return writers


def peak_memory(device: torch.device) -> Metrics:
    """Return the most GiB this rank has held: allocated on the GPU, or resident on a CPU.

    On a GPU also what the allocator has reserved, with what lies unused between tensors.
    """
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device) / 2**30
        allocated = torch.cuda.max_memory_allocated(device) / 2**30
        return {"peak_memory_gib": allocated, "reserved_memory_gib": reserved}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = peak_resident() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_gib": peak / 2**30}


def speed(config: Config, pairs: list[Pair], seconds: float, device: torch.device) -> Metrics:
    """Return tokens and pairs per second over all ranks and, on a GPU whose peak is known, MFU.

    MFU is the share of all GPUs' peak that went into the model's arithmetic.
    """
    rates = {
        "tokens_per_second": sum(pair.tokens for pair in pairs) / seconds,
        "pairs_per_second": len(pairs) / seconds,
    }
    if peak := peak_flops(device):
        flops = sum(train_flops(config, pair) for pair in pairs)
        rates["mfu"] = flops / seconds / peak / dist.get_world_size()
    return rates


def describe(metrics: Metrics) -> str:
    """Return a one-line summary for the terminal."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if "rewards/margins" in metrics:
        parts += [f"margin {metrics['rewards/margins']:+.4f}"]
        parts += [f"accuracy {100 * metrics['rewards/accuracies']:.1f} %"]
    else:
        parts += [f"log p {metrics['avg_logps/chosen']:.3f} nats/token"]
    return "  ".join(parts)


# --------------------------------------------------------------------------------------------------
# How a run ends


def what_is_saved(out: Path) -> str:
    """Say which checkpoint an interrupted run has, and how to continue from it."""
    if (out / "model").exists():
        return f"{out} holds a finished run"
    if saved := resume.checkpoints(out):
        return f"{saved[-1]} is saved; run the same command with {_out_flag(out)} to continue"
    return "no checkpoint was saved" + (f"; the metrics are in {out}" if out.exists() else "")


def _out_flag(out: Path) -> str:
    return f"--out {shlex.quote(str(out))}"


def warn_of_failure(work: Callable[[], object]) -> None:
    """Do on rank 0, after the model is saved, what no run depends on; warn if it fails."""
    try:
        if is_rank_0():
            work()
    except Exception as e:
        print0(f"warning: {type(e).__name__}: {e}")


def would_repeat(error: BaseException) -> bool:
    """Return True for an error that a run would meet again if it was resumed."""
    return isinstance(error, FloatingPointError) or bool(out_of_memory(error))


@contextlib.contextmanager
def report_errors(program: str, ends: bool = False) -> Iterator[None]:
    """Report expected failures on stderr and exit with status 1; end the process if it listens.

    For bad input, I/O errors and NaN, rank 0 prints one line; `agree` brings the error to it. A
    rank that fails alone prints the error and leaves at once, since the others wait for it and
    cannot be asked. Ctrl-C exits with status 130, and rank 0 says what is saved, which `Run` noted
    on the exception.

    ends: nothing comes after it in this process; a program that listens to signals says so, too.
    Such a program leaves without Python's own way out. Gloo's threads outlive
    `destroy_process_group`; if one frees a tensor while Python shuts down, it asks for the GIL, is
    ended by Python inside a destructor, and aborts the process ("terminate called without an active
    exception", a run of many). A signal there would also end it with another status.
    """
    status: int | str | None = 0
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    with contextlib.ExitStack() as streams:
        streams.enter_context(contextlib.redirect_stdout(Unfailing(sys.stdout)))
        streams.enter_context(contextlib.redirect_stderr(Unfailing(sys.stderr)))
        try:
            yield
        except SystemExit as e:
            status = e.code
        except (Exception, KeyboardInterrupt) as e:
            if alone and not (signals.is_listening() or expected(e)):
                raise
            status = 130 if isinstance(e, KeyboardInterrupt) else 1
            print_error(program, e)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if dist.is_initialized() and (alone or status in (0, signals.RESUME_ME)):
                dist.destroy_process_group()
        if ends or signals.is_listening() or (status and not alone):
            signals.leave(int(status or 0))
    if status:
        sys.exit(status)


def expected(error: BaseException) -> bool:
    """Return True for an error that a user or a machine can cause."""
    kinds = (InputError, OSError, FloatingPointError, KeyboardInterrupt)
    return isinstance(error, kinds) or bool(out_of_memory(error))


def print_error(program: str, error: BaseException) -> None:
    """Print one line about an expected error, and the traceback of another."""
    notes = getattr(error, "__notes__", [])
    shared = AGREED in notes or isinstance(error, (InputError, FloatingPointError))
    if isinstance(error, KeyboardInterrupt):
        text = "; ".join([f"\n{program}: interrupted", *notes])
        shared = True
    elif not expected(error):
        text, shared = "".join(traceback.format_exception(error)), False
    elif out_of_memory(error):
        advice = "; ".join(notes) or "lower --microbatch-tokens, or --batch-size"
        text, shared = f"{program}: error: {out_of_memory(error)}; {advice}", False
    else:
        text = f"{program}: error: {error}"
    # Before the ranks have joined, a machine that lacks what the others have must say so itself.
    first = is_rank_0() if dist.is_initialized() else os.environ.get("LOCAL_RANK", "0") == "0"
    if first or not shared:
        print(text, file=sys.stderr)
