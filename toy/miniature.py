"""The paper in miniature: its pipeline, its ablations and its analyses, in a world that fits on a laptop.

    python toy/miniature.py                             one seed: SimPO, DPO and two ablations; about three minutes
    python toy/miniature.py --seeds 5                   the same with five seeds: mean ± standard deviation
    python toy/miniature.py --full --seeds 5 --out toy  everything; writes RESULTS.md, results.json and the figures
    torchrun --nproc-per-node 2 toy/miniature.py        the same numbers up to rounding

For each seed: corpus → SFT checkpoint → four samples a prompt, best against worst → every method from that same
checkpoint → answers to held-out prompts → the judge (toy/world.py) and the analyses (analyze.py). Training is train.py's,
sampling sample.py's; nothing is computed here that could be computed there.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import analyze  # noqa: E402
import make  # noqa: E402
import train  # noqa: E402
import world  # noqa: E402
from data import Tokenizer  # noqa: E402
from model import load as load_model  # noqa: E402

FIRST_SEED = 101  # 0–3 were used while the world and the settings were chosen; these were drawn once all was frozen

# ---------------------------------------------------------------------------------------------------------------------
# The methods: a name, and the flags of train.py


def simpo(beta: float, ratio: float, lr: float = 5e-4, **more) -> dict:
    return {"objective": "simpo", "beta": beta, "gamma_beta_ratio": ratio, "lr": lr} | more


def dpo(beta: float, lr: float = 5e-4) -> dict:
    return {"objective": "dpo", "beta": beta, "lr": lr}


METHODS = {
    "SimPO": simpo(10, 0.3),
    "SimPO, γ = 0": simpo(10, 0),
    "no length norm": simpo(0.1, 0.3, length_norm=False),
    "DPO": dpo(0.1),
}
RATIOS = (0, 0.1, 0.3, 0.8)  # γ/β of the sweep
SWAPPED = 0.2  # share of the labels swapped in the noisy half of it
SWEEP = {ratio: f"SimPO β 20, γ/β {ratio}" for ratio in RATIOS}
NOISY = {ratio: f"{name}, 20 % swapped" for ratio, name in SWEEP.items()}
STEP_SIZES = {5e-5: "DPO, lr 5e-5", 1e-4: "DPO, lr 1e-4", 5e-4: "DPO"}
TUNED = {beta: f"DPO β {beta}, lr 8e-4" for beta in (0.1, 0.3, 1)}
FULL = (
    METHODS
    | {"no length norm, β 2": simpo(2, 0.5, length_norm=False)}
    | {SWEEP[ratio]: simpo(20, ratio, lr=8e-4) for ratio in RATIOS}
    | {NOISY[ratio]: simpo(20, ratio, lr=8e-4, data="swapped.jsonl") for ratio in RATIOS}
    | {STEP_SIZES[lr]: dpo(0.1, lr) for lr in (5e-5, 1e-4)}
    | {name: dpo(beta, lr=8e-4) for beta, name in TUNED.items()}
)
DUELS = {  # answers to the same prompts, one against the other
    "SimPO : DPO": ("SimPO", "DPO"),
    "tuned SimPO : DPO β 0.3": (SWEEP[0.1], TUNED[0.3]),
    "tuned SimPO : DPO β 1": (SWEEP[0.1], TUNED[1]),
}

# ---------------------------------------------------------------------------------------------------------------------
# One seed


@dataclass
class Answers:
    """What a model answered to the held-out prompts, and what the judge thinks of it; all [prompts]."""

    scores: np.ndarray
    lengths: np.ndarray  # in tokens, without the end of turn
    repeats: np.ndarray

    @classmethod
    def judged(cls, records: list[dict]) -> "Answers":
        asked = [(record["prompt"], record["responses"][0]) for record in records]
        lengths = np.array([len(response.split()) for _, response in asked])
        scores = [world.score(*pair, finished=n < make.MAX_NEW_TOKENS) for pair, n in zip(asked, lengths)]
        return cls(np.array(scores), lengths, np.array([world.repeats(response) for _, response in asked]))

    def summary(self, other: "Answers") -> dict[str, float]:
        return {"score": float(self.scores.mean()), "win_rate": self.win_rate(other), "length": float(self.lengths.mean()),
                "repeats": 100 * float(self.repeats.mean())}  # fmt: skip

    def wins(self, other: "Answers", length_bias: float = 0.0, blind_to_length: bool = False) -> np.ndarray:
        """Probability that each of these answers is preferred to the other's."""
        sd = float(np.concatenate([self.lengths, other.lengths]).std())
        lengths = np.zeros((2, len(self.lengths))) if blind_to_length else (self.lengths, other.lengths)
        rows = zip(*(x.tolist() for x in (self.scores, other.scores, *lengths)))
        return np.array([world.win_probability(*row, length_bias=length_bias, length_sd=sd or 1.0) for row in rows])

    def win_rate(self, other: "Answers") -> float:
        return 100 * float(self.wins(other).mean())

    def under_a_biased_judge(self, other: "Answers", length_bias: float = 0.6) -> dict[str, float]:
        """Win rates by a judge who likes length, by the same judge were all answers of one length, and what
        length control makes of the former."""
        wins = self.wins(other, length_bias)
        return {"raw": 100 * float(wins.mean()),
                "unbiased": 100 * float(self.wins(other, length_bias, blind_to_length=True).mean()),
                "controlled": 100 * analyze.length_controlled_win_rate(wins, self.lengths - other.lengths)}  # fmt: skip


