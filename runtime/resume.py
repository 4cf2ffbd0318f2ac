"""Save and find the checkpoints of a run: OUT/checkpoints/step-000120 and the like.

A checkpoint holds all that the next step depends on, so a run that is killed and resumed ends like
one that was never killed. Weights and optimizer state are safetensors, each rank's shards in files
of its own, and any number of ranks can read them back. Nothing is pickled. No random state is
saved: the order of the pairs follows from seed and epoch, and nothing else is random.

state.json says what belongs to a checkpoint:

    version     of this format
    sha256      of everything else in state.json
    files       name → bytes, sha256: every other file, as it was meant to be written
    identity    what shapes the run: settings, steps, tokens, template, files of the model
    source      name → sha256, stat: files of the model, so that they are not read again to compare
    step, run, before, optimizer    where the run was
"""

import contextlib
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from formats.checkpoint import content_files
from formats.errors import CheckpointError
from formats.files import digests, read_json, reading, remove, stat_of, sync
from formats.progress import Progress
from model import Llama
from runtime.inputs import Inputs
from runtime.processes import agree, gather, is_rank_0, on_every_rank, on_rank_0, print0, slice_of
from runtime.settings import Settings
from runtime.tokens import digest

FILE_BYTES = 2**30  # of one file of a checkpoint: DCP holds a whole file in memory
VERSION = 2  # of state.json; the first had none
ANEW = "--resume never --overwrite to start anew"
SCHEDULE = {"epochs", "max-steps", "batch-size", "seed", "shuffle"}  # all they do is make the steps


def fingerprint(settings: Settings, inputs: Inputs, source: dict[str, dict]) -> dict:
    """Return everything that must match before resuming: the content of what shapes the run.

    These are the settings that affect the result, the pairs of every step and their tokens, the
    chat template, and the model's files, of which `source` holds the `digests`. No path is among
    them, so the same bytes under another path resume.
    """
    by_content = {"model"} | {f.name for f in fields(settings) if f.metadata["may_change"]}
    values = {name: value for name, value in asdict(settings).items() if name not in by_content}
    template = (inputs.tokenizer.template or "").encode()
    return {name.replace("_", "-"): value for name, value in values.items()} | {
        "data": inputs.pairs.digest,
        "eval-data": inputs.held_out.digest,
        "steps": digest([(step,) for step in inputs.steps]),
        "chat template": f"sha256 {hashlib.sha256(template).hexdigest()[:16]}",
        **{name: f"sha256 {entry['sha256'][:16]}" for name, entry in source.items()},
    }


