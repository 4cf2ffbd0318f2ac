"""Keep the output folder of one run: who may write there, what is in it, and how a run ends.

    OUT/config.json      everything resolved: settings, versions, what was read, cut and dropped
    OUT/metrics.jsonl    one object per logged step or evaluation; locked while the run lasts
    OUT/checkpoints/     what the run can resume from, see `runtime/resume.py`
    OUT/model/           the trained model, a Hugging Face folder; written last

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
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.distributed as dist

from data import Pair
from formats import checkpoint, sandbox
from formats.errors import CheckpointError, InputError
from formats.files import dump_json, read_json
from methods.objectives import OBJECTIVES
from model import Config, Llama, train_flops
from runtime import resume
from runtime.inputs import Inputs
from runtime.plan import peak_flops
from runtime.processes import (
    PARENT,
    agree,
    any_rank,
    is_rank_0,
    on_rank_0,
    print0,
    progress,
    stop_requested,
)
from runtime.settings import Settings

Metrics = dict[str, float]


class Run:
    """Owns one run and its output folder; an interrupted run resumes in the same folder."""

    def __init__(self, settings: Settings, device: torch.device):
        """Check the output folder before anything is read. Sets `settings.date`.

        Raises:
            FileExistsError: see `check_output_folder`.
        """
        self.settings, self.device = settings, device
        self.files = contextlib.ExitStack()  # closed, and OUT unlocked, however the run ends
        on_rank_0(lambda: check_output_folder(settings))
        settings.date = on_rank_0(lambda: settings.date or day_of_run(settings))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Unlock the output folder. Note on a KeyboardInterrupt what is saved."""
        self.files.close()
        if isinstance(error, KeyboardInterrupt) and self.settings.out:
            error.add_note(what_is_saved(Path(self.settings.out)))

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
        self.writers = open_writers(self) if self.metrics_file else []
        print0(self._headline())
        self.before = self.state["before"] if self.resumed else self.evaluate(0)

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps (0-based) under a progress bar. From here on, SIGTERM saves."""
        self.stopped = self.files.enter_context(stop_requested())
        self.pairs_seen = np.cumsum([len(step) for step in self.inputs.steps])
        first, count = self.state["step"], len(self.inputs.steps)
        what = self.settings.objective
        self.bar = progress(range(first, count), what, initial=first, total=count)
        for step in self.bar:
            self.step_started = time.perf_counter()
            yield step

    def log_step(self, step: int, batch: list[Pair], metrics: Metrics) -> None:
        """Log a step's metrics, with speed and memory, every `--log-every` steps and at the end."""
        seconds = time.perf_counter() - self.step_started
        row = {
            "step": step + 1,
            "epoch": float(self.pairs_seen[step]) / len(self.inputs.pairs),
            **metrics,
            **speed(self.inputs.config, batch, seconds, self.device),
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        count = len(self.inputs.steps)
        due = (step + 1) % self.settings.log_every == 0 or step + 1 == count
        if due:
            self._log(row)
        if not self.bar.disable:
            self.bar.set_postfix_str(describe(row))
        elif due:
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
        if stop or (every and (last or (step + 1) % every == 0)):
            numbers = resume.optimizer_scalars(self.policy, self.optimizer)
            optimizer = {"class": type(self.optimizer).__name__, "numbers": numbers}
            self.state |= {"step": step + 1, "before": self.before, "optimizer": optimizer}
            tensors, keep = self._tensors(), self.settings.keep
            path = resume.save_checkpoint(self.out, tensors, self.state, keep)
        if stop:
            command = f"run the same command with --out {self.out} to continue"
            print0(f"stopped by a signal; saved {path}; {command}")
            sys.exit(resume.RESUME_ME)

    def finish(self) -> dict:
        """Evaluate the trained policy and write OUT/model; return its path and both evaluations.

        The keys are "out", "model", "steps", "before" and "after".
        """
        after = self.evaluate(len(self.inputs.steps))
        inputs, model = self.inputs, self.out / "model"
        source, dtypes = inputs.source, inputs.weights.dtypes
        replace = self.companions
        checkpoint.save(self.policy, source, model, dtypes, is_rank_0(), replace=replace)
        return {
            "out": self.out,
            "model": model,
            "steps": len(inputs.steps),
            "before": self.before,
            "after": after,
        }

    # -- parts of the above

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
        """Return the line that says what is about to be trained, and on what."""
        s, steps = self.settings, self.inputs.steps
        named = [f"{name} {getattr(s, name)}" for name in OBJECTIVES[s.objective].defaults]
        objective = ", ".join([s.objective, *named])
        parameters = sum(p.numel() for p in self.policy.parameters())
        size = f"{len(steps)} steps of {len(steps[0])} pairs, {parameters:,} parameters"
        ranks = f"{dist.get_world_size()} × {self.device.type} in {s.dtype}"
        return f"{objective}: {size}, {ranks} → {self.out}"

    def _reset_output_folder(self) -> None:
        """Delete everything this run will produce again, then write config.json."""
        shutil.rmtree(self.out / "model", ignore_errors=True)
        for path in resume.checkpoints(self.out):
            if resume.step_of(path) > self.state["step"]:
                shutil.rmtree(path)
        self.metrics_file.truncate(0)
        self.metrics_file.write(self.rows)
        self.metrics_file.flush()  # the next checkpoint copies what is on disk
        (self.out / "config.json").write_text(dump_json(self._summary(), indent=2) + "\n")

    def _summary(self) -> dict:
        """Return what config.json holds."""
        inputs, settings = self.inputs, self.settings
        device = platform.processor() or "cpu"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name(self.device)
        packages = ("torch", "numpy", "safetensors", "tokenizers")
        versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
        return {
            "settings": asdict(settings) | {"gamma": settings.gamma},
            "source": str(inputs.source),
            "resumed": str(self.resumed) if self.resumed else None,
            "architecture": asdict(inputs.config),
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            **inputs.counts,
            "steps": len(inputs.steps),
            "processes": dist.get_world_size(),
            "launcher": launcher(),
            "device": device,
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
        what = f"{out} holds a finished run"
        raise FileExistsError(f"{what}: pass --overwrite to replace it, or another --out")
    resumes_from = Path(settings.resume).resolve().parent
    resumes_here = settings.resume == "auto" or resumes_from == (out / "checkpoints").resolve()
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
        settings.out = str(_restarted_run() or _new_folder(settings.objective))
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


def _restarted_run() -> Path | None:
    """Return the unfinished run of our own torchrun, if that has restarted its workers."""
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return None
    found = None
    for path in Path("runs").glob("*/config.json"):
        with contextlib.suppress(CheckpointError):  # another process may still be writing it
            ours = read_json(path, CheckpointError).get("launcher") == launcher()
            if ours and not (path.parent / "model").exists():
                found = path.parent
    return found


def day_of_run(settings: Settings) -> str:
    """Return the day on which the run to resume began, YYYY-MM-DD; for a new run, today."""
    out = Path(settings.out) if settings.out else _restarted_run()
    unfinished = out and not (out / "model").exists()
    newest = next(reversed(resume.checkpoints(out)), None) if out and unfinished else None
    path = {"auto": newest, "never": None}.get(settings.resume, Path(settings.resume))
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


def launcher() -> str:
    """Identify the torchrun that launched us; unchanged when it restarts its workers."""
    return f"{platform.node()}:{PARENT}:{os.environ.get('TORCHELASTIC_RUN_ID', '')}"


# --------------------------------------------------------------------------------------------------
# Metrics


def open_writers(run: Run) -> list[Callable[[dict], object]]:
    """Open the optional extra sinks for metrics (TensorBoard, W&B); they continue a resumed run."""
    writers: list[Callable[[dict], object]] = []
    if run.settings.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        folder, purge = str(run.out / "tensorboard"), run.state["step"] + 1
        board = run.files.enter_context(SummaryWriter(folder, purge_step=purge))
        writers.append(
            lambda row: [board.add_scalar(name, value, row["step"]) for name, value in row.items()]
        )
    if run.settings.wandb:
        import wandb

        # The id stays the same when a run resumes.
        options = {"project": "simpo", "name": run.out.name, "id": run.state["run"]}
        online = run.files.enter_context(
            wandb.init(**options, resume="allow", dir=run.out, config=asdict(run.settings))
        )
        writers.append(lambda row: online.log(row, step=row["step"]))
    return writers


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this rank has held: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


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
        return f"{saved[-1]} is saved; run the same command with --out {out} to continue"
    return "no checkpoint was saved" + (f"; the metrics are in {out}" if out.exists() else "")


@contextlib.contextmanager
def report_errors(program: str) -> Iterator[None]:
    """Report expected failures on stderr and exit with status 1.

    For bad input, I/O errors and NaN, rank 0 prints one line; `agree` brings the error to it. A
    rank without memory prints the error and what to do. Ctrl-C exits with status 130, and rank 0
    says what is saved, which `Run` noted on the exception.
    """
    try:
        yield
    except (InputError, OSError, FloatingPointError) as e:
        if is_rank_0():
            print(f"{program}: error: {e}", file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as e:  # the other ranks wait for this one and cannot be asked
        message = f"{program}: error: {e}\nlower --microbatch-tokens"
        print(message, file=sys.stderr, flush=True)
        os._exit(1)
    except KeyboardInterrupt as e:
        if is_rank_0():
            notes = ["", *getattr(e, "__notes__", [])]
            print(f"\n{program}: interrupted{'; '.join(notes)}", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
