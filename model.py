"""A Llama-style decoder whose forward pass returns the log-probabilities of packed responses, and its Hugging Face files.

Module names are Hugging Face's and RoPE rotates split halves, as theirs does, so a checkpoint is a strict copy, name by
name. Axes: T tokens in the stream, D hidden, H query heads, K key-value heads, E features of a head, V vocabulary,
N predicted tokens.

    stream of tokens [T] ─ embed ─ blocks ─ norm ─┬─ the N positions that predict a response token ─ lm_head ─ logps [N]
                                                  └─ everything else never meets the vocabulary

The attention rule. A stream holds trees: a prompt, and the responses that continue it. It is cut into *segments* of
queries, each the last tokens of one path from root to leaf; `key_index` lists, for every segment, the stream positions
of that whole path. Query and key positions end together, so the mask is causal with its lower right corner fixed:

    stream                 P P P C C R R R            one pair: prompt, chosen, rejected
    segment 1 queries      P P P C C                  keys  P P P C C
    segment 2 queries                R R R            keys  P P P R R R      (the prompt's keys again, never its MLP)

This file knows nothing about processes, flags or text.
"""

import inspect
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, q [T,H,E], k [T,K,E], v [T,K,E]) → [T,H,E]


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used; the message names the file and the key or tensor."""

    def __init__(self, message: str):  # one line of bounded length, whatever a stranger's file has put into it
        super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message)[:2000])


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class Config:
    """The shape of a Llama or Mistral model, in the words of `config.json`."""

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
    tie_word_embeddings: bool = False  # lm_head is the embedding, transposed
    max_position_embeddings: int = 2048  # what the model was trained for; RoPE itself has no limit

    @classmethod
    def from_folder(cls, folder: Path) -> "Config":
        """Read `config.json` in either dialect of transformers (4: `rope_theta`, `rope_scaling`; 5: `rope_parameters`).

        Raises CheckpointError, naming the key, for whatever this file would compute silently wrong."""
        path = folder / "config.json"
        raw = read_json(path)

        def refuse(key: str, why: str):
            raise CheckpointError(f"{path}: {key} = {json.dumps(raw.get(key))}: {why}")

        def number(key: str, default=None, kind=int, most: int = 2**31):
            value = raw.get(key)
            value = default if value is None else value
            if value is None:
                raise CheckpointError(f"{path}: {key} is missing")
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value <= most:
                refuse(key, f"expected a positive {kind.__name__} of at most {most}")
            return kind(value)

        def size(key: str, default=None) -> int:  # so far no model is near: 126 layers, 151,936 words
            return number(key, default, most=2**20)

        if raw.get("model_type") not in ("llama", "mistral"):
            refuse("model_type", "this is a Llama-style decoder; it loads llama and mistral")
        mistral = raw["model_type"] == "mistral"
        for key, neutral in NEUTRAL.items():
            if raw.get(key, neutral[0]) not in neutral:
                refuse(key, f"not implemented (only {json.dumps(neutral[0])} is)")

        heads = size("num_attention_heads")
        hidden = size("hidden_size")
        head_dim = size("head_dim", hidden // heads)
        # where a key is absent its meaning is the default of transformers' class for that model type
        kv_heads = size("num_key_value_heads", 8 if mistral and "num_key_value_heads" not in raw else heads)
        if heads % kv_heads:
            refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
        if head_dim % 2:
            refuse("head_dim", "rotary embeddings need an even number of features")
        if heads * head_dim > 2**20:
            refuse("head_dim", f"too many features with num_attention_heads = {heads}")
        window = raw.get("sliding_window", 4096) if mistral else None  # v0.2 and later say null
        rope_theta, rope_scaling = read_rope(raw, path)
        return cls(
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=number("num_hidden_layers", most=2**10),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=number("rms_norm_eps", 1e-6, float),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            sliding_window=None if window is None else number("sliding_window", 4096),
            tie_word_embeddings=raw.get("tie_word_embeddings", False) is True,
            max_position_embeddings=number("max_position_embeddings", 4096 * 32 if mistral else 2048),
        )


# config.json keys with the values under which the code below is right; any other value would change the computation
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "num_local_experts": (None, 1),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
}


def read_rope(raw: dict, path: Path) -> tuple[float, dict | None]:
    """(theta, scaling) from either dialect; scaling is None or the four numbers of Llama 3.1's rule."""
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"{path}: {key}: expected one flat object for all layers")
    numbers = {"rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 10000.0}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{path}: {key}.rope_type = {json.dumps(kind)}: not implemented (default and llama3 are)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: {key}.partial_rotary_factor: not implemented (only 1.0 is)")
    if kind == "llama3":
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            numbers[name] = rope.get(name, raw.get(name))
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise CheckpointError(f"{path}: {key}.{name} = {json.dumps(value)}: expected a positive number")
    theta = float(numbers.pop("rope_theta"))
    return theta, numbers or None


