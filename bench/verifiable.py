"""Train a real checkpoint on prompts that a program can verify, and show what it learnt.

    python bench/verifiable.py --model SmolLM2-135M-Instruct --texts test.jsonl --out OUT

    prompts ── sample.py ──▶ six candidates each ── verifier ──▶ passing against failing: pairs
                                                                                            │
    report ◀── verifier ◀── answers on held-out topics ◀── sample.py ◀── models ◀── train.py

bench/verifiable.toml holds prompts and settings. A constraint stands beside its opposite (no comma,
a comma), so no style passes both. A text passes if it obeys the constraint, answers the prompt and
does not talk about the constraint. The same check is made where nobody asked for it, which tells
following an instruction from a habit. --tune tries other settings on topics of their own.

A step whose product is in OUT is not run again: the same command resumes, and one with other
--seeds or --methods adds to the report. Two may run at once. That a program can verify instructions
is the idea of IFEval (arXiv 2311.07911); kinds, topics and wording are our own.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from tokenizing import cpu

from formats.records import read_records
from study.figures import COLOURS, panels, table

ASK = tomllib.loads((ROOT / "bench" / "verifiable.toml").read_text(encoding="utf-8"))
KINDS, METHODS, TRIED, COMMANDS = list(ASK["kinds"]), ASK["methods"], ASK["tried"], ASK["commands"]
OPPOSITE = {kind: KINDS[i ^ 1] for i, kind in enumerate(KINDS)}
DRAWS = ("greedy", "sampled")  # one answer, two answers
SECONDS = {"candidates": 420, "train": 180, "greedy": 60, "sampled": 120}  # on one core

# Prompts and the verifier


def make_prompts(topics: str, share: int, ways: int) -> list[dict]:
    """Ask each kind about every `share`-th topic, in the first `ways` ways in turn."""
    rows = []
    for k, (kind, asked) in enumerate(ASK["kinds"].items()):
        for i, topic in enumerate(ASK["topics"][topics][k // 2 % share :: share]):
            value = value_of(kind, topic, i // ways)
            row = {"prompt": asked[i % ways].format(t=topic, v=value), "kind": kind}
            rows.append(row | {"topic": topic, "value": value, "unseen": i % ways == 3})
    return rows


def value_of(kind: str, topic: str, i: int) -> str:
    values = ASK["values"].get(kind, [""])
    return values[i % len(values)].format(t=topic.capitalize())


ITEM = re.compile(r"(?:[-*•]|\d+[.)])\s+\S")
INTRODUCTION = re.compile(r"\A[^\n]*:\s*\n+(?=" + ITEM.pattern + ")")
ABOUT_THE_CONSTRAINT = re.compile(rf"\b({'|'.join(ASK['about_the_constraint'])})\b")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:['’][a-z]+)?", text.lower())


def threes(said: list[str]) -> list[tuple[str, ...]]:
    return list(zip(said, said[1:], said[2:]))


def obeys(kind: str, value: str, text: str) -> bool:
    """Return whether a text obeys a constraint; a list may have one line that introduces it."""
    said, wanted = words(text), words(value)
    items = [bool(ITEM.match(line.strip())) for line in text.splitlines() if line.strip()]
    checks = {
        "list": items in ([True] * 3, [False] + [True] * 3),
        "prose": len(items) == 1 and not re.search(r"(^|\s)(\d+[.)]|[-*•])\s", text),
        "include": value in said,
        "comma": "," in text,
        "short": value.isdigit() and len(said) < int(value),
        "begin": said[: len(wanted)] == wanted,
        "question": text.rstrip("\"'”* ").endswith("?"),
        "statement": "?" not in text,
        "fact": any(word in wanted for word in said),
    }
    return checks[kind] if kind in checks else not checks[OPPOSITE[kind]]


def problem(row: dict, text: str, finished: bool, kind: str = "", value: str = "") -> str:
    """Return why a text does not pass, "" if it does; `kind` and `value` replace the prompt's."""
    kind, value = (kind, value) if kind else (row["kind"], row["value"])
    body = INTRODUCTION.sub("", text.strip())
    said, echo = words(body), set(threes(words(row["prompt"])))
    rows = [line.strip() for line in body.splitlines() if line.strip()] or [""]
    often = max(Counter(threes(said)).values(), default=0)
    stem = re.sub(r"(?<=...)(ies|m?ing|s|es)$", "", row["topic"].split()[0])
    problems = {
        "cut": not finished,
        "too short": len(said) < 6,
        "off the topic": not any(word.startswith(stem) for word in words(text)),
        "repeats itself": often > 2 or len(set(rows)) < len(rows),
        "talks about the constraint": ABOUT_THE_CONSTRAINT.search(body.lower()),
        "reads the prompt back": 2 * sum(t in echo for t in threes(said)) > len(said) - 2,
        "does not end": not re.search(r"[.!?][\"'”)*]*$", body) and not ITEM.match(rows[-1]),
        "constraint": not obeys(kind, value, text.strip()),
    }
    return next((name for name, found in problems.items() if found), "")


