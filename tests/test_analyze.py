"""Checks the analyses against cases worked out by hand, and the two commands on the toy."""

import doctest
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from formats import checkpoint
from formats.tokenizer import Tokenizer
from methods.objectives import OBJECTIVES
from runtime.settings import Settings
from study import analyze, figures
from study import labels as labels_module
from study.labels import labels, recorded_settings

TOY = Path(__file__).resolve().parent.parent / "toy"


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_ranks_share_ties():
    assert analyze.ranks(np.array([30, 10, 20, 10])).tolist() == [4, 1.5, 3, 1.5]


def test_spearman_without_ties_is_the_textbook_formula():
    rng = np.random.default_rng(0)
    x, y = rng.permutation(50), rng.permutation(50)
    d2 = ((analyze.ranks(x) - analyze.ranks(y)) ** 2).sum()
    assert analyze.spearman(x, y) == pytest.approx(1 - 6 * d2 / (50 * (50**2 - 1)))
    assert analyze.spearman(x, np.exp(x / 10)) == pytest.approx(1)
    assert analyze.spearman(x, -(x**3)) == pytest.approx(-1)


def test_spearman_with_ties_by_hand():
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: Σab = 4.5, Σa² = 4.5, Σb² = 5
    assert analyze.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(analyze.spearman([1, 1, 1], [1, 2, 3]))


def test_accuracy_counts_a_tie_half():
    assert analyze.accuracy(np.array([2.0, 0.0, -1.0, 3.0])) == 0.625


def test_contingency():
    cells = analyze.contingency(np.array([1, 1, -1, -1, 1]), np.array([1, -1, 1, -1, 2]))
    assert cells == pytest.approx(
        {"both": 0.4, "reward only": 0.2, "likelihood only": 0.2, "neither": 0.2}
    )


def test_accuracy_by_length():
    margins = np.array([-1, 1, -1, 1, 0, 1, 1])
    differences = np.array([-9, -8, -2, -1, 0, 5, 5])
    assert analyze.accuracy_by_length(margins, differences, bins=2) == [
        {"from": -9, "to": -8, "pairs": 2, "accuracy": 0.5},
        {"from": -2, "to": -1, "pairs": 2, "accuracy": 0.5},
        {"from": 0, "to": 0, "pairs": 1, "accuracy": 0.5},
        {"from": 5, "to": 5, "pairs": 2, "accuracy": 1.0},
    ]


def test_every_pair_is_in_one_bin():
    rng = np.random.default_rng(1)
    margins, differences = rng.standard_normal(500), rng.integers(-40, 60, 500)
    bins = analyze.accuracy_by_length(margins, differences)
    assert sum(b["pairs"] for b in bins) == 500
    assert sum(b["pairs"] * b["accuracy"] for b in bins) / 500 == pytest.approx(
        analyze.accuracy(margins)
    )
    assert all(a["to"] < b["from"] for a, b in zip(bins, bins[1:]))


def test_length_control_recovers_the_model_that_made_the_wins():
    differences = np.random.default_rng(2).integers(-30, 70, 400)
    wins = sigmoid(0.4 + 1.5 * np.tanh(differences / differences.std()))
    assert analyze.length_controlled_win_rate(wins, differences) == pytest.approx(
        sigmoid(0.4), abs=1e-9
    )
    assert wins.mean() > sigmoid(0.4) + 0.05  # what it took out


def test_length_control_where_length_says_nothing():
    wins = np.array([1, 1, 1, 0.5, 0, 1])
    assert analyze.length_controlled_win_rate(wins, np.zeros(6)) == pytest.approx(wins.mean())
    # each result once with a longer and once with a shorter answer: nothing for φ to explain
    twice, lengths = np.tile(wins, 2), np.repeat([7, -7], 6)
    assert analyze.length_controlled_win_rate(twice, lengths) == pytest.approx(wins.mean())
    assert (
        analyze.length_controlled_win_rate(np.ones(6), np.arange(6)) > 0.999
    )  # no finite fit, still an answer


def test_a_judge_of_length_alone_is_seen_through():
    differences = np.random.default_rng(3).integers(0, 80, 300)  # always at least as long
    wins = sigmoid(0.8 * np.tanh(differences / differences.std()))
    assert wins.mean() > 0.6
    assert analyze.length_controlled_win_rate(wins, differences) == pytest.approx(0.5, abs=1e-9)


