"""Run the paper's Instruct setting from end to end, on a checkpoint small enough for a CPU.

    python bench/pipeline.py --model DIR --prompts FILE --questions DIR --out OUT

    prompts     → candidates       sample.py
    candidates  → pairs            `score`
    pairs       → SimPO, DPO       train.py
    models      → answer files     sample.py --format

Every step but the scorer is a command of this project. `score` can be replaced by any other scorer:
train.py only asks for a list of `scores` beside the `responses` of each record. The paper asked a
reward model (PairRM, ArmoRM) about five candidates for each of about 60,000 prompts. Questions that
are asked at the end never serve as training prompts.

A step whose product is in OUT is not run again, so the same command resumes after an interruption.
The results, with the time of each step, are written to OUT/PIPELINE.md.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from tokenizing import cpu

from formats.records import read_records
from formats.schemas import parse_record

ALPACA_EVAL, MT_BENCH = "alpaca_eval.json", "mt_bench_question.jsonl"
SAMPLES, CANDIDATE_TOKENS, ANSWER_TOKENS = 4, 80, 128
TRAINING = {  # not tuned; the learning rate is high, since there are few steps
    "simpo": "--beta 2.5 --gamma-beta-ratio 0.55 --lr 2e-5",
    "dpo": "--beta 0.1 --reference cached --lr 2e-5",
}
COMMON = (
    "--batch-size 8 --epochs 2 --max-length 384 --max-prompt-length 256 --dtype bf16 "
    "--no-activation-checkpointing"
)
PARTS = ("ends", "fresh", "about")

# --------------------------------------------------------------------------------------------------
# The scorer


def score(prompt: str, response: str) -> dict[str, float]:
    """Return three numbers from 0 to 1 that a program can see; their sum is the score.

    They catch what goes wrong with a small model, and do not judge quality.

    ends: the last character closes a sentence.
    fresh: the share of distinct three-word sequences.
    about: the share of the prompt's words of four or more letters that occur.
    """
    said, asked = re.findall(r"\w+", response.lower()), re.findall(r"\w{4,}", prompt.lower())
    threes = list(zip(said, said[1:], said[2:]))
    return {
        "ends": float(response.rstrip().endswith((".", "!", "?", '"', ")", "```"))),
        "fresh": len(set(threes)) / max(1, len(threes)),
        "about": len(set(asked) & set(said)) / max(1, len(set(asked))),
    }


def total(prompt: str, response: str) -> float:
    return sum(score(prompt, response).values())


# --------------------------------------------------------------------------------------------------
# The steps


def records(path: Path) -> list[dict]:
    return [record for _, record in read_records(str(path))]


def write(path: Path, rows: list[dict]) -> None:
    """Write a .jsonl under another name, then rename it: a product that exists is complete."""
    part = path.with_name(path.name + ".part")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


class Pipeline:
    """Runs steps, skips those that are done, and keeps their times and commands.

    hidden: paths, and what the report calls them.
    """

    def __init__(self, out: Path, hidden: dict[str, str]):
        self.out, self.hidden = out, hidden
        self.log = out / "steps.json"
        self.steps: dict[str, dict] = {}
        if self.log.exists():
            self.steps = json.loads(self.log.read_text())

    def run(self, name: str, product: Path, command: list[str]) -> None:
        """Run a script of this project with its arguments, which makes `product`."""

        def work() -> None:
            script, *arguments = command
            words = [sys.executable, str(ROOT / script), *arguments]
            if code := subprocess.run(words, check=False).returncode:
                sys.exit(f"pipeline.py: {script} ended with status {code}")

        shown = "python " + " ".join(command)
        for path, name_of_path in self.hidden.items():
            shown = shown.replace(path, name_of_path)
        self._step(name, product, work, shown)

    def call(self, name: str, product: Path, work: Callable[[Path], None]) -> None:
        """Call `work(product)`, which makes `product`."""
        self._step(name, product, lambda: work(product), "")

    def _step(self, name: str, product: Path, work: Callable[[], None], command: str) -> None:
        if product.exists() and name in self.steps:
            return
        print(f"— {name}", flush=True)
        start = time.perf_counter()
        work()
        self.steps[name] = {"seconds": time.perf_counter() - start, "command": command}
        self.log.write_text(json.dumps(self.steps, indent=2) + "\n")


def choose_prompts(flags: argparse.Namespace, path: Path) -> None:
    """Write the training prompts: short ones, in file order, that are no AlpacaEval question."""
    questions = records(flags.questions / ALPACA_EVAL)[: flags.alpaca_eval]
    asked = {question["instruction"] for question in questions}
    texts = dict.fromkeys(record["prompt"] for _, record in read_records(flags.prompts))
    short = [text for text in texts if text not in asked and len(text.split()) <= 60]
    write(path, [{"prompt": text} for text in short[: flags.count]])


def add_scores(candidates: Path, held_out: Path, path: Path) -> None:
    """Score all candidates; write every fifth pair to `held_out` and the rest to `path`."""
    rows = []
    for record in records(candidates):
        scores = [total(record["prompt"], response) for response in record["responses"]]
        rows.append(record | {"scores": scores})
    pairs = [row for row in rows if len(set(row["scores"])) > 1]
    write(held_out, pairs[::5])
    write(path, [row for row in rows if row not in pairs[::5]])


def run(flags: argparse.Namespace) -> None:
    """Run all steps that are not done, then write and print the report."""
    out, model, questions = flags.out, str(flags.model), flags.questions
    out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(out, {model: "MODEL", str(questions): "QUESTIONS", str(out): "OUT"})
    names = ("prompts", "candidates", "pairs", "held-out")
    prompts, candidates, pairs, held_out = (out / f"{name}.jsonl" for name in names)

    pipeline.call("prompts", prompts, lambda path: choose_prompts(flags, path))
    sampling = f"--num-samples {SAMPLES} --temperature 0.8 --top-p 0.95".split()
    sampling += f"--max-new-tokens {CANDIDATE_TOKENS}".split()
    command = ["sample.py", "--model", model, "--prompts", str(prompts), *sampling]
    pipeline.run("candidates", candidates, [*command, "--out", str(candidates)])
    pipeline.call("scores", pairs, lambda path: add_scores(candidates, held_out, path))
    for objective, settings in TRAINING.items():
        folder = out / objective
        command = ["train.py", "--model", model, "--objective", objective, *settings.split()]
        command += [*COMMON.split(), "--data", str(pairs), "--eval-data", str(held_out)]
        command += ["--out", str(folder), "--overwrite"]
        pipeline.run(f"train, {objective}", folder / "model", command)
    models = {"before": model}
    models |= {objective: str(out / objective / "model") for objective in TRAINING}
    for name, folder in models.items():
        for form, file, limit, suffix in (
            ("alpaca_eval", ALPACA_EVAL, flags.alpaca_eval, "json"),
            ("mt_bench", MT_BENCH, flags.mt_bench, "jsonl"),
        ):
            answers = out / f"{form}-{name}.{suffix}"
            command = ["sample.py", "--model", folder, "--format", form]
            command += ["--prompts", str(questions / file), "--limit", str(limit)]
            command += ["--max-new-tokens", str(ANSWER_TOKENS), "--out", str(answers)]
            pipeline.run(f"{form}, {name}", answers, command)
    text = report(pipeline, list(models), flags)
    (out / "PIPELINE.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{out / 'PIPELINE.md'}")


# --------------------------------------------------------------------------------------------------
# The report


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_words(texts: Iterable[str]) -> str:
    return f"{mean(len(text.split()) for text in texts):.0f}"


def times_table(pipeline: Pipeline) -> str:
    rows = []
    for name, step in pipeline.steps.items():
        command = f"`{step['command']}`" if step["command"] else "within the script"
        rows.append([name, f"{step['seconds']:.0f}", command])
    return table(["step", "seconds", "command"], rows)


def candidates_table(scored: list[dict]) -> str:
    """Return mean score and length of all candidates, of the best and of the worst."""
    examples = [parse_record(row, "")[1] for row in scored if len(set(row["scores"])) > 1]
    everything = [score for row in scored for score in row["scores"]]
    responses = [response for row in scored for response in row["responses"]]
    picked = [f"{mean(pick(row['scores']) for row in scored):.2f}" for pick in (max, min)]
    words = [mean_words(e.responses[i] for e in examples) for i in (0, 1)]
    rows = [
        ["mean score", f"{mean(everything):.2f}", *picked],
        ["mean words", mean_words(responses), *words],
    ]
    counts = f"{len(everything)} candidates gave {len(examples)} pairs."
    columns = ["", "all", "best = chosen", "worst = rejected"]
    return f"{counts}\n\n{table(columns, rows)}"


def training_table(out: Path) -> str:
    """Return each objective's steps and loss, and what changed on the held-out pairs."""
    rows = []
    for objective in TRAINING:
        metrics = records(out / objective / "metrics.jsonl")
        held_out = [row for row in metrics if "eval_loss" in row]
        steps = [row for row in metrics if "loss" in row]
        accuracy = [f"{100 * row['eval_rewards/accuracies']:.0f}" for row in held_out]
        margin = [f"{row['eval_rewards/margins']:+.3f}" for row in held_out]
        losses = f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"
        changes = [f"{' → '.join(accuracy)} %", " → ".join(margin)]
        rows.append([objective, str(len(steps)), losses, *changes])
    columns = ["", "steps", "loss, first → last step", "held-out accuracy", "held-out margin"]
    return table(columns, rows)


