"""A Llama-style decoder whose forward pass returns log-probabilities of packed responses.

Module names are Hugging Face's, and RoPE rotates split halves as theirs does, so a checkpoint is
copied name by name. `formats/checkpoint.py` does that; this file is architecture only.

Axes: T tokens in the stream, D hidden, H query heads, K key-value heads, E features per head,
V vocabulary, N predicted tokens.

    stream [T] ─ embed ─ blocks ─ norm ─┬─ N positions that predict responses ─ lm_head ─ logps [N]
                                        └─ all other positions skip lm_head

The attention rule. A stream holds preference pairs. A *path* is a prompt followed by one of its
responses. The stream is cut into *segments* of queries: the first of a pair holds its whole first
path, each further one only a response. The keys of a segment are always the whole path, and
`key_index` lists their stream positions. Queries and keys end at the same token, so the mask is
causal and aligned at its lower right corner:

    stream                 P P P C C R R R            one pair: prompt, chosen, rejected
    segment 1 queries      P P P C C                  keys  P P P C C
    segment 2 queries                R R R            keys  P P P R R R    (the prompt's keys again)

Read `Llama.forward` first, then `Decoder` and `Block`. `TiledLogps` and `PackedAttention` are the
two parts that differ from other implementations.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Turns = tuple[Tensor, Tensor]  # RoPE's cosines and sines, see `rotary_table`
# (the layer's module, q [T,H,E], k [T,K,E], v [T,K,E]) → [T,H,E]
Attend = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Holds the shape of a Llama or Mistral model, in the words of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3.1's frequency scaling; None: plain RoPE
    sliding_window: int | None = None  # in positions; None: a token sees its whole path
    tie_word_embeddings: bool = False  # lm_head is the transposed embedding
    max_position_embeddings: int = 2048  # the longest training context; RoPE itself has no limit


def to_device(array: Any, device: torch.device) -> Tensor:
    """Copy an array to a GPU through pinned memory, without waiting; on a CPU, share its memory."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# --------------------------------------------------------------------------------------------------
# Architecture