def test_rewards_and_what_is_said_of_them():
    """Two pairs, per token −1 and −2 against −2 and −1.

    SimPO ranks one of them right. Sums of log-probabilities rank none right.
    """
    logps = torch.tensor([[-4.0, -2.0], [-6.0, -2.0]])
    lengths = torch.tensor([[4, 1], [3, 2]])

    def reward(reference=None, **flags):
        return analyze.rewards_of(Settings(**flags), logps, lengths, reference)

    assert reward(beta=2.0).tolist() == [[-2, -4], [-4, -2]]
    assert reward(beta=2.0, length_norm=False).tolist() == [[-8, -4], [-12, -4]]
    reference = torch.tensor([[-5.0, -2.0], [-6.0, -4.0]])
    dpo = reward(reference, objective="dpo", beta=0.5)
    assert dpo.tolist() == [[0.5, 0], [0, 1]]
    per_token = reward(reference, objective="dpo", beta=0.5, length_norm=True)
    assert per_token.tolist() == [[0.125, 0], [0, 0.5]]
    for objective, wanted in {
        "rrhf": [[-1, -2], [-2, -1]],
        "slic": logps.tolist(),
        "cpo": (0.5 * logps).tolist(),
        "ipo": dpo.tolist(),
        "kto": dpo.tolist(),
        "rdpo": dpo.tolist(),
        "apo_zero": dpo.tolist(),
        "repo": [[-1, -2], [-2, -1]],
    }.items():
        beta = {"beta": 0.5} if "beta" in OBJECTIVES[objective].defaults else {}
        assert reward(reference, objective=objective, **beta).tolist() == wanted
    odds = reward(objective="orpo").exp().tolist()  # p / (1 − p) of e⁻¹ and e⁻²
    assert odds == [pytest.approx([0.5819767, 0.1565176]), pytest.approx([0.1565176, 0.5819767])]
    sums = reward(beta=2.0, length_norm=False).numpy()
    result = analyze.analyse(sums, logps.numpy(), lengths.numpy())
    assert result["reward_accuracy"] == 0
    assert result["likelihood_accuracy"] == 0.5 and result["mis_ranked"] == 0.5
    assert result["chosen_avg_logp"]["mean"] == -1.5 and result["reward_margin"]["mean"] == -6
    assert result["accuracy_by_length"] == [
        {"from": 1, "to": 1, "pairs": 1, "accuracy": 0.0},
        {"from": 3, "to": 3, "pairs": 1, "accuracy": 0.0},
    ]


def test_table_is_aligned_markdown():
    assert figures.table(["a", "b"], [["xyz", "1"], ["x", "10"]]).splitlines() == [
        "| a   |  b |",
        "|-----|---:|",
        "| xyz |  1 |",
        "| x   | 10 |",
    ]


# -- labels


def test_examples_in_docstrings():
    for module, examples in ((labels_module, 3), (analyze, 1)):
        assert doctest.testmod(module) == (0, examples)  # failed, attempted


def labelled(*settings: Settings) -> list[str]:
    return labels([f"runs/{i}" for i in range(len(settings))], list(settings))


def test_labels_say_in_what_runs_differ():
    ablations = [Settings(), Settings(length_norm=False), Settings(gamma_beta_ratio=0.0)]
    assert labelled(*ablations) == ["simpo", "simpo, no length norm", "simpo, γ/β 0"]
    assert labelled(Settings(), Settings("dpo", lr=5e-6)) == ["simpo", "dpo, lr 5e-06"]
    seeds = [Settings("orpo", lam=0.5, lr=1e-5, seed=seed) for seed in (1, 2)]
    assert labelled(*seeds) == ["orpo, seed 1", "orpo, seed 2"]  # not in what they share


def test_labels_compare_hyperparameters_within_an_objective():
    """A β of 10 tells no SimPO run from a DPO run, but it does from another SimPO run."""
    simpo, dpo = Settings(beta=10.0), Settings("dpo", beta=0.1)
    assert labelled(simpo, dpo) == ["simpo", "dpo"]
    assert labelled(simpo, dpo, Settings(beta=2.5)) == ["simpo, β 10", "dpo", "simpo, β 2.5"]
    kinds = [Settings("dpo"), Settings("dpo", reference="cached")]
    assert labelled(*kinds) == ["dpo", "dpo, reference cached"]


