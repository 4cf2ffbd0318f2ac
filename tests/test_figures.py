"""Check what can be checked of a figure without looking: who shares an axis, and what dots are."""

import doctest
import json
from pathlib import Path

import miniature
import numpy as np
import pytest

from study import figures

SEEDS = json.loads((Path(__file__).resolve().parent.parent / "toy/results.json").read_text())[
    "seeds"
]
BELL = np.random.default_rng(0).standard_normal(200)


@pytest.fixture
def axes(monkeypatch):
    """Return a list that receives the axes of every figure that is drawn."""
    drawn, real = [], figures.panels

    def panels(*args, **options):
        figure, some = real(*args, **options)
        drawn.extend(some)
        return figure, some

    monkeypatch.setattr(figures, "panels", panels)
    return drawn


def test_examples():
    assert doctest.testmod(figures, extraglobs={"np": np}) == (0, 1)


@pytest.mark.parametrize(
    "series, groups",
    [
        ({"simpo": 2.4 * BELL, "dpo": 0.4 * BELL}, [["simpo"], ["dpo"]]),
        ({"simpo": 2.4 * BELL, "γ 0": 1.6 * BELL + 1}, [["simpo", "γ 0"]]),
        ({"near 0": 0.01 * BELL, "near 9": 9 + 0.01 * BELL}, [["near 0"], ["near 9"]]),
        ({"big": BELL, "small": BELL / 90, "other": BELL / 80}, [["big"], ["small", "other"]]),
        ({"reference itself": 0 * BELL, "dpo": BELL}, [["reference itself"], ["dpo"]]),
        ({"one wild value": np.append(BELL, 1e6), "tame": BELL}, [["one wild value", "tame"]]),
    ],
)
def test_an_axis_crushes_nobody(series, groups):
    assert figures.by_scale(series) == groups


def test_every_histogram_fills_its_axis(tmp_path, axes):
    """DPO's margins were one bar beside SimPO's."""
    margins = {"simpo": 2.4 * BELL, "sums": 40 * BELL, "dpo": 0.4 * BELL}
    figures.draw_distributions(tmp_path / "a.png", margins, margins)
    filled = []
    for axis in axes[:-1]:
        for patch in axis.patches:
            heights = patch.get_path().vertices[:, 1]
            filled.append(sum(heights > 0.02 * heights.max()) / len(heights))
    assert len(axes) == 4 and len(filled) == 3 and min(filled) > 0.4


def test_likelihoods_are_compared_on_one_scale(tmp_path, axes):
    likelihoods = {"simpo": BELL, "dpo": 9 * BELL}
    lengths = {"simpo": abs(BELL), "dpo": 50 + abs(BELL)}
    figures.draw_likelihood_and_length(
        tmp_path / "a.png", likelihoods, lengths, {"simpo": 0.1, "dpo": 0.2}
    )
    assert axes[0].get_xlim() == axes[1].get_xlim() and axes[0].get_ylim() == axes[1].get_ylim()


def test_curves_of_other_scales_have_panels_of_their_own(tmp_path, axes):
    def rows(scale: float) -> list[dict]:
        constant = {"avg_logps/chosen": -1, "rewards/accuracies": 0.5, "lengths/chosen": 9}
        return [
            {"step": i, "loss": scale * (2 + x), "rewards/margins": scale * x} | constant
            for i, x in enumerate(BELL)
        ]

    figures.draw_curves(tmp_path / "a.png", {"simpo": rows(1), "γ 0": rows(0.6), "dpo": rows(0.05)})
    losses = [axis for axis in axes if axis.get_ylabel() == "loss"]
    assert [axis.get_title() for axis in losses] == ["simpo; γ 0", "dpo"]
    assert [len(axis.lines) for axis in losses] == [2, 1]
    [accuracy] = [axis for axis in axes if axis.get_ylabel() == "reward accuracy"]
    assert len(accuracy.lines) == 3  # its unit is the same for all


@pytest.mark.parametrize("name", ["methods", "gamma", "mis_ranking", "judge"])
def test_a_dot_is_a_seed_and_the_figure_says_so(tmp_path, axes, name):
    """A number that depends on no step size is not drawn at each."""
    getattr(miniature, f"draw_{name}")(tmp_path / "a.png", SEEDS)
    legends = [t.get_text() for axis in axes if axis.get_legend() for t in axis.get_legend().texts]
    assert "one seed" in legends
    dots = sum(len(group.get_offsets()) for axis in axes for group in axis.collections)
    places = {"methods": 3 * 5, "gamma": 2 * 2 * 4, "mis_ranking": 3, "judge": 3 * 4}[name]
    assert dots == places * len(SEEDS)


def test_the_judges_bars_use_the_height(tmp_path, axes):
    miniature.draw_judge(tmp_path / "a.png", SEEDS)
    low, high = axes[0].get_ylim()
    tallest = max(
        group.get_offsets()[:, 1].max() for group in axes[0].collections if len(group.get_offsets())
    )
    assert (tallest - low) / (high - low) > 0.9