def make_pairs(candidates: list[dict], seed: int, most: int = 2) -> list[dict]:
    """Pair passing with failing candidates, at most `most` pairs a prompt, balanced in length.

    Each pair brings the number of words of all chosen responses to a kind and its opposite as close
    to that of the rejected ones as the prompt's candidates allow.
    """
    pairs, excess = [], Counter()  # words of the chosen minus words of the rejected responses
    for row in random.Random(seed).sample(candidates, len(candidates)):
        sides: dict[bool, list] = {True: [], False: []}
        for text, finished in zip(row["responses"], row["finished"]):
            sides[not problem(row, text, finished)].append((len(words(text)), text, finished))
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


# The steps


def records(path: Path | str) -> list[dict]:
    return [record for _, record in read_records(str(path))]


def plan(flags: argparse.Namespace) -> Iterator[tuple[str, str, str | Callable[[], list[dict]]]]:
    """Yield each step: its kind, its product in OUT, and a command or what returns records."""
    facts = [{"prompt": p, "kind": "fact", "value": v} for p, v in ASK["facts"].items()]
    yield "prompts", "prompts.jsonl", lambda: make_prompts("train", 3, 3)
    yield "prompts", "tuning.jsonl", lambda: make_prompts("tuning", 1, 3)
    yield "prompts", "held-out.jsonl", lambda: make_prompts("held-out", 1, 4) + facts
    yield "texts", "texts.jsonl", lambda: records(flags.texts)[:50]
    yield "candidates", "candidates.jsonl", COMMANDS["candidates"]
    runs, asked = [("base", "MODEL")], "tuning" if flags.tune else "held-out"
    methods = TRIED if flags.tune else {name: METHODS[name] for name in flags.methods}
    read = partial(records, flags.out / "candidates.jsonl")
    for seed in flags.seeds:
        yield "pairs", f"pairs-{seed}.jsonl", lambda seed=seed: make_pairs(read(), seed)
        for name, how in methods.items():
            run = f"{name}-{seed}"
            yield "train", f"{run}/model", f"{COMMANDS['train']} {how}".format(run=run, seed=seed)
            runs.append((run, f"{run}/model"))
    for (run, model), draw in itertools.product(runs, DRAWS):
        out = f"{asked}/{run}-{draw}.jsonl"
        yield draw, out, COMMANDS[draw].format(model=model, asked=asked, out=out)


def make(flags: argparse.Namespace, product: str, work: str | Callable[[], list[dict]]) -> None:
    """Run a step in OUT and note its seconds and command. A product that exists is complete."""
    start, path = time.perf_counter(), flags.out / product
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(work, str):
        script, *options = [str(flags.model) if w == "MODEL" else w for w in work.split()]
        called = [sys.executable, str(ROOT / script), *options]
        if code := subprocess.run(called, check=False, cwd=flags.out).returncode:
            sys.exit(f"verifiable.py: {work}\nended with status {code}")
    else:
        part = path.with_name(path.name + ".part")
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in work()]
        part.write_text("".join(lines), encoding="utf-8")
        part.rename(path)
    command = f"`python {work}`" if isinstance(work, str) else "within the script"
    note = {"product": product, "seconds": round(time.perf_counter() - start), "command": command}
    (flags.out / f"{product}.step").write_text(json.dumps(note))


