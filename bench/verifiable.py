"""Train a real checkpoint on prompts that a program can verify, and show what it learnt.

    python bench/verifiable.py --model SmolLM2-135M-Instruct --out OUT --texts test.jsonl
    python bench/verifiable.py … --tune        tries the settings of [tried] on topics of their own

    prompts ── sample.py ──▶ six candidates each ── verifier ──▶ passing against failing: pairs
                                                                                           │
    report ◀── verifier ◀── answers on held-out topics ◀── sample.py ◀── models ◀── train.py

bench/verifiable.toml holds prompts and settings. A constraint stands beside its opposite (no comma,
a comma), so no style passes both. To pass, a text must obey the constraint, be an answer and not
talk about the constraint. The same check is made where nobody asked for it, which tells following
an instruction from a habit. --texts names preference pairs whose chosen responses are good texts:
their log-probability shows what training does to text in general.

A step whose product is in OUT is not run again, so the same command resumes, and one with other
--seeds or --methods adds to the report. Two of them may run at once. That a program can verify
instructions is the idea of IFEval (arXiv 2311.07911); kinds, topics and wording are our own.
"""

import argparse
import itertools
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from tokenizing import cpu

from formats.records import read_records
from study.figures import COLOURS, panels, table

ASK = tomllib.loads((ROOT / "bench" / "verifiable.toml").read_text(encoding="utf-8"))
KINDS, METHODS, TRIED = list(ASK["kinds"]), ASK["methods"], ASK["tried"]
OPPOSITE = {kind: KINDS[i ^ 1] for i, kind in enumerate(KINDS)}
ANSWER = "--max-new-tokens 64 --dtype bf16"
DRAWS = {"greedy": "--num-samples 1", "sampled": "--num-samples 2 --temperature 0.7"}
TRAIN = "--batch-size 8 --max-length 256 --max-prompt-length 128 --dtype bf16"
TRAIN += " --no-activation-checkpointing --overwrite"
CLAIMS = [  # which methods, which number, what the paper leads to expect
    ("simpo", "base", "passed", "more"),
    ("dpo", "base", "passed", "more"),
    ("simpo", "dpo", "passed", "more"),
    ("simpo", "simpo-no-margin", "passed", "more"),
    ("simpo", "simpo-sums", "passed", "more"),
    ("simpo", "dpo", "lengths", "level"),
]
SECONDS = {"candidates": 420, "train": 260, "answer": 60}  # on one core of the committed report

# --------------------------------------------------------------------------------------------------
# Prompts and the verifier


