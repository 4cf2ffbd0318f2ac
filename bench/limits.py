"""Measure three promises of the layout, each alone, with small random models.

    python bench/limits.py vocabulary
        Does a large vocabulary cost memory beyond its own weights?
    python bench/limits.py tokens
        Is a micro-batch of 32k tokens as cheap per token as one of 2k?
    python bench/limits.py data
        How much of a step goes into assigning and packing its micro-batches?

No checkpoint is needed. Forward and backward of SimPO's loss run with activation checkpointing.
Memory is what PyTorch has allocated. The resident memory of a CPU would also count the holes in
glibc's heap, which vary more from run to run than the effect.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import workload
from data import Pair, assign, pack
from formats.checkpoint import compute_device
from model import Config, Llama
from runtime.processes import keep_freed_memory
from simpo import simpo_loss
from train import response_logps

# SmolLM2-135M with 4 of its 30 blocks
SMALL = Config(49152, 576, 1536, 4, 9, 3, 64, tie_word_embeddings=True)


def random_pairs(tokens: int, vocabulary: int) -> list[Pair]:
    """Return pairs of UltraFeedback's lengths with at most `tokens` tokens in total."""
    rng = np.random.default_rng(0)
    pairs: list[Pair] = []

    def draw(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count, dtype=np.int32)

    for p, c, r in workload.shape_lengths("ultrafeedback", tokens, seed=0):
        if total_tokens(pairs) + p + c + r > tokens:
            break
        pairs.append(Pair(draw(p), (draw(c), draw(r))))
    return pairs


def total_tokens(pairs: list[Pair]) -> int:
    return sum(pair.tokens for pair in pairs)


def random_model(config: Config, dtype: str, device: str) -> Llama:
    """Return a random model with activation checkpointing."""
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    workload.fill(model.to_empty(device=device))
    for block in model.model.layers:
        block.checkpoint_activations = True
    return model


def step(model: Llama, pairs: list[Pair]) -> float:
    """Run one forward and backward pass over all pairs together; return its seconds."""
    start = time.perf_counter()
    logps, lengths = response_logps(model, pairs)
    losses, *_ = simpo_loss(*logps.unbind(1), *lengths.unbind(1), beta=2.0, gamma=1.0)
    losses.mean().backward()
    if compute_device(model).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# The three checks


def peak_bytes(device: str, work: Callable[[], object]) -> int:
    """Return the most bytes that `work` has allocated at once, by PyTorch's own count."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def beyond_head(vocabulary: int, flags: argparse.Namespace) -> int:
    """Return the peak bytes of a model and a pass, without the head's weights and gradient."""
    config = dataclasses.replace(SMALL, vocab_size=vocabulary)

    def work() -> None:
        model = random_model(config, flags.dtype, flags.device)
        step(model, random_pairs(flags.tokens, vocabulary))

    head = 2 * vocabulary * SMALL.hidden_size * (2 if flags.dtype == "bf16" else 4)
    return peak_bytes(flags.device, work) - head


def check_vocabulary(flags: argparse.Namespace) -> None:
    small, large = beyond_head(32_000, flags), beyond_head(128_256, flags)
    sizes = f"{small / 2**20:.0f} MiB with 32,000 entries, {large / 2**20:.0f} MiB with 128,256"
    ratio = f"{large / small:.2f} times (target: at most 1.1)"
    print(f"peak of {flags.tokens} tokens without the head and its gradient: {sizes}: {ratio}")


def check_tokens(flags: argparse.Namespace) -> None:
    model = random_model(SMALL, flags.dtype, flags.device)
    step(model, random_pairs(2048, SMALL.vocab_size))  # a warm-up
    costs = {}
    for size in (2048 * 2**i for i in range(5)):
        if size > flags.tokens:
            break
        pairs = random_pairs(size, SMALL.vocab_size)
        costs[size] = min(step(model, pairs) for _ in range(3)) / total_tokens(pairs)
        relative = f"{costs[size] / costs[2048]:.2f} times that of the smallest"
        cost = f"{1e6 * costs[size]:7.1f} µs per token"
        print(f"{size:6} tokens, {len(pairs):3} pairs: {cost}, {relative}", flush=True)


def check_data(flags: argparse.Namespace) -> None:
    """Time `data.assign`, `data.pack` and the copy; tokenizing is over before the first step."""
    model = random_model(SMALL, flags.dtype, flags.device)
    pairs, device = random_pairs(flags.tokens, SMALL.vocab_size), compute_device(model)
    step(model, pairs)
    seconds = min(step(model, pairs) for _ in range(3))
    start, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        assign([pair.tokens for pair in pairs], 1, flags.tokens)
        packed = pack(pairs)
        for name in packed.keys() - {"cu_q", "cu_k"}:
            torch.from_numpy(packed[name]).to(device)
    share = (time.perf_counter() - start) / repeats / seconds
    blocks = f"{seconds:.3f} s per pass of {SMALL.num_hidden_layers} blocks"
    speed = f"{1 - share:.4f} of its speed without (target: at least 0.97)"
    print(f"{flags.tokens} tokens: {blocks}, data work {share:.5f} of it: the loop runs at {speed}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    checks = {"vocabulary": check_vocabulary, "tokens": check_tokens, "data": check_data}
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("check", choices=checks)
    tokens = "tokens of the largest micro-batch (default: 8192; 32768 for the check of tokens)"
    add("--tokens", type=int, metavar="N", help=tokens)
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--device", choices=("cpu", "cuda"), default=default)
    flags = parser.parse_args()
    flags.tokens = flags.tokens or (32_768 if flags.check == "tokens" else 8192)
    keep_freed_memory()  # as train.py does
    checks[flags.check](flags)


if __name__ == "__main__":
    main()
