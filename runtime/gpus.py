"""What GPUs can do by their data sheets, and how long they need for a step.

The figures are those of NVIDIA's data sheets and whitepapers, and of AMD's for the MI300X. They
quote arithmetic with a sparsity that training does not have; the table holds dense bf16 with
float32 sums, mostly half of it. Of a link, it holds one direction, which is half, too.
"""

import math
import re
from dataclasses import dataclass, replace

import torch

from data import Pair
from methods.objectives import OBJECTIVES
from model import LOGITS_TILE, Config, Llama, visible
from runtime.settings import KEEP_LOGITS, Settings

Items = dict[str, float]  # item: bytes on one GPU, or seconds


@dataclass(frozen=True)
class Gpu:
    """Holds what one GPU can do at most."""

    memory: float  # GB; the driver leaves 1 or 2 % less, in GiB, and 6 % less of GDDR with ECC
    tflops: float  # dense bf16
    bandwidth: float  # of memory, TB/s
    link: float  # to other GPUs of its machine, GB/s: NVLink or PCIe
    bus: float  # to the host, GB/s


GPUS = {
    "A100": Gpu(80, 312, 2.039, 300, 32),
    "A100 40": Gpu(40, 312, 1.555, 300, 32),
    "A100 PCIe": Gpu(80, 312, 1.935, 32, 32),
    "A100 PCIe 40": Gpu(40, 312, 1.555, 32, 32),
    "A800": Gpu(80, 312, 2.039, 200, 32),
    "A800 40": Gpu(40, 312, 1.555, 200, 32),
    "A800 PCIe": Gpu(80, 312, 1.935, 32, 32),
    "A30": Gpu(24, 165, 0.933, 32, 32),
    "H100": Gpu(80, 989, 3.35, 450, 64),
    "H100 PCIe": Gpu(80, 756, 2.0, 64, 64),
    "H100 NVL": Gpu(94, 835, 3.9, 64, 64),
    "H800": Gpu(80, 989, 3.35, 200, 64),
    "H800 PCIe": Gpu(80, 756, 2.0, 64, 64),
    "H20": Gpu(96, 148, 4.0, 450, 64),
    "H20 3e": Gpu(141, 148, 4.8, 450, 64),
    "H200": Gpu(141, 989, 4.8, 450, 64),
    "H200 NVL": Gpu(141, 835, 4.8, 450, 64),
    "GH200": Gpu(96, 989, 4.0, 450, 450),
    "GH200 120": Gpu(96, 989, 4.0, 450, 450),  # with 120 GB on the host's side
    "GH200 480": Gpu(96, 989, 4.0, 450, 450),
    "GH200 144": Gpu(144, 989, 4.9, 450, 450),
    "B200": Gpu(180, 2250, 7.7, 900, 64),
    "GB200": Gpu(186, 2500, 8.0, 900, 450),
    "B300": Gpu(270, 2250, 7.7, 900, 128),
    "GB300": Gpu(279, 2500, 8.0, 900, 450),
    "L4": Gpu(24, 121, 0.3, 32, 32),
    "L40": Gpu(48, 181, 0.864, 32, 32),
    "L40S": Gpu(48, 362, 0.864, 32, 32),
    "A10": Gpu(24, 125, 0.6, 32, 32),
    "A40": Gpu(48, 149.7, 0.696, 32, 32),
    "A6000": Gpu(48, 154.8, 0.768, 32, 32),
    "6000 Ada": Gpu(48, 364, 0.96, 32, 32),
    "3090": Gpu(24, 71, 0.936, 32, 32),
    "4090": Gpu(24, 165.2, 1.008, 32, 32),
    "5090": Gpu(32, 209.5, 1.792, 64, 64),
    "MI300X": Gpu(192, 1307.4, 5.3, 448, 64),
}
# Words of a name that say nothing more
PLAIN = re.compile(r"nvidia|amd|instinct|geforce|rtx|generation|sxm\d?|oam|ac|hbm3e?")


def words_of(name: str) -> set[str]:
    """Return the words of a name; sizes lose their unit: 80GB, 80G and 80 are one word."""
    return {re.sub(r"^(\d+)gi?b?$", r"\1", word) for word in re.split(r"[\s_-]+", name.lower())}


def find_gpu(name: str) -> Gpu | None:
    """Return the data sheet of a GPU, or None for one that the table does not hold.

    All words of an entry must be in the name; of several entries, the one with most words counts.
    The rest of the name must be plain, or the size of the memory. So half a GPU (MIG), one for
    laptops, or a variant that the table does not know (RTX 4090 D) never gets another's figures.

    >>> find_gpu("NVIDIA A100-SXM4-40GB") == GPUS["A100 40"]
    True
    >>> find_gpu("NVIDIA RTX A1000")
    """
    words = words_of(name)
    found = [entry for entry in GPUS if words_of(entry) <= words]
    entry = max(found, key=lambda entry: len(words_of(entry)), default=None)
    if entry is None:
        return None
    rest = words - words_of(entry) - {f"{GPUS[entry].memory:.0f}"}
    return GPUS[entry] if all(PLAIN.fullmatch(word) for word in rest) else None


