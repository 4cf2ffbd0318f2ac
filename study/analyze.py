"""Analyse trained checkpoints on any pairs, as the paper does, in numbers and figures.

    python -m study.analyze rewards --policy runs/simpo-1 --policy runs/dpo-1 \\
        --data toy/heldout.jsonl --out analysis
    python -m study.analyze rewards --policy DIR --reference DIR --objective dpo --beta 0.01 \\
        --data pairs.jsonl --out analysis
    python -m study.analyze curves runs/simpo-1 runs/dpo-1 --out curves.png

`rewards` compares two rankings of the responses of each pair: by the policy's reward, which was
trained, and by its likelihood, the average log-probability per token, which decoding follows.

    likelihood and length    Spearman's ρ over all responses: is long text likely?     Fig. 2, 4a
    contingency              how often do the two rankings agree?                      Fig. 4b
    reward accuracy          is the chosen response ranked first? Even if shorter?     Fig. 4c
    distributions            reward margins, likelihood of the chosen responses        Fig. 3

Objective, hyperparameters and reference are read from the config.json of a policy that train.py
made; flags override them. `curves` plots the metrics.jsonl of runs.

Read next: study/labels.py, which names the runs, and study/figures.py, which draws
and prints.
"""

import argparse
import contextlib
import itertools
import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import train
from data import Pair
from formats import checkpoint
from formats.authors import encoder
from formats.errors import CheckpointError, DataError, InputError
from formats.files import dump_json
from formats.progress import Progress
from formats.records import read_records
from formats.schemas import Columns, Dropped, parse_record
from formats.tokenizer import Tokenizer, read_template
from methods.objectives import OBJECTIVES, hyperparameters, pair_losses
from model import Llama
from runtime.settings import Parser, Settings, auto_dtype
from study.figures import (
    curves_table,
    draw_accuracy_by_length,
    draw_contingency,
    draw_curves,
    draw_distributions,
    draw_likelihood_and_length,
    rewards_table,
)
from study.labels import labels, recorded_settings

PROGRAM = "python -m study.analyze"
FLAGS_OVER_RECORD = (  # the flags that replace what a run recorded
    "objective",
    "model",
    "beta",
    "gamma_beta_ratio",
    "length_norm",
    "chat_template",
)

# --------------------------------------------------------------------------------------------------
# Statistics: arrays in, numbers out


def ranks(x: np.ndarray) -> np.ndarray:
    """Return the rank of every value, 1 for the smallest; equal values share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation, which is Pearson's correlation between the ranks.

    It is nan if x or y is constant.

    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 9)
    0.8
    """
    a, b = (r - r.mean() for r in (ranks(np.asarray(x)), ranks(np.asarray(y))))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else math.nan


def accuracy(margins: np.ndarray) -> float:
    """Return the share of pairs with a positive margin (chosen minus rejected); a tie is half."""
    return float((np.sign(margins) + 1).mean() / 2)


def contingency(reward_margins: np.ndarray, likelihood_margins: np.ndarray) -> dict[str, float]:
    """Return which of two rankings put the chosen response first, as shares of the pairs.

    A tie does not count as first.
    """
    reward, likelihood = np.asarray(reward_margins) > 0, np.asarray(likelihood_margins) > 0
    cells = {
        "both": reward & likelihood,
        "reward only": reward & ~likelihood,
        "likelihood only": ~reward & likelihood,
        "neither": ~reward & ~likelihood,
    }
    return {name: float(cell.mean()) for name, cell in cells.items()}


def accuracy_by_length(
    margins: np.ndarray, differences: np.ndarray, bins: int = 3
) -> list[dict[str, Any]]:
    """Return reward accuracy by how many tokens longer the chosen response is.

    Pairs with a shorter chosen response, and pairs with a longer one, are each cut into at most
    `bins` bins of about equal size. Pairs of equal length have a bin of their own.

    Returns {from, to, pairs, accuracy} for each bin, from short to long.
    """
    margins, differences = np.asarray(margins), np.asarray(differences)
    rows = []
    for side in (differences < 0, differences == 0, differences > 0):
        if not side.any():
            continue
        inner_edges = np.quantile(differences[side], np.arange(1, bins) / bins)
        bin_of = np.searchsorted(inner_edges, differences, side="left")
        for i in range(bins):
            inside = side & (bin_of == i)
            if inside.any():
                lengths = differences[inside]
                row = {"from": int(lengths.min()), "to": int(lengths.max())}
                share = accuracy(margins[inside])
                rows.append(row | {"pairs": int(inside.sum()), "accuracy": share})
    return rows