def training_tensors(policy: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return weights and optimizer state by name: the live tensors, so loading fills them in place.

    The state is saved by its own keys, those of AdamW being exp_avg and exp_avg_sq. This holds for
    every optimizer that keeps its state per parameter.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            if _is_saved_as_tensor(value):
                tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def optimizer_scalars(policy: Llama, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the numbers in the optimizer's state, such as AdamW's `step`, by key.

    A value is one number if all parameters have the same, else a dict from parameter to number.
    """
    scalars: dict[str, Any] = {}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state[parameter].items():
            if value is not None and not _is_saved_as_tensor(value):
                number = value.item() if isinstance(value, Tensor) else value
                scalars.setdefault(key, {})[name] = number
    count = sum(1 for _ in policy.parameters())
    for key, numbers in scalars.items():
        if len(numbers) == count and len(set(numbers.values())) == 1:
            scalars[key] = next(iter(numbers.values()))
    return scalars


def _is_saved_as_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let a new optimizer allocate its state by a step at rate 0 with zero gradients.

    That may change state and weights; loading overwrites both.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = out.glob("checkpoints/step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that a checkpoint was saved after: 120 for step-000120."""
    return int(checkpoint.name.removeprefix("step-"))


class _DigestedFile(io.BufferedWriter):
    """Digests what is to be written; whatever the disk makes of it, is compared with that."""

    def __init__(self, path: str | os.PathLike):
        super().__init__(io.FileIO(path, "w"))
        self.sha, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write all of `data` to the file: DCP waits for the disk without emptying the buffer."""
        self.sha.update(data)
        self.size += super().write(data)
        self.flush()
        return len(data)


class _DigestedFiles(FileSystem):
    """Opens files for DCP. files: name → bytes and sha256 of those that were written."""

    def __init__(self) -> None:
        self.files: dict[str, dict] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with _DigestedFile(path) as file:
            yield file
        self.files[Path(path).name] = {"bytes": file.size, "sha256": file.sha.hexdigest()}


def save_checkpoint(out: Path, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Write a checkpoint under another name, wait for the disk, then rename it: complete or absent.

    Call it on all ranks. Older checkpoints are deleted until `keep` are left. state: what goes into
    state.json beside version, files and digest.

    Raises:
        OSError: it cannot be written, for instance on a full disk. Older checkpoints stay.
    """
    path = out / "checkpoints" / f"step-{state['step']:06d}"
    temporary = path.with_name(path.name + ".incomplete")
    numbers, size = {}, 0  # numbers: name of a tensor → number of the file that it goes to
    for name, tensor in tensors.items():
        size += tensor.nbytes // dist.get_world_size()
        numbers[name] = 1 + size // FILE_BYTES

    def begin() -> None:
        _delete(list(path.parent.glob("*.incomplete")))
        temporary.mkdir(parents=True)

    def finish(files: dict[str, dict]) -> None:
        for name, entry in files.items():
            if not (file := temporary / name).exists() or file.stat().st_size != entry["bytes"]:
                raise OSError(f"{name} of another rank is not there; all nodes must see {out}")
        metrics = (out / "metrics.jsonl").read_bytes()
        files["metrics.jsonl"] = {
            "bytes": len(metrics),
            "sha256": hashlib.sha256(metrics).hexdigest(),
        }
        (temporary / "metrics.jsonl").write_bytes(metrics)
        whole = state | {"version": VERSION, "files": files}
        whole["sha256"] = _digest_of_state(whole)
        (temporary / "state.json").write_text(json.dumps(whole, indent=2) + "\n")
        for file in (temporary / "metrics.jsonl", temporary / "state.json", temporary):
            sync(file)
        temporary.rename(path)
        sync(path.parent)
        _delete(checkpoints(out)[:-keep])

    try:
        on_rank_0(begin)
        writer = HuggingFaceStorageWriter(str(temporary), numbers, save_distributed=True)
        writer.fs = _DigestedFiles()
        with Progress(f"saving {path}"):
            dcp.save(tensors, storage_writer=writer)
            parts = gather(writer.fs.files)
            on_rank_0(lambda: finish({name: e for part in parts for name, e in part.items()}))
    except (CheckpointException, OSError) as e:
        cause = _cause(e)
        if is_rank_0():
            shutil.rmtree(temporary, ignore_errors=True)
        older = checkpoints(out)
        kept = f"{older[-1]} is complete" if older else "there is no older one"
        raise OSError(f"{path}: cannot be saved: {cause}; {kept}") from None
    return path


def _delete(paths: list[Path]) -> None:
    """Delete checkpoints that nobody needs; warn of one that cannot be deleted, and go on."""
    for path in paths:
        try:
            remove(path)
        except OSError as e:
            print0(f"warning: {path}: cannot be deleted: {e}")


def _cause(error: BaseException) -> BaseException:
    """Unwrap the first error inside a CheckpointException; re-raise KeyboardInterrupt."""
    cause = error
    if isinstance(error, CheckpointException):
        cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, KeyboardInterrupt):
        raise cause
    return cause


def checkpoint_to_resume(settings: Settings, out: Path | None) -> Path | None:
    """Return the checkpoint that `--resume` names: with auto, the newest of an unfinished run."""
    unfinished = checkpoints(out) if out and not (out / "model").exists() else []
    newest = unfinished[-1] if unfinished else None
    return {"auto": newest, "never": None}.get(settings.resume, Path(settings.resume))


def find_checkpoint(settings: Settings, out: Path, inputs: Inputs) -> tuple[Path | None, dict, str]:
    """Return (checkpoint, state, metrics) to resume from; (None, a new state, "") for a new run.

    Call it on all ranks, which share the files to digest. The state has this run's identity.

    Raises:
        CheckpointError: it is damaged, or of another run; the message names what differs. Or the
            model's files have changed since they were read.
    """
    path = on_rank_0(lambda: checkpoint_to_resume(settings, out))
    state = read_whole(path) if path else on_rank_0(lambda: {"step": 0, "run": uuid.uuid4().hex})

    def digest_source() -> dict[str, dict]:
        files = content_files(inputs.source)
        for name in sorted(inputs.stats.keys() | {path.name for path in files}):
            path = inputs.source / name
            if not path.exists() or stat_of(path) != inputs.stats.get(name):
                raise CheckpointError(f"{path} was changed while it was read: start again")
        return digests(slice_of(files), state.get("source", {}))

    parts = on_every_rank(digest_source)
    source = {name: entry for part in parts for name, entry in part.items()}
    identity = fingerprint(settings, inputs, source)
    if path:
        refuse_another_run(path, state["identity"], identity)
    rows = (path / "metrics.jsonl").read_text(encoding="utf-8") if path and is_rank_0() else ""
    return path, state | {"identity": identity, "source": source}, rows


def refuse_another_run(path: Path, saved: dict, wanted: dict) -> None:
    """Raise CheckpointError if two `fingerprint`s differ; it names both values of what does."""
    differ = {key for key in saved | wanted if saved.get(key) != wanted.get(key)}
    if "steps" not in differ:  # `--epochs 6` and `--max-steps 48` may be the same run
        differ -= SCHEDULE
    if differ:
        values = [f"{key} {saved.get(key)!r} (now {wanted.get(key)!r})" for key in sorted(differ)]
        advice = f"pass what it began with, another --out, or {ANEW}"
        raise CheckpointError(f"{path} is of another run: {', '.join(values)}; {advice}")


def read_whole(path: Path) -> dict:
    """Return the state of a checkpoint whose files are all as they were saved.

    Call it on all ranks.

    Raises:
        CheckpointError: a file is not, or it is of another version. The message names the file and
            the newest older checkpoint that is whole, or says that there is none.
    """
    try:
        return _read_whole(path)
    except CheckpointError as damage:
        advice = f"no older one is whole: pass {ANEW}"
        named = path if path.name.startswith("step-") else Path(os.path.realpath(path))  # a link
        siblings = on_rank_0(lambda: checkpoints(named.absolute().parent.parent))
        older = list(itertools.takewhile(lambda other: other.name != named.name, siblings))
        for other in reversed(older):
            with contextlib.suppress(CheckpointError):
                _read_whole(other)
                advice = f"{other.name} is whole: pass --resume {shlex.quote(str(other))}"
                break
        raise CheckpointError(f"{damage}; {advice}") from None


def _read_whole(path: Path) -> dict:
    """Return the state of a checkpoint. Raises CheckpointError if a file is not what was saved."""
    state = on_rank_0(lambda: read_state(path))
    files: dict[str, dict] = state["files"]

    def check_digests() -> None:
        for name in Progress(f"checking {path}", slice_of(sorted(files))):
            with reading(path / name, CheckpointError):
                found = digests([path / name])[name]["sha256"]
            if found != files[name]["sha256"]:
                problem = "is not what was saved: its SHA-256 is another"
                raise CheckpointError(f"{path / name} {problem}")

    on_every_rank(check_digests)
    return state


def read_state(path: Path) -> dict:
    """Return state.json, if it is as it was saved and the folder holds the files that it names."""
    file = path / "state.json"
    state = read_json(file, CheckpointError)
    if state.get("version") != VERSION:
        ours = f"version {state.get('version')}, this program resumes from version {VERSION}"
        raise CheckpointError(f"{file}: {ours}: finish the run with the program that began it")
    if state.get("sha256") != _digest_of_state(state):
        raise CheckpointError(f"{file} is not what was saved: its SHA-256 is another")
    found = {entry.name for entry in path.iterdir()}
    for problem, names in (
        ("is missing", state["files"].keys() - found),
        ("does not belong to the checkpoint", found - state["files"].keys() - {file.name}),
    ):
        if names:
            raise CheckpointError(f"{path / min(names)} {problem}")
    for name, entry in state["files"].items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != entry["bytes"]:
            raise CheckpointError(f"{path / name}: {size} bytes, {entry['bytes']} were saved")
    return state


def _digest_of_state(state: dict) -> str:
    """Return the SHA-256 of a state without its own."""
    rest = {key: value for key, value in state.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_checkpoint(
    path: Path,
    policy: Llama,
    optimizer: torch.optim.Optimizer,
    others: dict[str, Tensor],
    saved: dict[str, Any],
) -> None:
    """Fill weights, optimizer state and the `others` tensors in place. Call it on all ranks.

    saved: what state.json says of the optimizer: its "class" and its "numbers".

    Raises:
        CheckpointError: the checkpoint is damaged, or of another optimizer.
    """
    if saved.get("class") != type(optimizer).__name__ or not isinstance(saved.get("numbers"), dict):
        ours = type(optimizer).__name__
        raise CheckpointError(f"{path}: holds the state of {saved.get('class')}, not of {ours}")
    create_state(optimizer)
    tensors = training_tensors(policy, optimizer) | others
    agree(lambda: check_tensors(path, tensors))
    logging.disable(logging.WARNING)  # DCP would log a traceback of what we report in one line
    try:
        with Progress(f"loading {path}"):
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    except CheckpointException as e:
        raise CheckpointError(f"{path}: cannot be read: {_cause(e)}") from None
    finally:
        logging.disable(logging.NOTSET)
    for name, parameter in policy.named_parameters():
        state = optimizer.state[parameter]
        for key, numbers in saved["numbers"].items():
            number = numbers.get(name) if isinstance(numbers, dict) else numbers
            if number is None:
                continue
            if isinstance(state.get(key), Tensor):
                state[key].fill_(number)
            else:
                state[key] = number


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Check that a checkpoint holds every row of exactly these tensors.

    DCP takes a tensor's size from the highest offset in any file and does not miss rows below it.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or has not all rows.
    """
    with reading(path, CheckpointError, also=(SafetensorError,)):
        saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    for name in sorted(saved.keys() | tensors.keys()):
        chunks = saved[name].chunks if name in saved else []
        rows = {tuple(chunk.offsets): chunk.sizes.numel() for chunk in chunks}
        found = saved[name].size if name in saved else None, sum(rows.values())
        wanted = (tensors[name].shape, tensors[name].numel()) if name in tensors else (None, 0)
        if found != wanted:
            problem = f"shape and elements are {found}, of this run {wanted}"
            raise CheckpointError(f"{path}: {name}: {problem}")
