"""The paper's Instruct setting from end to end, on a checkpoint small enough for a CPU.

    python bench/pipeline.py --model DIR --prompts FILE --questions DIR --out OUT

    prompts ─ sample.py → candidates ─ score → pairs ─ train.py → SimPO, DPO ─ sample.py --format → answer files

Every step is a command of this project, but for the scorer, `score` below, whose place any other can take: a list of
`scores` beside the `responses` of each record is all that train.py asks for. The paper asked a reward model (PairRM,
ArmoRM) about five candidates to each of some 60,000 prompts. Questions that are asked at the end are no training prompts.

A step whose product is in OUT is not done again, so the same command goes on after an interruption. What it all came to,
with the time of each step, is written to OUT/PIPELINE.md.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from data import parse_record, read_records  # noqa: E402
from tokenizing import cpu  # noqa: E402

ALPACA_EVAL, MT_BENCH = "alpaca_eval.json", "mt_bench_question.jsonl"
SAMPLES, CANDIDATE_TOKENS, ANSWER_TOKENS = 4, 80, 128
TRAINING = {  # tuned on nothing: large steps, since there are few
    "simpo": "--beta 2.5 --gamma-beta-ratio 0.55 --lr 2e-5",
    "dpo": "--beta 0.1 --reference cached --lr 2e-5",
}
COMMON = "--batch-size 8 --epochs 2 --max-length 384 --max-prompt-length 256 --dtype bf16 --no-activation-checkpointing"
PARTS = ("ends", "fresh", "about")


def score(prompt: str, response: str) -> dict[str, float]:
    """Three things that go wrong with a small model and that a program can see, each from 0 to 1; their sum is the
    score. ends: the last character closes a sentence. fresh: the share of three-word sequences that are not repeated.
    about: the share of the prompt's words of four letters and more that occur. No judge of quality."""
    said, asked = re.findall(r"\w+", response.lower()), re.findall(r"\w{4,}", prompt.lower())
    threes = list(zip(said, said[1:], said[2:]))
    return {
        "ends": float(response.rstrip().endswith((".", "!", "?", '"', ")", "```"))),
        "fresh": len(set(threes)) / max(1, len(threes)),
        "about": len(set(asked) & set(said)) / max(1, len(set(asked))),
    }


def total(prompt: str, response: str) -> float:
    return sum(score(prompt, response).values())


def records(path: Path) -> list[dict]:
    return [record for _, record in read_records(str(path))]


def write(path: Path, rows: list[dict]) -> None:
    """At one stroke, since a product that is there counts as whole."""
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


class Pipeline:
    """Runs steps, skips those done before, keeps their times and commands."""

    def __init__(self, out: Path, hidden: dict[str, str]):
        self.out, self.hidden = out, hidden  # paths, and what the report calls them
        self.log = out / "steps.json"
        self.steps: dict[str, dict] = json.loads(self.log.read_text()) if self.log.exists() else {}

    def step(self, name: str, product: Path, work: list[str] | None = None, function=None) -> None:
        if product.exists() and name in self.steps:
            return
        print(f"— {name}", flush=True)
        start = time.perf_counter()
        if function:
            function(product)
        elif code := subprocess.run([sys.executable, str(ROOT / work[0]), *work[1:]], check=False).returncode:
            sys.exit(f"pipeline.py: {work[0]} ended with status {code}")
        command = "python " + " ".join(work) if work else ""
        for path, shown in self.hidden.items():
            command = command.replace(path, shown)
        self.steps[name] = {"seconds": time.perf_counter() - start, "command": command}
        self.log.write_text(json.dumps(self.steps, indent=2) + "\n")


