"""Read and write model folders in Hugging Face's format: config.json, safetensors, tokenizer files.

    read_config     config.json                →  Config
    Weights         *.safetensors              →  the parameters of a model, whole or sharded
    load            a folder                   →  a model, whole, on one device
    save            a model, whole or sharded  →  a folder

This file owns everything that knows of files, shards and meshes (DTensor), so that model.py is
architecture alone. The folder comes from strangers: names, sizes and headers are checked before
memory is spent on them. A new key of config.json belongs in `NEUTRAL` if only one of its values is
supported, else in `Config` and `read_config`. Read model.py next.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from formats.errors import CheckpointError
from formats.files import dump_json, parse_json, read_json, reading, sync
from formats.hub import local_path
from model import Config, Llama

# the files beside the weights that a checkpoint needs so that others can load it; never code
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "LICENSE*",
)
# the only files ever downloaded (Mistral repos also ship the weights as consolidated.safetensors)
CHECKPOINT_FILES = ("model*.safetensors", "model.safetensors.index.json", *COMPANIONS)


# --------------------------------------------------------------------------------------------------
# The folder


def checkpoint_folder(name: str) -> Path:
    """Return the model folder that `name` names, an existing folder or a hub id; checked.

    Raises:
        DataError: neither a folder nor a repository has that name, or the download failed.
        CheckpointError: see `check_folder`.
    """
    path = local_path(name, "model", CHECKPOINT_FILES)
    if path.is_dir():
        check_folder(path)
    return path


def check_folder(folder: Path, patterns: Iterable[str] = CHECKPOINT_FILES) -> None:
    """Check a checkpoint folder before reading it.

    No symlink may leave the folder, because it could lead to the user's own files and a saved
    checkpoint would copy them. Files that match `patterns` must not be pipes or devices, and only
    weights may be large.

    Raises:
        CheckpointError: a file breaks one of these rules; the message names it.
    """
    patterns = tuple(patterns)
    root = Path(os.path.realpath(folder))
    allowed = [root]
    if root.parent.name == "snapshots":
        # the hub's cache links into the blobs of one repository, or of the whole cache
        allowed += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    for file in folder.iterdir():
        target = Path(os.path.realpath(file))
        if not any(target.is_relative_to(parent) for parent in allowed):
            problem = f"a link to {target}, outside the checkpoint"
            raise CheckpointError(f"{file}: {problem}: put the file itself into the folder")
        if not any(fnmatchcase(file.name, pattern) for pattern in patterns) or target.is_dir():
            continue
        if not target.is_file():
            problem = "not a regular file" if target.exists() else "a link to no file"
            raise CheckpointError(f"{file}: {problem}")
        limit = 2**26 if file.name == "tokenizer.json" else 2**24  # Gemma 3's has 2²⁵ bytes
        size = target.stat().st_size
        if not file.name.endswith(".safetensors") and size > limit:
            problem = f"{size} bytes, more than such a file of any checkpoint ({limit})"
            raise CheckpointError(f"{file}: {problem}")


# --------------------------------------------------------------------------------------------------
# config.json

# Keys with the values for which model.py is right. Any other value would change the computation.
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "num_local_experts": (None, 1),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
}


@dataclass
class _Fields:
    """Looks up numbers in config.json; an absent key and null both mean the default."""

    path: Path
    raw: dict
    prefix: str = ""  # of a key, for error messages: "rope_scaling."

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise CheckpointError. The message holds file, key and value."""
        value = json.dumps(self.raw.get(key))
        raise CheckpointError(f"{self.path}: {self.prefix}{key} = {value}: {why}")

    def number(self, key: str, default: float | None, kind: type, limit: float) -> float:
        """Return a number in (0, limit] of type `kind`. A float may be written as an int."""
        value = self.raw.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.path}: {self.prefix}{key} is missing")
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= limit:
            self.refuse(key, f"expected a positive {kind.__name__} of at most {limit}")
        return kind(value)

    def integer(self, key: str, default: int | None = None, limit: int = 2**31) -> int:
        """Return an int in (0, limit]."""
        return int(self.number(key, default, int, limit))

    def size(self, key: str, default: int | None = None) -> int:
        """Return one side of a weight matrix; no published model comes near the limit."""
        return self.integer(key, default, limit=2**20)