def length_controlled_win_rate(wins: np.ndarray, differences: np.ndarray) -> float:
    """Return the win rate if all answers were as long as their opponents, as AlpacaEval 2 does.

    wins: the probability, from 0 to 1, that each answer wins. differences: how many tokens longer
    it is. Newton's method fits logit P(win) = θ + φ · tanh(difference / sd(differences)). The
    prediction for a difference of 0 is σ(θ).
    """
    wins, differences = np.asarray(wins, float), np.asarray(differences, float)
    x = np.stack([np.ones_like(wins), np.tanh(differences / (differences.std() or 1.0))], axis=1)
    coefficients = np.zeros(2)
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ coefficients))
        curvature = (x.T * (p * (1 - p))) @ x + 1e-9 * np.eye(2)  # invertible if lengths are equal
        coefficients += np.linalg.solve(curvature, x.T @ (wins - p))
    return float(1 / (1 + np.exp(-coefficients[0])))


def spread(x: np.ndarray) -> dict[str, float]:
    """Return mean and standard deviation."""
    return {"mean": float(x.mean()), "sd": float(x.std())}


def analyse(rewards: np.ndarray, logps: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Compute all of the statistics above for one policy.

    Arguments are [pairs, (chosen, rejected)]; logps are sums in nats, lengths are in tokens.
    """
    likelihoods = logps / lengths
    margins = rewards[:, 0] - rewards[:, 1]
    likelihood_margins = likelihoods[:, 0] - likelihoods[:, 1]
    cells = contingency(margins, likelihood_margins)
    return {
        "pairs": len(rewards),
        "reward_accuracy": accuracy(margins),
        "likelihood_accuracy": accuracy(likelihood_margins),
        "contingency": cells,
        "mis_ranked": cells["reward only"] + cells["likelihood only"],
        "spearman_likelihood_length": spearman(likelihoods.ravel(), lengths.ravel()),
        "accuracy_by_length": accuracy_by_length(margins, lengths[:, 0] - lengths[:, 1]),
        "reward_margin": spread(margins),
        "chosen_avg_logp": spread(likelihoods[:, 0]),
        "rejected_avg_logp": spread(likelihoods[:, 1]),
        "chosen_length": spread(lengths[:, 0]),
        "rejected_length": spread(lengths[:, 1]),
    }


# --------------------------------------------------------------------------------------------------
# Checkpoints and pairs → log-probabilities → rewards


@dataclass(frozen=True)
class Scores:
    """Holds what a policy gives to the responses of all pairs, each [pairs, (chosen, rejected)]."""

    rewards: np.ndarray
    logps: np.ndarray  # sums, in nats
    lengths: np.ndarray  # in tokens

    @property
    def likelihoods(self) -> np.ndarray:
        """Average log-probabilities, in nats per token."""
        return self.logps / self.lengths


def read_pairs(
    name: str,
    tokenizer: Tokenizer,
    max_length: int,
    max_prompt_length: int,
    like_authors: bool = False,
    limit: int | None = None,
    columns: Columns | None = None,
) -> tuple[list[Pair], Counter]:
    """Read the pairs of a file, a folder or a hub data set, and cut them as training does.

    At most `limit` records are read. Returns the pairs, and how many were cut or dropped for each
    reason.

    Raises:
        DataError: a record is malformed, or no pair remains.
    """
    examples, counts = [], Counter[str]()
    records = itertools.islice(read_records(name), limit)
    for where, record in Progress(f"reading {name}", records):
        try:
            examples.append(parse_record(record, where, columns=columns)[1])
        except Dropped as e:
            counts[f"dropped: {e}"] += 1
    encode = encoder(like_authors)
    pairs = encode(examples, tokenizer, max_length, max_prompt_length, counts)
    if not pairs:
        reasons = "".join(f", {n} {reason}" for reason, n in counts.items())
        raise DataError(f"{name}: no pair to analyse{reasons}")
    return pairs, +counts


@torch.no_grad()
def score_pairs(
    model: Llama, pairs: list[Pair], microbatch_tokens: int = 8192
) -> tuple[Tensor, Tensor]:
    """Return summed log-probabilities in nats and lengths in tokens of all responses.

    Both are [pairs, (chosen, rejected)]. No forward pass has more than `microbatch_tokens` tokens,
    unless a single pair is longer.
    """
    logps = torch.empty(len(pairs), 2)
    lengths = torch.empty(len(pairs), 2, dtype=torch.int64)
    starts = range(0, len(pairs), 256)
    for start in Progress("scoring", starts, total=len(pairs), each=256):
        group = pairs[start : start + 256]
        for [share] in data.assign([pair.tokens for pair in group], 1, microbatch_tokens):
            indices = [start + i for i in share]
            scored = train.response_logps(model, [pairs[i] for i in indices])
            logps[indices], lengths[indices] = (x.cpu() for x in scored)
    return logps, lengths


def rewards_of(
    settings: Settings, logps: Tensor, lengths: Tensor, reference: Tensor | None = None
) -> Tensor:
    """Return what the objective calls the reward of each response, [pairs, (chosen, rejected)].

    reference: the reference model's summed log-probabilities; ignored by objectives without one.
    """
    _, report = pair_losses(settings, logps, lengths, reference)
    return torch.stack([report["rewards/chosen"], report["rewards/rejected"]], dim=1)


def open_policy(name: str, flags: argparse.Namespace) -> tuple[Path, Settings]:
    """Return a checkpoint folder and the settings that define its reward.

    name: a run, a model folder or a hub id. Settings that a run recorded are overridden by flags.
    With another objective than the run's, its hyperparameters are dropped: they mean nothing.

    Raises:
        DataError: the objective has no reward, or needs a reference that is not named.
    """
    settings = recorded_settings(name) or Settings()
    changes = {key: getattr(flags, key) for key in FLAGS_OVER_RECORD}
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("objective", settings.objective) != settings.objective:
        changes = dict.fromkeys(hyperparameters()) | changes
    settings = replace(settings, **changes)
    objective = OBJECTIVES[settings.objective]
    if objective.loss is None:
        trained = f"was trained with --objective {settings.objective}, which has no reward"
        raise DataError(f"{name}: {trained}: pass another --objective")
    if objective.needs_reference and not settings.model:
        needed = "needs --reference, the checkpoint that training started from"
        raise DataError(f"{name}: the reward of {settings.objective} {needed}")
    path = Path(name)
    is_run = (path / "model" / "config.json").exists()
    return checkpoint.checkpoint_folder(str(path / "model") if is_run else name), settings


def score_checkpoint(source: Path, name: str, settings: Settings) -> tuple[Tensor, Tensor]:
    """Apply `score_pairs` to a checkpoint folder and the pairs named `name`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer(source, read_template(settings.chat_template), settings.date)
    tokenizer.check_fits(checkpoint.read_config(source).vocab_size)
    assert settings.max_prompt_length  # Settings derives it from max_length
    lengths = settings.max_length, settings.max_prompt_length
    like_authors, columns = settings.like_authors, settings.named_columns
    pairs, counts = read_pairs(name, tokenizer, *lengths, like_authors, columns=columns)
    for what, n in counts.items():
        print(f"{name}: {n} {what}", file=sys.stderr)
    dtype = torch.bfloat16 if auto_dtype(device.type) == "bf16" else torch.float32
    return score_pairs(checkpoint.load(source, device, dtype), pairs, settings.microbatch_tokens)


def score_policy(
    name: str, flags: argparse.Namespace, references: dict[tuple, Tensor]
) -> tuple[Settings, Scores]:
    """Score a policy and, if its reward needs one, its reference.

    references: log-probabilities that earlier calls found, so that policies share a reference.

    Raises:
        DataError: policy and reference keep different pairs.
    """
    source, settings = open_policy(name, flags)
    logps, lengths = score_checkpoint(source, flags.data, settings)
    reference = None
    if OBJECTIVES[settings.objective].needs_reference:
        s = settings
        key = (s.model, s.chat_template, s.date, s.max_length, s.max_prompt_length, s.like_authors)
        if key not in references:
            assert s.model  # see open_policy
            folder = checkpoint.checkpoint_folder(s.model)
            references[key] = score_checkpoint(folder, flags.data, settings)[0]
        reference = references[key]
        if reference.shape != logps.shape:
            kept = f"{s.model} keeps {len(reference)} pairs, {name} {len(logps)}"
            raise DataError(f"{flags.data}: {kept}: the two do not have the same tokenizer")
    rewards = rewards_of(settings, logps, lengths, reference)
    return settings, Scores(rewards.numpy(), logps.numpy(), lengths.numpy())


# --------------------------------------------------------------------------------------------------
# The commands


def rewards(flags: argparse.Namespace) -> None:
    """Run `rewards`: write rewards.json and four figures to --out, and print a table."""
    references: dict[tuple, Tensor] = {}
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, Scores] = {}
    recorded = [recorded_settings(policy) for policy in flags.policy]
    for name, policy in zip(labels(flags.policy, recorded), flags.policy):
        settings, s = score_policy(policy, flags, references)
        reported = ("objective", "beta", "gamma_beta_ratio", "length_norm")
        results[name] = {"policy": policy, "data": flags.data}
        results[name] |= {key: getattr(settings, key) for key in reported}
        results[name] |= analyse(s.rewards, s.logps, s.lengths)
        scores[name] = s

    flags.out.mkdir(parents=True, exist_ok=True)
    text = dump_json(results, indent=2, ensure_ascii=False)
    (flags.out / "rewards.json").write_text(text + "\n", encoding="utf-8")
    with Progress("drawing figures"):
        draw_distributions(
            flags.out / "distributions.png",
            {name: s.rewards[:, 0] - s.rewards[:, 1] for name, s in scores.items()},
            {name: s.likelihoods[:, 0] for name, s in scores.items()},
        )
        draw_likelihood_and_length(
            flags.out / "likelihood-length.png",
            {name: s.likelihoods.ravel() for name, s in scores.items()},
            {name: s.lengths.ravel() for name, s in scores.items()},
            {name: result["spearman_likelihood_length"] for name, result in results.items()},
        )
        draw_contingency(flags.out / "contingency.png", results)
        draw_accuracy_by_length(flags.out / "accuracy-length.png", results)
    print(f"{next(iter(results.values()))['pairs']} pairs of {flags.data}\n")
    print(rewards_table(results))
    print(
        "\nmis-ranked: reward and average log-probability disagree; ± sd over the pairs. "
        f"Numbers and figures: {flags.out}"
    )


