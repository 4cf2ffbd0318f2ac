"""What a run taught: the paper's analyses of any checkpoint on any pairs, as numbers and figures.

    python analyze.py rewards --policy runs/simpo-1 --policy runs/dpo-1 --data toy/heldout.jsonl --out analysis
    python analyze.py rewards --policy DIR --reference DIR --objective dpo --beta 0.01 --data pairs.jsonl --out analysis
    python analyze.py curves runs/simpo-1 runs/dpo-1 --out curves.png

`rewards` asks how a policy ranks the two responses of each pair, once by its reward (what was trained) and once by its
likelihood, the average log-probability of a token (what decoding goes by):

    likelihood and length    is what is long likely? Spearman's ρ over all responses                  paper, Fig. 2 and 4a
    contingency              do the two rankings agree?                                               paper, Fig. 4b
    reward accuracy          is the chosen response ranked first, also where it is the shorter one?   paper, Fig. 4c
    distributions            of the reward margin and of the chosen response's likelihood             paper, Fig. 3

The objective, β, γ and reference of a policy that train.py made stand in its run's config.json; flags win over them.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import model as llama
import train
from data import DataError, Tokenizer, Tree
from model import CheckpointError, Config, Llama

# ---------------------------------------------------------------------------------------------------------------------
# Statistics: arrays in, numbers out


def ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation: Pearson's, of the ranks. nan where x or y is the same everywhere.

    >>> round(spearman([1, 2, 3, 4], [10, 30, 20, 40]), 9)
    0.8
    """
    a, b = (r - r.mean() for r in (ranks(np.asarray(x)), ranks(np.asarray(y))))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else math.nan


def accuracy(margins: np.ndarray) -> float:
    """Share of pairs whose margin (chosen minus rejected) is positive; a tie is half right."""
    return float((np.sign(margins) + 1).mean() / 2)


def contingency(reward_margins: np.ndarray, likelihood_margins: np.ndarray) -> dict[str, float]:
    """Which of two rankings put the chosen response first, as shares of the pairs; a tie did not."""
    reward, likelihood = np.asarray(reward_margins) > 0, np.asarray(likelihood_margins) > 0
    cells = {"both": reward & likelihood, "reward only": reward & ~likelihood, "likelihood only": ~reward & likelihood}
    return {name: float(cell.mean()) for name, cell in (cells | {"neither": ~reward & ~likelihood}).items()}


def accuracy_by_length(margins: np.ndarray, differences: np.ndarray, bins: int = 3) -> list[dict]:
    """Reward accuracy by how many tokens longer the chosen response is.

    The pairs whose chosen response is shorter, and those where it is longer, are each cut into at most `bins` bins of
    about as many pairs; those of equal length are a bin of their own. From short to long: {from, to, pairs, accuracy}."""
    margins, differences = np.asarray(margins), np.asarray(differences)
    rows = []
    for side in (differences < 0, differences == 0, differences > 0):
        if not side.any():
            continue
        inner = np.quantile(differences[side], np.arange(1, bins) / bins)
        bin_of = np.searchsorted(inner, differences, side="left")
        for i in range(bins):
            inside = side & (bin_of == i)
            if inside.any():
                lengths = differences[inside]
                rows.append({"from": int(lengths.min()), "to": int(lengths.max()), "pairs": int(inside.sum()), "accuracy": accuracy(margins[inside])})  # fmt: skip
    return rows


def length_controlled_win_rate(wins: np.ndarray, differences: np.ndarray) -> float:
    """The win rate had all answers been as long as those they were compared with, in the manner of AlpacaEval 2.

    wins: probability, from 0 to 1, that each answer wins. differences: how many tokens longer it is. Fits, by Newton's
    method, logit P(win) = θ + φ · tanh(difference / sd(differences)), and predicts for a difference of 0: σ(θ)."""
    wins, differences = np.asarray(wins, float), np.asarray(differences, float)
    x = np.stack([np.ones_like(wins), np.tanh(differences / (differences.std() or 1.0))], axis=1)
    coefficients = np.zeros(2)
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ coefficients))
        curvature = (x.T * (p * (1 - p))) @ x + 1e-9 * np.eye(2)  # invertible even where all lengths are equal
        coefficients += np.linalg.solve(curvature, x.T @ (wins - p))
    return float(1 / (1 + np.exp(-coefficients[0])))