def run_seed(seed: int, methods: dict[str, dict], greedy: bool, size: argparse.Namespace, work: Path) -> dict:
    """The whole pipeline; what every method came to, on every process."""
    start = time.perf_counter()
    key = 1000 * seed  # so that no two seeds share a stream of random numbers
    sft = make.finetune(work, key, size.texts, size.steps)
    note(seed, "SFT", f"fine-tuned ({time.perf_counter() - start:.0f} s)")
    pairs = make.sample_pairs(sft, work, key + 1, size.prompts, held_out=False)
    held_out = make.sample_pairs(sft, work, key + 2, size.held_out, held_out=True)
    rng = Random(key + 3)
    swap = lambda p: p | {"chosen": p["rejected"], "rejected": p["chosen"]} if rng.random() < SWAPPED else p
    prompts = [{"prompt": world.make_prompt(rng, held_out=True)} for _ in range(size.answers)]
    files = {
        "train.jsonl": pairs,
        "swapped.jsonl": list(map(swap, pairs)),
        "heldout.jsonl": held_out,
        "prompts.jsonl": prompts,
    }
    make.on_rank_0(lambda: [make.write_jsonl(work / name, records) for name, records in files.items()])
    note(
        seed,
        "pairs",
        f"{len(pairs)} sampled and labelled, {len(held_out)} held out ({time.perf_counter() - start:.0f} s)",
    )

    tokenizer = Tokenizer(sft)
    trees, _ = analyze.read_pairs(str(work / "heldout.jsonl"), tokenizer, 512, 256)
    reference, _ = analyze.score_pairs(load_model(sft), trees)

    def answers(model: Path, name: str, temperature: float, stream: int) -> Answers:
        out = work / f"answers-{name}-{temperature:g}-{stream}.jsonl"
        return Answers.judged(
            make.run_sample(
                out, model=model, prompts=work / "prompts.jsonl", temperature=temperature, seed=key + stream
            )
        )

    baseline = answers(sft, "sft", 0.7, 4)  # what all others are compared with, drawn apart from them
    greedy_baseline = answers(sft, "sft", 0, 4) if greedy else None
    results, sampled, argmax = {}, {}, {}
    for number, (name, flags) in enumerate([("SFT", None), *methods.items()]):
        began = time.perf_counter()
        model, settings = (
            sft,
            train.Settings(objective="simpo", beta=1.0),
        )  # SFT's "reward": the average log-probability
        if flags:
            flags = {"data": "train.jsonl", "batch_size": 32, "seed": key} | flags
            model = make.run_train(work / f"run-{number}", model=sft, **flags | {"data": work / flags["data"]})
            settings = train.Settings(**flags)
        trained = time.perf_counter()
        sampled[name] = answers(model, str(number), 0.7, 5)
        logps, lengths = analyze.score_pairs(load_model(model), trees)
        rewards = analyze.rewards_of(settings, logps, lengths, reference).numpy()
        logps, lengths = logps.numpy(), lengths.numpy()
        ranking = analyze.analyse(rewards, logps, lengths)
        results[name] = sampled[name].summary(baseline) | {
            "accuracy": 100 * ranking["reward_accuracy"],
            "mis_ranked": 100 * ranking["mis_ranked"] if flags else None,
            "spearman": ranking["spearman_likelihood_length"],
            "margin_mean": ranking["reward_margin"]["mean"],
            "margin_sd": ranking["reward_margin"]["sd"],
            "chosen_avg_logp": ranking["chosen_avg_logp"]["mean"],
            "biased": sampled[name].under_a_biased_judge(baseline),
            "train_seconds": trained - began,
        }
        if name in SWEEP.values() or name in list(METHODS)[:2]:  # for the figure of distributions
            results[name]["pairs"] = {"margins": (rewards[:, 0] - rewards[:, 1]).round(2).tolist(),
                                      "chosen_avg_logps": (logps / lengths)[:, 0].round(3).tolist()}  # fmt: skip
        if greedy:
            argmax[name] = answers(model, str(number), 0, 5)
            results[name]["greedy"] = argmax[name].summary(greedy_baseline)
        r = results[name]
        note(
            seed,
            name,
            f"win rate {r['win_rate']:.1f} %, length {r['length']:.1f} ({time.perf_counter() - began:.0f} s)",
        )
    duels = {name: {"sampled": sampled[a].win_rate(sampled[b])} | ({"greedy": argmax[a].win_rate(argmax[b])} if greedy else {})
             for name, (a, b) in DUELS.items() if a in sampled and b in sampled}  # fmt: skip
    return {"seed": seed, "methods": results, "duels": duels, "seconds": time.perf_counter() - start}


