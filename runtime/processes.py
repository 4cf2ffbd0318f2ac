"""Join the ranks of a run, let them agree, print, and talk to the operating system.

One rank takes the same path as many; without torchrun a run is a group of one. A function of this
file that talks to other ranks must be called on all of them.
"""

import contextlib
import ctypes
import os
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from formats import progress
from formats.errors import DataError
from formats.progress import Progress
from runtime import signals
from runtime.settings import Settings

# How long ranks wait for each other before they give up. One may have to read a lot while others
# wait; NCCL's own 10 minutes are too short for that.
TIMEOUT = timedelta(minutes=30)
FLASH_RUNS_ON = {3: (9,), 4: (9, 10)}  # version of FlashAttention → major compute capabilities
AGREED = "raised on every rank"  # a note on an error
# What CUDA, its libraries, NCCL and torch's allocator for CPUs say without an OutOfMemoryError.
NO_MEMORY = re.compile("out of memory|ALLOC_FAILED|bad_alloc|can't allocate memory")

# --------------------------------------------------------------------------------------------------
# Joining


def start_ranks(settings: Settings) -> torch.device:
    """Join the group that torchrun describes in the environment; return this rank's device.

    Without torchrun, this process forms a group of one. A process that has joined stays joined.

    Raises:
        DataError: this machine has fewer GPUs than ranks, or not the FlashAttention of `--flash`.
    """
    available = "cuda" if torch.cuda.is_available() else "cpu"
    kind = available if settings.device == "auto" else settings.device
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if dist.is_initialized():
        use_flash(settings.flash, device)
        return device
    ranks_here = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local_rank + 1)
    if kind == "cuda":
        if not (gpus := torch.cuda.device_count()):
            raise DataError("--device cuda: no CUDA device available")
        if ranks_here > gpus:
            raise DataError(f"{ranks_here} ranks for {gpus} GPUs: pass --nproc-per-node {gpus}")
        # Streams differ in length: segments that grow waste less memory than blocks of many sizes.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    else:
        # oneDNN keeps what it prepares for every shape, and our streams all differ in length. All
        # blocks of one micro-batch see the same few hundred shapes; older ones do not come again.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
        keep_freed_memory()
    use_flash(settings.flash, device)  # starts CUDA, which reads the settings above only once
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
    else:
        alone = kind != "cuda"  # NCCL is at home with a TCPStore; port 0 is any free one
        store = dist.HashStore() if alone else dist.TCPStore("127.0.0.1", 0, 1, True)
        rank, world = 0, 1
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A torchrun that restarts its workers would show them the addresses of the previous ones.
        # Several nodes may count restarts differently, so a prefix could keep them apart for good:
        # recipes/slurm.sh sets TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backends = "gloo"
    if kind == "cuda":  # with --offload, gradients are on the host when their norm is computed
        backends = "cpu:gloo,cuda:nccl" if settings.offload else "nccl"
    options = {"timeout": TIMEOUT, "device_id": device if kind == "cuda" else None}
    with Progress(f"waiting for {world} ranks"):
        dist.init_process_group(backends, store=store, rank=rank, world_size=world, **options)
    ours = signals.LAUNCHER, os.getpid()
    ranks = gather(ours)
    signals.peers[:] = [process for launcher, process in ranks if launcher == ours[0]]
    signals.rank_0 = ranks[0][1] if ranks[0][0] == ours[0] else 0
    return device


def use_flash(version: int, device: torch.device) -> None:
    """Make this version of FlashAttention the one that torch calls; 2 is torch's own.

    Raises:
        DataError: the device, torch or an installed package lacks it.
    """
    from torch.nn import attention

    name, flag = f"FA{version}", f"--flash {version}"
    if version == 2:
        if attention.current_flash_attention_impl():
            attention.restore_flash_attention_impl()
    elif device.type != "cuda":
        raise DataError(f"{flag}: needs a GPU")
    elif (major := torch.cuda.get_device_capability(device)[0]) not in FLASH_RUNS_ON[version]:
        able = " or ".join(map(str, FLASH_RUNS_ON[version]))
        gpu = torch.cuda.get_device_name(device)
        raise DataError(f"{flag}: needs compute capability {able}, and {gpu} has {major}")
    elif version == 4 and torch.__version__ < "2.13":  # hands on a window of -1, which FA4 refuses
        raise DataError(f"{flag}: needs torch 2.13, and this is {torch.__version__}")
    elif attention.current_flash_attention_impl() != name:
        try:
            attention.activate_flash_attention_impl(name)
        except Exception as e:  # whatever an absent or half-built package raises
            what = f"{flag}: not usable here: {type(e).__name__}: {e}"
            raise DataError(f"{what}; install it, or leave {flag} out") from None


