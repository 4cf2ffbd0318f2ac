"""Measure greedy decoding of prompts of mixed lengths, beside transformers' `generate`.

    pip install -r bench/requirements.txt
    python bench/decoding.py --model DIR --prompts FILE

`sample.generate` and `generate` answer the same prompts from the same weights in float32, at the
same batch size, in turns. transformers pads prompts on the left and uses sdpa attention and its
default cache. Each answer has exactly `--max-new-tokens` tokens; with --stop it ends at a stop
token, as in use. Prompts are taken at even distances through the file, so that all its lengths
occur. Both sides should give the same tokens. Where they differ, the gap between the two likeliest
logits tells whether rounding can be the reason. Elapsed and processor seconds are printed: compare
the latter on a busy machine.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from tokenizing import cpu

from formats.candidates import prompt_of
from formats.checkpoint import load
from formats.records import read_records
from formats.tokenizer import Tokenizer
from model import Llama, PackedAttention
from sample import generate

Answers = list[list[int]]


def read_prompts(name: str, count: int, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of at most `count` distinct prompts, spread evenly over the file."""
    texts = [
        tokenizer.prompt_text(prompt_of(record, where), where)
        for where, record in read_records(name)
    ]
    texts = list(dict.fromkeys(texts))
    indices = [i * len(texts) // count for i in range(min(count, len(texts)))]
    return tokenizer.encode_prompts([texts[i] for i in indices])


def theirs(
    model: Any, prompts: list[list[int]], batch_size: int, stop_ids: set[int], max_new_tokens: int
) -> Answers:
    """Return the new tokens of every prompt, from transformers."""
    answers, device = [], model.device
    model.generation_config.eos_token_id = sorted(stop_ids) or None
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": 0}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        rows = [[0] * (width - len(prompt)) + prompt for prompt in batch]
        ids = torch.tensor(rows, device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
        generated = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
        answers += [cut(tokens, stop_ids) for tokens in generated]
    return answers


def cut(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Return the tokens up to the first stop token; padding follows it."""
    stops = (i for i, token in enumerate(tokens) if token in stop_ids)
    return tokens[: 1 + next(stops, len(tokens))]


@torch.inference_mode()
def first_difference(model: Llama, prompts: Answers, ours: Answers, others: Answers) -> str:
    """Say where the answers differ first, and by how much the two likeliest logits differ there."""
    different = [i for i, (a, b) in enumerate(zip(ours, others)) if a != b]
    if not different:
        return "all tokens equal"

    def position(i: int) -> int:
        both = zip([*ours[i], -1], [*others[i], -1])
        return next(n for n, (a, b) in enumerate(both) if a != b)

    i = min(different, key=position)
    n = position(i)
    tokens = prompts[i] + ours[i][:n]
    offsets, positions = torch.tensor([0, len(tokens)]), torch.arange(len(tokens))
    attend = PackedAttention(positions, offsets, offsets, model.config.sliding_window)
    logits = model.logits(model.model(torch.tensor(tokens), positions, attend)[-1])
    best = logits.topk(2).values
    equal = f"{len(prompts) - len(different)} of {len(prompts)} answers equal"
    return (
        f"{equal}; the first difference is at token {n} of answer {i}, "
        f"where the two likeliest logits differ by {best[0] - best[1]:.1e}"
    )


def run_in_turns(
    works: dict[str, Callable[[], Answers]], repeats: int
) -> tuple[dict[str, Answers], dict[str, list[tuple[float, float]]]]:
    """Return the answers, and the seconds of every run: (elapsed, of the processor)."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    answers = {}
    for _ in range(repeats):
        for name, work in works.items():
            elapsed, worked = time.perf_counter(), time.process_time()
            answers[name] = work()
            elapsed, worked = time.perf_counter() - elapsed, time.process_time() - worked
            seconds[name].append((elapsed, worked))
    return answers, seconds


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    prompts = "records with `prompt` or `messages`"
    add("--prompts", required=True, metavar="FILE", help=prompts)
    add("--count", type=int, default=64, metavar="N", help="prompts (default: 64)")
    batch_size = "sequences to decode at once (default: 64)"
    add("--batch-size", type=int, default=64, metavar="N", help=batch_size)
    most = "tokens per answer (default: 128)"
    add("--max-new-tokens", type=int, default=128, metavar="N", help=most)
    add("--stop", action="store_true", help="end answers at a stop token, as in use")
    repeats = "runs of each, in turns (default: 3)"
    add("--repeats", type=int, default=3, metavar="N", help=repeats)
    return parser.parse_args()


def main() -> None:
    flags = read_flags()
    try:
        import transformers  # only now, so that --help works without it
    except ImportError as e:
        sys.exit(f"decoding.py: error: {e}: pip install -r bench/requirements.txt")
    tokenizer = Tokenizer(flags.model)
    prompts = read_prompts(flags.prompts, flags.count, tokenizer)
    stop_ids = tokenizer.stop_ids if flags.stop else set()
    model = load(flags.model)
    peer = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
    size, most = flags.batch_size, flags.max_new_tokens
    works = {
        "sample.py": partial(generate, model, prompts, stop_ids, most, batch_size=size),
        "transformers": partial(theirs, peer, prompts, size, stop_ids, most),
    }
    answers, seconds = run_in_turns(works, flags.repeats)
    lengths = sorted(map(len, prompts))
    print(
        f"{date.today()}, {cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, "
        f"float32, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )
    print(
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{median(lengths):.0f}, mean {sum(lengths) / len(lengths):.0f}), {most} new tokens, "
        f"{size} at once; medians of {flags.repeats} runs, in turns"
    )
    count = sum(map(len, answers["sample.py"]))
    for i, kind in enumerate(("elapsed", "of the processor")):
        ours, others = ([run[i] for run in runs] for runs in seconds.values())
        ratios = [b / a for a, b in zip(ours, others)]
        print(
            f"seconds {kind}: sample.py {median(ours):6.1f} ({count / median(ours):.0f} tokens/s), "
            f"transformers {median(others):6.1f}, "
            f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(first_difference(model, prompts, *answers.values()))


if __name__ == "__main__":
    main()