def note(seed: int, what: str, text: str) -> None:
    train.say(f"seed {seed}  {what:33}  {text}")


# ---------------------------------------------------------------------------------------------------------------------
# Findings: what the paper says, and what would have to be seen here. A claim is a number per seed and the range that it
# must lie in; all of them were written down before the final seeds were drawn.


@dataclass
class Claim:
    text: str
    number: Callable[[dict], float]  # of a seed's result; KeyError: not measured without --full
    above: float = 0.0
    below: float = math.inf

    @property
    def range(self) -> str:
        return f"> {self.above:g}" if self.below == math.inf else f"{self.above:g} to {self.below:g}"


@dataclass
class Finding:
    title: str
    paper: str
    claims: list[Claim]
    remark: str = ""


def at(method: str, key: str, of: str | None = None) -> Callable[[dict], float]:
    """A method's number in a seed's result; `of`: the group ("greedy", "biased") that it is in."""
    return lambda seed: (seed["methods"][method][of] if of else seed["methods"][method])[key]


def gap(key: str, a: str, b: str, of: str | None = None) -> Callable[[dict], float]:
    """How much larger the number is for method a than for method b."""
    return lambda seed: at(a, key, of)(seed) - at(b, key, of)(seed)


def ratio(key: str, a: str, b: str) -> Callable[[dict], float]:
    return lambda seed: at(a, key)(seed) / at(b, key)(seed)


def duel(name: str, how: str) -> Callable[[dict], float]:
    return lambda seed: seed["duels"][name][how]


def judge_error(seed: dict, key: str) -> float:
    """How far the biased judge's win rates, raw or controlled, are from the unbiased ones: the mean over three methods."""
    three = [seed["methods"][name]["biased"] for name in ("SimPO", "DPO", "no length norm")]
    return statistics.mean(abs(b[key] - b["unbiased"]) for b in three)