# The report


class Run:
    """Holds what the verifier says of a model's answers: why, lengths (words): [prompts, 3]."""

    def __init__(self, out: Path, name: str, asked: str):
        self.name, self.rows, self.facts = name, [], 0
        for row, more in zip(*(records(out / asked / f"{name}-{draw}.jsonl") for draw in DRAWS)):
            texts = row["responses"] + more["responses"]
            if row["kind"] == "fact":
                self.facts += obeys("fact", row["value"], texts[0])
            else:
                self.rows.append((row, [*zip(texts, row["finished"] + more["finished"])]))
        self.why = np.array([[problem(row, *text) for text in texts] for row, texts in self.rows])
        self.passed = 100.0 * (self.why == "")
        self.words = np.array([[len(words(t)) for t, _ in texts] for _, texts in self.rows])
        log = out / name / "metrics.jsonl"
        metrics = [r for r in records(log) if "eval_loss" in r] if log.exists() else []
        self.good = [row["eval_avg_logps/chosen"] for row in metrics] or [0.0]

    def summary(self) -> list[str]:
        """Return a row of the table of runs."""
        unseen = self.passed[[row["unseen"] for row, _ in self.rows]]
        parts = [
            self.passed[:, 0],
            self.passed[:, 1:],
            unseen if len(unseen) else np.nan,
            self.words,
        ]
        shown = [f"{np.mean(part):.1f}" for part in parts]
        return [self.name, *shown, str(self.facts), f"{self.good[-1] - self.good[0]:+.3f}"]

    def where(self, kind: str) -> list[float]:
        """Return how often a check passes, in %: where asked for, where its opposite is, elsewhere.

        Where the opposite is asked for, the check takes that prompt's value.
        """
        found: dict[str, list[bool]] = {kind: [], OPPOSITE[kind]: [], "": []}
        for i, (row, texts) in enumerate(self.rows):
            place = row["kind"] if row["kind"] in found else ""
            value = row["value"] if place else value_of(kind, row["topic"], i)
            found[place] += [not problem(row, *text, kind, value) for text in texts]
        return [100 * float(np.mean(part)) for part in found.values()]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return a mean over [seeds, prompts] and its 95 % interval, drawing both with replacement."""
    rng, (n, m) = np.random.default_rng(0), values.shape
    draws = [(rng.integers(n, size=(n, 1)), rng.integers(m, size=m)) for _ in range(2000)]
    return values.mean(), *np.quantile([values[draw].mean() for draw in draws], [0.025, 0.975])


def compare(runs: dict[str, list[Run]], one: str, other: str, number: str, paper: str) -> list[str]:
    """Compare two methods prompt by prompt, over the seeds of both, with what the paper claims."""
    pairs = list(zip(runs[one], runs[other] * (9 if other == "base" else 1)))
    change = np.array([getattr(a, number) - getattr(b, number) for a, b in pairs])
    greedy, sampled = change[:, :, :1], change[:, :, 1:]  # [seeds, prompts, answers]
    cells = [interval(part.mean(2)) for part in (greedy, sampled, change)]
    found = "more" if cells[2][1] > 0 else "less" if cells[2][2] < 0 else "level"
    verdict = "holds" if found == paper else "open" if found == "level" else "does not hold"
    shown = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*cell) for cell in cells]
    counts = f"{(greedy > 0).sum()} : {(greedy < 0).sum()}"
    return [f"{one} − {other}", number, str(len(pairs)), *shown, counts, paper, verdict]


def draw(runs: dict[str, list[Run]], rates: dict[str, np.ndarray], path: Path) -> None:
    """Draw greedy pass rates by method and seed, and each kind's where asked for and elsewhere."""
    figure, axes = panels(3, height=4.2)
    for i, (name, seeds) in enumerate(runs.items()):
        greedy = [run.passed[:, 0].mean() for run in seeds]
        axes[0].bar(name.replace("-", "\n"), np.mean(greedy), color=COLOURS[i], alpha=0.6)
        axes[0].plot([i] * len(greedy), greedy, "k.")
        for axis, rate in zip(axes[1:], rates[name].T[[0, 2]]):
            axis.plot(rate[::-1], [*KINDS, "mean"][::-1], "osD^v"[i], color=COLOURS[i], label=name)
    for axis, title in zip(axes, ASK["heads"]["figure"]):
        axis.set_title(title, fontsize=9)
    axes[1].legend(fontsize=7)
    figure.savefig(path)


