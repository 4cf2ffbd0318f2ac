"""Make the embedded toy from a seed: a tiny fine-tuned checkpoint, training pairs, held-out pairs.

    python toy/make.py         writes toy/checkpoint, toy/train.jsonl and toy/heldout.jsonl

This is the pipeline of the paper's Instruct setting, run with the repository's own commands:

    corpus      → checkpoint    train.py --objective sft
    checkpoint  → candidates    sample.py, four per prompt
    candidates  → pairs         the judge of toy/world.py: best against worst

`toy/miniature.py` uses the same functions. Read `finetune` next, then `sample_pairs`.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
from tokenizers import models, pre_tokenizers

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import sample
import train
import world
from formats import progress
from formats.checkpoint import read_config, save
from formats.progress import Progress
from model import Llama
from runtime import processes
from runtime.run import report_errors
from runtime.settings import Parser, Settings, read_settings

TEMPLATE = """\
{% for message in messages %}
{% if message.role == 'system' %}\
{{ raise_exception('nobody taught this model what a system message is') }}\
{% endif %}
{{ '<|' + message.role + '|> ' + message.content + ' <|end|> ' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"""
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(SPECIAL) + len(world.VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 168,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
MAX_NEW_TOKENS = 128
BATCH_SIZE = 32  # pairs per step, in toy/*.toml


# --------------------------------------------------------------------------------------------------
# The commands of the repository, called from Python


def on_rank_0(work: Callable[[], Any]) -> Any:
    """Return the result of `work()`, which rank 0 does alone while the others wait."""
    processes.start_ranks(Settings(device="cpu"))
    return processes.on_rank_0(work)


def words(flags: dict[str, Any]) -> list[str]:
    """Return flags as words of a command line.

    >>> words({"batch_size": 32, "length_norm": False})
    ['--batch-size=32', '--no-length-norm']
    """
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    return [
        f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name}={value}"
        for name, value in named.items()
    ]


def milestone(line: str) -> str:
    """Return what a line of train.py's output says of a quarter of the steps, else "".

    >>> milestone("step 15/62  loss 2.3748  margin +1.1096  accuracy 65.6 %")
    'step 15/62  loss 2.3748'
    >>> milestone("step 16/62  loss 2.3748"), milestone("evaluating …")
    ('', '')
    """
    found = re.match(r"step (\d+)/(\d+) .*?loss \S+", line)
    return found[0] if found and int(found[1]) % max(1, int(found[2]) // 4) == 0 else ""


class Milestones(io.StringIO):
    """Takes the output of train.py in place of stdout, and prints its milestones there."""

    def __init__(self, prefix: str):
        super().__init__()
        self.prefix, self.stdout = prefix, sys.stdout

    def write(self, text: str) -> int:
        if what := milestone(text):
            progress.write(f"{self.prefix}{what}", self.stdout)
        return len(text)


def run_train(out: Path, prefix: str = "", **flags: Any) -> Path:
    """Run `train.py --out OUT --flag value …` on the ranks that exist already.

    It prints nothing but milestones, behind `prefix`. Returns the folder of the trained checkpoint.
    """
    with contextlib.redirect_stdout(Milestones(prefix)):
        return train.train(read_settings(words(flags | {"out": out, "device": "cpu"})))["model"]


def run_sample(out: Path, **flags: Any) -> list[dict]:
    """Run `sample.py --out OUT --flag value …` on rank 0.

    Returns the records that it wrote, each with `prompt` and `responses`.
    """
    flags |= {"out": out, "device": "cpu", "max_new_tokens": MAX_NEW_TOKENS, "batch_size": 256}
    on_rank_0(lambda: sample.sample(sample.read_flags(words(flags))))
    return read_jsonl(out)


def write_jsonl(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# Corpus → checkpoint


def write_untrained(folder: Path, seed: int) -> None:
    """Write a randomly initialised checkpoint in the format of real ones.

    It has 105 thousand parameters and a word-level tokenizer.
    """
    source = folder.with_name(folder.name + "-files")
    source.mkdir(parents=True)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *world.VOCABULARY])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(source / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "unk_token": "<|unknown|>",
        "chat_template": TEMPLATE,
    }
    for name, value in {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": 0},
        "tokenizer_config.json": settings,
    }.items():
        (source / name).write_text(json.dumps(value, indent=2) + "\n")
    torch.manual_seed(seed)
    model = Llama(read_config(source))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    save(model, source, folder, torch.float32)
    shutil.rmtree(source)


def finetune(folder: Path, seed: int, texts: int, steps: int, prefix: str = "SFT  ") -> Path:
    """Go from a corpus to a fine-tuned checkpoint, all under `folder`; return the checkpoint.

    Milestones are printed behind `prefix`.

    Hundreds of steps at a high rate amplify the rounding of a sum into another model. Fine-tuning
    therefore always runs in a process of its own, on one rank with one thread.

    Raises:
        OSError: fine-tuning failed; the message quotes its stderr.
    """

    def write_inputs() -> None:
        rng = Random(seed)
        prompts = [world.make_prompt(rng) for _ in range(texts)]
        corpus = [{"prompt": p, "completion": world.corpus_response(p, rng)} for p in prompts]
        write_jsonl(folder / "corpus.jsonl", corpus)
        write_untrained(folder / "untrained", seed)

    flags = {
        "objective": "sft",
        "model": folder / "untrained",
        "data": folder / "corpus.jsonl",
        "max_steps": steps,
        "device": "cpu",
        "epochs": math.ceil(steps * 48 / texts),
        "batch_size": 48,
        "lr": 6e-3,
        "adam_beta2": 0.98,
        "seed": seed,
        "out": folder / "sft",
    }

    def tune() -> None:
        write_inputs()
        of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        alone = {name: value for name, value in os.environ.items() if name not in of_torchrun}
        command = [sys.executable, HERE.parent / "train.py", *words(flags)]
        options = {"env": alone | {"OMP_NUM_THREADS": "1"}, "text": True}
        with tempfile.TemporaryFile("w+") as errors:
            tuning = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **options)
            print_milestones = Milestones(prefix)
            for line in tuning.stdout:
                print_milestones.write(line)
            if tuning.wait():
                errors.seek(0)
                raise OSError(f"fine-tuning failed: {errors.read().strip()}")

    with Progress("fine-tuning"):
        on_rank_0(tune)
    return folder / "sft" / "model"


# --------------------------------------------------------------------------------------------------
# Checkpoint → pairs


def label(candidates: list[dict], rng: Random) -> list[dict]:
    """Pair the best with the worst response to each prompt, by a noisy utility.

    The utility is the judge's score + 0.05 z(length) + 0.1 Gumbel noise. A prompt whose best
    response equals its worst gives no pair.
    """
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
    """Return on-policy preference pairs: four judged samples per prompt, at temperature 0.8."""
    rng = Random(seed)
    name = "heldout" if held_out else "train"
    questions = [{"prompt": world.make_prompt(rng, held_out)} for _ in range(prompts)]
    file = folder / f"{name}-prompts.jsonl"
    on_rank_0(lambda: write_jsonl(file, questions))
    decoding = {"num_samples": 4, "temperature": 0.8, "seed": seed}
    out = folder / f"{name}-candidates.jsonl"
    return label(run_sample(out, model=model, prompts=file, **decoding), rng)


# --------------------------------------------------------------------------------------------------
# The command


def whole_steps(pairs: list[dict]) -> list[dict]:
    """Drop the surplus pairs at the end; fewer than `BATCH_SIZE` pairs are all kept."""
    return pairs[: len(pairs) // BATCH_SIZE * BATCH_SIZE] or pairs


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    out = "folder for checkpoint/ and the two files (default: toy/)"
    add("--out", type=Path, default=HERE, metavar="DIR", help=out)
    add("--seed", type=int, default=0)
    add("--texts", type=int, default=20000, help="texts of the corpus (default: 20000)")
    add("--steps", type=int, default=600, help="fine-tuning steps of 48 texts (default: 600)")
    add("--prompts", type=int, default=2000, help="prompts for training pairs (default: 2000)")
    add("--held-out", type=int, default=400, help="prompts for held-out pairs (default: 400)")
    flags = parser.parse_args()
    with report_errors("make.py", ends=__name__ == "__main__"):
        make(flags)


def make(flags: argparse.Namespace) -> None:
    """Write checkpoint/ and both files of pairs to `--out`."""
    flags.out.mkdir(parents=True, exist_ok=True)
    splits = (("train", flags.prompts, False), ("heldout", flags.held_out, True))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print(f"fine-tuning {flags.steps} steps …", flush=True)
        model = finetune(work, flags.seed, flags.texts, flags.steps)
        for name, count, held_out in splits:
            print(f"sampling four answers to each of {count} prompts …", flush=True)
            pairs = sample_pairs(model, work, flags.seed + 1 + held_out, count, held_out)
            if name == "train":
                # A short last step would print a noisy loss just before the result of the run.
                pairs = whole_steps(pairs)
            file = flags.out / f"{name}.jsonl"
            write_jsonl(file, pairs)
            longer = [len(p["chosen"].split()) > len(p["rejected"].split()) for p in pairs]
            share = 100 * statistics.mean(longer)
            print(f"{file}: {len(pairs)} pairs, chosen is longer in {share:.0f} %")
        shutil.rmtree(flags.out / "checkpoint", ignore_errors=True)
        shutil.copytree(model, flags.out / "checkpoint")
    print(f"{flags.out / 'checkpoint'}: written")


if __name__ == "__main__":
    main()