NO_NORM = "no length norm"
FINDINGS = [
    Finding("Preference optimisation beats SFT", "Table 4: every method improves on the SFT model, SimPO and DPO by far.", [
        Claim("SimPO's win rate against SFT, %", at("SimPO", "win_rate"), 50),
        Claim("DPO's win rate against SFT, %", at("DPO", "win_rate"), 50),
    ]),
    Finding("SimPO beats DPO", "Table 4 and abstract: SimPO outperforms DPO by up to 6.4 points on AlpacaEval 2.", [
        Claim("SimPO's win rate against DPO, both at their defaults, %", duel("SimPO : DPO", "sampled"), 50),
        Claim("the same, decoded greedily", duel("SimPO : DPO", "greedy"), 50),
        Claim("both tuned (SimPO β 20, γ/β 0.1; DPO β 0.3; lr 8e-4), %", duel("tuned SimPO : DPO β 0.3", "sampled"), 50),
        Claim("the same, decoded greedily", duel("tuned SimPO : DPO β 0.3", "greedy"), 50),
        Claim("both tuned, DPO's β up to 1, %", duel("tuned SimPO : DPO β 1", "sampled"), 50),
        Claim("the same, decoded greedily", duel("tuned SimPO : DPO β 1", "greedy"), 50),
    ], "A comparison hangs on how far each method was tuned and on how answers are decoded: compare the rows."),
    Finding("Without length normalisation, answers become long and repetitive, and worse",
            "Table 5 and Section 4.2: its removal hurts most of all; generation becomes long and repetitive.", [
        Claim("length without it ÷ SimPO's length", ratio("length", NO_NORM, "SimPO"), 1),
        Claim("answers with repetition without it − SimPO's, points", gap("repeats", NO_NORM, "SimPO")),
        Claim("SimPO's win rate − that without it, points", gap("win_rate", "SimPO", NO_NORM)),
        Claim("with β 2, γ/β 0.5: length ÷ SimPO's", ratio("length", "no length norm, β 2", "SimPO"), 1),
        Claim("with β 2, γ/β 0.5: SimPO's win rate − that, points", gap("win_rate", "SimPO", "no length norm, β 2")),
    ]),
    Finding("Without length normalisation, what is long is likely",
            "Figure 2b and 2c: the correlation of average log-probability and length is far stronger without it.", [
        Claim("Spearman's ρ without it − SimPO's", gap("spearman", NO_NORM, "SimPO")),
    ]),
    Finding("DPO stands between the two", "Figure 4a: DPO's correlation is weaker than without normalisation, stronger than SimPO's.", [
        Claim("ρ without length normalisation − DPO's", gap("spearman", NO_NORM, "DPO")),
        Claim("DPO's ρ − SimPO's", gap("spearman", "DPO", "SimPO")),
    ]),
    Finding("SimPO does not exploit length", "Section 4.1: it gains without substantially increasing response length.", [
        Claim("SimPO's length ÷ SFT's", ratio("length", "SimPO", "SFT"), 0, 1.25),
        Claim("DPO's length ÷ SimPO's", ratio("length", "DPO", "SimPO"), 1),
    ]),
    Finding("The margin helps", "Table 5: γ = 0 lowers the win rate.", [
        Claim("SimPO's win rate − that with γ = 0, at the defaults, points", gap("win_rate", "SimPO", "SimPO, γ = 0")),
        Claim("the same at β 20, γ/β 0.1, points", gap("win_rate", SWEEP[0.1], SWEEP[0])),
        Claim("the same with 20 % of the labels swapped, γ/β 0.3, points", gap("win_rate", NOISY[0.3], NOISY[0])),
    ]),
    Finding("As γ grows, the win rate rises and then falls", "Figure 3a: it peaks at a moderate margin.", [
        Claim("clean labels: win rate at γ/β 0.1 − at 0, points", gap("win_rate", SWEEP[0.1], SWEEP[0])),
        Claim("clean labels: at 0.1 − at 0.8, points", gap("win_rate", SWEEP[0.1], SWEEP[0.8])),
        Claim("20 % swapped: at 0.3 − at 0, points", gap("win_rate", NOISY[0.3], NOISY[0])),
        Claim("20 % swapped: at 0.3 − at 0.8, points", gap("win_rate", NOISY[0.3], NOISY[0.8])),
    ], "Where the last claim fails, unlike in an earlier study of this world: swapped labels pull back, so that the same γ takes the "
       "model less far from SFT (in results.json, `chosen_avg_logp` and `margin_mean` at γ/β 0.8), and not yet past its peak. Seen "
       "afterwards, not foreseen."),
    Finding("As γ grows, so does reward accuracy", "Figure 3a: a larger margin gives a higher reward accuracy.", [
        Claim("clean labels: accuracy at γ/β 0.8 − at 0, points", gap("accuracy", SWEEP[0.8], SWEEP[0])),
        Claim("20 % swapped: accuracy at γ/β 0.8 − at 0, points", gap("accuracy", NOISY[0.8], NOISY[0])),
    ]),
    Finding("As γ grows, margins spread and the chosen become less likely", "Figure 3b and 3c.", [
        Claim("sd of the reward margin at γ/β 0.8 − at 0", gap("margin_sd", SWEEP[0.8], SWEEP[0])),
        Claim("chosen average log-probability at γ/β 0 − at 0.8, nats", gap("chosen_avg_logp", SWEEP[0], SWEEP[0.8])),
    ]),
    Finding("DPO's reward and likelihood disagree on about half of the pairs", "Section 4.4 and Figure 4b; SimPO's agree by construction.", [
        Claim("mis-ranked by DPO at the default step size, %", at("DPO", "mis_ranked"), 40, 60),
        Claim("mis-ranked by DPO at a tenth of it, lr 5e-5, %", at("DPO, lr 5e-5", "mis_ranked"), 40, 60),
    ], "SimPO's is 0 by construction. How DPO's falls as the step grows is below, and in the figure."),
    Finding("SimPO ranks held-out pairs better than DPO", "Figure 4c: SimPO's reward accuracy is the higher.", [
        Claim("SimPO's reward accuracy − DPO's, points", gap("accuracy", "SimPO", "DPO")),
    ]),
    Finding("The order of Table 4 and 5 under a judge who likes length, with length control",
            "AlpacaEval 2's length-controlled win rate: SimPO above DPO above no length normalisation.", [
        Claim("length-controlled win rate: SimPO − DPO, points", gap("controlled", "SimPO", "DPO", "biased")),
        Claim("length-controlled win rate: SimPO − no length normalisation, points", gap("controlled", "SimPO", NO_NORM, "biased")),
    ]),
]  # fmt: skip
OURS = [
    Finding("DPO's mis-ranking falls as the step grows", "Not in the paper.", [
        Claim("mis-ranked at lr 5e-5 − at 5e-4, points", gap("mis_ranked", "DPO, lr 5e-5", "DPO")),
    ]),
    Finding("A judge who likes length turns the order round", "Not in the paper; why AlpacaEval 2 controls for length.", [
        Claim("unbiased: SimPO − no length normalisation, points", gap("unbiased", "SimPO", NO_NORM, "biased")),
        Claim("biased: no length normalisation − SimPO, points", gap("raw", NO_NORM, "SimPO", "biased")),
    ]),
    Finding("Length control brings the judge nearer to the truth", "Not in the paper.", [
        Claim("mean error of the raw win rates − of the controlled ones, points",
              lambda seed: judge_error(seed, "raw") - judge_error(seed, "controlled")),
        Claim("controlled − unbiased win rate without length normalisation, points",
              lambda seed: at(NO_NORM, "controlled", "biased")(seed) - at(NO_NORM, "unbiased", "biased")(seed), -1, 1),
    ], "Where the second claim fails, length control also excuses the real harm that travels with length."),
]  # fmt: skip


