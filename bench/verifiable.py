"""Train a real checkpoint on prompts that a program can verify, and show what it learnt.

    python bench/verifiable.py --model SmolLM2-135M-Instruct --texts test.jsonl --out OUT

    prompts ── sample.py ──▶ six candidates each ── verifier ──▶ passing against failing: pairs
                                                                                            │
    report ◀── verifier ◀── answers on held-out topics ◀── sample.py ◀── models ◀── train.py

A constraint stands beside its opposite (no comma, a comma), so no style passes both. To pass, a
text must obey, be an answer, and not talk about the constraint. What is in OUT is not made again:
the same command resumes, and other --seeds or --methods add to the report. That a program can
verify instructions is IFEval's idea (arXiv 2311.07911); kinds, topics and wording are our own.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
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


def problem(row: dict, text: str, finished: bool) -> str:
    """Return why a text does not pass as an answer to a prompt, or "" if it does."""
    body = INTRODUCTION.sub("", text.strip())
    said, asked = words(body), words(row["prompt"])
    threes, echo = list(zip(said, said[1:], said[2:])), set(zip(asked, asked[1:], asked[2:]))
    rows = [line.strip() for line in body.splitlines() if line.strip()] or [""]
    stem = re.sub(r"(?<=...)(ies|m?ing|s|es)$", "", row["topic"].split()[0])
    problems = {
        "cut": not finished,
        "too short": len(said) < 6,
        "off the topic": not any(word.startswith(stem) for word in words(text)),
        "repeats itself": len(set(rows)) < len(rows)
        or any(n > 2 for n in Counter(threes).values()),
        "talks about the constraint": ABOUT_THE_CONSTRAINT.search(body.lower()),
        "reads the prompt back": 2 * sum(three in echo for three in threes) > len(threes),
        "does not end": not re.search(r"[.!?][\"'”)*]*$", body) and not ITEM.match(rows[-1]),
        "constraint": not obeys(row["kind"], row["value"], text.strip()),
    }
    return next((name for name, found in problems.items() if found), "")


def make_pairs(candidates: list[dict], seed: int, most: int = 2) -> list[dict]:
    """Pair passing with failing candidates of a prompt, at most `most` times.

    Of all pairs that a prompt allows, the one is taken that brings the words of chosen and rejected
    responses to a kind and its opposite closest.
    """
    pairs, excess = [], Counter()  # words of the chosen minus words of the rejected responses
    for row in random.Random(seed).sample(candidates, len(candidates)):
        sides: dict[bool, list] = {True: [], False: []}
        for text, finished in zip(row["responses"], row["finished"]):
            sides[not problem(row, text, finished)].append((len(words(text)), text, finished))
        both = min(row["kind"], OPPOSITE[row["kind"]])
        for _ in range(min(most, *map(len, sides.values()))):
            options = [(c, r) for c in sides[True] for r in sides[False]]
            pair = min(options, key=lambda pair: abs(excess[both] + pair[0][0] - pair[1][0]))
            sides[True].remove(pair[0])
            sides[False].remove(pair[1])
            lengths, texts, finished = zip(*pair)
            excess[both] += lengths[0] - lengths[1]
            judged = {"prompt": row["prompt"], "responses": texts, "scores": [1, 0]}
            pairs.append(judged | {"finished": finished})
    return pairs


def records(path: Path | str) -> list[dict]:
    return [record for _, record in read_records(str(path))]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plan(flags: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield each step: the path of its product and its command, which runs in OUT."""
    yield "candidates.jsonl", COMMANDS["candidates"]
    asked = "tuning" if flags.tune else "held-out"
    methods = TRIED if flags.tune else {name: METHODS[name] for name in flags.methods}
    runs = [(f"{name}-{seed}", seed, methods[name]) for seed in flags.seeds for name in methods]
    for run, seed, how in [("base", 0, ""), *runs]:
        if how:
            yield f"{run}/model", f"{COMMANDS['train']} {how}".format(run=run, seed=seed)
        for draw in ("greedy", "sampled"):  # one answer, two answers
            model, out = f"{run}/model" if how else "MODEL", f"{asked}/{run}-{draw}.jsonl"
            yield out, COMMANDS[draw].format(model=model, asked=asked, out=out)