def read_config(folder: Path) -> Config:
    """Read `config.json` in either dialect of transformers.

    Version 4 writes `rope_theta` and `rope_scaling`, version 5 `rope_parameters`. An absent key
    means what it means in transformers' class for that model type.

    Raises:
        CheckpointError: a key is missing or absurd, or model.py would silently compute something
            else than the model was trained with. The message names file and key.
    """
    path = folder / "config.json"
    raw = read_json(path, CheckpointError)
    fields = _Fields(path, raw)
    if raw.get("model_type") not in ("llama", "mistral"):
        fields.refuse("model_type", "only llama and mistral are supported")
    for key, supported in NEUTRAL.items():
        if raw.get(key, supported[0]) not in supported:
            fields.refuse(key, f"not implemented (only {json.dumps(supported[0])} is)")

    mistral = raw["model_type"] == "mistral"
    hidden, heads, kv_heads, head_dim = _read_heads(fields, mistral)
    window = None
    if mistral and raw.get("sliding_window", 4096) is not None:  # version 0.2 and later: null
        window = fields.integer("sliding_window", 4096)
    rope_theta, rope_scaling = _read_rope(raw, path)
    positions = fields.integer("max_position_embeddings", 2**17 if mistral else 2048)
    return Config(
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers", limit=2**10),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, float, 2**31),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=window,
        tie_word_embeddings=raw.get("tie_word_embeddings", False) is True,
        max_position_embeddings=positions,
    )