def checked(claim: Claim, seeds: list[dict]) -> list[tuple[float, bool]]:
    """The claim's number and whether it holds, for each seed; empty where it was not measured."""
    try:
        numbers = [claim.number(seed) for seed in seeds]
    except KeyError:
        return []
    return [(x, claim.above < x < claim.below) for x in numbers]


def verdict(claims: list[list[tuple[float, bool]]]) -> str:
    """Reproduced: every claim holds in every seed. Not reproduced: no claim holds in more than half of the seeds."""
    shares = [statistics.mean(holds for _, holds in seeds) for seeds in claims]
    return "reproduced" if min(shares) == 1 else "not reproduced" if max(shares) <= 0.5 else "partly reproduced"


# ---------------------------------------------------------------------------------------------------------------------
# For people

COLUMNS = {  # key: its heading, and decimals
    "score": ("judge score", 2),
    "win_rate": ("win rate %", 1),
    "length": ("length", 1),
    "repeats": ("repeats %", 0),
    "accuracy": ("reward accuracy %", 1),
    "mis_ranked": ("mis-ranked %", 0),
    "spearman": ("ρ(logp, length)", 2),
}
LEGEND = """\
Win rate: against a sample of the SFT model for the same prompt (SFT: one sample of it against another), a tie counts ½.
Length in tokens. Repeats: answers that come back to a noun or a sentence. Reward accuracy, mis-ranked (reward and average
log-probability rank a pair differently) and Spearman's ρ of average log-probability and length: on held-out pairs; for SFT,
the accuracy is that of its average log-probability."""


def mean_sd(values: list[float | None], digits: int) -> str:
    if None in values:
        return "–"
    return f"{statistics.mean(values):.{digits}f}" + (
        f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    )


def results_table(seeds: list[dict], of: str | None = None) -> str:
    columns = {key: column for key, column in COLUMNS.items() if not of or key in seeds[0]["methods"]["SFT"][of]}
    rows = [
        [name, *(mean_sd([at(name, key, of)(seed) for seed in seeds], digits) for key, (_, digits) in columns.items())]
        for name in seeds[0]["methods"]
    ]
    return analyze.table(["method", *(heading for heading, _ in columns.values())], rows)