def answers_table(out: Path, models: list[str]) -> str:
    """Return score, its parts and length of each model's answers."""
    rows = []
    for name in models:
        answers = records(out / f"alpaca_eval-{name}.json")
        parts = [score(a["instruction"], a["output"]) for a in answers]
        conversations = records(out / f"mt_bench-{name}.jsonl")
        turns = [turn for a in conversations for turn in a["choices"][0]["turns"]]
        means = [mean(part[key] for part in parts) for key in PARTS]
        numbers = [f"{number:.2f}" for number in (sum(means), *means)]
        rows.append([name, *numbers, mean_words(a["output"] for a in answers), mean_words(turns)])
    return table(["", "score", *PARTS, "words, AlpacaEval", "words, MT-Bench turn"], rows)


def first_answers(out: Path, models: list[str]) -> str:
    """Return the first AlpacaEval question, and every model's answer cut at 400 characters."""
    paragraphs = []
    for name in models:
        first = records(out / f"alpaca_eval-{name}.json")[0]
        if not paragraphs:
            paragraphs.append(f'The first AlpacaEval question, "{first["instruction"]}":')
        output = " ".join(first["output"].split())
        paragraphs.append(f"*{name}*: {output[:400]}{'…' if len(output) > 400 else ''}")
    return "\n\n".join(paragraphs)


