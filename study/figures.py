"""Draw the figures and lay out the tables of the analyses: numbers come in, nothing is computed.

`study/analyze.py` computes the numbers; its docstring says which figure of the paper shows what.
`toy/miniature.py` draws with `panels`, `style` and `COLOURS`, too.
"""

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's palette, which colour-blind readers can tell apart; dashes serve grey prints.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")

CURVES = {  # the metrics of a panel: its label
    ("loss",): "loss",
    ("rewards/margins",): "reward margin",
    ("rewards/accuracies",): "reward accuracy",
    ("avg_logps/chosen", "avg_logps/rejected"): "average log-probability (nats per token)",
    ("lengths/chosen", "lengths/rejected"): "length of the responses (tokens)",
}
OF_ITS_OWN_SCALE = ("loss", "rewards/margins")  # every objective has other units of reward


# --------------------------------------------------------------------------------------------------
# Tables


def table(header: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """Return a table that is aligned for the terminal and valid Markdown.

    The first `texts` columns are aligned to the left, the others, numbers, to the right.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * (w + 2) if i < texts else "-" * (w + 1) + ":" for i, w in enumerate(widths)]

    def line(cells: Iterable[str]) -> str:
        sized = enumerate(zip(cells, widths))
        padded = (cell.ljust(w) if i < texts else cell.rjust(w) for i, (cell, w) in sized)
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])


def rewards_table(results: dict[str, dict[str, Any]]) -> str:
    """Return one row per policy. results: what `analyze.analyse` returns, for each policy."""

    def mean_and_sd(value: dict[str, float]) -> str:
        return f"{value['mean']:.3f} ± {value['sd']:.3f}"

    rows = []
    for name, result in results.items():
        bins = result["accuracy_by_length"]
        columns = {
            "policy": name,
            "reward accuracy %": f"{100 * result['reward_accuracy']:.1f}",
            "chosen shorter %": _percent_right([b for b in bins if b["to"] < 0]),
            "chosen longer %": _percent_right([b for b in bins if b["from"] > 0]),
            "mis-ranked %": f"{100 * result['mis_ranked']:.1f}",
            "ρ(logp per token, length)": f"{result['spearman_likelihood_length']:.2f}",
            "reward margin": mean_and_sd(result["reward_margin"]),
            "chosen logp per token": mean_and_sd(result["chosen_avg_logp"]),
        }
        rows.append(columns)
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _percent_right(bins: list[dict[str, Any]]) -> str:
    """Return the accuracy over several bins in percent, or a dash if they hold no pairs."""
    pairs = sum(b["pairs"] for b in bins)
    return f"{100 * sum(b['pairs'] * b['accuracy'] for b in bins) / pairs:.1f}" if pairs else "–"


def curves_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return one row per run. runs: the rows of metrics.jsonl, for each run."""
    rows = []
    for name, metrics in runs.items():
        steps = [row for row in metrics if "loss" in row]
        last = {key: value for row in metrics for key, value in row.items()}

        def held_out(metric: str, digits: int, scale: int = 1) -> str:
            value = last.get(f"eval_{metric}")
            return "–" if value is None else f"{scale * value:.{digits}f}"

        columns = {
            "run": name,
            "steps": str(len(steps)),
            "last loss": f"{last['loss']:.4f}",
            "held-out loss": held_out("loss", 4),
            "held-out accuracy %": held_out("rewards/accuracies", 1, 100),
            "held-out margin": held_out("rewards/margins", 3),
            "pairs/s (median)": f"{np.median([step['pairs_per_second'] for step in steps]):.1f}",
            "peak memory GiB": f"{last['peak_memory_gib']:.2f}",
        }
        rows.append(columns)
    return table(list(rows[0]), [list(row.values()) for row in rows])


# --------------------------------------------------------------------------------------------------
# Figures


def style(i: int) -> dict[str, str]:
    """Return colour and dashes of the i-th line of a figure."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def panels(
    columns: int, rows: int = 1, width: float = 4.2, height: float = 3.4, share: bool = False
) -> tuple[Any, np.ndarray]:
    """Create a figure and its axes, `columns * rows` of `width` by `height` inches.

    share: all axes have the same limits. pyplot, which keeps global state, is not used.
    """
    from matplotlib.figure import Figure  # slow to import, and the statistics do without

    figure = Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def by_scale(series: dict[str, np.ndarray], least: float = 0.2) -> list[list[str]]:
    """Group series into those that can share an axis: each fills at least this part of it.

    Rewards and losses of different objectives have different units, so that one axis for all would
    crush some of them. The 5 % at either end of a series do not count.

    >>> by_scale({"a": np.arange(10.0), "b": np.arange(20.0), "small": np.arange(10.0) / 100})
    [['a', 'b'], ['small']]
    """
    ends = {name: np.quantile(x, [0.05, 0.95]) for name, x in series.items()}
    groups: list[list[str]] = []
    for name in series:
        for group in groups:
            low, high = np.transpose([ends[other] for other in (*group, name)])
            if min(high - low) >= least * (max(high) - min(low)):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def _wrapped(label: str) -> str:
    """Break a long label into lines that fit above a panel."""
    return textwrap.fill(label, 32)


def draw_distributions(
    path: Path, margins: dict[str, np.ndarray], likelihoods: dict[str, np.ndarray]
) -> None:
    """Overlay the policies' reward margins, and their chosen log-probabilities (Fig. 3b and 3c).

    Margins of different scales have an axis each, see `by_scale`. margins, likelihoods: one number
    per pair, for each policy; likelihoods in nats per token.
    """
    groups = by_scale(margins)
    figure, axes = panels(len(groups) + 1)
    shown = [{name: margins[name] for name in group} for group in groups] + [likelihoods]
    styles = {name: style(i) for i, name in enumerate(margins)}
    for axis, values in zip(axes, shown):
        low, high = np.quantile(np.concatenate(list(values.values())), [0.003, 0.997])
        edges = np.linspace(low, high if high > low else low + 1, 31)
        for name, x in values.items():
            how = {"histtype": "step", "linewidth": 1.8, "label": name, **styles[name]}
            axis.hist(x, edges, density=True, **how)
        axis.set(xlabel="reward margin, chosen − rejected", ylabel="density")
        axis.margins(y=0.3)  # room for the legend
        axis.legend(fontsize=8, frameon=False)
    for axis in axes[:-1]:
        axis.axvline(0, color="grey", linewidth=0.8)
    axes[-1].set(xlabel="chosen average log-probability (nats per token)")
    figure.savefig(path)


def draw_likelihood_and_length(
    path: Path,
    likelihoods: dict[str, np.ndarray],
    lengths: dict[str, np.ndarray],
    correlations: dict[str, float],
) -> None:
    """Plot every response by length and average log-probability (Fig. 2b, 2c and 4a).

    likelihoods [responses] are in nats per token, lengths [responses] in tokens; correlations are
    Spearman's ρ between the two.
    """
    figure, axes = panels(len(likelihoods), share=True)
    for i, (axis, name) in enumerate(zip(axes, likelihoods)):
        dots = {"s": 6, "alpha": 0.4, "linewidths": 0, "color": style(i)["color"]}
        axis.scatter(lengths[name], likelihoods[name], label="one response", **dots)
        title = _wrapped(f"{name}: ρ = {correlations[name]:.2f}")
        axis.set(title=title, xlabel="length of the response (tokens)")
    axes[0].set(ylabel="average log-probability (nats per token)")
    axes[0].legend(fontsize=8, frameon=False, loc="lower right", markerscale=2)
    figure.savefig(path)


def draw_contingency(path: Path, results: dict[str, dict]) -> None:
    """Draw how often reward and likelihood rank a pair alike, as shares of the pairs (Fig. 4b)."""
    figure, axes = panels(len(results), width=3.4, height=3.1)
    for axis, (name, result) in zip(axes, results.items()):
        cells = result["contingency"]
        by_reward = (
            [cells["both"], cells["reward only"]],
            [cells["likelihood only"], cells["neither"]],
        )
        shares = 100 * np.array(by_reward)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (y, x), share in np.ndenumerate(shares):
            colour = "white" if share > 50 else "black"
            axis.text(x, y, f"{share:.1f} %", ha="center", va="center", color=colour)
        axis.grid(False)
        axis.set(title=_wrapped(name))
        axis.set(xlabel="likelihood ranks the chosen", ylabel="reward ranks the chosen")
        axis.set_xticks([0, 1], ["first", "second"])
        axis.set_yticks([0, 1], ["first", "second"])
    figure.savefig(path)


def draw_accuracy_by_length(path: Path, results: dict[str, dict]) -> None:
    """Plot reward accuracy over how much longer the chosen response is (after Fig. 2a)."""
    figure, [axis] = panels(1, width=5)
    for i, (name, result) in enumerate(results.items()):
        bins = result["accuracy_by_length"]
        centres = [(b["from"] + b["to"]) / 2 for b in bins]
        percent = [100 * b["accuracy"] for b in bins]
        axis.plot(centres, percent, marker="o", label=name, **style(i))
    axis.axhline(50, color="grey", linewidth=0.8)
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="length of the chosen − length of the rejected (tokens)")
    axis.set(ylabel="reward accuracy (%)", ylim=(0, 103))
    title = "dots: middles of bins with equally many pairs"
    axis.legend(fontsize=8, frameon=False, title=title, title_fontsize=8)
    figure.savefig(path)


def draw_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Plot training (lines, a running mean) and evaluation (dots) of several runs.

    runs: the rows of metrics.jsonl, for each run. Where a panel shows two metrics, the chosen
    response has a solid line and the rejected one a dotted line. Runs whose loss or margin has
    another scale have a panel of their own.
    """
    colours = {name: style(i)["color"] for i, name in enumerate(runs)}
    shown = []  # of every panel: metrics, label, names of the runs
    for metrics, label in CURVES.items():
        groups = [list(runs)]
        if metrics[0] in OF_ITS_OWN_SCALE:
            steps = {n: [row[metrics[0]] for row in runs[n] if metrics[0] in row] for n in runs}
            groups = by_scale({n: np.array(values) for n, values in steps.items() if values})
        shown += [(metrics, label, group) for group in groups]
    figure, axes = panels(3, math.ceil(len(shown) / 3))
    for axis, (metrics, label, group) in zip(axes, shown):
        for name in group:
            for metric, dash in zip(metrics, ("-", ":")):
                _draw_metric(axis, name, runs[name], metric, colours[name], dash)
        axis.set(xlabel="step", ylabel=label)
        if len(group) < len(runs):
            axis.set(title=_wrapped("; ".join(group)))
    for axis in axes[len(shown) :]:
        axis.axis("off")
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    title = "lines: training, a running mean; dots: held-out pairs; dotted and hollow: rejected"
    where = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    figure.legend(handles=handles, title=title, **where)
    figure.savefig(path)


def _draw_metric(
    axis: Any, name: str, rows: list[dict], metric: str, colour: str, dash: str
) -> None:
    """Plot one metric of one run: the training steps that have it, and the evaluations."""
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    if points:
        steps, values = np.array(points).T
        n = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(n) / n, mode="valid")
        axis.plot(steps[n - 1 :], smooth, color=colour, linestyle=dash, label=name)
    dots = [(row["step"], row[f"eval_{metric}"]) for row in rows if f"eval_{metric}" in row]
    if dots:
        filled = None if dash == "-" else "none"
        axis.scatter(*np.array(dots).T, s=22, color=colour, facecolors=filled, zorder=3)