def rotary_table(config: Config, positions: Tensor) -> Turns:
    """Return what `rotate` multiplies the halves of a head with, two times float32 [T, 1, 2, E/2].

    The table is recomputed every forward pass, so there is no buffer to load or shard.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = config.rope_theta ** -(exponents / config.head_dim)
    if (s := config.rope_scaling) is not None:
        # Llama 3.1 slows down the low frequencies, keeps the high ones and interpolates between.
        cycles = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((cycles - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / s["factor"])
    angles = positions.float()[:, None, None] * frequencies  # [T, 1, E/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos, sin), -2), torch.stack((-sin, cos), -2)


def rotate(x: Tensor, by_first: Tensor, by_second: Tensor) -> Tensor:
    """Rotate the feature pairs (i, i + E/2) of x [T, heads, E] by their angles, in float32."""
    first, second = x.unflatten(-1, (2, 1, -1)).unbind(-3)  # each half adds to both halves
    return torch.addcmul(first * by_first, second, by_second).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.index = layer
        self.head_dim = config.head_dim
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, turns: Turns, attend: Attend) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        out = attend(self, rotate(q, *turns), rotate(k, *turns), v)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.checkpoint_activations = False  # keep input and attention, recompute the rest …
        self.save_matmuls("none")  # … except the matmuls that this names

    def save_matmuls(self, which: str) -> None:
        """Choose the matmul outputs that checkpointing saves: "none", "attention" or "all"."""
        a, m = self.self_attn, self.mlp  # backward never needs the output of down_proj
        attention = [a.q_proj, a.k_proj, a.v_proj, a.o_proj]
        saved = {"none": [], "attention": attention, "all": [*attention, m.gate_proj, m.up_proj]}
        shapes = frozenset((layer.in_features, layer.out_features) for layer in saved[which])
        policy = partial(checkpoint_policy, shapes)
        self.checkpoint_contexts = partial(create_selective_checkpoint_contexts, policy)

    def compile(self) -> None:
        """Compile the block as one graph, for streams of any length.

        FSDP's hooks, which gather the weights, stay outside. So does attention in PyTorch's own
        operations, which is cut to the lengths of a stream; FlashAttention is one operation.
        """
        if not hasattr(attend := PackedAttention.by_segment, "__wrapped__"):  # once for all blocks
            setattr(PackedAttention, "by_segment", torch.compiler.disable(attend))
        self.forward = torch.compile(self.forward, dynamic=True)  # type: ignore[method-assign]

    def forward(self, x: Tensor, turns: Turns, attend: Attend) -> Tensor:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return self.body(x, turns, attend)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        contexts = self.checkpoint_contexts
        return checkpoint(self.body, x, turns, attend, context_fn=contexts, **options)

    def body(self, x: Tensor, turns: Turns, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turns, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


def checkpoint_policy(
    saved_matmuls: frozenset[tuple[int, int]], context, op, *args, **kwargs
) -> CheckpointPolicy:
    """Save the chosen matmuls and the outputs of fused attention; recompute the rest.

    Attention costs most to recompute per byte kept. saved_matmuls: (features in, features out).
    """
    fused = "_flash_attention_for_cpu", "_efficient_attention"  # the latter on a GPU in float32
    save = op.name() == "torch_attn::_varlen_attn" or op.name().endswith(fused)
    save |= op.name() == "aten::bmm" and args[0].device.type == "cpu"  # ends `attention` there
    save |= op.name() == "aten::mm" and tuple(args[1].shape) in saved_matmuls
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embed_tokens(tokens)  # [T, D]
        turns = rotary_table(self.config, positions)
        for block in self.layers:
            x = block(x, turns, attend)
        return self.norm(x)


class Llama(nn.Module):
    """Combines decoder and head. Training calls `forward`, decoding `model` and `logits`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.keep_logits = False  # for backward, which otherwise recomputes them tile by tile
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        tied = self.config.tie_word_embeddings
        return (self.model.embed_tokens if tied else self.lm_head).weight  # [V, D]

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits [..., V] in float32."""
        return F.linear(hidden, self.head_weight).float()

    def forward(self, tokens, positions, key_index, cu_q, cu_k, predict, targets) -> Tensor:
        """Return log-probabilities [N] of `targets` [N] at the positions `predict` [N].

        They are float32, in nats. `data.pack` makes all arguments; tokens, positions are [T], and
        key_index, cu_q, cu_k are described in `PackedAttention`. The log-probabilities are computed
        inside this call because FSDP gathers the head's weight only here.
        """
        attend = PackedAttention(key_index, cu_q, cu_k, self.config.sliding_window)
        hidden = self.model(tokens, positions, attend).index_select(0, predict)  # [N, D]
        keep = self.keep_logits and torch.is_grad_enabled()
        return TiledLogps.apply(hidden, self.head_weight, targets, keep)


# --------------------------------------------------------------------------------------------------
# Log-probabilities without logits

# About how many logits a tile holds. Matmuls on a GPU want large operands (128 MiB in float32), the
# caches of a CPU want small ones.
LOGITS_TILE = {"cuda": 2**25, "cpu": 2**20}
MIN_TILE_WIDTH = 512  # vocabulary entries: matmuls with fewer columns are slow
TILE_STEP = 128  # widths are multiples of it, the width that matmul kernels of GPUs work in


class TiledLogps(torch.autograd.Function):
    """Computes log softmax(hidden · weightᵀ)[target], float32 [N], without all N × V logits.

    Logits exist for one tile of vocabulary entries at a time, for all N rows. Forward keeps,
    beyond its inputs, the log-sum-exp of each row; with it, backward recomputes a tile's
    probabilities. (`keep` keeps the logits and spares their matmul.) Each vocabulary row belongs to
    one tile, so its gradient is written once, as one product over all N positions.
    """

    @staticmethod
    def tiles(
        hidden: Tensor, weight: Tensor, targets: Tensor, kept: Sequence[Tensor] = ()
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield each tile's entries (a slice of V), its logits [N, width], and where targets are.

        The last two tensors say whether each target is in the tile [N], and in which column [N, 1].
        kept: every tile's logits, if forward kept them.
        """
        width = LOGITS_TILE[hidden.device.type] // len(hidden)
        width = max(MIN_TILE_WIDTH, width - width % TILE_STEP)
        for i, start in enumerate(range(0, len(weight), width)):
            entries, column = slice(start, start + width), targets - start
            inside = (0 <= column) & (column < width)
            logits = kept[i] if kept else F.linear(hidden, weight[entries])
            yield entries, logits, inside, column.clamp(0, width - 1)[:, None]

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, keep=False) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)  # to which logits are upcast
        maximum = hidden.new_full(targets.shape, -torch.inf, dtype=dtype)  # of logits so far
        total = torch.zeros_like(maximum)  # Σ exp(logit − maximum)
        target_logit = torch.zeros_like(maximum)
        kept: list[Tensor] = []
        for _, logits, inside, column in TiledLogps.tiles(hidden, weight, targets):
            if keep:
                kept.append(logits)
            target_logit += logits.gather(1, column)[:, 0].where(inside, 0.0)
            previous, maximum = maximum, torch.maximum(maximum, logits.amax(1))
            total = total * (previous - maximum).exp() + (logits - maximum[:, None]).exp_().sum(1)
        normaliser = maximum + total.log()
        ctx.save_for_backward(hidden, weight, targets, normaliser, *kept)
        return target_logit - normaliser

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, normaliser, *kept = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype)
        grad_weight = torch.empty_like(weight)
        for entries, logits, inside, column in TiledLogps.tiles(hidden, weight, targets, kept):
            probabilities = (logits - normaliser[:, None]).exp_()
            probabilities.scatter_add_(1, column, -inside[:, None].to(grad.dtype))
            grad_logits = probabilities.mul_(-grad[:, None]).to(hidden.dtype)  # g · (1[target] − p)
            grad_hidden += grad_logits @ weight[entries]
            torch.mm(grad_logits.t(), hidden, out=grad_weight[entries])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