def make_prompts(topics: str, share: int, ways: int) -> list[dict]:
    """Ask each kind about every `share`-th topic, in the first `ways` ways in turn."""
    rows = []
    for k, (kind, asked) in enumerate(ASK["kinds"].items()):
        for i, topic in enumerate(ASK["topics"][topics].split()[k // 2 % share :: share]):
            topic, value = topic.replace("_", " "), value_of(kind, topic, i // ways)
            row = {"prompt": asked[i % ways].format(t=topic, v=value), "kind": kind}
            rows.append(row | {"topic": topic, "value": value, "unseen": i % ways == 3})
    return rows


def value_of(kind: str, topic: str, i: int) -> str:
    values = ASK["values"].get(kind, [""])
    return values[i % len(values)].format(t=topic.replace("_", " ").capitalize())


ITEM = re.compile(r"(?:[-*•]|\d+[.)])\s+\S")
INTRODUCTION = re.compile(r"\A[^\n]*:\s*\n+(?=" + ITEM.pattern + ")")
ABOUT_THE_CONSTRAINT = re.compile(
    r"\b(words?|commas?|sentences?|lists?|listed|bullets?|paragraphs?|questions?|statements?|full "
    r"stops?|instructions?|prompts?|(fewer|less|more) than (\d+|twelve|fifteen|eighteen|twenty)|"
    r"(start|begin|end)s? with)\b"
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:['’][a-z]+)?", text.lower())


def threes(said: list[str]) -> list[tuple[str, ...]]:
    return list(zip(said, said[1:], said[2:]))


def repeats(text: str) -> bool:
    """Return whether three words in a row occur three times, or a line twice."""
    rows = [line.strip() for line in text.splitlines() if line.strip()]
    return max(Counter(threes(words(text))).values(), default=0) > 2 or len(set(rows)) < len(rows)


def obeys(kind: str, value: str, text: str) -> bool:
    """Return whether a text obeys a constraint; a list may have one line that introduces it."""
    said, wanted = words(text), words(value)
    items = [bool(ITEM.match(line.strip())) for line in text.splitlines() if line.strip()]
    checks = {
        "list": items in ([True] * 3, [False] + [True] * 3),
        "prose": len(items) == 1 and not re.search(r"(^|\s)(\d+[.)]|[-*•])\s", text),
        "include": value in said,
        "leave out": value not in said,
        "no comma": "," not in text,
        "comma": "," in text,
        "short": len(said) < int(value) if kind == "short" else None,
        "long": len(said) >= int(value) if kind == "long" else None,
        "begin": said[: len(wanted)] == wanted,
        "begin otherwise": said[: len(wanted)] != wanted,
        "question": text.rstrip("\"'”* ").endswith("?"),
        "statement": "?" not in text,
        "fact": any(word in wanted for word in said),
    }
    return bool(checks[kind])


def flaw(row: dict, text: str, finished: bool) -> str:
    """Return why a text is no answer to the prompt, whatever the constraint; "" if it is one."""
    body = INTRODUCTION.sub("", text.strip())
    said, echo = words(body), set(threes(words(row["prompt"])))
    stem = re.sub(r"(?<=...)(ies|m?ing|s|es)$", "", row["topic"].split()[0])
    last = body.splitlines()[-1].strip() if body else ""
    flaws = {
        "cut": not finished,
        "too short": len(said) < 6,
        "off the topic": not any(word.startswith(stem) for word in words(text)),
        "repeats itself": repeats(body),
        "talks about the constraint": ABOUT_THE_CONSTRAINT.search(body.lower()),
        "reads the prompt back": 2 * sum(t in echo for t in threes(said)) > len(said) - 2,
        "does not end": not re.search(r"[.!?][\"'”)*]*$", last) and not ITEM.match(last),
    }
    return next((name for name, found in flaws.items() if found), "")


def passes(row: dict, text: str, finished: bool, kind: str = "", value: str = "") -> bool:
    """Return whether a text answers a prompt and obeys its constraint, or that of another kind."""
    kind, value = (kind, value) if kind else (row["kind"], row["value"])
    return not flaw(row, text, finished) and obeys(kind, value, text)


def make_pairs(candidates: list[dict], seed: int, most: int = 2) -> list[dict]:
    """Pair passing with failing candidates, at most `most` pairs a prompt, balanced in length.

    Each pair brings the number of words of all chosen responses to a kind and its opposite as close
    to that of the rejected ones as the prompt's candidates allow.
    """
    pairs, excess = [], Counter()  # words of the chosen minus words of the rejected responses
    for row in random.Random(seed).sample(candidates, len(candidates)):
        sides: dict[bool, list] = {True: [], False: []}
        for text, finished in zip(row["responses"], row["finished"]):
            sides[passes(row, text, finished)].append((len(words(text)), text, finished))
        both = min(row["kind"], OPPOSITE[row["kind"]])
        for _ in range(min(most, *map(len, sides.values()))):
            options = itertools.product(sides[True], sides[False])
            pair = min(options, key=lambda pair: abs(excess[both] + pair[0][0] - pair[1][0]))
            for side, response in zip((True, False), pair):
                sides[side].remove(response)
            lengths, texts, finished = zip(*pair)
            excess[both] += lengths[0] - lengths[1]
            judged = {"prompt": row["prompt"], "responses": texts, "scores": [1, 0]}
            pairs.append(judged | {"finished": finished})
    return pairs


# --------------------------------------------------------------------------------------------------
# The steps


class Step(NamedTuple):
    """Describes how to make a product: by a script with its flags, or as a list of records."""

    name: str
    product: str  # a path within OUT, where commands run
    work: str | Callable[[], list[dict]]


def records(path: Path | str) -> list[dict]:
    return [record for _, record in read_records(str(path))]


def plan(flags: argparse.Namespace) -> list[Step]:
    """List all steps in order. MODEL in a command is the checkpoint of --model."""
    asked = "tuning" if flags.tune else "held-out"
    facts = [{"prompt": p, "kind": "fact", "value": v} for p, v in ASK["facts"].items()]
    sample = f"sample.py --model MODEL --prompts prompts.jsonl {ANSWER} --num-samples 6"
    sample += " --temperature 0.8 --top-p 0.95 --out candidates.jsonl"
    candidates = flags.out / "candidates.jsonl"
    steps = [
        Step("prompts", "prompts.jsonl", lambda: make_prompts("train", 3, 3)),
        Step("tuning prompts", "tuning.jsonl", lambda: make_prompts("tuning", 1, 3)),
        Step("held-out prompts", "held-out.jsonl", lambda: make_prompts("held-out", 1, 4) + facts),
        Step("texts", "texts.jsonl", lambda: records(flags.texts)[:50]),
        Step("candidates", "candidates.jsonl", sample),
    ]
    runs = [("base", "")]
    for seed in [0] if flags.tune else flags.seeds:
        pairs = f"pairs-{seed}.jsonl"
        steps.append(
            Step(pairs, pairs, partial(lambda s: make_pairs(records(candidates), s), seed))
        )
        methods = TRIED if flags.tune else {name: METHODS[name] for name in flags.methods}
        common = f"--model MODEL --data {pairs} --eval-data texts.jsonl --seed {seed} {TRAIN}"
        runs += [(f"{name}-{seed}", f"train.py {how} {common}") for name, how in methods.items()]
    for run, train in runs:
        if train:
            steps.append(Step(f"train {run}", f"{run}/model", f"{train} --out {run}"))
        model = f"{run}/model" if train else "MODEL"
        for draw, how in DRAWS.items():
            command = f"sample.py --model {model} --prompts {asked}.jsonl {ANSWER} {how}"
            product = f"{asked}/{run}-{draw}.jsonl"
            steps.append(
                Step(f"answer {asked} {run} {draw}", product, f"{command} --out {product}")
            )
    return steps


def note_of(out: Path, step: Step) -> Path:
    """Return the file that keeps a finished step's seconds and command."""
    return out / "steps" / f"{step.name.replace(' ', '-')}.json"


def is_done(out: Path, step: Step) -> bool:
    return note_of(out, step).exists() and (out / step.product).exists()


def make(out: Path, step: Step, model: Path) -> None:
    """Run a step. A product that exists is complete."""
    start, command, product = time.perf_counter(), "", out / step.product
    for path in (product, note_of(out, step)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(step.work, str):
        command = "python " + step.work
        script, *flags = [str(model) if word == "MODEL" else word for word in step.work.split()]
        called = [sys.executable, str(ROOT / script), *flags]
        if code := subprocess.run(called, check=False, cwd=out).returncode:
            sys.exit(f"verifiable.py: {command} ended with status {code}")
    else:
        part = product.with_name(product.name + ".part")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in step.work()]
        part.write_text("".join(lines), encoding="utf-8")
        os.replace(part, product)
    seconds = round(time.perf_counter() - start)
    note_of(out, step).write_text(json.dumps({"seconds": seconds, "command": command}))


# --------------------------------------------------------------------------------------------------
# The report


def answers(out: Path, run: str) -> list[tuple[dict, list[tuple[str, bool]]]]:
    """Return each prompt with a run's answers, the greedy one first; none before it has run."""
    files = [out / f"{run}-{draw}.jsonl" for draw in DRAWS]
    if not all(file.exists() for file in files):
        return []
    return [
        (row, [pair for r in (row, sampled) for pair in zip(r["responses"], r["finished"])])
        for row, sampled in zip(*map(records, files))
    ]


class Run:
    """Verifies what one model answered. passed, lengths: [prompts, answers], in words."""

    def __init__(self, out: Path, name: str, asked: str = "held-out"):
        everything = answers(out / asked, name)
        self.name, self.rows = name, [pair for pair in everything if pair[0]["kind"] != "fact"]
        self.passed = np.array([[passes(row, *t) for t in texts] for row, texts in self.rows])
        self.lengths = np.array([[len(words(t)) for t, _ in texts] for _, texts in self.rows])
        facts = [(row, texts[0][0]) for row, texts in everything if row["kind"] == "fact"]
        self.facts = sum(obeys("fact", row["value"], text) for row, text in facts)
        log = out / name / "metrics.jsonl"
        metrics = [r for r in records(log) if "eval_loss" in r] if log.exists() else []
        self.logps = [row["eval_avg_logps/chosen"] for row in metrics]  # nats per token

    def summary(self) -> list[str]:
        texts = [text for _, answers in self.rows for text, _ in answers]
        greedy = {tuple(words(answers[0][0])[:3]) for _, answers in self.rows}
        unseen = [i for i, (row, _) in enumerate(self.rows) if row["unseen"]]
        percent = [self.passed[:, 0], self.passed[:, 1:], self.passed[unseen] if unseen else []]
        percent += [[repeats(text) for text in texts]]
        shown = [f"{100 * np.mean(part):.1f}" if len(part) else "–" for part in percent]
        shown += [f"{100 * len(greedy) / len(self.rows):.0f}", f"{self.lengths.mean():.1f}"]
        change = " → ".join(f"{x:.3f}" for x in self.logps) or "–"
        return [self.name, *shown, str(self.facts), change]

    def where(self, kind: str) -> list[float]:
        """Return how often a check is passed, in percent: where asked for it, its opposite, neither.

        Where the opposite is asked for, the check takes that prompt's value.
        """
        found: dict[str, list[bool]] = {kind: [], OPPOSITE[kind]: [], "": []}
        for i, (row, texts) in enumerate(self.rows):
            place = row["kind"] if row["kind"] in found else ""
            value = row["value"] if place else value_of(kind, row["topic"], i)
            found[place] += [passes(row, *text, kind, value) for text in texts]
        return [100 * float(np.mean(part)) for part in found.values()]


def interval(difference: np.ndarray) -> tuple[float, float, float]:
    """Return a mean over [seeds, prompts] and its 95 % interval, drawing both with replacement."""
    rng, (seeds, prompts) = np.random.default_rng(0), difference.shape
    draws = [
        difference[rng.integers(seeds, size=seeds)][:, rng.integers(prompts, size=prompts)].mean()
        for _ in range(2000)
    ]
    return difference.mean(), *np.quantile(draws, [0.025, 0.975])


def compare(runs: dict[str, dict[int, Run]]) -> list[list[str]]:
    """Compare methods over the seeds that both have: one row for each of CLAIMS."""
    rows = []
    for one, other, number, expected in CLAIMS:
        seeds = [s for s in runs.get(one, {}) if s in runs.get(other, {}) or other == "base"]
        if not seeds:
            continue
        pairs = [(runs[one][s], runs[other][0 if other == "base" else s]) for s in seeds]
        scale = 100 if number == "passed" else 1
        values = [[scale * getattr(r, number).astype(float) for r in pair] for pair in pairs]
        difference = np.stack([a - b for a, b in values])  # [seeds, prompts, answers]
        won, lost = ((sign * difference[:, :, 0] > 0).sum() for sign in (1, -1))
        parts = [difference[:, :, :1], difference[:, :, 1:], difference]
        shown = [interval(part.mean(2)) for part in parts]
        _, low, high = shown[-1]
        found = "more" if low > 0 else "less" if high < 0 else "level"
        verdict = "holds" if found == expected else "open" if found == "level" else "does not hold"
        cells = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*three) for three in shown]
        name = f"{one} − {other}, {'% passed' if number == 'passed' else 'words'}"
        rows.append([name, str(len(seeds)), *cells, f"{won} : {lost}", expected, verdict])
    return rows


def draw(runs: dict[str, dict[int, Run]], path: Path) -> None:
    """Draw the rate of greedy passes by method and seed, and each kind's where asked and not."""
    figure, (bars, asked, others) = panels(3, height=4.2)
    for i, (name, seeds) in enumerate(runs.items()):
        greedy = [100 * run.passed[:, 0].mean() for run in seeds.values()]
        bars.bar(i, np.mean(greedy), color=COLOURS[i], alpha=0.6)
        bars.plot([i] * len(greedy), greedy, "k.")
        rates = np.mean([[r.where(kind) for kind in KINDS] for r in seeds.values()], axis=0)
        for axis, column in ((asked, 0), (others, 2)):
            axis.plot(rates[:, column], KINDS, "osD^v"[i], color=COLOURS[i], label=name, alpha=0.8)
    bars.set_xticks(range(len(runs)), [name.replace(", ", ",\n") for name in runs])
    bars.set_title("greedy answers that pass, %; a dot a seed", fontsize=9)
    asked.set_title("check passed where asked, %", fontsize=9)
    others.set_title("… where neither it nor its opposite was, %", fontsize=9)
    for axis in (asked, others):
        axis.invert_yaxis()
        axis.set_xlim(-3, 103)
    asked.legend(fontsize=7)
    figure.savefig(path)


def report(flags: argparse.Namespace) -> str:
    """Return the report on all that has been answered so far; draw OUT/verifiable.png."""
    out = flags.out
    seeds = {name: {s: Run(out, f"{name}-{s}") for s in range(9)} for name in METHODS}
    runs = {"base": {0: Run(out, "base")}}
    runs |= {
        name: found
        for name in seeds
        if (found := {s: r for s, r in seeds[name].items() if len(r.rows)})
    }
    draw(runs, out / "verifiable.png")
    every = [run for found in runs.values() for run in found.values()]
    tried = [
        (Run(out, name, "tuning"), how)
        for name, how in [("base", ""), *((f"{n}-0", h) for n, h in TRIED.items())]
    ]
    kinds = []
    for kind in KINDS:
        rates = [
            np.mean([r.where(kind) for r in found.values()], axis=0) for found in runs.values()
        ]
        kinds.append([kind, *("{:.0f} / {:.0f} / {:.0f}".format(*rate) for rate in rates)])
    notes = sorted((out / "steps").glob("*.json"), key=lambda path: path.stat().st_mtime)
    steps = [(note.stem, json.loads(note.read_text())) for note in notes]
    parts = [
        "# A real model on prompts that a program can verify",
        f"{date.today()}, {cpu()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
        "## What was learnt",
        table(
            [
                "run",
                "greedy %",
                "sampled %",
                "unseen wording %",
                "repeats %",
                "openings %",
                "words",
                "facts",
                "texts",
            ],
            [run.summary() for run in every],
        ),
        table(
            ["difference", "seeds", "greedy", "sampled", "all", "won : lost", "paper", "verdict"],
            compare(runs),
        ),
        table(["kind", *runs], kinds),
        table(
            ["tried", *["greedy %", "sampled %"], "flags"],
            [[*run.summary()[:3], how] for run, how in tried if run.rows],
        ),
        table(
            ["step", "seconds", "command"],
            [[name, str(n["seconds"]), f"`{n['command']}`"] for name, n in steps],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="checkpoint with a chat template")
    add("--out", type=Path, required=True, metavar="OUT", help="folder for everything")
    add("--texts", metavar="FILE", required=True, help="pairs with good texts")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of pairs and their order")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--tune", action="store_true")
    flags = parser.parse_args()
    flags.out, flags.model = flags.out.absolute(), flags.model.absolute()
    todo = [step for step in plan(flags) if not is_done(flags.out, step)]
    seconds = sum(SECONDS.get(step.name.split()[0], 1) for step in todo)
    print(f"{len(todo)} steps to do, about {seconds / 60:.0f} minutes on one core", flush=True)
    for i, step in enumerate(todo, 1):
        print(f"— {i}/{len(todo)} {step.name}", flush=True)
        make(flags.out, step, flags.model)
    text = report(flags)
    (flags.out / "VERIFIABLE.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