def report(out: Path) -> str:
    """Return the report on all that has been answered so far; draw OUT/verifiable.png."""

    def answered(names: list[str], asked: str) -> list[Run]:
        files = [(name, out / asked / f"{name}-{DRAWS[-1]}.jsonl") for name in names]
        return [Run(out, name, asked) for name, file in files if file.exists()]

    every = {name: [f"{name}-{seed}" for seed in range(9)] for name in METHODS}
    every = {
        name: answered(runs, "held-out") for name, runs in ({"base": ["base"]} | every).items()
    }
    runs = {name: seeds for name, seeds in every.items() if seeds}
    rates = {}  # [kinds and their mean; asked, opposite, elsewhere]
    for name, seeds in runs.items():
        mean = np.mean([[run.where(kind) for kind in KINDS] for run in seeds], axis=0)
        rates[name] = np.vstack([mean, mean.mean(0)])
    draw(runs, rates, out / "verifiable.png")
    share = lambda name, why: f"{100 * np.mean([run.why == why for run in runs[name]]):.1f}"
    cell = lambda rate: " / ".join(f"{part:.0f}" for part in rate)
    tried = answered(["base", *(f"{name}-0" for name in TRIED)], "tuning")
    notes = [json.loads(note.read_text()) for note in sorted(out.rglob("*.step"))]
    tables = {
        "runs": [run.summary() for seeds in runs.values() for run in seeds],
        "claims": [compare(runs, *claim) for claim in ASK["claims"] if {*claim[:2]} <= runs.keys()],
        "kinds": [
            [kind, *(cell(rates[name][k]) for name in runs)]
            for k, kind in enumerate([*KINDS, "mean"])
        ],
        "flaws": [
            [why, *(share(name, why) for name in runs)]
            for why in np.unique(runs["base"][0].why)
            if why
        ],
        "tried": [[*run.summary()[:3], TRIED.get(run.name[:-2], "")] for run in tried],
        "steps": [[note["product"], str(note["seconds"]), note["command"]] for note in notes],
    }
    heads = ASK["heads"] | {"kinds": ["kind", *runs], "flaws": ["% of the answers", *runs]}
    shown = {name: table(heads[name], rows) for name, rows in tables.items()}
    where = f"{cpu()}, {torch.get_num_threads()} thread, torch {torch.__version__}, {date.today()}"
    return ASK["report"]["text"].lstrip().format(where=where, **shown)


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint folder, with a chat template")
    add("--texts", required=True, help="preference pairs whose chosen responses are good texts")
    add("--out", type=Path, required=True, help="folder for everything that is made")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the pairs and their order")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--tune", action="store_true", help="train the settings of [tried], answer tuning prompts")
    flags = parser.parse_args()
    flags.out, flags.model = flags.out.absolute(), flags.model.absolute()
    todo = [step for step in plan(flags) if not (flags.out / step[1]).exists()]
    minutes = sum(SECONDS.get(kind, 1) for kind, _, _ in todo) / 60
    print(f"{len(todo)} steps, about {minutes:.0f} minutes on one core", flush=True)
    for i, (_, product, work) in enumerate(todo, 1):
        print(f"— {i}/{len(todo)} {product}", flush=True)
        make(flags, product, work)
    text = report(flags.out)
    (flags.out / "VERIFIABLE.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
