"""Three promises of the layout, each measured by itself, with small random models: no checkpoint is needed.

    python bench/limits.py vocabulary    does a large vocabulary cost memory beyond its own weights?
    python bench/limits.py tokens        is a micro-batch of 32k tokens as cheap per token as one of 2k?
    python bench/limits.py data          how much of a step goes into planning and packing its micro-batches?

Forward and backward of SimPO's loss with activation checkpointing. Memory is what PyTorch has allocated: on a CPU
what stays resident beside that, in glibc's holes, differs from run to run by more than what is to be seen.
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

import data  # noqa: E402
import workload  # noqa: E402
from model import Config, Llama  # noqa: E402
from simpo import simpo_loss  # noqa: E402
from train import keep_freed_memory, response_logps  # noqa: E402

SMALL = Config(49152, 576, 1536, 4, 9, 3, 64, tie_word_embeddings=True)  # SmolLM2-135M with 4 of its 30 blocks


def random_trees(tokens: int, vocabulary: int) -> list[data.Tree]:
    """Pairs of UltraFeedback's lengths, `tokens` or a little less of them together."""
    rng, trees = np.random.default_rng(0), []
    for p, c, r in workload.shape_lengths("ultrafeedback", tokens, seed=0):
        if sum(map(len, trees)) + p + c + r > tokens:
            return trees
        draw = lambda n: rng.integers(0, vocabulary, n, dtype=np.int32)
        trees.append(data.Tree(draw(p), (draw(c), draw(r)), ""))


def random_model(config: Config, dtype: str, device: str) -> Llama:
    with torch.device("meta"):
        model = Llama(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    workload.fill(model.to_empty(device=device))
    for block in model.model.layers:
        block.recompute = True
    return model


def step(model: Llama, trees: list[data.Tree]) -> float:
    """Seconds of one forward and backward pass over all `trees` together."""
    start = time.perf_counter()
    logps, lengths = response_logps(model, trees)
    simpo_loss(*logps.unbind(1), *lengths.unbind(1), beta=2.0, gamma=1.0)[0].mean().backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(device: str, work: Callable[[], object]) -> int:
    """The most bytes allocated at once of what `work` allocates, by PyTorch's own count."""
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
    """The most bytes that model and pass over `flags.tokens` take, less the head and the head's gradient."""
    config = dataclasses.replace(SMALL, vocab_size=vocabulary)

    def work() -> None:
        step(random_model(config, flags.dtype, flags.device), random_trees(flags.tokens, vocabulary))

    head = 2 * vocabulary * SMALL.hidden_size * (2 if flags.dtype == "bf16" else 4)
    return peak_bytes(flags.device, work) - head


def check_vocabulary(flags: argparse.Namespace) -> None:
    small, large = beyond_head(32_000, flags), beyond_head(128_256, flags)
    print(f"peak of {flags.tokens} tokens without the head and its gradient: {small / 2**20:.0f} MiB with 32,000 words, "
          f"{large / 2**20:.0f} MiB with 128,256: {large / small:.2f} times (wanted: at most 1.1)")  # fmt: skip


def check_tokens(flags: argparse.Namespace) -> None:
    model, sizes = random_model(SMALL, flags.dtype, flags.device), [2048 * 2**i for i in range(5)]
    step(model, random_trees(2048, SMALL.vocab_size))  # warms up
    costs = {}
    for size in (size for size in sizes if size <= flags.tokens):
        trees = random_trees(size, SMALL.vocab_size)
        costs[size] = min(step(model, trees) for _ in range(3)) / sum(map(len, trees))
        relative = f"{costs[size] / costs[2048]:.2f} times that of the smallest"
        print(f"{size:6} tokens, {len(trees):3} pairs: {1e6 * costs[size]:7.1f} µs a token, {relative}", flush=True)


def check_data(flags: argparse.Namespace) -> None:
    """Tokenizing is over before the first step; what remains in the loop is `data.plan`, `data.pack` and the copy."""
    model, trees = random_model(SMALL, flags.dtype, flags.device), random_trees(flags.tokens, SMALL.vocab_size)
    step(model, trees)
    seconds = min(step(model, trees) for _ in range(3))
    start, repeats = time.perf_counter(), 20
    for _ in range(repeats):
        data.plan([len(tree) for tree in trees], 1, flags.tokens)
        packed = data.pack(trees)
        for name in packed.keys() - {"cu_q", "cu_k"}:
            torch.from_numpy(packed[name]).to(model.device)
    share = (time.perf_counter() - start) / repeats / seconds
    print(f"{flags.tokens} tokens: {seconds:.3f} s a pass of {SMALL.num_hidden_layers} blocks, {share:.5f} of it data "
          f"work: with it the loop runs at {1 - share:.4f} of its speed without (wanted: at least 0.97)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = {"vocabulary": check_vocabulary, "tokens": check_tokens, "data": check_data}
    parser.add_argument("check", choices=checks)
    parser.add_argument("--tokens", type=int, help="in the largest micro-batch (default: 8192; 32768 for tokens)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args()
    flags.tokens = flags.tokens or (32_768 if flags.check == "tokens" else 8192)
    keep_freed_memory()  # as train.py does
    checks[flags.check](flags)


if __name__ == "__main__":
    main()