def analyse(rewards: np.ndarray, logps: np.ndarray, lengths: np.ndarray) -> dict:
    """All of the above for one policy. Arguments [pairs, (chosen, rejected)]; logps are sums in nats, lengths in tokens."""
    likelihoods = logps / lengths
    margins, likelihood_margins = rewards[:, 0] - rewards[:, 1], likelihoods[:, 0] - likelihoods[:, 1]
    cells = contingency(margins, likelihood_margins)
    spread = lambda x: {"mean": float(x.mean()), "sd": float(x.std())}
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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and pairs → log-probabilities → rewards


def read_pairs(name: str, tokenizer: Tokenizer, max_length: int, max_prompt_length: int) -> tuple[list[Tree], Counter]:
    """The pairs of a file, folder or hub data set as trees, cut as in training; and how many were cut or dropped, and why."""
    examples, counts = [], Counter()
    for where, record in data.read_records(name):
        try:
            examples.append(data.parse_record(record, where)[1])
        except data.Dropped as e:
            counts[f"dropped: {e}"] += 1
    trees = tokenizer.encode(examples, max_length, max_prompt_length, counts)
    if not trees:
        raise DataError(f"{name}: no pair to analyse" + "".join(f", {n} {what}" for what, n in counts.items()))
    return trees, +counts


@torch.no_grad()
def score_pairs(model: Llama, trees: list[Tree], microbatch_tokens: int = 8192) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities in nats and lengths in tokens of the pairs' responses, both [pairs, (chosen, rejected)]."""
    logps, lengths = torch.empty(len(trees), 2), torch.empty(len(trees), 2, dtype=torch.int64)
    for start in tqdm(range(0, len(trees), 256), "scoring", unit_scale=256, disable=None, leave=False):
        group = range(start, min(start + 256, len(trees)))
        for [share] in data.plan([len(trees[n]) for n in group], 1, microbatch_tokens):
            numbers = [group[i] for i in share]
            logps[numbers], lengths[numbers] = (x.cpu() for x in train.response_logps(model, [trees[n] for n in numbers]))
    return logps, lengths


def rewards_of(settings: train.Settings, logps: Tensor, lengths: Tensor, reference: Tensor | None = None) -> Tensor:
    """What the objective calls the reward of each response, [pairs, (chosen, rejected)], by train.py's own function."""
    _, report = train.pair_losses(settings, logps, lengths, reference)
    return torch.stack([report["rewards/chosen"], report["rewards/rejected"]], dim=1)


def open_policy(name: str, flags: argparse.Namespace) -> tuple[Path, train.Settings]:
    """A checkpoint folder, and the settings that define its reward: its run's, where it has one, under the flags."""
    path = Path(name)
    path = path / "model" if (path / "model" / "config.json").exists() else path
    record = path.absolute().parent / "config.json"
    recorded = llama.read_json(record).get("settings", {}) if path.name == "model" and record.exists() else {}
    known = {f.name for f in fields(train.Settings)}
    values = {key: value for key, value in recorded.items() if key in known}
    if flags.objective not in (None, recorded.get("objective")):  # hyperparameters of the run's own mean nothing to it
        for name in {name for names in train.HYPERPARAMETERS.values() for name in names}:
            values.pop(name, None)
    values |= {key: value for key, value in vars(flags).items() if key in known and key != "data" and value is not None}
    settings = train.Settings(**values)
    if settings.objective == "sft":
        raise DataError(f"{name}: was trained with --objective sft, which has no reward: pass another --objective")
    if settings.objective in train.NEEDS_REFERENCE and not settings.model:
        raise DataError(
            f"{name}: {settings.objective}'s reward needs --reference, the checkpoint that training started from"
        )
    return data.local_path(str(path), "model", llama.CHECKPOINT_FILES), settings


