"""Read and write model folders in Hugging Face's format: config.json, safetensors, tokenizer files.

    Weights         *.safetensors              →  the parameters of a model, whole or sharded
    load            a folder                   →  a model, whole, on one device
    save            a model, whole or sharded  →  a folder

This file owns everything that knows of files, shards and meshes (DTensor), so that model.py is
architecture alone. The folder comes from strangers: names, sizes and headers are checked before
memory is spent on them. Where two of its statements about one thing differ, none is picked: the
folder is refused. formats/config.py reads config.json. Read model.py next.
"""

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from formats.config import read_config
from formats.errors import CheckpointError
from formats.files import dump_json, parse_json, read_json, reading, sync
from formats.hub import local_path
from formats.progress import Progress
from model import Config, Llama, rotary_table

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
# The only files ever downloaded. transformers, too, prefers these to other copies of the weights,
# such as pytorch_model.bin and Mistral's consolidated.safetensors.
CHECKPOINT_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    *COMPANIONS,
)


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


def content_files(folder: Path) -> list[Path]:
    """Return the files that shape what a model computes and is asked: weights, config, tokenizer.

    Raises:
        CheckpointError: see `Weights`.
    """
    weights = {path for path, *_ in Weights(folder).files.values()}
    patterns = [pattern for pattern in COMPANIONS if not pattern.startswith("LICENSE")]
    others = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(weights | others)


# --------------------------------------------------------------------------------------------------
# Reading weights

INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 2**24  # bytes of a safetensors file's list; 10,000 tensors take a sixteenth