def execute(flags: argparse.Namespace) -> None:
    """Make what is missing in OUT. PRODUCT.step keeps seconds and command of what is there."""
    out, candidates = flags.out, flags.out / "candidates.jsonl"
    todo = [step for step in plan(flags) if not (out / step[0]).exists()]
    print(f"{len(todo)} steps, about {2 * len(todo)} minutes on one core", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    facts = [{"prompt": p, "kind": "fact", "value": v} for p, v in ASK["facts"].items()]
    write(out / "prompts.jsonl", make_prompts("train", 3, 3))
    write(out / "tuning.jsonl", make_prompts("tuning", 1, 3))
    write(out / "held-out.jsonl", make_prompts("held-out", 1, 4) + facts)
    write(out / "texts.jsonl", records(flags.texts)[:50])
    for product, command in todo:
        print(f"— {product}", flush=True)
        for seed in flags.seeds if candidates.exists() else []:
            write(out / f"pairs-{seed}.jsonl", make_pairs(records(candidates), seed))
        (out / product).parent.mkdir(exist_ok=True)
        start = time.perf_counter()
        script, *options = [str(flags.model) if w == "MODEL" else w for w in command.split()]
        called = [sys.executable, str(ROOT / script), *options]
        if code := subprocess.run(called, check=False, cwd=out).returncode:
            sys.exit(f"verifiable.py: {command}\nended with status {code}")
        note = [product, f"{time.perf_counter() - start:.0f}", f"`python {command}`"]
        (out / f"{product}.step").write_text(json.dumps(note))


class Run:
    """Holds what the verifier says of a model's answers: why, passed, words: [prompts, 3]."""

    def __init__(self, sampled: Path):
        self.name, self.rows, self.facts = sampled.name.removesuffix("-sampled.jsonl"), [], 0
        self.method, _, self.seed = self.name.rpartition("-")
        greedy = sampled.with_name(f"{self.name}-greedy.jsonl")
        for row, more in zip(records(greedy), records(sampled)):
            texts = row["responses"] + more["responses"]
            if row["kind"] == "fact":
                self.facts += obeys("fact", row["value"], texts[0])
            else:
                self.rows.append((row, [*zip(texts, row["finished"] + more["finished"])]))
        self.why = np.array([[problem(row, *text) for text in texts] for row, texts in self.rows])
        self.passed = 100.0 * (self.why == "")
        self.words = np.array([[len(words(t)) for t, _ in texts] for _, texts in self.rows])
        key, log = "eval_avg_logps/chosen", sampled.parent.parent / self.name / "metrics.jsonl"
        self.good = [row[key] for row in records(log) if key in row] if log.exists() else [0.0]

    def summary(self) -> list[str]:
        """Return a row of the table of runs; the fourth number leaves out what is no answer."""
        unseen = self.passed[[row["unseen"] for row, _ in self.rows]]
        obeyed = self.passed[(self.why == "") | (self.why == "constraint")]
        parts = self.passed[:, 0], self.passed[:, 1:], unseen if len(unseen) else 0, obeyed
        shown = [f"{np.mean(part):.1f}" for part in (*parts, self.words)]
        return [self.name, *shown, str(self.facts), f"{self.good[-1] - self.good[0]:+.3f}"]

    def rates(self) -> np.ndarray:
        """Return each check's pass rate and the mean, %: asked for, its opposite is, neither is."""
        rates = []
        for kind in KINDS:
            found: dict[str, list[bool]] = {kind: [], OPPOSITE[kind]: [], "": []}
            for i, (row, texts) in enumerate(self.rows):
                place = row["kind"] if row["kind"] in found else ""
                value = row["value"] if place else value_of(kind, row["topic"], i)
                found[place] += [not problem(row | dict(kind=kind, value=value), *t) for t in texts]
            rates.append([100 * np.mean(part) for part in found.values()])
        return np.vstack([rates, np.mean(rates, axis=0)])


def compare(runs: dict[str, list[Run]], one: str, other: str, number: str, paper: str) -> list[str]:
    """Compare two methods prompt by prompt over the seeds of both; judge what the paper claims."""
    pairs = [(a, b) for a in runs[one] for b in runs[other] if b.seed in ("base", a.seed)]
    change = np.array([getattr(a, number) - getattr(b, number) for a, b in pairs])
    greedy, sampled = change[:, :, :1], change[:, :, 1:]  # [seeds, prompts, answers]
    rng, (n, m, _) = np.random.default_rng(0), change.shape
    draws = [(rng.integers(n, size=(n, 1)), rng.integers(m, size=m)) for _ in range(2000)]
    shown = []
    for part in (greedy.mean(2), sampled.mean(2), change.mean(2)):
        low, high = np.quantile([part[draw].mean() for draw in draws], [0.025, 0.975])
        shown.append(f"{part.mean():+.1f} [{low:+.1f}, {high:+.1f}]")
    found = "more" if low > 0 else "less" if high < 0 else "level"
    verdict = "holds" if found == paper else "open" if found == "level" else "does not hold"
    counts = f"{(greedy > 0).sum()} : {(greedy < 0).sum()}"
    return [f"{one} − {other}", number, str(n), *shown, counts, paper, verdict]


def draw(runs: dict[str, list[Run]], rates: dict[str, np.ndarray], path: Path) -> None:
    """Draw greedy pass rates by method and seed, and each kind's where asked for and elsewhere."""
    figure, axes = panels(3, height=4.2)
    for i, (name, seeds) in enumerate(runs.items()):
        greedy, look = [run.passed[:, 0].mean() for run in seeds], {"color": COLOURS[i]}
        axes[0].bar(name.replace("-", "\n"), np.mean(greedy), alpha=0.6, **look)
        axes[0].plot([i] * len(greedy), greedy, "k.")
        for axis, rate in zip(axes[1:], rates[name].T[[0, 2]]):
            axis.plot(rate[::-1], [*KINDS, "mean"][::-1], "osD^v"[i], label=name, **look)
    for axis, title in zip(axes, ASK["heads"]["figure"]):
        axis.set_title(title, fontsize=9)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower right", ncols=len(runs))
    figure.savefig(path)


def report(out: Path) -> str:
    """Return the report on all that has been answered so far; draw OUT/verifiable.png."""
    held_out = [Run(file) for file in sorted(out.glob("held-out/*-sampled.jsonl"))]
    tried = [Run(file) for file in sorted(out.glob("tuning/*-sampled.jsonl"))]
    every = {name: [run for run in held_out if run.method == name] for name in ("", *METHODS)}
    runs = {name or "base": seeds for name, seeds in every.items() if seeds}
    rates = {name: np.mean([run.rates() for run in runs[name]], axis=0) for name in runs}
    draw(runs, rates, out / "verifiable.png")
    rows: dict[str, list[list[str]]] = {
        "runs": [run.summary() for seeds in runs.values() for run in seeds],
        "claims": [compare(runs, *claim) for claim in ASK["claims"] if {*claim[:2]} <= runs.keys()],
        "kinds": [[kind] for kind in (*KINDS, "mean")],
        "reasons": [[why] for why in np.unique(runs["base"][0].why) if why],
        "tried": [[*run.summary()[:3], TRIED.get(run.method, "")] for run in tried],
        "steps": [json.loads(note.read_text()) for note in sorted(out.rglob("*.step"))],
    }
    for name in runs:
        for row, rate in zip(rows["kinds"], rates[name]):
            row.append(" / ".join(f"{part:.0f}" for part in rate))
        for row in rows["reasons"]:
            row.append(f"{100 * np.mean([run.why == row[0] for run in runs[name]]):.1f}")
    heads = ASK["heads"] | {"kinds": ["kind", *runs], "reasons": ["% of the answers", *runs]}
    tables = {name: table(heads[name], rows[name]) for name in rows}
    where = f"{cpu()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    return ASK["report"]["text"].lstrip().format(where=where, **tables)


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
    execute(flags)
    text = report(flags.out)
    (flags.out / "VERIFIABLE.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
