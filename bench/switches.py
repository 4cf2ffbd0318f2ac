"""Go from the usual padded rectangle to this project, one design decision at a time.

    python bench/switches.py VARIANT JOB.json

Runs one variant in a process of its own; `compare.py --switches` starts it, with the same pairs and
weights for each. Forward and backward of SimPO's loss with activation checkpointing are measured,
without FSDP and optimizer, which all variants would share. Prints what compare.py calls a Run, as
JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from data import Pair, pack
from formats.checkpoint import compute_device, load
from model import Attention, Llama, PackedAttention, to_device
from runtime.processes import peak_resident
from simpo import simpo_loss
from train import response_logps

# --------------------------------------------------------------------------------------------------
# The variants: each returns the summed log-probabilities of some pairs, [pairs, (chosen, rejected)]


def rectangle(model: Llama, pairs: list[Pair]) -> Tensor:
    """Give every response a row with its prompt, padded to the longest; full logits everywhere."""
    rows = [(pair.prompt, response) for pair in pairs for response in pair.responses]
    width = max(len(p) + len(r) for p, r in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    is_response = np.zeros((len(rows), width), bool)
    for i, (p, r) in enumerate(rows):
        tokens[i, : len(p) + len(r)] = np.concatenate([p, r])
        is_response[i, len(p) : len(p) + len(r)] = True
    device = compute_device(model)
    tokens, is_response = (torch.from_numpy(x).to(device) for x in (tokens, is_response))

    def attend(layer: Attention, *qkv: Tensor) -> Tensor:
        # Padding is at the end, where causal queries never look.
        q, k, v = (x.unflatten(0, tokens.shape).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    positions = torch.arange(width, device=device).repeat(len(rows))
    hidden = model.model(tokens.flatten(), positions, attend)
    logps = model.logits(hidden).unflatten(0, tokens.shape)[:, :-1].log_softmax(-1)
    logps = logps.gather(2, tokens[:, 1:, None])[..., 0].where(is_response[:, 1:], 0.0)
    return logps.sum(1).view(len(pairs), 2)


def packed(model: Llama, pairs: list[Pair], everywhere: bool = True) -> Tensor:
    """Compute one stream without padding.

    everywhere: compute full logits at all positions, not only where a response is predicted.
    """
    stream, device = pack(pairs), compute_device(model)
    cu_q, cu_k = stream.pop("cu_q"), stream.pop("cu_k")
    moved = {name: torch.from_numpy(value).to(device) for name, value in stream.items()}
    predict, targets = moved["predict"], moved["targets"]
    attend = PackedAttention(moved["key_index"], cu_q, cu_k, model.config.sliding_window)
    hidden = model.model(moved["tokens"], moved["positions"], attend)
    if everywhere:
        logps = model.logits(hidden).log_softmax(-1)[predict]
    else:
        logps = model.logits(hidden[predict]).log_softmax(-1)
    lengths = to_device([len(r) for pair in pairs for r in pair.responses], device)
    sums = torch.segment_reduce(logps.gather(1, targets[:, None])[:, 0], "sum", lengths=lengths)
    return sums.view(len(pairs), -1)


def separate(model: Llama, pairs: list[Pair]) -> Tensor:
    """Compute one stream in which every response has a copy of its prompt."""
    singles = [
        Pair(pair.prompt, (response,), pair.where) for pair in pairs for response in pair.responses
    ]
    return packed(model, singles).view(-1, 2)


def response_only(model: Llama, pairs: list[Pair]) -> Tensor:
    return packed(model, pairs, everywhere=False)


def tiled(model: Llama, pairs: list[Pair]) -> Tensor:
    return response_logps(model, pairs)[0]


VARIANTS = {
    "padded rectangle": rectangle,
    "packed": separate,
    "+ shared prompt": packed,
    "+ response-only log-probabilities": response_only,
    "+ tiled": tiled,
    "+ compile": tiled,
}

# --------------------------------------------------------------------------------------------------
# One run


def run(variant: str, job: dict) -> dict:
    """Return what compare.py calls a Run; its loss is the mean of the first step.

    job: what `compare.write_job` wrote.
    """
    pairs = [Pair(np.array(p), tuple(map(np.array, responses))) for p, *responses in job["pairs"]]
    cuda = job["device"] == "cuda"
    dtype = torch.bfloat16 if job["dtype"] == "bf16" else torch.float32
    model = load(Path(job["model"]), job["device"], dtype)
    for block in model.model.layers:
        block.checkpoint_activations = job["activation_checkpointing"]
        if variant == "+ compile":  # as train.py does
            block.compile()
    losses, seconds = [], []
    for i in range(0, len(pairs), job["batch_size"]):
        start = time.perf_counter()
        losses.append(one_step(model, pairs[i : i + job["batch_size"]], variant, job["microbatch"]))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    return {"seconds": seconds, "loss": losses[0], "peak_gib": peak / 2**30}


def one_step(model: Llama, batch: list[Pair], variant: str, microbatch: int) -> float:
    """Run forward and backward over a step, `microbatch` pairs at a time; return the mean loss."""
    loss = 0.0
    for i in range(0, len(batch), microbatch):
        share = batch[i : i + microbatch]
        logps = VARIANTS[variant](model, share)
        lengths = to_device([[len(r) for r in pair.responses] for pair in share], logps.device)
        losses, *_ = simpo_loss(*logps.unbind(1), *lengths.unbind(1), beta=2.0, gamma=1.0)
        (losses.sum() / len(batch)).backward()
        loss += losses.sum().item() / len(batch)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="VARIANT", choices=VARIANTS, help=", ".join(VARIANTS))
    parser.add_argument("job", type=Path, metavar="JOB.json", help="written by compare.py")
    flags = parser.parse_args()
    print(json.dumps(run(flags.variant, json.loads(flags.job.read_text()))))


if __name__ == "__main__":
    main()
