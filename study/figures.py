"""Draw the figures and lay out the tables of the analyses: numbers come in, nothing is computed.

`study/analyze.py` computes the numbers; its docstring says which figure of the paper shows what.
`toy/miniature.py` draws with `panels`, `style` and `COLOURS`, too.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's palette, which colour-blind readers can tell apart; dashes serve grey prints.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")

CURVES = {  # the metrics of a panel: its label
    ("loss",): "loss (nats per pair)",
    ("rewards/margins",): "reward margin",
    ("rewards/accuracies",): "reward accuracy",
    ("avg_logps/chosen", "avg_logps/rejected"): "average log-probability (nats per token)",
    ("lengths/chosen", "lengths/rejected"): "length of the responses (tokens)",
}


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
    columns: int, rows: int = 1, width: float = 4.2, height: float = 3.4
) -> tuple[Any, np.ndarray]:
    """Create a figure and its axes, `columns * rows` of `width` by `height` inches.

    pyplot, which keeps global state, is not used.
    """
    from matplotlib.figure import Figure  # slow to import, and the statistics do without

    figure = Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _wrapped(label: str) -> str:
    """Break a long label into lines that fit above a panel."""
    return textwrap.fill(label, 32)


def draw_distributions(
    path: Path, margins: dict[str, np.ndarray], likelihoods: dict[str, np.ndarray]
) -> None:
    """Overlay the policies' reward margins, and their chosen log-probabilities (Fig. 3b and 3c).

    margins, likelihoods: one number per pair, for each policy; likelihoods in nats per token.
    """
    figure, (left, right) = panels(2)
    for axis, values in ((left, margins), (right, likelihoods)):
        low, high = np.quantile(np.concatenate(list(values.values())), [0.003, 0.997])
        edges = np.linspace(low, high if high > low else low + 1, 31)
        for i, (name, x) in enumerate(values.items()):
            axis.hist(
                x, edges, density=True, histtype="step", linewidth=1.8, label=name, **style(i)
            )
    left.axvline(0, color="grey", linewidth=0.8)
    left.set(xlabel="reward margin, chosen − rejected", ylabel="density")
    right.set(xlabel="chosen average log-probability (nats per token)", ylabel="density")
    left.legend(fontsize=8, frameon=False)
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
    figure, axes = panels(len(likelihoods))
    for i, (axis, name) in enumerate(zip(axes, likelihoods)):
        colour = style(i)["color"]
        axis.scatter(lengths[name], likelihoods[name], s=6, alpha=0.4, linewidths=0, color=colour)
        axis.set(
            title=_wrapped(f"{name}: ρ = {correlations[name]:.2f}"),
            xlabel="length of the response (tokens)",
            ylabel="average log-probability (nats per token)",
        )
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
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def draw_curves(path: Path, runs: dict[str, list[dict]]) -> None:
    """Plot training (lines, a running mean) and evaluation (dots) of several runs.

    runs: the rows of metrics.jsonl, for each run. Where a panel shows two metrics, the chosen
    response has a solid line and the rejected one a dotted line.
    """
    figure, axes = panels(3, 2)
    for axis, (metrics, label) in zip(axes, CURVES.items()):
        for i, (name, rows) in enumerate(runs.items()):
            for metric, dash in zip(metrics, ("-", ":")):
                _draw_metric(axis, name, rows, metric, style(i)["color"], dash)
        axis.set(xlabel="step", ylabel=label)
    axes[-1].axis("off")
    handles = {name: handle for handle, name in zip(*axes[0].get_legend_handles_labels())}
    title = "dots: held-out pairs; dotted lines: rejected"
    box = {"loc": "center", "frameon": False, "title": title, "title_fontsize": 8}
    axes[-1].legend(handles.values(), handles.keys(), **box)
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