def score_checkpoint(source: Path, name: str, settings: train.Settings) -> tuple[Tensor, Tensor]:
    """`score_pairs` of a checkpoint folder on the pairs that `name` names."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = Tokenizer(source, data.read_template(settings.chat_template))
    tokenizer.check_fits(Config.from_folder(source).vocab_size)
    trees, counts = read_pairs(name, tokenizer, settings.max_length, settings.max_prompt_length)
    for what, n in counts.items():
        print(f"{name}: {n} {what}", file=sys.stderr)
    model = llama.load(source, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return score_pairs(model, trees, settings.microbatch_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# For people

# Okabe and Ito's palette, which the colour-blind can tell apart; dashes for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


def style(i: int) -> dict:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def panels(columns: int, rows: int = 1, width: float = 4.2, height: float = 3.4):
    """A figure and its axes, without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def table(header: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """Aligned for the terminal, and Markdown too; the first `texts` columns stand to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths)]

    def line(cells: list[str]) -> str:
        padded = (c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])


def draw_distributions(path: Path, margins: dict[str, np.ndarray], likelihoods: dict[str, np.ndarray]) -> None:
    """Reward margins and chosen log-probabilities, several policies overlaid (the paper's Fig. 3b and 3c)."""
    figure, (left, right) = panels(2)
    for axis, values in ((left, margins), (right, likelihoods)):
        low, high = np.quantile(np.concatenate(list(values.values())), [0.003, 0.997])
        edges = np.linspace(low, high if high > low else low + 1, 31)
        for i, (name, x) in enumerate(values.items()):
            axis.hist(x, edges, density=True, histtype="step", linewidth=1.8, label=name, **style(i))
    left.axvline(0, color="grey", linewidth=0.8)
    left.set(xlabel="reward margin, chosen − rejected", ylabel="density")
    right.set(xlabel="chosen average log-probability (nats per token)", ylabel="density")
    left.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def draw_likelihood_and_length(path: Path, likelihoods: dict[str, np.ndarray], lengths: dict[str, np.ndarray]) -> None:
    """Every response, by its length and its average log-probability (the paper's Fig. 2b, 2c and 4a)."""
    figure, axes = panels(len(likelihoods))
    for i, (axis, name) in enumerate(zip(axes, likelihoods)):
        axis.scatter(lengths[name], likelihoods[name], s=6, alpha=0.4, linewidths=0, color=style(i)["color"])
        axis.set(title=f"{name}: ρ = {spearman(likelihoods[name], lengths[name]):.2f}", xlabel="length of the response (tokens)",
                 ylabel="average log-probability (nats per token)")  # fmt: skip
    figure.savefig(path)


def draw_contingency(path: Path, results: dict[str, dict]) -> None:
    """Reward ranking against likelihood ranking, shares of the pairs (the paper's Fig. 4b)."""
    figure, axes = panels(len(results), width=3.4, height=3.1)
    for axis, (name, result) in zip(axes, results.items()):
        cells = result["contingency"]
        shares = 100 * np.array([[cells["both"], cells["reward only"]], [cells["likelihood only"], cells["neither"]]])
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (y, x), share in np.ndenumerate(shares):
            axis.text(x, y, f"{share:.1f} %", ha="center", va="center", color="white" if share > 50 else "black")
        axis.grid(False)
        axis.set(title=name, xlabel="likelihood ranks the chosen", ylabel="reward ranks the chosen", xticks=[0, 1], yticks=[0, 1],
                 xticklabels=["first", "second"], yticklabels=["first", "second"])  # fmt: skip
    figure.savefig(path)


def draw_accuracy_by_length(path: Path, results: dict[str, dict]) -> None:
    """Reward accuracy where the chosen response is the shorter, and where it is the longer (after the paper's Fig. 2a)."""
    figure, [axis] = panels(1, width=5)
    for i, (name, result) in enumerate(results.items()):
        rows = result["accuracy_by_length"]
        axis.plot(
            [(r["from"] + r["to"]) / 2 for r in rows],
            [100 * r["accuracy"] for r in rows],
            marker="o",
            label=name,
            **style(i),
        )
    axis.axhline(50, color="grey", linewidth=0.8)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set(
        xlabel="length of the chosen − length of the rejected (tokens)", ylabel="reward accuracy (%)", ylim=(0, 103)
    )
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)


CURVES = {  # metrics of a panel: its label
    ("loss",): "loss (nats per pair)",
    ("rewards/margins",): "reward margin",
    ("rewards/accuracies",): "reward accuracy",
    ("avg_logps/chosen", "avg_logps/rejected"): "average log-probability (nats per token)",
    ("lengths/chosen", "lengths/rejected"): "length of the responses (tokens)",
}


def draw_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Training (lines, a running mean) and evaluation (dots) of several runs. Where a panel shows two metrics, the chosen
    response's is the full line and the rejected one's is dotted."""
    figure, axes = panels(3, 2)
    for axis, (metrics, label) in zip(axes, CURVES.items()):
        for i, (name, rows) in enumerate(runs.items()):
            for metric, dash in zip(metrics, ("-", ":")):
                points = [(row["step"], row[metric]) for row in rows if metric in row]
                if points:
                    steps, values = np.array(points).T
                    n = max(1, len(values) // 20)
                    smooth = np.convolve(values, np.ones(n) / n, mode="valid")
                    axis.plot(steps[n - 1 :], smooth, color=style(i)["color"], linestyle=dash, label=name)
                dots = [(row["step"], row[f"eval_{metric}"]) for row in rows if f"eval_{metric}" in row]
                if dots:
                    axis.scatter(
                        *np.array(dots).T,
                        s=22,
                        color=style(i)["color"],
                        facecolors="none" if dash == ":" else None,
                        zorder=3,
                    )
        axis.set(xlabel="step", ylabel=label)
    axes[-1].axis("off")
    handles = {name: handle for handle, name in zip(*axes[0].get_legend_handles_labels())}
    axes[-1].legend(
        handles.values(),
        handles.keys(),
        loc="center",
        frameon=False,
        title="dots: held-out pairs; dotted lines: rejected",
        title_fontsize=8,
    )
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def label_of(policy: str) -> str:
    """A short name for a policy or run: its folder's, unless that is `model`."""
    path = Path(policy)
    return path.absolute().parent.name if path.name == "model" else path.name or policy


def unique_labels(names: list[str]) -> list[str]:
    labels = [label_of(name) for name in names]
    return labels if len(set(labels)) == len(labels) else names


def rewards(flags: argparse.Namespace) -> None:
    references: dict[tuple, Tensor] = {}
    results, margins, likelihoods, lengths_of, chosen = {}, {}, {}, {}, {}
    for name, policy in zip(unique_labels(flags.policy), flags.policy):
        source, settings = open_policy(policy, flags)
        logps, lengths = score_checkpoint(source, flags.data, settings)
        reference = None
        if settings.objective in train.NEEDS_REFERENCE:
            key = (settings.model, settings.chat_template, settings.max_length, settings.max_prompt_length)
            if key not in references:
                references[key] = score_checkpoint(
                    data.local_path(settings.model, "model", llama.CHECKPOINT_FILES), flags.data, settings
                )[0]
            reference = references[key]
            if reference.shape != logps.shape:
                raise DataError(
                    f"{settings.model}: keeps {len(reference)} pairs of {flags.data}, {policy} {len(logps)}: not the same tokenizer"
                )
        reward = rewards_of(settings, logps, lengths, reference).numpy()
        logps, lengths = logps.numpy(), lengths.numpy()
        hyper = {key: getattr(settings, key) for key in ("objective", "beta", "gamma_beta_ratio", "length_norm")}
        results[name] = {"policy": policy, "data": flags.data} | hyper | analyse(reward, logps, lengths)
        margins[name], chosen[name] = reward[:, 0] - reward[:, 1], (logps / lengths)[:, 0]
        likelihoods[name], lengths_of[name] = (logps / lengths).ravel(), lengths.ravel()

    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "rewards.json").write_text(json.dumps(none_for_nan(results), indent=2) + "\n")
    draw_distributions(flags.out / "distributions.png", margins, chosen)
    draw_likelihood_and_length(flags.out / "likelihood-length.png", likelihoods, lengths_of)
    draw_contingency(flags.out / "contingency.png", results)
    draw_accuracy_by_length(flags.out / "accuracy-length.png", results)
    rows = []
    for name, r in results.items():
        shorter, longer = (
            side(r["accuracy_by_length"])
            for side in (lambda b: [x for x in b if x["to"] < 0], lambda b: [x for x in b if x["from"] > 0])
        )
        rows.append([name, f"{100 * r['reward_accuracy']:.1f}", share_right(shorter), share_right(longer), f"{100 * r['mis_ranked']:.1f}",
                     f"{r['spearman_likelihood_length']:.2f}", f"{r['reward_margin']['mean']:.3f} ± {r['reward_margin']['sd']:.3f}",
                     f"{r['chosen_avg_logp']['mean']:.3f} ± {r['chosen_avg_logp']['sd']:.3f}"])  # fmt: skip
    print(f"{next(iter(results.values()))['pairs']} pairs of {flags.data}\n")
    print(
        table(
            [
                "policy",
                "reward accuracy %",
                "chosen shorter %",
                "chosen longer %",
                "mis-ranked %",
                "ρ(logp per token, length)",
                "reward margin",
                "chosen logp per token",
            ],
            rows,
        )
    )
    print(
        f"\nmis-ranked: reward and average log-probability disagree; ± sd over the pairs. Numbers and figures: {flags.out}"
    )


