"""Count what a GPU computes, reads and writes in a training step, on a machine without one.

    python bench/count_ops.py                a layer of Llama 3 8B, and what surrounds the layers
    python bench/count_ops.py --roofline     the table in docs/gpu.md: a step's expected time
    python bench/count_ops.py --roofline --gpu H200 --keep everything

The model runs on the meta device, where tensors have shapes and no contents, and on the branch of
GPUs. A dispatcher mode sees every operation below autograd and adds up its cost:

    ops      operations that launch kernels; views and allocations launch none. Some launch more
             than one: attention's backward, a norm's backward, a product cut in pieces by cuBLAS
    FLOPs    of matrix products and attention: 4 per feature of a visible query-key pair forward,
             10 backward, where FlashAttention computes the scores again
    bytes    of every tensor that an operation reads or writes, as if no cache held any of them

`F.rms_norm` is two operations on CUDA and many elsewhere, so the count replaces it by those two.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import model as llama  # noqa: E402
from data import Pair, pack  # noqa: E402
from model import Config, Llama  # noqa: E402
from runtime.gpus import EFFICIENCY, Gpu, Load, Machine, find_gpu, step_times  # noqa: E402
from runtime.settings import KEEP_LOGITS, read_settings  # noqa: E402

LLAMA3_8B = Config(128256, 4096, 14336, 32, 32, 8, 128)
PAIRS = [Pair(np.zeros(121, int), (np.zeros(288, int),) * 2)] * 8  # UltraFeedback's median
GPUS, ROUNDS = 8, 2  # micro-batches of `PAIRS` on each, so a step is the recipes' 128 pairs
POLICIES = (
    "none",
    "attention",
    "all",
    "everything",
)  # kept by checkpointing; the last: there is none
ALLOCATE = {"empty", "new_empty", "empty_like", "_unsafe_view", "lift_fresh", "promote_types"}
OVERWRITE = {"zero_", "fill_", "zeros_like", "ones_like", "new_zeros", "new_full"}  # read nothing
GATHER = {"index_select", "index", "embedding", "gather"}  # read as many numbers as they return
ADD_ROWS = {"index_add", "index_add_", "index_put", "embedding_dense_backward"}
KINDS = "matmul", "attention", "norm", "RoPE", "SwiGLU", "sums", "gather", "other"
Costs = dict[str, "Cost"]  # kind: cost


@dataclass
class Cost:
    """Holds a number of operations, of floating-point operations and of bytes."""

    ops: int = 0
    flops: float = 0
    bytes: float = 0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def times(self, factor: int) -> "Cost":
        return Cost(*(factor * number for number in vars(self).values()))


def nbytes(tree: Any) -> int:
    """Return the bytes of all tensors in a tree; of an expanded one, those that it really has."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)


