"""Save and find the checkpoints of a run: OUT/checkpoints/step-000120 and the like.

A checkpoint holds all that the next step depends on, so a run that is killed and resumed ends like
one that was never killed. Weights and optimizer state are safetensors, each rank's shards in files
of its own, and any number of ranks can read them back. Nothing is pickled. No random state is
saved: the order of the pairs follows from seed and epoch, and nothing else is random.
"""

import hashlib
import json
import logging
import re
import shutil
import uuid
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from data import Pair
from formats.errors import CheckpointError
from formats.files import read_json, reading, sync
from methods.objectives import OBJECTIVES, hyperparameters
from model import Llama
from runtime.inputs import Inputs
from runtime.processes import is_rank_0, on_rank_0
from runtime.settings import Settings

RESUME_ME = 75  # exit status: stopped when told to, not finished (EX_TEMPFAIL of sysexits.h)
FILE_BYTES = 2**30  # of one file of a checkpoint: DCP holds a whole file in memory


def fingerprint(settings: Settings, inputs: Inputs) -> dict:
    """Return everything that must match before resuming.

    These are the settings that affect the result, the source checkpoint (the exact commit for a hub
    id) and the tokens.
    """
    may_change = {f.name for f in fields(settings) if f.metadata["may_change"]}
    fixed = {name: value for name, value in asdict(settings).items() if name not in may_change}
    return fixed | {
        "norm_gains_decay": False,  # they did in earlier versions
        "model": str(inputs.source.resolve()),
        "data": _digest(inputs.pairs),
        "eval_data": _digest(inputs.held_out),
    }


def _digest(pairs: list[Pair]) -> str:
    """Return the number of pairs, and a hash of their tokens in order."""
    sha = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt, *pair.responses):
            sha.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return f"{len(pairs)} with sha256 {sha.hexdigest()[:16]}"


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


def save_checkpoint(out: Path, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Write a checkpoint under another name, wait for the disk, then rename it: complete or absent.

    Call it on all ranks. Older checkpoints are deleted until `keep` are left. state: what goes into
    state.json, at least `step`.

    Raises:
        OSError: it cannot be written, for instance on a full disk. Older checkpoints stay.
    """
    path = out / "checkpoints" / f"step-{state['step']:06d}"
    temporary = path.with_name(path.name + ".incomplete")
    files, size = {}, 0  # files: name of a tensor → number of the file that it goes to
    for name, tensor in tensors.items():
        size += tensor.nbytes // dist.get_world_size()
        files[name] = 1 + size // FILE_BYTES

    def begin() -> None:
        for stale in path.parent.glob("*.incomplete"):
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)

    def finish() -> None:
        shutil.copyfile(out / "metrics.jsonl", temporary / "metrics.jsonl")
        (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for file in (temporary / "metrics.jsonl", temporary / "state.json", temporary):
            sync(file)
        temporary.rename(path)
        sync(path.parent)
        for old in checkpoints(out)[:-keep]:
            shutil.rmtree(old.rename(old.with_name(old.name + ".incomplete")))

    try:
        on_rank_0(begin)
        writer = HuggingFaceStorageWriter(temporary, files, save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        on_rank_0(finish)
    except (CheckpointException, OSError) as e:
        cause = _cause(e)
        if is_rank_0():
            shutil.rmtree(temporary, ignore_errors=True)
        older = checkpoints(out)
        kept = f"{older[-1]} is complete" if older else "there is no older one"
        raise OSError(f"{path}: cannot be saved: {cause}; {kept}") from None
    return path


def _cause(error: BaseException) -> BaseException:
    """Unwrap the first error inside a CheckpointException; re-raise KeyboardInterrupt."""
    cause = error
    if isinstance(error, CheckpointException):
        cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, KeyboardInterrupt):
        raise cause
    return cause


def find_checkpoint(settings: Settings, out: Path, wanted: dict) -> tuple[Path | None, dict, str]:
    """Return (checkpoint, state, metrics) to resume from; (None, a new state, "") for a new run.

    wanted: this run's `fingerprint`.

    Raises:
        CheckpointError: it is damaged, or of another run; the message names what differs.
    """
    newest = None if (out / "model").exists() else next(reversed(checkpoints(out)), None)
    path = {"auto": newest, "never": None}.get(settings.resume, Path(settings.resume))
    if path is None:
        return None, {"step": 0, "run": uuid.uuid4().hex}, ""
    state = read_json(path / "state.json", CheckpointError)
    saved = state.get("identity")
    known = isinstance(state.get("step"), int) and isinstance(state.get("before"), dict)
    known &= isinstance(state.get("optimizer", {}), dict)
    if not known or not isinstance(saved, dict) or "run" not in state:
        raise CheckpointError(f"{path / 'state.json'}: not the state of a run")
    saved = with_new_settings(saved, wanted)
    differ = [
        f"{key.replace('_', '-')} {saved.get(key)!r} (now {wanted.get(key)!r})"
        for key in sorted(saved | wanted)
        if saved.get(key) != wanted.get(key)
    ]
    if differ:
        advice = "pass these, another --out, or --resume never"
        raise CheckpointError(f"{path} is of another run: {', '.join(differ)}; {advice}")
    with reading(path / "metrics.jsonl", CheckpointError):
        return path, state, (path / "metrics.jsonl").read_text(encoding="utf-8")


def with_new_settings(saved: dict, wanted: dict) -> dict:
    """Return the fingerprint of an earlier version as this version would have written it.

    A setting that did not exist has its default; one that its objective does not have is None.
    """
    if saved.get("objective") not in OBJECTIVES:
        return saved
    own = OBJECTIVES[saved["objective"]].defaults
    new = {f.name: f.default for f in fields(Settings) if f.name in wanted and f.name not in saved}
    decayed = saved.get("norm_gains_decay", bool(saved.get("weight_decay")))
    saved = saved | new | {"norm_gains_decay": decayed}
    for name in hyperparameters():
        if name not in own or saved[name] is None:
            saved[name] = own.get(name)
    return saved


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
    logging.disable(logging.WARNING)  # DCP would log a traceback of what we report in one line
    try:
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