def judge_table(seeds: list[dict]) -> str:
    keys = {"unbiased": "no bias %", "raw": "biased, raw %", "controlled": "biased, length-controlled %"}
    rows = [
        [name, *(mean_sd([at(name, key, "biased")(seed) for seed in seeds], 1) for key in keys)]
        for name in seeds[0]["methods"]
    ]
    return analyze.table(["method", *keys.values()], rows)


def findings_text(findings: list[Finding], seeds: list[dict]) -> tuple[list[list[str]], list[str]]:
    """Rows of the summary (finding, paper, verdict) and a section per finding."""
    summary, sections = [], []
    for finding in findings:
        claims = [(claim, result) for claim in finding.claims if (result := checked(claim, seeds))]
        if not claims:
            continue
        words = verdict([result for _, result in claims])
        summary.append([finding.title, finding.paper, f"**{words}**"])
        rows = [
            [
                c.text,
                c.range,
                mean_sd([x for x, _ in r], 2),
                ", ".join(f"{x:.2f}" for x, _ in r),
                f"{sum(h for _, h in r)} of {len(r)}",
            ]
            for c, r in claims
        ]
        sections.append(f"### {finding.title}: {words}\n\nPaper: {finding.paper}\n\n"
                        + analyze.table(["here", "holds if", "mean ± sd", "every seed", "holds in"], rows)
                        + (f"\n\n{finding.remark}" if finding.remark else ""))  # fmt: skip
    return summary, sections


def report(record: dict, figures: list[str]) -> str:
    """RESULTS.md, from what is in results.json."""
    seeds = record["seeds"]
    summary, sections = findings_text(FINDINGS, seeds)
    ours, our_sections = findings_text(OURS, seeds)
    minutes = statistics.mean(seed["seconds"] for seed in seeds) / 60
    captions = {
        "methods": "Win rate against SFT, length and Spearman's ρ; a dot per seed, a bar for the mean.",
        "gamma": "The margin γ at β 20: win rate and reward accuracy, on clean labels and with 20 % of them swapped (paper: Fig. 3a).",
        "mis-ranking": "How many held-out pairs DPO's reward and the likelihood rank differently, against the step size (paper: Fig. 4b).",
        "judge": "Win rates by a judge without and with a liking for length, and what length control makes of the latter.",
        "distributions": "Reward margins and chosen log-probabilities of the held-out pairs as γ varies (paper: Fig. 3b, 3c).",
    }
    every = [[f"{seed['seed']}", name, *("–" if m[key] is None else f"{m[key]:.{digits}f}" for key, (_, digits) in COLUMNS.items())]
             for seed in seeds for name, m in seed["methods"].items()]  # fmt: skip
    parts = [
        "# The paper in miniature: results",
        "Written by `toy/miniature.py`, verdicts included; nothing here is filled in by hand.",
        f"- Command: `{record['command']}`\n- Seeds: {', '.join(str(s['seed']) for s in seeds)}"
        + (f" (of {record['wanted']}; the run goes on or was interrupted)" if len(seeds) < record["wanted"] else "")
        + f"\n- Date: {record['date']}\n- Hardware: {record['hardware']}; {minutes:.1f} minutes a seed",
        "The world was shaped so that the paper's effects *can* appear in it: boilerplate makes long text predictable, and "
        "misconceptions keep the SFT model's likelihood from telling right from wrong. That they can is no evidence that they do "
        "in real language: this is a demonstration, not a replication. World, settings and claims were fixed on other seeds "
        f"(0 to 3, and those of earlier studies) before seeds {FIRST_SEED} and up were first drawn; all seeds that were run are shown.",
        "A finding is *reproduced* if each of its claims holds in every seed, *not reproduced* if none holds in more than half of them, "
        "and *partly reproduced* otherwise.",
        "## Verdicts",
        analyze.table(["finding", "paper", "here"], summary, texts=3),
        analyze.table(["beyond the paper", "", "here"], ours, texts=3),
        "## Methods",
        results_table(seeds),
        LEGEND,
        *(f"![{captions[name]}]({name}.png)\n\n*{captions[name]}*" for name in figures),
        "### A judge who likes length",
        "P(win) = σ(4 Δscore + 0.6 Δlength/sd); *no bias* is the same judge without the second term. Length control fits "
        "logit P(win) = θ + φ tanh(Δlength/sd) and predicts for Δlength = 0, in the manner of AlpacaEval 2.",
        judge_table(seeds),
    ]
    if "greedy" in seeds[0]["methods"]["SFT"]:
        parts += ["### Greedy decoding", "Against the SFT model's greedy answer.", results_table(seeds, "greedy")]
    parts += ["## Findings", *sections, "## Beyond the paper", *our_sections]
    parts += [
        "## Every seed",
        "<details><summary>all methods, all seeds</summary>",
        analyze.table(["seed", "method", *(h for h, _ in COLUMNS.values())], every, texts=2),
        "</details>",
    ]
    return "\n\n".join(parts) + "\n"