# --------------------------------------------------------------------------------------------------
# Attention over a packed stream

QUERY_BLOCK = 128  # queries per block; keys after its last query are skipped


def flash_runs(device: torch.device) -> bool:
    """Return True for a GPU that runs FlashAttention and computes bfloat16 in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_takes(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= 256


def flash_kernel(window: int | None) -> Callable[..., Tensor]:
    """Return FlashAttention for segments of any length, causal from the lower right corner."""
    from torch.nn.attention.varlen import varlen_attn  # slow to import, and only needed on a GPU

    # torch 2.12 and later ask for this flag; the kernel has always supported grouped queries.
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict = {"enable_gqa": True} if grouped else {}
    left = -1 if window is None else window - 1
    return partial(varlen_attn, window_size=(left, 0), **options)


class PackedAttention:
    """Computes attention over a packed stream by the rule at the top of this file.

    key_index: [S] stream positions of each segment's keys, segment after segment.
    cu_q, cu_k: int32 [segments + 1], where each segment's queries (in the stream) and keys (in
        key_index) begin and end. NumPy arrays, so that reading lengths does not wait for the GPU.
    window: how many positions back a token sees, itself included (Mistral 7B v0.1); None for all.
    """

    def __init__(
        self, key_index: Tensor, cu_q: np.ndarray, cu_k: np.ndarray, window: int | None = None
    ):
        self.key_index, self.window = key_index, window
        self.q_lengths, self.k_lengths = np.diff(cu_q).tolist(), np.diff(cu_k).tolist()
        self.longest = max(self.q_lengths), max(self.k_lengths)
        self.flash_runs = flash_runs(key_index.device)
        if self.flash_runs:
            self.kernel = flash_kernel(window)
            self.cu_q, self.cu_k = (to_device(cu, key_index.device) for cu in (cu_q, cu_k))
        self.mask: Tensor | None = None  # shared by all segments and layers, see `blocks`

    def __call__(self, layer: "Attention", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flash = self.flash_runs and q.dtype.itemsize == 2 and flash_takes(q.shape[-1])
        return self.flash(q, k, v) if flash else self.by_segment(q, k, v)

    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run one kernel for all segments; it never computes blocks outside the mask."""
        k, v = (x.index_select(0, self.key_index) for x in (k, v))  # backward adds, without sorting
        return self.kernel(q, k, v, self.cu_q, self.cu_k, *self.longest)

    def by_segment(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute segment by segment, on any device and in any dtype."""
        group = q.shape[1] // k.shape[1]  # query heads that share a key head: rows of one matrix
        q = q.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)  # [K, T · group, E]
        k, v = (x.transpose(0, 1).index_select(1, self.key_index) for x in (k, v))  # [K, S, E]
        lengths = [n * group for n in self.q_lengths], self.k_lengths, self.k_lengths
        segments = zip(*(x.split(sizes, dim=1) for x, sizes in zip((q, k, v), lengths)))
        blocks = [block for q, k, v in segments for block in self.blocks(q, k, v, group)]
        return torch.cat(blocks, dim=1).unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, group: int) -> Iterator[Tensor]:
        """Yield the output of a segment, q [K, Tq · group, E] and k, v [K, Tk, E], block by block.

        Whether a query sees a key depends on their distance, so one mask serves all blocks: its
        row i is the query at position `longest` + i // group, its column j the key at position j.
        A block that begins at position p reads it shifted by `longest` − p columns.
        """
        longest = self.longest[1]
        if self.mask is None:
            self.mask = self.make_mask(longest, q, group)
        position = k.shape[1] - q.shape[1] // group  # of the block's first query
        for block in q.split(QUERY_BLOCK * group, dim=1):
            n = block.shape[1] // group
            visible = slice(max(0, position + 1 - (self.window or longest)), position + n)
            mask = self.mask[: n * group, longest - position + visible.start : longest + n]
            yield attention(block, k[:, visible], v[:, visible], mask)
            position += n

    def make_mask(self, longest: int, q: Tensor, group: int) -> Tensor:
        """Return the mask that `blocks` slices: [QUERY_BLOCK · group, longest + QUERY_BLOCK]."""
        rows = torch.arange(QUERY_BLOCK, device=q.device).repeat_interleave(group)
        columns = torch.arange(longest + QUERY_BLOCK, device=q.device)
        distance = longest + rows[:, None] - columns
        masked = (distance < 0) | (distance >= (self.window or longest + 1))
        if q.is_cuda:  # kernels need aligned float masks; of a boolean slice, SDPA makes one
            return ~masked
        return torch.zeros_like(masked, dtype=q.dtype).masked_fill_(masked, -torch.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √E + mask) v of a block of queries; a GPU's mask says who sees whom."""
    if q.is_cuda or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
    # On a CPU, that kernel's backward in bfloat16 takes three times as long as plain matmuls do.
    return torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1) @ v