class Count(TorchDispatchMode):
    """Adds up the cost of every operation by kind, in `costs`.

    visible: query-key pairs that attention computes, of one head.
    """

    def __init__(self, config: Config, visible: float):
        super().__init__()
        self.config, self.costs = config, defaultdict(Cost)
        self.attention = visible * config.num_attention_heads * config.head_dim

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.name().removeprefix("aten::").partition(".")[0]
        if not (op.is_view or name in ALLOCATE):
            self.add(name, args, out)
        return out

    def add(self, name: str, args: Any, out: Any) -> None:
        """Add an operation with its arguments and results."""
        flops = 0.0
        if name == "mm":
            flops = 2.0 * args[0].shape[1] * out.numel()
        elif "_varlen_attn" in name:
            flops = (10 if "backward" in name else 4) * self.attention
        read, written = nbytes(args), nbytes(out)
        if name in OVERWRITE:
            read = 0
        elif name in GATHER:
            read = written
        elif name in ADD_ROWS:  # rows are read, added and written
            read, written = 2 * nbytes(args[-1]), nbytes(args[-1])
        kind = self.kind(name, out)
        self.costs[kind] = self.costs[kind].plus(Cost(1, flops, read + written))

    def kind(self, name: str, out: Any) -> str:
        """Tell the kind by the operation, or by the last axis of its result."""
        c, shape = self.config, tree_leaves(out)[0].shape
        if name == "mm":
            return "matmul"
        if "attn" in name:
            return "attention"
        if "norm" in name:
            return "norm"
        if name in GATHER | ADD_ROWS | {"new_zeros"}:
            return "gather"
        if len(shape) > 2 or shape[-1:] == (c.head_dim // 2,):
            return "RoPE"
        widths = {c.hidden_size: "sums", c.intermediate_size: "SwiGLU"}
        return widths.get(shape[-1] if shape else 0, "other")

    def rms_norm(self, x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return FusedNorm.apply(x, weight, self)


class FusedNorm(torch.autograd.Function):
    """Costs what `F.rms_norm` costs on CUDA, and computes nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, count: Count) -> Tensor:
        out, scale = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
        ctx.count = count
        ctx.save_for_backward(x, scale, weight)
        count.add("_fused_rms_norm", (x, weight), (out, scale))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        gradients = torch.empty_like(x), torch.empty_like(weight)
        ctx.count.add("_fused_rms_norm_backward", (grad, x, scale, weight), gradients)
        return *gradients, None


@contextmanager
def pretended_gpu(count: Count) -> Iterator[None]:
    """Take the meta device for a GPU."""

    def to_device(array: Any, device: torch.device) -> Tensor:
        return torch.empty_like(torch.as_tensor(array), device="meta")

    with ExitStack() as stack:
        stack.enter_context(patch.object(llama, "flash_runs", lambda device: True))
        stack.enter_context(patch.object(llama, "to_device", to_device))
        stack.enter_context(patch.dict(llama.LOGITS_TILE, meta=llama.LOGITS_TILE["cuda"]))
        stack.enter_context(patch.object(F, "rms_norm", count.rms_norm))
        yield


def costs_of(config: Config, pairs: list[Pair], keep: str | None) -> Costs:
    """Return the cost of forward and backward of a micro-batch, by kind.

    keep: "none", "attention" or "all", as --keep-products; "everything": no checkpointing; None:
        forward alone, without gradients.
    """
    visible = 0.0
    for pair in pairs:
        p, responses = len(pair.prompt), [len(response) for response in pair.responses]
        visible += p * (p + 1) / 2 + sum(r * (p + (r + 1) / 2) for r in responses)
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16)
    model.keep_logits = keep in KEEP_LOGITS
    for block in model.model.layers:
        block.checkpoint_activations = keep != "everything"
        block.save_matmuls(keep if keep in ("attention", "all") else "none")
    packed: dict = pack(pairs)
    grad = torch.set_grad_enabled(keep is not None)
    with pretended_gpu(count := Count(config, visible)), count, grad:
        for name in packed.keys() - {"cu_q", "cu_k"}:
            packed[name] = llama.to_device(packed[name], torch.device("meta"))
        logps = model(**packed)
        if keep is not None:
            logps.sum().backward()
    return count.costs


def layer_and_rest(config: Config, pairs: list[Pair], keep: str | None) -> tuple[Costs, Costs]:
    """Return the cost of one layer and of what surrounds the layers, by kind."""
    rest, with_one = (costs_of(replace(config, num_hidden_layers=n), pairs, keep) for n in (0, 1))
    layer = {k: cost.plus(rest.get(k, Cost()).times(-1)) for k, cost in with_one.items()}
    return layer, rest


def total(costs: Costs) -> Cost:
    return reduce(Cost.plus, costs.values(), Cost())


def elementwise(costs: Costs) -> Cost:
    """Return the cost of all but matrix products and attention."""
    return total({kind: c for kind, c in costs.items() if kind not in ("matmul", "attention")})


# --------------------------------------------------------------------------------------------------
# What is printed


def count_lines(costs: Costs) -> Iterator[str]:
    """Yield a line for each kind, and the sums."""
    kinds = {kind: costs[kind] for kind in KINDS if kind in costs and costs[kind].ops}
    sums = {"elementwise": elementwise(costs), "total": total(costs)}
    for name, c in (kinds | sums).items():
        yield f"  {name:12} {c.ops:5} {c.flops / 1e12:9.3f} {c.bytes / 1e9:9.3f}"


def roofline(gpu: Gpu, keep: str) -> Iterator[str]:
    """Yield the expected time of a SimPO step on one of `GPUS` GPUs, as a table in Markdown."""
    config, layer, rest = LLAMA3_8B, *layer_and_rest(LLAMA3_8B, PAIRS, keep)
    times = config.num_hidden_layers * ROUNDS
    costs = {f"{kind}, layers": layer[kind].times(times) for kind in KINDS if kind in layer}
    costs["matmul, head"] = rest["matmul"].times(ROUNDS)
    costs["log-probs and the rest"] = elementwise(rest).times(ROUNDS)
    yield "| | operations | TFLOP | GB | by the data sheet, ms | expected, ms |"
    yield "|---|---|---|---|---|---|"
    ideal_sum = expected_sum = 0.0
    for name, c in costs.items():
        peak, memory = gpu.tflops * 1e12, gpu.bandwidth * 1e12
        reached = EFFICIENCY["attention" if "attention" in name else "matmul"]
        ideal = max(c.flops / peak, c.bytes / memory)
        expected = max(c.flops / (peak * reached), c.bytes / (memory * EFFICIENCY["bytes"]))
        ideal_sum, expected_sum = ideal_sum + ideal, expected_sum + expected
        numbers = f"{c.ops:,} | {c.flops / 1e12:.1f} | {c.bytes / 1e9:.0f}"
        yield f"| {name} | {numbers} | {1e3 * ideal:.0f} | {1e3 * expected:.0f} |"
    yield f"| sum | | | | {1e3 * ideal_sum:.0f} | {1e3 * expected_sum:.0f} |"
    kept = "--no-activation-checkpointing" if keep == "everything" else f"--keep-products={keep}"
    settings = read_settings(["--model=m", "--data=d", "--dtype=bf16", kept])
    machine = Machine("cuda", "", GPUS, gpu.memory, None, gpu)
    planned = step_times(config, settings, machine, Load.of(config, PAIRS * ROUNDS), ROUNDS)
    for name, seconds in planned.items():
        yield f"| `--plan`: {name} | | | | | {1e3 * seconds:.0f} |"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--roofline", action="store_true")
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--keep", default="none", choices=POLICIES)
    flags = parser.parse_args()
    if flags.roofline:
        if (gpu := find_gpu(flags.gpu)) is None:
            sys.exit(f"--gpu {flags.gpu}: no data sheet is known by that name")
        return print("\n".join(roofline(gpu, flags.keep)))
    tokens = sum(pair.tokens for pair in PAIRS)
    rests = {}
    for keep in POLICIES:
        layer, rests[keep] = layer_and_rest(LLAMA3_8B, PAIRS, keep)
        print(
            f"one layer, {tokens:,} tokens, kept: {keep}\n  kind           ops     TFLOP        GB"
        )
        print("\n".join(count_lines(layer)))
    for keep, logits in (("none", "computed twice"), ("all", "kept")):
        print(f"embedding, last norm, head; logits {logits}")
        print("\n".join(count_lines(rests[keep])))


if __name__ == "__main__":
    main()
