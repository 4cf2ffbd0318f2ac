"""Stand in for FlashAttention on a CPU, and refuse what the CUDA kernel would refuse.

Importing this module gives `aten::_flash_attention_forward` and its backward, which exist for CUDA
alone, an implementation for CPU tensors. The contract is that of `mha_varlen_fwd` in FlashAttention
2's flash_api.cpp: dtypes, int32 offsets on the same device, contiguous features, heads, head size,
totals and longest lengths. Queries and keys of a segment end at the same position.
"""

import math

import torch
from torch import Tensor

CALLS = {"forward": 0, "backward": 0}


def demand(met: bool, what: str) -> None:
    if not met:
        raise RuntimeError(f"FlashAttention demands {what}")


def lengths_of(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int
) -> tuple[list[int], list[int]]:
    """Check the contract; return the number of queries and keys of every segment."""
    demand(q.dtype in (torch.bfloat16, torch.float16), f"half precision, not {q.dtype}")
    demand(q.dtype == k.dtype == v.dtype, "one dtype")
    demand(all(x.dim() == 3 and x.stride(-1) == 1 for x in (q, k, v)), "contiguous features")
    demand(k.shape == v.shape and q.shape[1] % k.shape[1] == 0, "heads that divide each other")
    demand(q.shape[2] == k.shape[2] <= 256 and q.shape[2] % 8 == 0, f"head size {q.shape[2]} × 8")
    for cu in (cu_q, cu_k):
        demand(cu.dtype == torch.int32 and cu.is_contiguous(), f"int32 offsets, not {cu.dtype}")
        demand(cu.device == q.device, "offsets on the device")
    q_lengths, k_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    demand(len(q_lengths) == len(k_lengths), "keys for every segment")
    demand((sum(q_lengths), sum(k_lengths)) == (len(q), len(k)), "offsets that end at the totals")
    demand(max(q_lengths) <= longest_q and max(k_lengths) <= longest_k, "the longest lengths")
    return q_lengths, k_lengths


def scores(q: Tensor, k: Tensor, causal: bool, left: int | None, right: int | None) -> Tensor:
    """Return masked scores [H, queries, keys] of one segment; k has H heads."""
    behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    right = 0 if causal else -1 if right is None else right
    hidden = (behind < -right) & (right >= 0)
    if left is not None and left >= 0:
        hidden |= behind > left
    products = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(q.shape[-1])
    return products.masked_fill(hidden, -torch.inf)


def forward(
    q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, **options,
):  # fmt: skip
    """Return (output, log-sum-exp of the scores [H, queries], and three that nobody reads)."""
    CALLS["forward"] += 1
    demand(not dropout and scale is None and not any(options.values()), "what is implemented")
    q_lengths, k_lengths = lengths_of(q, k, v, cu_q, cu_k, longest_q, longest_k)
    group, outs, normalisers = q.shape[1] // k.shape[1], [], []
    segments = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths))
    for a, b, c in segments:
        a, b, c = a.float(), *(x.float().repeat_interleave(group, 1) for x in (b, c))
        s = scores(a, b, causal, window_size_left, window_size_right)
        normalisers.append(s.logsumexp(-1))
        outs.append(torch.einsum("hqk,khe->qhe", s.softmax(-1), c))
    unread = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), q.new_empty(0)
    return torch.cat(outs).to(q.dtype), torch.cat(normalisers, 1).contiguous(), *unread


def backward(
    grad, q, k, v, out, normaliser, cu_q, cu_k, longest_q, longest_k, dropout, causal, rng, unused,
    *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """Return the gradients of q, k and v."""
    CALLS["backward"] += 1
    q_lengths, k_lengths = lengths_of(q, k, v, cu_q, cu_k, longest_q, longest_k)
    demand(grad.dtype == q.dtype and grad.stride(-1) == 1, "a gradient like the output")
    demand(normaliser.shape == (q.shape[1], q.shape[0]), "the normaliser of every query and head")
    shape, gradients = (k.shape[1], q.shape[1] // k.shape[1]), ([], [], [])
    split = [*(x.float().split(q_lengths) for x in (q, grad, out)), normaliser.split(q_lengths, 1)]
    keys = (x.float().repeat_interleave(shape[1], 1).split(k_lengths) for x in (k, v))
    for a, d, o, lse, b, c in zip(*split, *keys):
        s = scores(a, b, causal, window_size_left, window_size_right)
        p = (s - lse[..., None]).exp()
        ds = p * (torch.einsum("qhe,khe->hqk", d, c) - (d * o).sum(-1).t()[..., None])
        ds = ds / math.sqrt(q.shape[-1])
        gradients[0].append(torch.einsum("hqk,khe->qhe", ds, b))
        gradients[1].append(torch.einsum("hqk,qhe->khe", ds, a).unflatten(1, shape).sum(2))
        gradients[2].append(torch.einsum("hqk,qhe->khe", p, d).unflatten(1, shape).sum(2))
    return tuple(torch.cat(parts).to(q.dtype) for parts in gradients)


LIBRARY = torch.library.Library("aten", "IMPL")  # as long as this lives, so do the kernels
LIBRARY.impl("_flash_attention_forward", forward, "CPU")
LIBRARY.impl("_flash_attention_backward", backward, "CPU")