def curves(flags: argparse.Namespace) -> None:
    """Run `curves`: draw the metrics of runs into one figure, and print a table."""
    recorded: list[Settings | None] = [None] * len(flags.runs)
    for i, run in enumerate(flags.runs):
        with contextlib.suppress(CheckpointError):  # curves need no settings; the folder will do
            recorded[i] = recorded_settings(run)
    runs = {}
    for name, run in zip(labels(flags.runs, recorded), flags.runs):
        file = Path(run) / "metrics.jsonl"
        records = Progress(f"reading {file}", read_records(str(file)))
        runs[name] = [row for _, row in records]
        if not any("loss" in row and isinstance(row.get("step"), int) for row in runs[name]):
            raise DataError(f"{file}: holds no training step of train.py")
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    with Progress("drawing figures"):
        draw_curves(flags.out, runs)
    print(curves_table(runs))
    print(f"\n{flags.out}")


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line. Exits with status 2 and one line on stderr for a usage error."""
    parser = Parser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="rewards | curves")
    text = "how policies rank the responses of pairs"
    _add_rewards_flags(commands.add_parser("rewards", help=text, allow_abbrev=False))
    text = "loss, margins, accuracies, log-probabilities and lengths of runs"
    add = commands.add_parser("curves", help=text, allow_abbrev=False).add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run, with metrics.jsonl")
    add("--out", type=Path, required=True, metavar="FILE.png", help="the figure")
    flags = parser.parse_args(argv)
    if flags.command == "rewards" and flags.beta is not None:
        if not (math.isfinite(flags.beta) and flags.beta > 0):
            parser.error("--beta: expected a positive number")
    if flags.command == "curves" and flags.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {flags.out}: expected a .png, .pdf or .svg file")
    return flags


def _add_rewards_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "a run of train.py, a Hugging Face folder or a hub id; can be given several times"
    add("--policy", action="append", required=True, metavar="DIR", help=text)
    add("--data", required=True, metavar="PAIRS", help="pairs in any format that train.py reads")
    text = "folder for rewards.json and the figures"
    add("--out", type=Path, required=True, metavar="DIR", help=text)
    users = ", ".join(name for name, objective in OBJECTIVES.items() if objective.needs_reference)
    text = f"reference of {users} (default: the checkpoint that the run started from)"
    add("--reference", dest="model", metavar="DIR", help=text)
    choices = [name for name, objective in OBJECTIVES.items() if objective.loss]
    text = "the objective that defines the reward (default: the run's, or simpo)"
    add("--objective", choices=choices, help=text)
    text = "β, or ipo's τ (default: the run's, or train.py's)"
    add("--beta", type=float, metavar="B", help=text)
    text = "γ/β (default: the run's); it is recorded, but γ shifts the loss, not the reward"
    add("--gamma-beta-ratio", type=float, metavar="G", help=text)
    text = "compute SimPO's reward without dividing by the length"
    add("--no-length-norm", dest="length_norm", action="store_const", const=False, help=text)
    text = "jinja2 chat template to use instead of the checkpoint's; 'none' for plain text"
    add("--chat-template", metavar="FILE", help=text)


def main() -> None:
    """Run the command that the first argument names."""
    flags = read_flags()
    try:
        {"rewards": rewards, "curves": curves}[flags.command](flags)
    except (InputError, OSError) as e:
        sys.exit(f"{PROGRAM}: error: {e}")


if __name__ == "__main__":
    main()