def test_labels_of_files_are_their_names():
    files = [Settings(data=name) for name in ("sets/a.jsonl", "sets/b.jsonl:test")]
    assert labelled(*files) == ["simpo, data a.jsonl", "simpo, data b.jsonl:test"]
    models = [Settings(model=name) for name in ("runs/sft-1/model", "runs/sft-2/model")]
    assert labelled(*models) == ["simpo, model sft-1", "simpo, model sft-2"]
    same_name = [Settings(data=name) for name in ("one/a.jsonl", "two/a.jsonl")]
    assert labelled(*same_name) == ["simpo (0)", "simpo (1)"]


def test_labels_name_the_hardware_only_if_nothing_else_differs():
    fast = Settings(compile=True, microbatch_tokens=4096)
    assert labelled(Settings(), fast) == ["simpo", "simpo, microbatch tokens 4096, compile"]
    assert labelled(Settings("dpo"), fast) == ["dpo", "simpo"]
    assert labelled(Settings(out="a"), Settings(out="b")) == ["simpo (0)", "simpo (1)"]


def test_labels_of_folders():
    assert labels(["runs/a", "hub/name"], [None, None]) == ["a", "name"]
    names = ["one/simpo-1", "two/simpo-1", "three/simpo-1/model"]
    assert labels(names, [None] * 3) == [f"simpo-1 ({name})" for name in names]
    assert labels(names[:2], [Settings(), None]) == ["simpo", "simpo-1"]


def test_recorded_settings(tmp_path):
    run = a_run(tmp_path / "simpo-1", objective="simpo", beta=10.0, gamma=3.0, unknown=1)
    expected = Settings(beta=10.0, model=str(TOY / "checkpoint"))
    assert recorded_settings(str(run)) == recorded_settings(str(run / "model")) == expected
    assert recorded_settings(str(TOY / "checkpoint")) is None  # its config.json is a model's
    assert recorded_settings("owner/name") is None


# -- the commands