def hardware() -> str:
    names = [line.partition(":")[2].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    threads = f"{dist.get_world_size()} process{'es' if dist.get_world_size() > 1 else ''} of {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores, {threads}; torch {torch.__version__}"


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw_figures(out: Path, seeds: list[dict]) -> list[str]:
    """Every figure for which there are numbers; the names of those drawn."""
    drawn = []
    for name, draw in {
        "methods": draw_methods,
        "gamma": draw_gamma,
        "mis-ranking": draw_mis_ranking,
        "judge": draw_judge,
        "distributions": draw_distributions,
    }.items():
        try:
            draw(out / f"{name}.png", seeds)
            drawn.append(name)
        except KeyError:  # not measured without --full
            pass
    return drawn


def draw_methods(path: Path, seeds: list[dict]) -> None:
    names = ["SFT", *METHODS]
    figure, axes = analyze.panels(3, width=3.6, height=3.2)
    for axis, (key, label) in zip(
        axes,
        {
            "win_rate": "win rate against SFT (%)",
            "length": "length of the answers (tokens)",
            "spearman": "ρ(average log-probability, length)",
        }.items(),
    ):
        for i, name in enumerate(names):
            values = [at(name, key)(seed) for seed in seeds]
            axis.bar(i, statistics.mean(values), color=analyze.COLOURS[i], alpha=0.35, width=0.7)
            axis.scatter(
                i + np.linspace(-0.2, 0.2, len(values)) * (len(values) > 1),
                values,
                s=16,
                color=analyze.COLOURS[i],
                zorder=3,
            )
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_ylabel(label)
    axes[0].axhline(50, color="grey", linewidth=0.8)
    figure.savefig(path)


def lines(axis, x: list[float], series: dict[str, list[list[float]]]) -> None:
    """Means with lines, and a dot for every seed."""
    for i, (label, values) in enumerate(series.items()):
        axis.plot(x, [statistics.mean(v) for v in values], label=label, linewidth=1.8, **analyze.style(i))
        for at_x, v in zip(x, values):
            axis.scatter([at_x] * len(v), v, s=12, color=analyze.style(i)["color"], alpha=0.7, zorder=3)


def draw_gamma(path: Path, seeds: list[dict]) -> None:
    figure, axes = analyze.panels(2)
    for axis, (key, label) in zip(
        axes, {"win_rate": "win rate against SFT (%)", "accuracy": "reward accuracy (%)"}.items()
    ):
        lines(axis, RATIOS, {title: [[at(names[r], key)(seed) for seed in seeds] for r in RATIOS]
                             for title, names in {"clean labels": SWEEP, "20 % of the labels swapped": NOISY}.items()})  # fmt: skip
        axis.set(xlabel="γ/β (nats per token), at β 20", ylabel=label)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path)


