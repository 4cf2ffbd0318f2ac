"""From the usual padded rectangle to this project, one design decision after the other, on the same pairs and weights.

    python bench/switches.py VARIANT JOB.json      one variant in a process of its own; compare.py --switches starts it

Forward and backward of SimPO's loss with activation checkpointing, without FSDP and optimizer, which all would share.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import data  # noqa: E402
import model as llama  # noqa: E402
from data import Tree  # noqa: E402
from model import Llama, PackedAttention  # noqa: E402
from simpo import simpo_loss  # noqa: E402
from train import response_logps  # noqa: E402

# Each of these returns the summed log-probabilities [pairs, (chosen, rejected)] of some trees.


def rectangle(model: Llama, trees: list[Tree]) -> Tensor:
    """Every prompt with every response in a row of its own, rows padded to the longest; logits everywhere."""
    rows = [(tree.prompt, response) for tree in trees for response in tree.responses]
    width = max(len(p) + len(r) for p, r in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    answer = np.zeros((len(rows), width), bool)
    for i, (p, r) in enumerate(rows):
        tokens[i, : len(p) + len(r)] = np.concatenate([p, r])
        answer[i, len(p) : len(p) + len(r)] = True
    tokens, answer = (torch.from_numpy(x).to(model.device) for x in (tokens, answer))

    def attend(layer: int, *qkv: Tensor) -> Tensor:  # padding stands at the end, where causal queries never look
        q, k, v = (x.unflatten(0, tokens.shape).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    positions = torch.arange(width, device=model.device).repeat(len(rows))
    hidden = model.model(tokens.flatten(), positions, attend)
    logps = model.logits(hidden).unflatten(0, tokens.shape)[:, :-1].log_softmax(-1)
    logps = logps.gather(2, tokens[:, 1:, None])[..., 0].where(answer[:, 1:], 0.0)
    return logps.sum(1).view(len(trees), 2)


def packed(model: Llama, trees: list[Tree], everywhere: bool = True) -> Tensor:
    """One stream without padding, full logits at all positions or only at those that predict a response."""
    stream = {name: torch.from_numpy(value) for name, value in data.pack(trees).items()}
    tokens, positions, key_index, predict, targets = (
        stream[name].to(model.device) for name in ("tokens", "positions", "key_index", "predict", "targets")
    )
    attend = PackedAttention(key_index, stream["cu_q"].numpy(), stream["cu_k"].numpy(), model.config.sliding_window)
    hidden = model.model(tokens, positions, attend)
    if everywhere:
        logps = model.logits(hidden).log_softmax(-1)[predict]
    else:
        logps = model.logits(hidden[predict]).log_softmax(-1)
    lengths = torch.tensor([len(r) for tree in trees for r in tree.responses], device=model.device)
    return torch.segment_reduce(logps.gather(1, targets[:, None])[:, 0], "sum", lengths=lengths).view(len(trees), -1)


def branches(trees: list[Tree]) -> list[Tree]:
    """Every response with a copy of its prompt."""
    return [Tree(tree.prompt, (response,), tree.where) for tree in trees for response in tree.responses]


VARIANTS = {
    "padded rectangle": rectangle,
    "packed": lambda model, trees: packed(model, branches(trees)).view(-1, 2),
    "+ shared prompt": packed,
    "+ response-only log-probabilities": lambda model, trees: packed(model, trees, everywhere=False),
    "+ tiled": lambda model, trees: response_logps(model, trees)[0],
    "+ compile": lambda model, trees: response_logps(model, trees)[0],
}


def run(variant: str, job: dict) -> dict:
    """What compare.py calls a Run; its loss is the mean of the first step."""
    trees = [Tree(np.array(prompt), tuple(map(np.array, responses)), "") for prompt, *responses in job["pairs"]]
    cuda = job["device"] == "cuda"
    model = llama.load(Path(job["model"]), job["device"], torch.bfloat16 if job["dtype"] == "bf16" else torch.float32)
    for block in model.model.layers:
        block.recompute = job["activation_checkpointing"]
        if variant == "+ compile":  # as train.py does
            for part in (block.input_layernorm, block.post_attention_layernorm, block.mlp):
                part.compile(dynamic=True)
    losses, seconds = [], []
    for i in range(0, len(trees), job["batch_size"]):
        step, loss, start = trees[i : i + job["batch_size"]], 0.0, time.perf_counter()
        for j in range(0, len(step), job["microbatch"]):
            share = step[j : j + job["microbatch"]]
            logps = VARIANTS[variant](model, share)
            lengths = torch.tensor([[len(r) for r in tree.responses] for tree in share], device=model.device)
            pair_losses = simpo_loss(*logps.unbind(1), *lengths.unbind(1), beta=2.0, gamma=1.0)[0]
            (pair_losses.sum() / len(step)).backward()
            loss += pair_losses.sum().item() / len(step)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        model.zero_grad()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "loss": losses[0], "peak_gib": peak / 2**30}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))))