def command(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study/analyze.py", *map(str, words)])
    analyze.main()


def some_pairs(folder: Path, n: int = 30) -> Path:
    path = folder / "pairs.jsonl"
    lines = (TOY / "heldout.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:n]))
    return path


def a_run(folder: Path, **settings) -> Path:
    """Write what train.py would leave of a run that changed nothing."""
    folder.mkdir()
    (folder / "model").symlink_to(TOY / "checkpoint")
    record = {"settings": {"model": str(TOY / "checkpoint"), **settings}}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_rewards_command(monkeypatch, capsys, tmp_path):
    runs = [
        a_run(tmp_path / "simpo-1", objective="simpo", beta=10.0, gamma=3.0),
        a_run(tmp_path / "simpo-2", objective="simpo", beta=10.0, length_norm=False),
        a_run(tmp_path / "dpo-1", objective="dpo", beta=0.1),
    ]
    out = tmp_path / "out"
    policies = [word for run in runs for word in ("--policy", run)]
    command(monkeypatch, "rewards", *policies, "--data", some_pairs(tmp_path), "--out", out)
    names = ["simpo", "simpo, no length norm", "dpo"]
    rows = capsys.readouterr().out.splitlines()
    assert all(any(row.startswith(f"| {name} ") for row in rows) for name in names)
    results = json.loads((out / "rewards.json").read_text())
    assert list(results) == names
    simpo, sums, dpo = results.values()
    assert [result["policy"] for result in results.values()] == [str(run) for run in runs]
    assert simpo["mis_ranked"] == 0 and simpo["beta"] == 10
    assert sums["mis_ranked"] > 0 and not sums["length_norm"]
    # the run is its own reference
    assert dpo["reward_accuracy"] == 0.5 and dpo["reward_margin"] == {"mean": 0, "sd": 0}
    assert simpo["spearman_likelihood_length"] == dpo["spearman_likelihood_length"]
    assert sorted(path.name for path in out.glob("*.png")) == [
        "accuracy-length.png",
        "contingency.png",
        "distributions.png",
        "likelihood-length.png",
    ]


def test_another_objective_takes_its_own_hyperparameters(tmp_path):
    """A run's β of 10 says nothing of DPO's."""
    recorded = {"beta": 10.0, "gamma_beta_ratio": 0.3, "length_norm": False}
    run = a_run(tmp_path / "simpo-1", objective="simpo", **recorded)

    def settings_of(*flags: str) -> Settings:
        words = ["rewards", "--policy", "x", "--data", "x", "--out", "x", *flags]
        return analyze.open_policy(str(run), analyze.read_flags(words))[1]

    assert recorded.items() <= vars(settings_of()).items()
    ipo = settings_of("--objective", "ipo")
    assert (ipo.beta, ipo.gamma_beta_ratio, ipo.length_norm) == (0.1, None, False)
    assert ipo.model == str(TOY / "checkpoint")
    assert settings_of("--objective", "kto", "--beta", "0.3").beta == 0.3


def test_scores_do_not_depend_on_the_micro_batch(tmp_path):
    tokenizer, model = Tokenizer(TOY / "checkpoint"), checkpoint.load(TOY / "checkpoint")
    pairs, _ = analyze.read_pairs(str(some_pairs(tmp_path, 8)), tokenizer, 512, 256)
    one, lengths = analyze.score_pairs(model, pairs)
    torch.testing.assert_close(one, analyze.score_pairs(model, pairs, microbatch_tokens=1)[0])
    assert lengths.tolist() == [[len(r) for r in pair.responses] for pair in pairs]


def test_curves_command(monkeypatch, capsys, tmp_path):
    constant = {
        "rewards/accuracies": 0.5,
        "avg_logps/chosen": -1,
        "avg_logps/rejected": -2,
        "lengths/chosen": 9,
        "lengths/rejected": 8,
        "pairs_per_second": 3.0,
        "peak_memory_gib": 0.1,
    }
    rows = [{"step": s, "loss": 1 / s, "rewards/margins": s} | constant for s in range(1, 41)]
    held_out = {"eval_loss": 0.25, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.5}
    rows.append({"step": 40} | held_out)
    runs = [
        a_run(tmp_path / "simpo-1", objective="simpo"),
        a_run(tmp_path / "simpo-2", objective="simpo", lr=5e-6),
        tmp_path / "run",
    ]
    runs[-1].mkdir()
    (runs[-1] / "config.json").write_text("{")  # a figure of metrics does without
    for run in runs:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(monkeypatch, "curves", *runs, "--out", tmp_path / "curves.png")
    printed = capsys.readouterr().out.splitlines()[2:5]
    assert [row.split("|")[1].strip() for row in printed] == ["simpo", "simpo, lr 5e-06", "run"]
    assert all("75.0" in row for row in printed)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


REWARDS = ["rewards", "--policy", TOY / "checkpoint", "--out", "x"]


@pytest.mark.parametrize(
    "words, status, parts",
    [
        (["curves", "nowhere", "--out", "x.png"], 1, ["nowhere/metrics.jsonl"]),
        (["curves", "nowhere", "--out", "x.txt"], 2, ["--out", "x.txt", ".png"]),
        ([*REWARDS[:2], "nowhere", "--data", TOY / "heldout.jsonl", "--out", "x"], 1, ["nowhere"]),
        ([*REWARDS, "--data", "nowhere.jsonl"], 1, ["nowhere.jsonl"]),
        (
            [*REWARDS, "--data", TOY / "heldout.jsonl", "--objective", "dpo"],
            1,
            ["checkpoint", "dpo", "--reference"],
        ),
        ([*REWARDS, "--data", TOY / "heldout.jsonl", "--beta", "-1"], 2, ["--beta", "positive"]),
        ([*REWARDS, "--data", TOY / "heldout.jsonl", "--objective", "sft"], 2, ["--objective"]),
        (["rewards", "--data", TOY / "heldout.jsonl", "--out", "x"], 2, ["--policy"]),
        ([], 2, ["rewards | curves"]),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, words, status, parts):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, *words)
    if status == 1:  # sys.exit prints its message and exits with 1
        line = exit.value.code
        assert "\n" not in line
    else:
        assert exit.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(analyze.PROGRAM) and "error: " in line
    assert all(part in line for part in parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"objective": "sft"}, ["sft-1", "sft", "--objective"]),
        ({"objective": "of tomorrow"}, ["config.json", "settings.objective", "of tomorrow"]),
    ],
)
def test_runs_without_a_reward_are_refused(monkeypatch, tmp_path, settings, parts):
    run = a_run(tmp_path / "sft-1", **settings)
    words = ["--policy", run, "--data", some_pairs(tmp_path), "--out", tmp_path / "x"]
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, "rewards", *words)
    assert all(part in exit.value.code for part in parts)
    assert not (tmp_path / "x").exists()


def test_a_run_in_a_folder_called_model_is_a_run(tmp_path):
    """`model` names a checkpoint folder only if it is not itself the folder of a run."""
    run = tmp_path / "model"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "config.json").write_text('{"settings": {"objective": "dpo", "beta": 0.3}}')
    for name in (str(run), str(run / "model")):
        settings = recorded_settings(name)
        assert settings is not None and (settings.objective, settings.beta) == ("dpo", 0.3)