def draw_mis_ranking(path: Path, seeds: list[dict]) -> None:
    figure, [axis] = analyze.panels(1)
    lines(axis, list(STEP_SIZES), {"DPO, β 0.1": [[at(name, "mis_ranked")(seed) for seed in seeds] for name in STEP_SIZES.values()],
                                   "the SFT model's likelihood against the labels": [[100 - at("SFT", "accuracy")(seed) for seed in seeds]] * len(STEP_SIZES)})  # fmt: skip
    axis.axhline(50, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(list(STEP_SIZES), [f"{lr:.0e}".replace("e-0", "e-") for lr in STEP_SIZES])
    axis.minorticks_off()
    axis.set(xlabel="peak learning rate", ylabel="pairs ranked differently (%)", ylim=(0, 60))
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    figure.savefig(path)


def draw_judge(path: Path, seeds: list[dict]) -> None:
    figure, [axis] = analyze.panels(1, width=7)
    labels = {
        "unbiased": "judge without bias",
        "raw": "judge who likes length",
        "controlled": "the same, length-controlled",
    }
    for i, (key, label) in enumerate(labels.items()):
        for j, name in enumerate(METHODS):
            values = [at(name, key, "biased")(seed) for seed in seeds]
            x = j + 0.26 * (i - 1)
            axis.bar(
                x,
                statistics.mean(values),
                width=0.22,
                color=analyze.COLOURS[i],
                alpha=0.45,
                label=label if j == 0 else None,
            )
            axis.scatter([x] * len(values), values, s=10, color=analyze.COLOURS[i], zorder=3)
    axis.set_xticks(range(len(METHODS)), list(METHODS))
    axis.set(ylabel="win rate against SFT (%)", ylim=(50, 100))
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.savefig(path)


def draw_distributions(path: Path, seeds: list[dict]) -> None:
    """All seeds' held-out pairs together."""
    names = list(SWEEP.values()) if SWEEP[0] in seeds[0]["methods"] else list(METHODS)[:2]
    pooled = lambda key: {
        name: np.concatenate([seed["methods"][name]["pairs"][key] for seed in seeds]) for name in names
    }
    analyze.draw_distributions(path, pooled("margins"), pooled("chosen_avg_logps"))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def read_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="γ sweep with clean and swapped labels, step sizes, tuned baselines, greedy decoding",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument(
        "--first-seed", type=int, default=FIRST_SEED, metavar="S", help=f"seeds are S, S+1, … (default: {FIRST_SEED})"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write RESULTS.md, results.json and figures; anew after every seed"
    )
    parser.add_argument("--redraw", action="store_true", help="write --out anew from its results.json, without any run")
    parser.add_argument("--texts", type=int, default=20000, help="of the corpus (default: 20000)")
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning, 48 texts each (default: 600)")
    parser.add_argument("--prompts", type=int, default=2000, help="that become training pairs (default: 2000)")
    parser.add_argument("--held-out", type=int, default=400, help="that become held-out pairs (default: 400)")
    parser.add_argument(
        "--answers", type=int, default=500, help="held-out prompts that are answered and judged (default: 500)"
    )
    flags = parser.parse_args()
    for name in ("seeds", "texts", "steps", "prompts", "held_out", "answers"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number")
    if flags.redraw and not (flags.out and (flags.out / "results.json").exists()):
        parser.error("--redraw goes with an --out that holds results.json")
    if flags.first_seed < 0:
        parser.error("--first-seed: expected 0 or a positive number")
    return flags


def write(out: Path, record: dict) -> None:
    """Everything that --out holds; all of it follows from `results.json`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    (out / "RESULTS.md").write_text(report(record, draw_figures(out, record["seeds"])))


def main() -> None:
    flags = read_flags()
    if flags.redraw:
        return write(flags.out, json.loads((flags.out / "results.json").read_text()))
    methods = FULL if flags.full else METHODS
    command = " ".join(
        [
            "python toy/miniature.py"
            if dist_size() == 1
            else f"torchrun --nproc-per-node {dist_size()} toy/miniature.py",
            *sys.argv[1:],
        ]
    )
    seeds: list[dict] = []
    with train.one_line_errors("miniature.py"):
        for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
            work = Path(make.on_rank_0(lambda: tempfile.mkdtemp(prefix="miniature-")))
            try:
                seeds.append(run_seed(seed, methods, flags.full, flags, work))
            finally:
                if dist.get_rank() == 0:
                    shutil.rmtree(work, ignore_errors=True)
            train.say(f"seed {seed}  {seeds[-1]['seconds'] / 60:.1f} minutes\n")
            if flags.out:
                record = {
                    "command": command,
                    "date": str(date.today()),
                    "hardware": hardware(),
                    "wanted": flags.seeds,
                    "seeds": seeds,
                }
                make.on_rank_0(lambda: write(flags.out, record))
        summary, _ = findings_text(FINDINGS + OURS, seeds)
        train.say(results_table(seeds))
        train.say(f"\n{LEGEND}\n")
        train.say(judge_table(seeds), "\n")
        train.say(analyze.table(["finding", "here"], [[title, words.strip("*")] for title, _, words in summary]))
        if flags.out:
            train.say(f"\n{flags.out}/RESULTS.md, results.json and figures")


def dist_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    main()