# ---------------------------------------------------------------------------------------------------------------------
# Architecture


def wide(x: Tensor) -> Tensor:
    """In float32, for what wants more bits than bfloat16 has; a float64 model stays in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = wide(x)
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + self.eps).rsqrt()
        return (x32 * scale).to(x.dtype) * self.weight


def rotary_table(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, float32 [T, 1, E/2]. Made anew each forward: no buffer to load or shard."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if (s := config.rope_scaling) is not None:  # Llama 3.1: slow waves are stretched, fast ones kept, a ramp between
        turns = s["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / s["factor"])
    angles = positions.float()[:, None] * frequencies
    return angles.cos()[:, None], angles.sin()[:, None]


class Rotate(torch.autograd.Function):
    """Turn the feature pairs (i, i + E/2) of x [T, heads, E] by their position's angle; float32 inside.

    Its gradient is the incoming one turned back, so that nothing of x is kept."""

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = wide(x).chunk(2, dim=-1)
        out = torch.empty_like(x, dtype=a.dtype)
        left, right = out.chunk(2, dim=-1)
        torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=right).addcmul_(a, sin)
        return out.to(x.dtype)

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotate.turn(grad, cos, -sin), None, None


rotate = Rotate.apply


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def kept(products: set[tuple[int, int]], context, op, *args, **kwargs) -> CheckpointPolicy:
    """What activation checkpointing keeps of a block: attention, which of all that it computes is dearest by the byte, and
    matrix products with weights of these shapes (features in, out)."""
    keep = op.name() in ("aten::_scaled_dot_product_flash_attention_for_cpu", "torch_attn::_varlen_attn")
    keep |= op.name() == "aten::mm" and tuple(args[1].shape) in products
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.recompute = False  # activation checkpointing: keep the block's input and attention, make the rest again in backward …
        self.kept_products: set[tuple[int, int]] = set()  # … but these

    def keep_products(self, which: str) -> None:
        """Of activation checkpointing: "none", those of "attention", or "all". down_proj's never needs to be made again."""
        a, m = self.self_attn, self.mlp
        attention = [a.q_proj, a.k_proj, a.v_proj, a.o_proj]
        layers = {"none": [], "attention": attention, "all": [*attention, m.gate_proj, m.up_proj]}[which]
        self.kept_products = {(layer.in_features, layer.out_features) for layer in layers}

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            keep = partial(create_selective_checkpoint_contexts, partial(kept, self.kept_products))
            return checkpoint(self.body, x, cos, sin, attend, use_reentrant=False, preserve_rng_state=False, context_fn=keep)
        return self.body(x, cos, sin, attend)

    def body(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self.embed_tokens(tokens)  # [T, D]
        cos, sin = rotary_table(self.config, positions)
        for block in self.layers:
            x = block(x, cos, sin, attend)
        return self.norm(x)


class Llama(nn.Module):
    """The model. `forward` is training's and evaluation's entry; decoding calls `model` and `logits` with a cache."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight  # [V, D]

    @property
    def device(self) -> torch.device:
        """Where it computes; under FSDP its shards may lie on the host all the same."""
        weight = self.head_weight
        return torch.device(weight.device_mesh.device_type) if isinstance(weight, DTensor) else weight.device

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] in float32."""
        return F.linear(hidden, self.head_weight).float()

    def forward(self, tokens, positions, key_index, cu_q, cu_k, predict, targets) -> Tensor:
        """Log-probabilities [N] in nats, float32, of `targets` [N] after the stream positions `predict` [N].

        tokens, positions: [T]. key_index, cu_q, cu_k: the attention rule, see PackedAttention. `data.pack` makes all
        of them. They come out of here, not logits, because under FSDP the head is whole only inside this call."""
        attend = PackedAttention(key_index, cu_q, cu_k, self.config.sliding_window)
        hidden = self.model(tokens, positions, attend)[predict]  # [N, D]
        return TiledLogps.apply(hidden, self.head_weight, targets)


# Logits alive at once, whatever the vocabulary: a GPU's matrix products want large operands (128 MiB in float32), a CPU's
# caches small ones.
LOGITS_TILE = {"cuda": 2**25, "cpu": 2**20}
LEAST_WORDS = 512  # in a tile, however many the tokens: products with fewer columns are slow


class TiledLogps(torch.autograd.Function):
    """log softmax(hidden · weightᵀ)[target], float32 [N], without ever holding all N × V logits.

    They are made for a tile of words at a time, all N rows at once: forward keeps no more than each row's log-sum-exp,
    with which backward makes the tile's probabilities again. A word's weight and its gradient belong to one tile, so that
    the gradient [V, D] is written once, as one product over all positions, and not summed over chunks of them."""

    @staticmethod
    def tiles(hidden: Tensor, weight: Tensor, targets: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """For each tile: its words, its logits [N, words], whether each target is one of them [N] and which [N, 1]."""
        width = max(LEAST_WORDS, LOGITS_TILE[hidden.device.type] // len(hidden))
        for start in range(0, len(weight), width):
            words = slice(start, min(start + width, len(weight)))
            inside = (words.start <= targets) & (targets < words.stop)
            column = (targets - words.start).clamp(0, words.stop - words.start - 1)[:, None]
            yield words, wide(F.linear(hidden, weight[words])), inside, column

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        most = wide(hidden.new_full(targets.shape, -torch.inf))  # of a row's logits so far
        total = torch.zeros_like(most)  # Σ exp(logit − most)
        chosen = torch.zeros_like(most)  # the target's logit
        for _, logits, inside, column in TiledLogps.tiles(hidden, weight, targets):
            chosen += logits.gather(1, column)[:, 0].where(inside, 0.0)
            before, most = most, torch.maximum(most, logits.amax(1))
            total = total * (before - most).exp() + logits.sub_(most[:, None]).exp_().sum(1)
        normaliser = most + total.log()
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        return chosen - normaliser

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(wide(hidden)), torch.empty_like(weight)
        for words, logits, inside, column in TiledLogps.tiles(hidden, weight, targets):
            probabilities = logits.sub_(normaliser[:, None]).exp_()
            probabilities.scatter_add_(1, column, -inside[:, None].to(logits.dtype))
            grad_logits = probabilities.mul_(-grad[:, None]).to(hidden.dtype)  # grad · (1[word is the target] − p)
            grad_hidden += grad_logits @ weight[words]
            torch.mm(grad_logits.t(), hidden, out=grad_weight[words])
        return grad_hidden.to(hidden.dtype), grad_weight, None


QUERIES = 128  # rows of a block of attention without a kernel of its own for packed streams; keys after its last row are left out


class PackedAttention:
    """Attention over a packed stream: which keys each segment of queries sees (the rule at the top of this file).

    key_index: [S] stream positions of every segment's keys, one segment after the other.
    cu_q, cu_k: int32 [segments + 1], NumPy's, since lengths are wanted without asking a GPU: where each segment's queries
    (in the stream) and keys (in key_index) begin and end.
    window: how many positions back a token sees, itself included (Mistral 7B v0.1); None for all.
    """

    def __init__(self, key_index: Tensor, cu_q: np.ndarray, cu_k: np.ndarray, window: int | None = None):
        self.key_index, self.window = key_index, window
        self.q_lengths, self.k_lengths = np.diff(cu_q).tolist(), np.diff(cu_k).tolist()
        if key_index.is_cuda:
            there = lambda cu: torch.as_tensor(cu).pin_memory().to(key_index.device, non_blocking=True)  # no waiting
            self.cu_q, self.cu_k = there(cu_q), there(cu_k)
        self.mask: Tensor | None = None  # of every block of every segment in every layer, see `sdpa`

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return self.flash(q, k[self.key_index], v[self.key_index])  # [S, K, E]
        # PyTorch's backward kernel for CPUs is nearly three times as fast in float32 as in bfloat16, even with AMX
        wide_q, wide_k, wide_v = wide(q), wide(k)[self.key_index], wide(v)[self.key_index]
        segments = zip(wide_q.split(self.q_lengths), wide_k.split(self.k_lengths), wide_v.split(self.k_lengths))
        return torch.cat([block for segment in segments for block in self.sdpa(*segment)]).to(q.dtype)

    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One kernel for all segments; blocks outside the mask are never computed."""
        from torch.nn.attention.varlen import varlen_attn

        window = (-1 if self.window is None else self.window - 1, 0)  # (to the left, to the right); causal
        # torch 2.12 on wants to be told of grouped queries; the kernel could always do them
        gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        longest = max(self.q_lengths), max(self.k_lengths)
        return varlen_attn(q, k, v, self.cu_q, self.cu_k, *longest, window_size=window, **gqa)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
        """One segment, q [Tq, H, E] against k, v [Tk, K, E], in blocks of queries; anywhere and in any dtype.

        Row i of `mask` is a query at position `most` + i, column j a key at position j, so that every block's mask is the
        part of it that lies as far from the diagonal."""
        most = max(self.k_lengths)
        if self.mask is None:
            rows, columns = (torch.arange(n, device=q.device) for n in (QUERIES, most + QUERIES))
            distance = most + rows[:, None] - columns
            hidden = (distance < 0) | (distance >= (self.window or most + 1))
            # added to scores as it is; CUDA's kernels want memory aligned, and align what they make of a boolean mask
            self.mask = ~hidden if q.is_cuda else torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [K, H/K, Tq, E]: queries that share their keys
        k, v = (x.transpose(0, 1)[:, None] for x in (k, v))  # [K, 1, Tk, E]
        position = k.shape[2] - q.shape[2]  # of the block's first query
        for block in q.split(QUERIES, dim=2):
            n = block.shape[2]
            seen = slice(max(0, position + 1 - (self.window or most)), position + n)
            mask = self.mask[:n, most - position + seen.start : most + n]
            keys, values = (x[:, :, seen].expand(-1, q.shape[1], -1, -1) for x in (k, v))  # not copied
            out = F.scaled_dot_product_attention(block, keys, values, attn_mask=mask)
            yield out.permute(2, 0, 1, 3).flatten(1, 2)  # [n, H, E]
            position += n


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def read_json(path: Path) -> dict:
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def parse_json(raw: bytes) -> object:
    """JSON in which no key stands twice: what readers make of a second one differs. Raises ValueError."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        if len(value := dict(pairs)) < len(pairs):
            raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]} stands twice")
        return value

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)