def _read_heads(fields: _Fields, mistral: bool) -> tuple[int, int, int, int]:
    """Return hidden size, query heads, key-value heads and features per head."""
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    head_dim = fields.size("head_dim", hidden // heads)
    absent = "num_key_value_heads" not in fields.raw
    kv_heads = fields.size("num_key_value_heads", 8 if mistral and absent else heads)
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    if head_dim % 2:
        fields.refuse("head_dim", "rotary embeddings need an even number of features")
    if heads * head_dim > 2**20:
        fields.refuse("head_dim", f"too many features with num_attention_heads = {heads}")
    return hidden, heads, kv_heads, head_dim


def _read_rope(raw: dict, path: Path) -> tuple[float, dict | None]:
    """Return (theta, scaling) from either dialect; scaling holds Llama 3.1's four numbers or None.

    Raises:
        CheckpointError: another rule than "default" and "llama3", or a number is not positive.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}: {key}: expected one flat object for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    fields = _Fields(path, raw | rope | {"rope_type": kind, "rope_theta": theta}, f"{key}.")
    if kind not in ("default", "llama3"):
        fields.refuse("rope_type", "not implemented (default and llama3 are)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        fields.refuse("partial_rotary_factor", "not implemented (only 1.0 is)")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = None
    if kind == "llama3":
        scaling = {name: fields.number(name, None, float, 1e30) for name in names}
    return fields.number("rope_theta", None, float, 1e30), scaling


# --------------------------------------------------------------------------------------------------
# Reading weights

LONGEST_HEADER = 2**24  # bytes of a safetensors file's list; 10,000 tensors take a sixteenth


class Weights:
    """Indexes the tensors of a checkpoint folder, and reads only the ones asked for.

    Attributes:
        files: tensor name → (file, shape).
        dtype: the first tensor's; a saved checkpoint keeps it.
    """

    DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

    def __init__(self, folder: Path):
        """Read the headers of all files.

        Raises:
            CheckpointError: a file is missing or damaged, a tensor is in two files, or a tensor is
                not float32, bfloat16 or float16.
        """
        self.folder = folder
        self.files: dict[str, tuple[Path, list[int]]] = {}
        self.dtype = torch.float32
        for path in self._shards():
            for name, (dtype, shape) in self._read_header(path).items():
                if dtype not in self.DTYPES:
                    supported = f"only {', '.join(self.DTYPES)} are supported"
                    raise CheckpointError(f"{path}: {name} is {dtype}: {supported}")
                if name in self.files:
                    raise CheckpointError(f"{path}: {name} is also in {self.files[name][0].name}")
                if not self.files:
                    self.dtype = self.DTYPES[dtype]
                self.files[name] = (path, shape)

    def _shards(self) -> list[Path]:
        """Return the folder's safetensors files: those that the index names, or the only one."""
        folder, index = self.folder, self.folder / "model.safetensors.index.json"
        if not index.exists():
            path = folder / "model.safetensors"
            if path.exists():
                return [path]
            problem = "neither model.safetensors nor model.safetensors.index.json"
            if any(folder.glob("pytorch_model*.bin")):
                why = "pytorch_model.bin is a pickle, which can run code"
                problem += f" ({why}: convert it to safetensors)"
            raise CheckpointError(f"{folder}: {problem}")
        weight_map = read_json(index, CheckpointError).get("weight_map")
        named = weight_map.values() if isinstance(weight_map, dict) else ()
        if not named or not all(isinstance(name, str) for name in named):
            problem = "missing, empty or not a map of tensor names to file names"
            raise CheckpointError(f"{index}: weight_map is {problem}")
        names = sorted(set(named))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                problem = "is not the name of a safetensors file in this folder"
                raise CheckpointError(f"{index}: weight_map: {name!r} {problem}")
            if not os.path.isfile(folder / name):
                problem = f"no such file, though {index.name} names it"
                raise CheckpointError(f"{folder / name}: {problem}")
        return [folder / name for name in names]

    def _read_header(self, path: Path) -> dict[str, tuple[str, list[int]]]:
        """Return each tensor's dtype, as safetensors spells it, and shape."""
        with reading(path, CheckpointError, "not a whole safetensors file", (SafetensorError,)):
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > LONGEST_HEADER:
                    raise ValueError(f"a header of {size} bytes, more than {LONGEST_HEADER}")
                header = file.read(size)
            # safe_open refuses tensors that overlap, leave holes or exceed the file
            with safe_open(path, framework="pt") as handle:
                # reject duplicate names (safe_open would silently keep the last)
                parse_json(header)
                slices = {name: handle.get_slice(name) for name in handle.keys()}
                return {name: (s.get_dtype(), list(s.get_shape())) for name, s in slices.items()}

    def check(self, model: Llama) -> None:
        """Compare the headers with an empty model, before memory is spent.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape; the message names it.
        """
        parameters = dict(model.named_parameters())
        recomputed = "rotary_emb.inv_freq"  # a buffer that model.py does not load
        extra = {n for n in self.files if n not in parameters and not n.endswith(recomputed)}
        if model.config.tie_word_embeddings:
            extra.discard("lm_head.weight")
        missing = parameters.keys() - self.files.keys()
        for problem, names in (("missing", missing), ("not a tensor of this model", extra)):
            if names:
                few = ", ".join(sorted(names)[:3])
                few += f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(f"{self.folder}: {problem}: {few}")
        for name, parameter in parameters.items():
            path, shape = self.files[name]
            expected = list(parameter.shape)
            if shape != expected:
                problem = f"{name} has shape {shape}, config.json says {expected}"
                raise CheckpointError(f"{path}: {problem}")

    def copy_into(self, model: Llama) -> None:
        """Fill every parameter in place, sharded or not. Each rank reads only the rows it holds.

        A file stays mapped only while it is read, because the pages that were read count as memory
        of this process until the file is unmapped.
        """
        parameters = dict(model.named_parameters())
        for path in dict.fromkeys(path for path, _ in self.files.values()):
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys() & parameters.keys():
                    parameter = parameters[name]
                    start, stop = local_rows(parameter)
                    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    with torch.no_grad():
                        local.copy_(handle.get_slice(name)[start:stop])


def local_rows(parameter: Tensor) -> tuple[int, int]:
    """Return the rows [start, stop) of a parameter that this rank holds.

    Without FSDP it holds all rows. FSDP's shards have ceil(rows / ranks) rows, the last ones fewer
    or none.
    """
    rows = parameter.shape[0]
    start, stop = 0, rows
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                size = math.ceil(rows / parameter.device_mesh.size(dim))
                start = min(parameter.device_mesh.get_local_rank(dim) * size, rows)
                stop = min(start + size, rows)
    return start, stop


def compute_device(model: Llama) -> torch.device:
    """Return the device that the model computes on.

    With `--offload` the shards themselves live on the CPU.
    """
    weight = model.head_weight
    if isinstance(weight, DTensor):
        return torch.device(weight.device_mesh.device_type)
    return weight.device


def load(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Llama:
    """Return the model of a checkpoint folder, unsharded, on one device.

    Sampling and analyses use it; train.py builds a sharded model instead.

    Raises:
        CheckpointError: the folder is damaged or not supported.
    """
    with torch.device("meta"):
        model = Llama(read_config(folder)).to(dtype)
    weights = Weights(folder)
    weights.check(model)
    model.to_empty(device=device)
    weights.copy_into(model)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Writing


def save(
    model: Llama,
    source: Path,
    out: Path,
    dtype: torch.dtype,
    write: bool = True,
    shard_bytes: int = 5 * 10**9,
    replace: dict[str, str] | None = None,
) -> None:
    """Write `out` as a Hugging Face folder: weights in `dtype`, their index, config and tokenizer.

    Every rank must call it under FSDP; only the rank with `write` writes. One file at a time is
    gathered in memory, of at most `shard_bytes` bytes or of a single tensor. Config and tokenizer
    files come from `source`, but `replace` maps file names to texts that take their place. The
    folder appears under its name only once it is complete and on disk.

    Raises:
        FileExistsError: `out` exists.
        OSError: a file cannot be written, for instance because the disk is full.
    """
    if write and out.exists():
        raise FileExistsError(f"{out} exists already")
    temporary = out.with_name(out.name + ".incomplete")
    if write:
        _start_folder(temporary, source, replace or {})
    parameters = dict(model.named_parameters())
    sizes = {name: p.numel() * dtype.itemsize for name, p in parameters.items()}
    shards = _split_into_shards(sizes, shard_bytes)
    for file, names in shards.items():
        shard = {name: parameters[name] for name in names}
        tensors = dict(whole_tensors(shard, dtype, keep=write))
        if write:
            try:
                save_file(tensors, temporary / file, metadata={"format": "pt"})
            except SafetensorError as e:  # such as a full disk
                shutil.rmtree(temporary, ignore_errors=True)
                raise OSError(f"{out / file}: cannot be written: {e}") from None
    if write:
        if len(shards) > 1:
            weight_map = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(dump_json(index, indent=2))
        _publish(temporary, out)


def _start_folder(folder: Path, source: Path, replace: dict[str, str]) -> None:
    """Create the folder anew, with everything but the weights in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    for name, text in replace.items():
        (folder / name).write_text(text, encoding="utf-8")


def _split_into_shards(sizes: dict[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """Distribute tensors over files in order, each full before the next: file name → tensor names.

    >>> _split_into_shards({"a": 3, "b": 3, "c": 9}, shard_bytes=6)
    {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
    """
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _publish(temporary: Path, out: Path) -> None:
    """Wait until every file is on disk, then rename the folder."""
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors creates files that only their owner can read
        sync(path)
    sync(temporary)
    temporary.rename(out)
    sync(out.parent)


def whole_tensors(
    parameters: Mapping[str, Tensor], dtype: torch.dtype, keep: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter gathered from its shards, as `dtype`, on the CPU.

    A rank without `keep` takes part in gathering but yields nothing.
    """
    for name, parameter in parameters.items():
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if keep:
            yield name, whole.to("cpu", dtype).contiguous()