class Weights:
    """Indexes the tensors of a checkpoint folder, and reads only the ones asked for.

    Attributes:
        files: tensor name → (file, shape).
        dtypes: tensor name → dtype; a saved checkpoint keeps them.
    """

    DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

    def __init__(self, folder: Path):
        """Read the headers of all files.

        Raises:
            CheckpointError: a file is missing, damaged or not named by the index, a tensor is in
                two files or not where the index says, or it is not float32, bfloat16 or float16.
        """
        self.folder = folder
        self.files: dict[str, tuple[Path, list[int]]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        weight_map = self._read_index()
        for path in self._shards(weight_map):
            for name, (dtype, shape) in self._read_header(path).items():
                if dtype not in self.DTYPES:
                    supported = f"only {', '.join(self.DTYPES)} are supported"
                    raise CheckpointError(f"{path}: {name} is {dtype}: {supported}")
                if name in self.files:
                    raise CheckpointError(f"{path}: {name} is also in {self.files[name][0].name}")
                self.files[name] = (path, shape)
                self.dtypes[name] = self.DTYPES[dtype]
        for name in sorted(weight_map.keys() | self.files.keys()) if weight_map else ():
            where = self.files[name][0].name if name in self.files else "none of the files"
            if weight_map.get(name) != where:
                problem = f"{name} is in {where}, weight_map says {weight_map.get(name)}"
                raise CheckpointError(f"{folder / INDEX}: {problem}: write the index anew")

    def _read_index(self) -> dict[str, str]:
        """Return the index's map from tensor to file name; empty if there is no index.

        Sizes in the index are ignored, as transformers does: the files' headers say them.
        """
        index = self.folder / INDEX
        if not index.exists():
            return {}
        weight_map = read_json(index, CheckpointError).get("weight_map")
        weight_map = weight_map if isinstance(weight_map, dict) else {}
        named = weight_map.values()
        if not named or not all(isinstance(name, str) for name in named):
            problem = "missing, empty or not a map of tensor names to file names"
            raise CheckpointError(f"{index}: weight_map is {problem}")
        for name in sorted(set(named)):
            if Path(name).name != name or not name.endswith(".safetensors"):
                problem = "is not the name of a safetensors file in this folder"
                raise CheckpointError(f"{index}: weight_map: {name!r} {problem}")
        return weight_map

    def _shards(self, weight_map: dict[str, str]) -> list[Path]:
        """Return the folder's safetensors files: those that the index names, or the only one.

        Raises:
            CheckpointError: a file is missing, or the folder holds weights beside these. They may
                be an adapter, or left over from another model that was saved here.
        """
        folder, single = self.folder, "model.safetensors"
        adapters = sorted(path.name for path in folder.glob("adapter_*"))
        if adapters:
            problem = "a LoRA adapter, which would not be applied: merge it into its base model"
            raise CheckpointError(f"{folder / adapters[0]}: {problem} (peft: merge_and_unload)")
        names = sorted(set(weight_map.values())) or [single]
        for name in names:
            if os.path.isfile(folder / name):
                continue
            if weight_map:
                problem = f"no such file, though {INDEX} names it"
                raise CheckpointError(f"{folder / name}: {problem}")
            problem = f"neither {single} nor {INDEX}"
            if any(folder.glob("pytorch_model*.bin")):
                why = "pytorch_model.bin is a pickle, which can run code"
                problem += f" ({why}: convert it to safetensors)"
            raise CheckpointError(f"{folder}: {problem}")
        # transformers reads only model.safetensors if there is one
        used = [single] if single in names else names
        others = {path.name for path in folder.glob("model*.safetensors")} | set(names)
        if unused := sorted(others.difference(used)):
            problem = f"not part of the weights in {used[0]}: delete the wrong one"
            raise CheckpointError(f"{folder / unused[0]}: {problem}")
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

        Tensors that model.py does not load, because it computes them, must hold what it computes.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape or contradicts
                config.json; the message names it.
        """
        parameters = dict(model.named_parameters())
        extra = self.files.keys() - parameters.keys()
        frequencies = {name for name in extra if name.endswith("rotary_emb.inv_freq")}
        tied = {"lm_head.weight"} & extra if model.config.tie_word_embeddings else set()
        extra -= frequencies | tied
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
        for name in tied:
            if not self._equal(name, "model.embed_tokens.weight"):
                problem = f"{name} is not the embedding, though tie_word_embeddings is true"
                raise CheckpointError(f"{self.files[name][0]}: {problem}: set that to false")
        for name in frequencies:
            self._check_frequencies(name, model.config)

    def _equal(self, first: str, second: str) -> bool:
        """Say whether two tensors hold the same numbers; read a few rows at a time."""
        (path, shape), (other_path, other_shape) = self.files[first], self.files[second]
        if shape != other_shape:
            return False
        with safe_open(path, framework="pt") as a, safe_open(other_path, framework="pt") as b:
            slices = a.get_slice(first), b.get_slice(second)
            starts = Progress(f"comparing {first}", range(0, shape[0], 4096), shape[0], each=4096)
            rows = (slice(start, start + 4096) for start in starts)
            return all(torch.equal(*(x[r].float() for x in slices)) for r in rows)

    def _check_frequencies(self, name: str, config: Config) -> None:
        """Compare a buffer that older versions of transformers saved with what model.py computes.

        Raises:
            CheckpointError: they differ by more than bfloat16 rounds.
        """
        path = self.files[name][0]
        [cos_sin, _] = rotary_table(config, torch.ones(1))  # at position 1, angles are frequencies
        cos, sin = cos_sin.view(2, -1)
        expected = torch.atan2(sin, cos)
        with safe_open(path, framework="pt") as handle:
            saved = handle.get_tensor(name).float()
        close = {"rtol": 2**-8, "atol": 1e-7}
        if saved.shape != expected.shape or not torch.allclose(saved, expected, **close):
            problem = f"{name} contradicts rope_theta = {config.rope_theta} in config.json"
            raise CheckpointError(f"{path}: {problem}: correct one or delete the tensor")

    def copy_into(self, model: Llama) -> None:
        """Fill every parameter in place, sharded or not. Each rank reads only the rows it holds.

        A file stays mapped only while it is read, because the pages that were read count as memory
        of this process until the file is unmapped.
        """
        parameters = dict(model.named_parameters())
        with torch.no_grad(), Progress(f"reading {self.folder}", total=len(parameters)) as bar:
            for path in dict.fromkeys(path for path, _ in self.files.values()):
                with safe_open(path, framework="pt") as handle:
                    for name in handle.keys() & parameters.keys():
                        whole = parameters[name]
                        local = whole.to_local() if isinstance(whole, DTensor) else whole
                        start, stop = local_rows(whole)
                        local.copy_(handle.get_slice(name)[start:stop])
                        bar.update()


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
    dtype: torch.dtype | Mapping[str, torch.dtype],
    write: bool = True,
    shard_bytes: int = 5 * 10**9,
    replace: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write `out` as a Hugging Face folder: weights in `dtype`, their index, config and tokenizer.

    `dtype` is one for all parameters, or a map from their names, such as `Weights.dtypes`. Every
    rank must call it under FSDP; only the rank with `write` writes. One file at a time is gathered
    in memory, of at most `shard_bytes` bytes or of a single tensor. Config and tokenizer files come
    from `source`, but `replace` maps file names to contents that take their place. The folder
    appears under its name only once it is complete and on disk.

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
    dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(parameters, dtype)
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in parameters.items()}
    shards = _split_into_shards(sizes, shard_bytes)
    for file, names in shards.items():
        shard = {name: parameters[name] for name in names}
        tensors = dict(whole_tensors(shard, dtypes, keep=write))
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
            (temporary / INDEX).write_text(dump_json(index, indent=2))
        _publish(temporary, out)


def _start_folder(folder: Path, source: Path, replace: Mapping[str, str | bytes]) -> None:
    """Create the folder anew, with everything but the weights in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in {**companions(source), **replace}.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def companions(folder: Path) -> dict[str, bytes]:
    """Return the files beside the weights that others need to load a checkpoint, by name."""
    files = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in files}


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
    parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], keep: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter gathered from its shards, in its dtype, on the CPU.

    A rank without `keep` takes part in gathering but yields nothing.
    """
    for name, parameter in parameters.items():
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if keep:
            yield name, whole.to("cpu", dtypes[name]).contiguous()