LONGEST_HEADER = 2**24  # bytes of a safetensors file's list of tensors; 10,000 of them take a sixteenth


class Weights:
    """The tensors of a checkpoint folder; only what is asked for is read.

    Raises CheckpointError for a missing or damaged file and for weights that are not float32, bfloat16 or float16."""

    DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

    def __init__(self, folder: Path):
        self.where = folder
        self.files: dict[str, tuple[Path, list[int]]] = {}  # tensor name → (file, shape)
        self.dtype = torch.float32  # of the first tensor; a saved checkpoint keeps it
        for path in self.shards(folder):
            try:
                with open(path, "rb") as file:
                    size = int.from_bytes(file.read(8), "little")
                    if size > LONGEST_HEADER:
                        raise ValueError(f"a header of {size} bytes, more than {LONGEST_HEADER}")
                    header = file.read(size)
                with safe_open(path, framework="pt") as handle:  # refuses tensors that overlap, leave holes or exceed the file
                    parse_json(header)  # it takes the last of two of the same name
                    slices = {name: handle.get_slice(name) for name in handle.keys()}
                    tensors = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
            except (SafetensorError, OSError, ValueError, RecursionError) as e:
                raise CheckpointError(f"{path}: not a whole safetensors file: {e}") from None
            for name, (dtype, shape) in tensors.items():
                if dtype not in self.DTYPES:
                    raise CheckpointError(f"{path}: {name} is {dtype}: only {', '.join(self.DTYPES)} are supported")
                if name in self.files:
                    raise CheckpointError(f"{path}: {name} is also in {self.files[name][0].name}")
                if not self.files:
                    self.dtype = self.DTYPES[dtype]
                self.files[name] = (path, list(shape))

    @staticmethod
    def shards(folder: Path) -> list[Path]:
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            path = folder / "model.safetensors"
            if not path.exists():
                bins = " (pytorch_model.bin is a pickle, which can run code: convert it to safetensors)"
                hint = bins if any(folder.glob("pytorch_model*.bin")) else ""
                raise CheckpointError(f"{folder}: neither model.safetensors nor model.safetensors.index.json{hint}")
            return [path]
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(f, str) for f in weight_map.values())
        ):
            raise CheckpointError(f"{index}: weight_map is missing, empty or not a map of tensor names to file names")
        for name in (names := sorted(set(weight_map.values()))):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: weight_map: {name!r} is not the name of a safetensors file in this folder"
                )
            if not os.path.isfile(folder / name):
                raise CheckpointError(f"{folder / name}: no such file, though {index.name} names it")
        return [folder / name for name in names]

    def check(self, model: nn.Module) -> None:
        """Hold the headers against an empty model, before memory is spent. Raises CheckpointError naming the tensors
        that are missing, unknown or of another shape."""
        parameters = dict(model.named_parameters())
        extra = {n for n in self.files if n not in parameters and not n.endswith("rotary_emb.inv_freq")}
        if model.config.tie_word_embeddings:
            extra.discard("lm_head.weight")
        for problem, names in (
            ("missing", parameters.keys() - self.files.keys()),
            ("not a tensor of this model", extra),
        ):
            if names:
                few = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise CheckpointError(f"{self.where}: {problem}: {few}")
        for name, parameter in parameters.items():
            path, shape = self.files[name]
            if shape != list(parameter.shape):
                raise CheckpointError(f"{path}: {name} has shape {shape}, config.json says {list(parameter.shape)}")

    def copy_into(self, model: nn.Module) -> None:
        """Fill every parameter, sharded or whole, in place; each process reads only the rows that it holds.

        A file is mapped only meanwhile: what was read of it counts as this process's memory until it is let go."""
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
    """The rows of a parameter that live here: all, or this process's share under FSDP (ceil-sized, the last one short)."""
    rows = parameter.shape[0]
    start, stop = 0, rows
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                size = math.ceil(rows / parameter.device_mesh.size(dim))
                start = min(parameter.device_mesh.get_local_rank(dim) * size, rows)
                stop = min(start + size, rows)
    return start, stop