def peak_flops(device: torch.device) -> float | None:
    """Return peak dense bf16 FLOP/s by the data sheet; None for CPUs and unknown GPUs."""
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.tflops * 1e12 if gpu else None


# --------------------------------------------------------------------------------------------------
# A run on several


@dataclass(frozen=True)
class Machine:
    """Describes the GPUs, or CPU ranks, that a plan is for."""

    kind: str  # "cuda" or "cpu"
    name: str
    gpus: int  # or CPU ranks
    memory: float  # bytes of each
    peak: float | None  # FLOP/s of each, if known
    gpu: Gpu | None = None  # its data sheet, if known
    host: float = math.inf  # bytes of the machine's own memory for each, if known


@dataclass(frozen=True)
class Load:
    """Counts what one GPU computes in its fullest micro-batch, in tokens."""

    tokens: float  # of the packed stream, with each prompt once
    keys: float  # gathered for attention, with each prompt once per response
    predicted: float  # response tokens
    visible: float = 0  # query-key pairs in attention

    @classmethod
    def of(cls, config: Config, pairs: list[Pair]) -> "Load":
        """Return the load of a micro-batch."""
        lengths = [(len(pair.prompt), list(map(len, pair.responses))) for pair in pairs]
        responses = sum(sum(rs) for _, rs in lengths)
        keys = sum(p * len(rs) for p, rs in lengths) + responses
        seen = sum(visible(prompt, rs, config.sliding_window) for prompt, rs in lengths)
        return cls(sum(pair.tokens for pair in pairs), keys, responses, seen)

    def times(self, factor: float) -> "Load":
        """Return a load in the same proportions."""
        return Load(*(factor * count for count in vars(self).values()))


@dataclass(frozen=True)
class Layout:
    """Counts the parameters of a model, and says how one GPU keeps them."""

    whole: int
    block: int
    root: int  # outside of the blocks: embedding, last norm, head
    matrix: int  # the embedding or the head
    kind: str  # "cuda" or "cpu"
    shards: int  # GPUs that share one copy
    compute_bytes: int  # per parameter, in what is computed with
    master_bytes: int  # per master weight
    online: bool  # whether a reference model stays in memory
    offload: bool
    gather_once: bool

    @classmethod
    def of(cls, config: Config, settings: Settings, machine: Machine) -> "Layout":
        """Return the layout of a run."""
        with torch.device("meta"):
            model = Llama(replace(config, num_hidden_layers=1))
        parts = (model, model.model.layers[0])
        with_one, block = (sum(p.numel() for p in part.parameters()) for part in parts)
        compute_bytes = {"bf16": 2, "fp32": 4, "fp64": 8}[settings.dtype]
        return cls(
            whole=with_one + (config.num_hidden_layers - 1) * block,
            block=block,
            root=with_one - block,
            matrix=config.vocab_size * config.hidden_size,
            kind=machine.kind,
            shards=machine.gpus // settings.replicate,
            compute_bytes=compute_bytes,
            master_bytes=max(compute_bytes, 4),
            online=has_online_reference(settings),
            offload=settings.offload and machine.kind == "cuda",
            gather_once=settings.gather_once,
        )


def has_online_reference(settings: Settings) -> bool:
    """Return True if a frozen reference model stays in memory."""
    return OBJECTIVES[settings.objective].needs_reference and settings.reference == "online"


# --------------------------------------------------------------------------------------------------
# Time

# What is assumed to be reached of a data sheet's figures; not measured
EFFICIENCY = {"matmul": 0.65, "attention": 0.35, "bytes": 0.75, "link": 0.7, "bus": 0.8}
# Seconds of a CPU per operation, measured on a 2-core EPYC with tensors too small to count: alone,
# and under activation checkpointing, which asks about every operation twice, in Python
LAUNCH, LAUNCH_CHECKPOINTED = 10e-6, 27e-6
LAUNCH_ADAMW = 60e-6  # per sharded tensor, measured there; the GPU has just been waited for
HOST_ADAMW = 20e9  # bytes a second of the fused AdamW on one thread; measured there: 30e9


@dataclass(frozen=True)
class Work:
    """Counts a micro-batch on one GPU: FLOPs by kind, bytes of all other operations."""

    matmul: float
    attention: float
    bytes: float
    ops: float  # each launches a kernel or a few

    def seconds(self, gpu: Gpu) -> float:
        """Return the time that the arithmetic takes at least, under `EFFICIENCY`."""
        peak, memory = gpu.tflops * 1e12, gpu.bandwidth * 1e12
        matmul = self.matmul / (peak * EFFICIENCY["matmul"])
        attention = self.attention / (peak * EFFICIENCY["attention"])
        return matmul + attention + self.bytes / (memory * EFFICIENCY["bytes"])