# --------------------------------------------------------------------------------------------------
# Cost


def train_flops(config: Config, pair: Any) -> float:
    """Return the floating-point operations that forward and backward need for one `data.Pair`.

    Counts 6 per weight and token and 12 per feature of a query-key pair that the mask shows. Leaves
    out recomputation, and the head where no target is.
    """
    c, prompt, responses = config, len(pair.prompt), [len(response) for response in pair.responses]
    q_k_v_o = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim  # features
    weights = c.hidden_size * (q_k_v_o + 3 * c.intermediate_size)  # of one block
    attention = c.num_attention_heads * c.head_dim * visible(prompt, responses, c.sliding_window)
    block = 6 * weights * (prompt + sum(responses)) + 12 * attention
    return c.num_hidden_layers * block + 6 * c.vocab_size * c.hidden_size * sum(responses)


def visible(prompt: int, responses: list[int], window: int | None) -> float:
    """Return how many query-key pairs the mask shows, for a pair of these lengths."""
    paths = [prompt, *(prompt + r for r in responses)]  # of n tokens, the last ones see m each
    seen = [m * n - m * (m - 1) / 2 for n in paths for m in [min(n, window or n)]]
    return sum(seen[1:]) - (len(responses) - 1) * seen[0]


if __name__ == "__main__":
    print(__doc__)