def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """The model of a checkpoint folder, whole, on one device (sampling and analysis; train.py shards instead)."""
    with torch.device("meta"):
        model = Llama(Config.from_folder(folder)).to(dtype)
    weights = Weights(folder)
    weights.check(model)
    model.to_empty(device=device)
    weights.copy_into(model)
    return model.eval()


# what else belongs to a checkpoint that others can load; never weights, never code
COMPANIONS = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
              "chat_template.*", "vocab.*", "merges.txt", "LICENSE*")  # fmt: skip


# all that is ever fetched from a hub; beside them Mistral keeps the same weights again, in consolidated.safetensors
CHECKPOINT_FILES = ("model*.safetensors", "model.safetensors.index.json", *COMPANIONS)


def save(model: Llama, source: Path, out: Path, dtype: torch.dtype, write: bool = True, shard_bytes: int = 5 * 10**9,
         replace: dict[str, str] | None = None) -> None:  # fmt: skip
    """Write `out` as a Hugging Face folder: safetensors shards of at most `shard_bytes`, index, config and tokenizer.

    Collective under FSDP: every process calls it, the one with `write` writes; one shard at a time is whole in memory.
    Config and tokenizer files come from `source`; `replace` maps file names to texts that take their place.
    The folder appears under its name only once it is whole and on disk. Raises FileExistsError if it is there already.
    """
    if write and out.exists():
        raise FileExistsError(f"{out} exists")
    temporary = out.with_name(out.name + ".incomplete")
    if write:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for pattern in COMPANIONS:
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, temporary / path.name)
        for name, text in (replace or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")

    groups: list[list[str]] = [[]]
    sizes = {name: p.numel() * dtype.itemsize for name, p in model.named_parameters()}
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    weight_map = {}
    parameters = dict(model.named_parameters())
    for i, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(whole_tensors({name: parameters[name] for name in group}, dtype, keep=write))
        weight_map |= dict.fromkeys(group, file)
        if write:
            try:
                save_file(tensors, temporary / file, metadata={"format": "pt"})
            except SafetensorError as e:  # a full disk, say
                shutil.rmtree(temporary, ignore_errors=True)
                raise OSError(f"{out / file}: cannot be written: {e}") from None
    if write:
        if len(groups) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            sync(path)
        sync(temporary)
        temporary.rename(out)
        sync(out.parent)


def whole_tensors(parameters: dict[str, Tensor], dtype: torch.dtype, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Each parameter gathered from its shards, cast, on the CPU; a process that does not `keep` them only takes part."""
    for name, parameter in parameters.items():
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if keep:
            yield name, whole.to("cpu", dtype).contiguous()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