def work(config: Config, load: Load, policy: str | None) -> Work:
    """Count a micro-batch in bf16, on FlashAttention's branch.

    policy: what activation checkpointing keeps; "everything": there is none; None: forward alone.
    """
    c, t = config, load.tokens
    d, i, a = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    kv = 2 * c.num_key_value_heads * c.head_dim  # features of keys and values
    layers, logits = c.num_hidden_layers, c.vocab_size * load.predicted
    weights, product = d * (2 * a + kv + 3 * i), layers * a * load.visible
    # Bytes of a layer: norms, rotation of queries and keys in float32, silu and product, sums,
    # the gather of keys and values. The last sum is not made again.
    turned = a + kv / 2
    again = t * (8 * d + 20 * turned + 10 * i + 6 * d) + 4 * kv * load.keys
    forward = again + t * 6 * d
    if policy is None:
        matmul = 2 * (layers * weights * t + logits * d)
        return Work(matmul, 4 * product, layers * forward + 20 * logits, ops=0)
    backward = t * (12 * d + 44 * turned + 18 * i + 30 * d + 2 * kv) + 6 * kv * load.keys
    remade = {"none": d * (2 * a + kv + 2 * i), "attention": 2 * d * i}.get(policy, 0)
    checkpointed, head = policy != "everything", 3 if policy in KEEP_LOGITS else 4
    return Work(
        matmul=2 * (layers * (3 * weights + remade) * t + head * logits * d),
        attention=14 * product,
        bytes=layers * (forward + backward + checkpointed * again) + 56 * logits,
        ops=layers * {"none": 90, "attention": 86, "all": 84}.get(policy, 71)
        + 38 * logits / LOGITS_TILE["cuda"],
    )


def step_times(
    config: Config, settings: Settings, machine: Machine, load: Load, rounds: int
) -> Items:
    """Return the seconds of a step by what takes them; nothing if they cannot be known.

    All but the optimizer go on beside each other. load: of one GPU in the whole step, in `rounds`
    micro-batches.
    """
    gpu, layout = machine.gpu, Layout.of(config, settings, machine)
    if gpu is None or settings.dtype != "bf16":
        return {}
    c, m, whole = layout.compute_bytes, layout.master_bytes, layout.whole
    one, forwards = load.times(1 / rounds), extra_passes(settings)
    training, scoring = work(config, one, settings.kept), work(config, one, None)
    gathers = 1 if settings.gather_once else 2 * rounds
    gathers, reductions = gathers + rounds * forwards, 1 if settings.gather_once else rounds
    sent = whole * (1 - 1 / layout.shards)
    # FSDP copies gathered weights out of its buffer, and gradients into it, as float32. A single
    # GPU casts and copies both ways instead, and adds gradients to those of the rounds before.
    copied = whole * (2 * c * gathers + (c + m) * reductions)
    if layout.shards == 1:
        copied = whole * ((m + 3 * c) * gathers + (c + 3 * m) * reductions)
        copied += whole * 3 * m * (reductions - 1)
    memory = gpu.bandwidth * 1e12 * EFFICIENCY["bytes"]
    state = 10 * m * whole / layout.shards  # bytes that clipping and AdamW read and write
    if layout.offload and settings.replicate == 1:  # FSDP adds up gradients on the host, and waits
        state += 3 * m * (reductions - 1) * whole / layout.shards
    tensors = 9 * config.num_hidden_layers + 3 - config.tie_word_embeddings
    launch = LAUNCH_CHECKPOINTED if settings.activation_checkpointing else LAUNCH
    crossing = layout.offload * m * (gathers + reductions) * whole / layout.shards
    return {
        "arithmetic": rounds * (training.seconds(gpu) + forwards * scoring.seconds(gpu))
        + copied / memory,
        "launches": rounds * training.ops * launch,
        "links": sent * (c * gathers + m * reductions) / (gpu.link * 1e9 * EFFICIENCY["link"]),
        "host bus": crossing / (gpu.bus * 1e9 * EFFICIENCY["bus"]),
        "optimizer": state / (HOST_ADAMW if layout.offload else memory) + tensors * LAUNCH_ADAMW,
    }


def extra_passes(settings: Settings) -> int:
    """Return the passes without gradients that every micro-batch takes beside training.

    An online reference is one. So is that of an objective with a `step_baseline`, which the
    reference joins.
    """
    online = has_online_reference(settings)
    return online + (OBJECTIVES[settings.objective].step_baseline is not None) * (1 + online)