def make_mesh(settings: Settings, device: torch.device) -> DeviceMesh:
    """Arrange the ranks in one row that shards the model.

    With `--replicate N` there are N rows, and each shards a whole copy.

    Raises:
        DataError: N does not divide the number of ranks.
    """
    world, copies = dist.get_world_size(), settings.replicate
    if world % copies:
        raise DataError(f"--replicate {copies} does not divide the number of ranks, {world}")
    if copies == 1:
        return init_device_mesh(device.type, (world,))
    names = ("replicate", "shard")
    mesh = init_device_mesh(device.type, (copies, world // copies), mesh_dim_names=names)
    for group in mesh.get_all_groups():  # which would wait for as long as their backend's default
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
    return mesh


# --------------------------------------------------------------------------------------------------
# Agreeing


def is_rank_0() -> bool:
    """Return True on rank 0, also before it has joined a group."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))
    return rank == 0


def slice_of(items: list) -> list:
    """Return this rank's contiguous slice; concatenating all ranks' slices gives `items` back."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def gather(thing: Any) -> list:
    """Return `thing` of every rank, as a list ordered by rank."""
    things = [thing]
    if dist.get_world_size() > 1:
        things = [None] * dist.get_world_size()
        dist.all_gather_object(things, thing)
    return things


def agree(work: Callable) -> Any:
    """Return `work()`. If it fails on any rank, every rank raises that error, so nobody hangs.

    Of several errors, the one about the first record is raised. Only ValueError, which includes
    InputError, and OSError travel; any other is raised where it is.
    """
    result = error = None
    try:
        result = work()
    except (ValueError, OSError) as e:
        error = e
    if errors := [e for e in gather(error) if e]:
        first = min(errors, key=lambda e: getattr(e, "record", 0))
        first.add_note(AGREED)
        raise first
    return result


def on_every_rank(work: Callable) -> list:
    """Return the results of `work()` of all ranks, ordered by rank; errors as in `agree`."""
    return gather(agree(work))


def on_rank_0(work: Callable) -> Any:
    """Return the result of `work()`, which rank 0 does alone while the others wait."""
    return on_every_rank(lambda: work() if is_rank_0() else None)[0]


def broadcast(array: np.ndarray, rank: int) -> None:
    """Overwrite an array with that of a rank. Call it on all ranks, with arrays of one size."""
    if dist.get_world_size() > 1:
        tensor = torch.from_numpy(array)
        moved = tensor if "gloo" in dist.get_backend() else tensor.cuda()
        dist.broadcast(moved, rank)
        tensor.copy_(moved)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return True if the flag is set on any rank."""
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


class Unfailing:
    """Passes text on to a stream; once that fails, as a closed pipe does, it goes nowhere.

    What a run prints is for people, and must not cost the run. Characters that the stream's
    encoding lacks become question marks.
    """

    def __init__(self, stream: Any):
        self._stream = stream or open(os.devnull, "w")
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        with self._failing_once():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or drop what it holds."""
        with self._failing_once():
            self._stream.flush()

    @contextlib.contextmanager
    def _failing_once(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
        except ValueError:  # closed in this process
            self._stream = open(os.devnull, "w")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print0(*words: object) -> None:
    """Print on rank 0, above the line that shows progress if there is one."""
    if is_rank_0():
        progress.write(" ".join(map(str, words)))


# --------------------------------------------------------------------------------------------------
# The operating system


def keep_freed_memory() -> None:
    """Stop glibc from returning large freed blocks to the OS, which would zero every page again.

    They stay with the process between operations, until `trim_freed_memory` gives them back.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        for parameter, size in ((-3, 2**30), (-1, 2**29)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, size)


def trim_freed_memory(device: torch.device) -> None:
    """Return freed heap memory to the OS, once per micro-batch, before backward.

    On a CPU, `keep_freed_memory` has made glibc keep it until then. A GPU has its own allocator.
    """
    if device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def multiplies_bf16(device: torch.device) -> bool:
    """Return True if bfloat16 runs in hardware; a CPU without it is about eight times slower.

    Every GPU counts as able, even an old one that emulates it.
    """
    mkldnn = torch.backends.mkldnn.is_available()
    return device.type != "cpu" or (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def free_memory(device: torch.device) -> float:
    """Return the bytes that every rank may take: the smallest of what is free on their devices.

    The ranks of a machine, or of a container with a limit, share its memory evenly on a CPU.
    """
    if device.type == "cuda":
        mine = float(torch.cuda.mem_get_info(device)[0])
    else:
        mine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        with contextlib.suppress(OSError), open("/proc/meminfo") as lines:  # no Linux
            fields = dict(line.split(":") for line in lines)
            mine = float(fields["MemAvailable"].split()[0]) * 1024
        with contextlib.suppress(OSError, ValueError):  # no container, or "max"
            group = Path("/sys/fs/cgroup")
            limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
            found = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            mine = min(mine, limit - used + int(found["inactive_file"]))  # files read, not in use
        mine /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(gather(mine))


def peak_resident(process: int | str = "self") -> int:
    """Return the most bytes that a process has held in memory; 0 where the system does not say.

    `getrusage` would begin at the peak of the process that started this one.
    """
    with contextlib.suppress(OSError), open(f"/proc/{process}/status") as lines:  # no Linux
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
    return 0


def out_of_memory(error: BaseException) -> str:
    """Return in one line which allocation failed, on a GPU or a CPU; "" for any other error."""
    failed = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    failed |= isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))
    return (str(error) or "out of memory").splitlines()[0] if failed else ""
