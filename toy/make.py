"""Make the embedded default: a tiny pretrained checkpoint, preference pairs, and held-out pairs, from a seed.

    python toy/make.py                        writes toy/checkpoint, toy/train.jsonl and toy/heldout.jsonl

This is the pipeline of the paper's Instruct setting, with the repository's own train.py and sample.py:

    corpus  ─ train.py --objective sft →  checkpoint  ─ sample.py, 4 a prompt →  candidates  ─ judge →  best against worst
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import tokenizers
import torch
from tokenizers import models, pre_tokenizers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import sample  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402
from model import Config, Llama, save  # noqa: E402

TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('nobody taught this model what a system message is') }}{% endif %}
{{ '<|' + message.role + '|> ' + message.content + ' <|end|> ' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"""
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
MAX_NEW_TOKENS = 128


@functools.cache
def processes() -> tuple:
    """Device and mesh: of the processes that torchrun started, or of this one alone; joined once, as that takes seconds."""
    return train.start_processes(train.read_settings(["--device=cpu"]))


def on_rank_0(work: Callable):
    """The result of `work()`, which rank 0 does alone while the others wait."""
    processes()
    return train.on_rank_0(work)


def words(flags: dict) -> list[str]:
    """{"batch_size": 32, "length_norm": False} → ["--batch-size=32", "--no-length-norm"]"""
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    return [
        f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name}={value}"
        for name, value in named.items()
    ]


def run_train(out: Path, **flags) -> Path:
    """`train.py --out OUT --flag value …`, silently and in these processes. The trained checkpoint."""
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(train.read_settings(words(flags | {"out": out, "device": "cpu"})), *processes())
    return out / "model"


def run_sample(out: Path, **flags) -> list[dict]:
    """`sample.py --out OUT --flag value …`, by rank 0. The records it wrote: `prompt` and its `responses`."""
    flags |= {"out": out, "device": "cpu", "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 256}
    on_rank_0(lambda: sample.sample(sample.read_flags(words(flags))))
    return read_jsonl(out)


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_untrained(folder: Path, seed: int) -> None:
    """A randomly initialised checkpoint in the format of real ones: 105 thousand parameters, a word-level tokenizer."""
    source = folder.with_name(folder.name + "-files")
    source.mkdir(parents=True)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *world.VOCABULARY])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(source / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": 64,
        "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 0,
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "unk_token": "<|unknown|>",
        "chat_template": TEMPLATE,
    }
    for name, value in {
        "config.json": config,
        "generation_config.json": {"eos_token_id": 0},
        "tokenizer_config.json": settings,
    }.items():
        (source / name).write_text(json.dumps(value, indent=2) + "\n")
    torch.manual_seed(seed)
    model = Llama(Config.from_folder(source))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    save(model, source, folder, torch.float32)
    shutil.rmtree(source)


def finetune(folder: Path, seed: int, texts: int, steps: int) -> Path:
    """Corpus → untrained checkpoint → SFT checkpoint, all under `folder`.

    Hundreds of steps at a high rate make another model of the last bit of a sum: always one process of one thread here."""

    def begin() -> None:
        rng = Random(seed)
        prompts = [world.make_prompt(rng) for _ in range(texts)]
        write_jsonl(
            folder / "corpus.jsonl", [{"prompt": p, "completion": world.corpus_response(p, rng)} for p in prompts]
        )
        write_untrained(folder / "untrained", seed)

    flags = {
        "objective": "sft", "model": folder / "untrained", "data": folder / "corpus.jsonl", "max_steps": steps, "device": "cpu",
        "epochs": math.ceil(steps * 48 / texts), "batch_size": 48, "lr": 6e-3, "adam_beta2": 0.98, "seed": seed, "out": folder / "sft",
    }  # fmt: skip

    def tune() -> None:
        begin()
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        command = [sys.executable, HERE.parent / "train.py", *words(flags)]
        done = subprocess.run(command, env=alone | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"fine-tuning failed: {done.stderr.strip()}")

    on_rank_0(tune)
    return folder / "sft" / "model"


def label(candidates: list[dict], rng: Random) -> list[dict]:
    """Best against worst of each prompt's responses by a noisy utility: judge's score + 0.05 z(length) + 0.1 Gumbel noise."""
    lengths = [len(text.split()) for c in candidates for text in c["responses"]]
    mean, sd = statistics.mean(lengths), statistics.pstdev(lengths)
    pairs = []
    for c in candidates:
        utility = [
            world.score(c["prompt"], text)
            + 0.05 * (len(text.split()) - mean) / sd
            - 0.1 * math.log(-math.log(rng.random()))
            for text in c["responses"]
        ]
        chosen, rejected = (c["responses"][utility.index(pick(utility))] for pick in (max, min))
        if chosen != rejected:
            pairs.append({"prompt": c["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def sample_pairs(model: Path, folder: Path, seed: int, prompts: int, held_out: bool) -> list[dict]:
    """On-policy preference pairs: four samples a prompt at temperature 0.8, judged."""
    rng = Random(seed)
    name = "heldout" if held_out else "train"
    asked = [{"prompt": world.make_prompt(rng, held_out)} for _ in range(prompts)]
    on_rank_0(lambda: write_jsonl(folder / f"{name}-prompts.jsonl", asked))
    candidates = run_sample(folder / f"{name}-candidates.jsonl", model=model, prompts=folder / f"{name}-prompts.jsonl",
                            num_samples=4, temperature=0.8, seed=seed)  # fmt: skip
    return label(candidates, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=HERE, metavar="DIR", help="where checkpoint/ and the two files go (default: toy/)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts", type=int, default=20000, help="of the corpus (default: 20000)")
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning, 48 texts each (default: 600)")
    parser.add_argument("--prompts", type=int, default=2000, help="that become training pairs (default: 2000)")
    parser.add_argument("--held-out", type=int, default=400, help="that become held-out pairs (default: 400)")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = finetune(work, flags.seed, flags.texts, flags.steps)
        for name, count, held_out in (("train", flags.prompts, False), ("heldout", flags.held_out, True)):
            pairs = sample_pairs(model, work, flags.seed + 1 + held_out, count, held_out)
            write_jsonl(flags.out / f"{name}.jsonl", pairs)
            longer = statistics.mean(len(p["chosen"].split()) > len(p["rejected"].split()) for p in pairs)
            print(f"{flags.out / name}.jsonl: {len(pairs)} pairs, chosen is longer in {100 * longer:.0f} %")
        shutil.rmtree(flags.out / "checkpoint", ignore_errors=True)
        shutil.copytree(model, flags.out / "checkpoint")
    print(f"{flags.out / 'checkpoint'}: written")


if __name__ == "__main__":
    main()