def share_right(bins: list[dict]) -> str:
    pairs = sum(b["pairs"] for b in bins)
    return f"{100 * sum(b['pairs'] * b['accuracy'] for b in bins) / pairs:.1f}" if pairs else "–"


def none_for_nan(value):
    """JSON knows no nan."""
    if isinstance(value, dict):
        return {key: none_for_nan(v) for key, v in value.items()}
    if isinstance(value, list):
        return [none_for_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def curves(flags: argparse.Namespace) -> None:
    runs = {}
    for name, run in zip(unique_labels(flags.runs), flags.runs):
        runs[name] = [row for _, row in data.read_records(str(Path(run) / "metrics.jsonl"))]
        if not any("loss" in row and isinstance(row.get("step"), int) for row in runs[name]):
            raise DataError(f"{Path(run) / 'metrics.jsonl'}: no step of train.py in it")
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(flags.out, runs)
    rows = []
    for name, metrics in runs.items():
        steps = [row for row in metrics if "loss" in row]
        last = {key: value for row in metrics for key, value in row.items() if key.startswith("eval_")}
        show = lambda key, digits, scale=1: f"{scale * last[key]:.{digits}f}" if key in last else "–"
        rows.append([name, str(len(steps)), f"{steps[-1]['loss']:.4f}", show("eval_loss", 4), show("eval_rewards/accuracies", 1, 100),
                     show("eval_rewards/margins", 3), f"{np.median([s['pairs_per_second'] for s in steps]):.1f}", f"{steps[-1]['peak_memory_gib']:.2f}"])  # fmt: skip
    print(
        table(
            [
                "run",
                "steps",
                "last loss",
                "held-out loss",
                "held-out accuracy %",
                "held-out margin",
                "pairs/s (median)",
                "peak memory GiB",
            ],
            rows,
        )
    )
    print(f"\n{flags.out}")


def read_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="rewards | curves")
    r = commands.add_parser("rewards", help="how policies rank the responses of pairs", allow_abbrev=False)
    r.add_argument(
        "--policy",
        action="append",
        required=True,
        metavar="DIR",
        help="a run of train.py, a Hugging Face folder or a hub id; may be given several times",
    )
    r.add_argument("--data", required=True, metavar="PAIRS", help="pairs, in any form that train.py takes")
    r.add_argument("--out", type=Path, required=True, metavar="DIR", help="where rewards.json and the figures go")
    r.add_argument(
        "--reference",
        dest="model",
        metavar="DIR",
        help="reference of dpo, ipo, kto, rdpo (default: what the run started from)",
    )
    r.add_argument(
        "--objective",
        choices=[name for name in train.HYPERPARAMETERS if name != "sft"],
        help="whose reward to compute (default: the run's, or simpo)",
    )
    r.add_argument("--beta", type=float, metavar="B", help="β, or ipo's τ (default: the run's, or train.py's)")
    r.add_argument(
        "--gamma-beta-ratio",
        type=float,
        metavar="G",
        help="γ/β (default: the run's); recorded: γ shifts the loss, no reward",
    )
    r.add_argument(
        "--no-length-norm",
        dest="length_norm",
        action="store_const",
        const=False,
        help="SimPO's reward without division by the length",
    )
    r.add_argument(
        "--chat-template",
        metavar="FILE",
        help="jinja2 chat template to use instead of the checkpoint's; 'none' for plain text",
    )
    c = commands.add_parser(
        "curves", help="loss, margins, accuracies, log-probabilities and lengths of runs", allow_abbrev=False
    )
    c.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, with metrics.jsonl")
    c.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the figure")
    flags = parser.parse_args(argv)
    if flags.command == "rewards" and flags.beta is not None and not (math.isfinite(flags.beta) and flags.beta > 0):
        parser.error("--beta: expected a positive number")
    if flags.command == "curves" and flags.out.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--out {flags.out}: expected a .png, .pdf or .svg file")
    return flags


def main() -> None:
    flags = read_flags()
    try:
        {"rewards": rewards, "curves": curves}[flags.command](flags)
    except (DataError, CheckpointError, OSError) as e:
        sys.exit(f"analyze.py: error: {e}")


if __name__ == "__main__":
    main()