def paragraph(text: str) -> str:
    """Wrap a paragraph for Markdown; code and words with a hyphen stay whole."""
    whole = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(" ".join(text.split()), 120, **whole)


def origin(minutes: float, flags: argparse.Namespace) -> str:
    """Say how and where the results were made."""
    threads = torch.get_num_threads()
    return paragraph(f"""
        Written by `python bench/pipeline.py --model {flags.model.name} …` on {date.today()}:
        {cpu()}, {os.cpu_count()} cores that were also running other work, {threads}
        thread{"s" * (threads > 1)}, Python {platform.python_version()}, torch {torch.__version__};
        {minutes:.1f} minutes in total.""")


def setting(prompts: int, flags: argparse.Namespace) -> str:
    """Say what was done. prompts: their number."""
    return paragraph(f"""
        {prompts} prompts, {SAMPLES} candidates each from the model itself (temperature 0.8, top-p
        0.95, at most {CANDIDATE_TOKENS} tokens). A program scores each candidate from 0 to 3:
        whether the text ends with a sentence, is free of repetition, and uses the prompt's words
        (`score` in bench/pipeline.py). The best and the worst candidate of a prompt form a pair,
        and every fifth pair is held out. SimPO and DPO train on the rest. Each model then answers
        {flags.alpaca_eval} AlpacaEval questions (greedy) and {flags.mt_bench} two-turn MT-Bench
        questions.""")


def caution(answers: int, held_out: int) -> str:
    """Say what the results do not show. answers, held_out: how many there are."""
    return paragraph(f"""
        The score that measures the answers also chose the pairs. A rise would therefore only show
        that the chain works from prompts to answers and that the preferred behavior becomes more
        frequent. It would not show better answers, since nobody judged them. With {answers}
        answers, cut at {ANSWER_TOKENS} tokens, differences of a tenth are noise. The held-out set
        is small too, and each pair is {100 / held_out:.0f} % of the accuracy. Where the training
        loss falls while the held-out pairs do not move, the model memorized the pairs. The files
        `alpaca_eval-*.json` and `mt_bench-*.jsonl` are those that `alpaca_eval --model_outputs`
        and FastChat's `gen_judgment.py` read.""")


def report(pipeline: Pipeline, models: list[str], flags: argparse.Namespace) -> str:
    """Return PIPELINE.md."""
    out = pipeline.out
    held_out = records(out / "held-out.jsonl")
    scored = records(out / "pairs.jsonl") + held_out
    minutes = sum(step["seconds"] for step in pipeline.steps.values()) / 60
    answers = records(out / f"alpaca_eval-{models[-1]}.json")
    parts = [
        "# The Instruct pipeline, end to end",
        origin(minutes, flags),
        setting(len(scored), flags),
        "## Time",
        times_table(pipeline),
        "## Candidates",
        candidates_table(scored),
        "## Training",
        training_table(out),
        "## Answers",
        answers_table(out, models),
        first_answers(out, models),
        "## How to read it",
        caution(len(answers), len(held_out)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = "checkpoint folder, with a chat template"
    add("--model", type=Path, required=True, metavar="DIR", help=model)
    add("--prompts", required=True, metavar="FILE", help="records with a string `prompt`")
    questions = f"folder with {ALPACA_EVAL} and {MT_BENCH}"
    add("--questions", type=Path, required=True, metavar="DIR", help=questions)
    out = "folder for everything that is made"
    add("--out", type=Path, required=True, metavar="OUT", help=out)
    add("--count", type=int, default=60, metavar="N", help="training prompts (default: 60)")
    add("--alpaca-eval", type=int, default=20, metavar="N", help="questions (default: 20)")
    add("--mt-bench", type=int, default=10, metavar="N", help="questions (default: 10)")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
