"""How fast are prompts of mixed lengths answered greedily, beside transformers' `generate` at the same batch size?

    python bench/decoding.py --model DIR --prompts FILE

`sample.generate` and `generate` (prompts padded on the left, sdpa attention, its default cache) answer the same prompts
from the same weights in float32, in turns, each with exactly `--max-new-tokens` tokens, or, with --stop, until a stop
token as in use. Prompts are taken at even distances through the file, so that all its lengths are there. Greedy tokens
should be the same; where they part, the gap between the two likeliest logits says whether rounding can have decided.
Beside the seconds that passed stand those that the processor worked: on a busy machine, these are what to compare.
"""

import argparse
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import model as llama  # noqa: E402
import sample  # noqa: E402
from data import Tokenizer, read_records  # noqa: E402
from tokenizing import cpu  # noqa: E402


def read_prompts(name: str, count: int, tokenizer: Tokenizer) -> list[list[int]]:
    texts = [tokenizer.prompt_text(sample.prompt_of(record, where), where) for where, record in read_records(name)]
    texts = list(dict.fromkeys(texts))
    return tokenizer.encode_prompts([texts[i * len(texts) // count] for i in range(min(count, len(texts)))])


def theirs(
    model, prompts: list[list[int]], batch_size: int, stop_ids: set[int], max_new_tokens: int
) -> list[list[int]]:
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        model.generation_config.eos_token_id = sorted(stop_ids) or None
        made = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)[
            :, width:
        ].tolist()
        answers += [cut(tokens, stop_ids) for tokens in made]
    return answers


def cut(tokens: list[int], stop_ids: set[int]) -> list[int]:
    """Up to the first stop token; what follows is padding."""
    return tokens[: 1 + next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))]


@torch.inference_mode()
def first_difference(model: llama.Llama, prompts, ours, others) -> str:
    """Where the answers part for the first time, and by how much the two tokens' logits differ there."""
    parted = [i for i, (a, b) in enumerate(zip(ours, others)) if a != b]
    if not parted:
        return "all tokens equal"
    where = lambda i: next(n for n, (a, b) in enumerate(zip([*ours[i], -1], [*others[i], -1])) if a != b)
    i = min(parted, key=where)
    n = where(i)
    tokens = prompts[i] + ours[i][:n]
    offsets, positions = torch.tensor([0, len(tokens)]), torch.arange(len(tokens))
    attend = llama.PackedAttention(positions, offsets, offsets, model.config.sliding_window)
    logits = model.logits(model.model(torch.tensor(tokens), positions, attend)[-1])
    best = logits.topk(2).values
    return (
        f"{len(prompts) - len(parted)} of {len(prompts)} answers equal; the first difference is at token {n} of answer {i}, "
        f"where the two likeliest logits differ by {best[0] - best[1]:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="checkpoint folder")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="records with `prompt` or `messages`")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="prompts (default: 64)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="decoded at once (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--stop", action="store_true", help="answers end with a stop token, as in use")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each, in turns (default: 3)")
    flags = parser.parse_args()
    tokenizer = Tokenizer(flags.model)
    prompts = read_prompts(flags.prompts, flags.count, tokenizer)
    stop_ids = tokenizer.stop_ids if flags.stop else set()
    model = llama.load(flags.model)
    other = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
    works = {
        "sample.py": lambda: sample.generate(
            model, prompts, stop_ids, flags.max_new_tokens, batch_size=flags.batch_size
        ),
        "transformers": lambda: theirs(other, prompts, flags.batch_size, stop_ids, flags.max_new_tokens),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in works}  # that passed, and of work
    answers = {}
    for _ in range(flags.repeats):
        for name, work in works.items():
            start = time.perf_counter(), time.process_time()
            answers[name] = work()
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    lengths = sorted(map(len, prompts))
    print(
        f"{date.today()}, {cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread, float32, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    print(
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens (median {median(lengths):.0f}, "
        f"mean {sum(lengths) / len(lengths):.0f}), {flags.max_new_tokens} new tokens, {flags.batch_size} at once; "
        f"medians of {flags.repeats} runs, in turns"
    )
    made = sum(map(len, answers["sample.py"]))
    for i, kind in enumerate(("passed", "worked")):
        mine, others = ([run[i] for run in runs] for runs in seconds.values())
        ratios = [b / a for a, b in zip(mine, others)]
        print(
            f"seconds {kind}: sample.py {median(mine):6.1f} ({made / median(mine):.0f} tokens/s), transformers "
            f"{median(others):6.1f}, ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(first_difference(model, prompts, *answers.values()))


if __name__ == "__main__":
    main()