def run(flags: argparse.Namespace) -> None:
    out, model, questions = flags.out, str(flags.model), flags.questions
    out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(out, {model: "MODEL", str(questions): "QUESTIONS", str(out): "OUT"})
    prompts, candidates, pairs, held_out = (out / f"{n}.jsonl" for n in ("prompts", "candidates", "pairs", "held-out"))

    def choose(path: Path) -> None:
        asked = {question["instruction"] for question in records(questions / ALPACA_EVAL)[: flags.alpaca_eval]}
        texts = dict.fromkeys(record["prompt"] for _, record in read_records(flags.prompts))
        short = [text for text in texts if text not in asked and len(text.split()) <= 60]
        write(path, [{"prompt": text} for text in short[: flags.count]])

    def add_scores(path: Path) -> None:
        rows = [
            record | {"scores": [total(record["prompt"], response) for response in record["responses"]]}
            for record in records(candidates)
        ]
        pairs = [row for row in rows if len(set(row["scores"])) > 1]
        write(held_out, pairs[::5])
        write(path, [row for row in rows if row not in pairs[::5]])

    pipeline.step("prompts", prompts, function=choose)
    sampling = f"--num-samples {SAMPLES} --temperature 0.8 --top-p 0.95 --max-new-tokens {CANDIDATE_TOKENS}".split()
    work = ["sample.py", "--model", model, "--prompts", str(prompts), *sampling, "--out", str(candidates)]
    pipeline.step("candidates", candidates, work)
    pipeline.step("scores", pairs, function=add_scores)
    for objective, settings in TRAINING.items():
        folder = out / objective
        work = ["train.py", "--model", model, "--objective", objective, *settings.split(), *COMMON.split()]
        work += ["--data", str(pairs), "--eval-data", str(held_out), "--out", str(folder), "--overwrite"]
        pipeline.step(f"train, {objective}", folder / "model", work)
    models = {"before": model} | {objective: str(out / objective / "model") for objective in TRAINING}
    for name, folder in models.items():
        for form, file, limit, suffix in (
            ("alpaca_eval", ALPACA_EVAL, flags.alpaca_eval, "json"),
            ("mt_bench", MT_BENCH, flags.mt_bench, "jsonl"),
        ):
            answers = out / f"{form}-{name}.{suffix}"
            work = ["sample.py", "--model", folder, "--format", form, "--prompts", str(questions / file)]
            work += ["--limit", str(limit), "--max-new-tokens", str(ANSWER_TOKENS), "--out", str(answers)]
            pipeline.step(f"{form}, {name}", answers, work)
    text = report(pipeline, list(models), flags)
    (out / "PIPELINE.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{out / 'PIPELINE.md'}")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(pipeline: Pipeline, models: list[str], flags: argparse.Namespace) -> str:
    out = pipeline.out
    words = lambda texts: f"{mean(len(text.split()) for text in texts):.0f}"
    scored = records(out / "pairs.jsonl") + records(out / "held-out.jsonl")
    examples = [parse_record(row, "")[1] for row in scored if len(set(row["scores"])) > 1]
    scores = [score for row in scored for score in row["scores"]]
    candidates = [
        ["mean score", *(f"{mean(pick(row['scores']) for row in scored):.2f}" for pick in (mean, max, min))],
        ["mean words", words(response for row in scored for response in row["responses"]),
         *(words(e.responses[i] for e in examples) for i in (0, 1))],
    ]  # fmt: skip
    trained = []
    for objective in TRAINING:
        metrics = records(out / objective / "metrics.jsonl")
        held_out, steps = [row for row in metrics if "eval_loss" in row], [row for row in metrics if "loss" in row]
        change = lambda key, scale, form: " → ".join(format(scale * row[key], form) for row in held_out)  # noqa: B023
        accuracy, margin = change("eval_rewards/accuracies", 100, ".0f"), change("eval_rewards/margins", 1, "+.3f")
        losses = f"{steps[0]['loss']:.3f} → {steps[-1]['loss']:.3f}"
        trained.append([objective, str(len(steps)), losses, f"{accuracy} %", margin])
    answered, first = [], []
    for name in models:
        answers = records(out / f"alpaca_eval-{name}.json")
        parts = [score(a["instruction"], a["output"]) for a in answers]
        turns = [turn for a in records(out / f"mt_bench-{name}.jsonl") for turn in a["choices"][0]["turns"]]
        means = [mean(part[key] for part in parts) for key in PARTS]
        numbers = [f"{number:.2f}" for number in (sum(means), *means)]
        answered.append([name, *numbers, words(a["output"] for a in answers), words(turns)])
        output = " ".join(answers[0]["output"].split())
        first.append(f"*{name}*: {output[:400]}{'…' if len(output) > 400 else ''}")
    threads = torch.get_num_threads()
    times = [[name, f"{step['seconds']:.0f}", f"`{step['command']}`" if step["command"] else "within the script"]
             for name, step in pipeline.steps.items()]  # fmt: skip
    seconds = sum(step["seconds"] for step in pipeline.steps.values())
    return f"""# The Instruct pipeline, end to end

Made by `python bench/pipeline.py --model {flags.model.name} …` on {date.today()}: {cpu()}, {os.cpu_count()} cores that had
other work too, {threads} thread{"s" * (threads > 1)}, Python {platform.python_version()}, torch {torch.__version__}; \
{seconds / 60:.1f} minutes in all.

{len(scored)} prompts, {SAMPLES} candidates each from the model itself (temperature 0.8, top-p 0.95, at most {CANDIDATE_TOKENS}
tokens), scored from 0 to 3 by a program: does the text end with a sentence, is it free of repetition, does it take up the
prompt's words (`score` in bench/pipeline.py). The best and the worst of each make a pair; every fifth pair is held out.
Then SimPO and DPO on the rest, and answers to {flags.alpaca_eval} AlpacaEval questions (greedy) and {flags.mt_bench} MT-Bench \
questions of two turns.

## Time

{table(["step", "seconds", "command"], times)}

## Candidates

{len(scores)} candidates, of which {len(examples)} pairs.

{table(["", "all", "best = chosen", "worst = rejected"], candidates)}

## Training

{table(["", "steps", "loss, first → last step", "held-out accuracy", "held-out margin"], trained)}

## Answers

{table(["", "score", *PARTS, "words, AlpacaEval", "words, MT-Bench turn"], answered)}

The first AlpacaEval question, "{records(out / f"alpaca_eval-{models[0]}.json")[0]["instruction"]}":

{(chr(10) * 2).join(first)}

## How to read it

The score is the one that chose the pairs, so a rise would only show that the chain holds together from prompts to answers:
that what was preferred becomes more frequent. It would not show better answers; nobody judged them. With {len(answers)} answers,
cut at {ANSWER_TOKENS} tokens, differences of a tenth are noise. Held out are few pairs, too: each is \
{100 / len(records(out / "held-out.jsonl")):.0f} % of the accuracy, and where the training
loss falls while they stay as they were, the pairs were learnt by heart. The files `alpaca_eval-*.json` and `mt_bench-*.jsonl`
are those that `alpaca_eval --model_outputs` and FastChat's `gen_judgment.py` take.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="checkpoint folder, with a chat template"
    )
    parser.add_argument("--prompts", required=True, metavar="FILE", help="records with a string `prompt`")
    parser.add_argument(
        "--questions", type=Path, required=True, metavar="DIR", help=f"folder with {ALPACA_EVAL} and {MT_BENCH}"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of all that is made")
    parser.add_argument("--count", type=int, default=60, metavar="N", help="training prompts (default: 60)")
    parser.add_argument("--alpaca-eval", type=int, default=20, metavar="N", help="questions (default: 20)")
    parser.add_argument("--mt-bench", type=int, default=10, metavar="N", help="questions (default: 10)")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
