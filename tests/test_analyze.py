"""The analyses against cases that can be worked out by hand, and the two commands on the toy."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import train

TOY = Path(__file__).resolve().parent.parent / "toy"
sigmoid = lambda x: 1 / (1 + np.exp(-x))


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
    assert cells == pytest.approx({"both": 0.4, "reward only": 0.2, "likelihood only": 0.2, "neither": 0.2})


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
    assert sum(b["pairs"] * b["accuracy"] for b in bins) / 500 == pytest.approx(analyze.accuracy(margins))
    assert all(a["to"] < b["from"] for a, b in zip(bins, bins[1:]))


def test_length_control_recovers_the_model_that_made_the_wins():
    differences = np.random.default_rng(2).integers(-30, 70, 400)
    wins = sigmoid(0.4 + 1.5 * np.tanh(differences / differences.std()))
    assert analyze.length_controlled_win_rate(wins, differences) == pytest.approx(sigmoid(0.4), abs=1e-9)
    assert wins.mean() > sigmoid(0.4) + 0.05  # what it took out


def test_length_control_where_length_says_nothing():
    wins = np.array([1, 1, 1, 0.5, 0, 1])
    assert analyze.length_controlled_win_rate(wins, np.zeros(6)) == pytest.approx(wins.mean())
    # each result once with a longer and once with a shorter answer: nothing for φ to explain
    twice, lengths = np.tile(wins, 2), np.repeat([7, -7], 6)
    assert analyze.length_controlled_win_rate(twice, lengths) == pytest.approx(wins.mean())
    assert analyze.length_controlled_win_rate(np.ones(6), np.arange(6)) > 0.999  # no finite fit, still an answer


def test_a_judge_of_length_alone_is_seen_through():
    differences = np.random.default_rng(3).integers(0, 80, 300)  # always at least as long
    wins = sigmoid(0.8 * np.tanh(differences / differences.std()))
    assert wins.mean() > 0.6
    assert analyze.length_controlled_win_rate(wins, differences) == pytest.approx(0.5, abs=1e-9)


def test_rewards_and_what_is_said_of_them():
    """Two pairs. Per token −1 and −2 against −2 and −1: SimPO is right once; by sums of log-probabilities, never."""
    logps = torch.tensor([[-4.0, -2.0], [-6.0, -2.0]])
    lengths = torch.tensor([[4, 1], [3, 2]])
    reward = lambda reference=None, **flags: analyze.rewards_of(train.Settings(**flags), logps, lengths, reference)
    assert reward(beta=2.0).tolist() == [[-2, -4], [-4, -2]]
    assert reward(beta=2.0, length_norm=False).tolist() == [[-8, -4], [-12, -4]]
    reference = torch.tensor([[-5.0, -2.0], [-6.0, -4.0]])
    dpo = reward(reference, objective="dpo", beta=0.5)
    assert dpo.tolist() == [[0.5, 0], [0, 1]]
    for objective, wanted in {
        "rrhf": [[-1, -2], [-2, -1]],
        "slic": logps.tolist(),
        "cpo": (0.5 * logps).tolist(),
        "ipo": dpo.tolist(),
        "kto": dpo.tolist(),
        "rdpo": dpo.tolist(),
    }.items():
        beta = {"beta": 0.5} if "beta" in train.HYPERPARAMETERS[objective] else {}
        assert reward(reference, objective=objective, **beta).tolist() == wanted
    odds = reward(objective="orpo").exp().tolist()  # p / (1 − p) of e⁻¹ and e⁻²
    assert odds == [pytest.approx([0.5819767, 0.1565176]), pytest.approx([0.1565176, 0.5819767])]
    result = analyze.analyse(reward(beta=2.0, length_norm=False).numpy(), logps.numpy(), lengths.numpy())
    assert result["reward_accuracy"] == 0 and result["likelihood_accuracy"] == 0.5 and result["mis_ranked"] == 0.5
    assert result["chosen_avg_logp"]["mean"] == -1.5 and result["reward_margin"]["mean"] == -6
    assert result["accuracy_by_length"] == [{"from": 1, "to": 1, "pairs": 1, "accuracy": 0.0}, {"from": 3, "to": 3, "pairs": 1, "accuracy": 0.0}]  # fmt: skip


def test_table_is_aligned_markdown():
    assert analyze.table(["a", "b"], [["xyz", "1"], ["x", "10"]]).splitlines() == [
        "| a   |  b |",
        "|-----|---:|",
        "| xyz |  1 |",
        "| x   | 10 |",
    ]


# -- the commands


def command(monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, words)])
    analyze.main()


def some_pairs(folder: Path, n: int = 30) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((TOY / "heldout.jsonl").read_text().splitlines(keepends=True)[:n]))
    return path


def a_run(folder: Path, **settings) -> Path:
    """What train.py would leave of a run that changed nothing."""
    folder.mkdir()
    (folder / "model").symlink_to(TOY / "checkpoint")
    (folder / "config.json").write_text(json.dumps({"settings": {"model": str(TOY / "checkpoint"), **settings}}))
    return folder


def test_rewards_command(monkeypatch, capsys, tmp_path):
    simpo = a_run(tmp_path / "simpo-1", objective="simpo", beta=10.0, gamma=3.0)
    dpo = a_run(tmp_path / "dpo-1", objective="dpo", beta=0.1)
    out = tmp_path / "out"
    command(monkeypatch, "rewards", "--policy", simpo, "--policy", dpo, "--data", some_pairs(tmp_path), "--out", out)
    assert "simpo-1" in (printed := capsys.readouterr().out) and "dpo-1" in printed
    results = json.loads((out / "rewards.json").read_text())
    assert results["simpo-1"]["mis_ranked"] == 0 and results["simpo-1"]["beta"] == 10
    assert results["dpo-1"]["reward_accuracy"] == 0.5 and results["dpo-1"]["reward_margin"] == {
        "mean": 0,
        "sd": 0,
    }  # its own reference
    assert results["simpo-1"]["spearman_likelihood_length"] == results["dpo-1"]["spearman_likelihood_length"]
    figures = sorted(path.name for path in out.glob("*.png"))
    assert figures == ["accuracy-length.png", "contingency.png", "distributions.png", "likelihood-length.png"]


def test_another_objective_takes_its_own_hyperparameters(tmp_path):
    """A run's β of 10 says nothing of DPO's."""
    run = a_run(tmp_path / "simpo-1", objective="simpo", beta=10.0, gamma_beta_ratio=0.3, length_norm=False)
    settings_of = lambda *flags: analyze.open_policy(
        str(run), analyze.read_flags(["rewards", "--policy", "x", "--data", "x", "--out", "x", *flags])
    )[1]
    assert (settings_of().beta, settings_of().gamma_beta_ratio, settings_of().length_norm) == (10.0, 0.3, False)
    ipo = settings_of("--objective", "ipo")
    assert (ipo.beta, ipo.gamma_beta_ratio, ipo.length_norm, ipo.model) == (0.1, None, False, str(TOY / "checkpoint"))
    assert settings_of("--objective", "kto", "--beta", "0.3").beta == 0.3


def test_scores_do_not_depend_on_the_micro_batch(tmp_path):
    tokenizer, model = analyze.Tokenizer(TOY / "checkpoint"), analyze.llama.load(TOY / "checkpoint")
    trees, _ = analyze.read_pairs(str(some_pairs(tmp_path, 8)), tokenizer, 512, 256)
    one, lengths = analyze.score_pairs(model, trees)
    torch.testing.assert_close(one, analyze.score_pairs(model, trees, microbatch_tokens=1)[0])
    assert lengths.tolist() == [[len(r) for r in tree.responses] for tree in trees]


def test_curves_command(monkeypatch, capsys, tmp_path):
    rows = [{"step": s, "loss": 1 / s, "rewards/margins": s, "rewards/accuracies": 0.5, "avg_logps/chosen": -1, "avg_logps/rejected": -2,
             "lengths/chosen": 9, "lengths/rejected": 8, "pairs_per_second": 3.0, "peak_memory_gib": 0.1} for s in range(1, 41)]  # fmt: skip
    rows.append({"step": 40, "eval_loss": 0.25, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.5})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(monkeypatch, "curves", tmp_path / "run", "--out", tmp_path / "curves.png")
    assert "75.0" in capsys.readouterr().out and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, status",
    [
        (["curves", "nowhere", "--out", "x.png"], 1),
        (["curves", "nowhere", "--out", "x.txt"], 2),
        (["rewards", "--policy", "nowhere", "--data", TOY / "heldout.jsonl", "--out", "x"], 1),
        (["rewards", "--policy", TOY / "checkpoint", "--data", "nowhere.jsonl", "--out", "x"], 1),
        (["rewards", "--policy", TOY / "checkpoint", "--data", TOY / "heldout.jsonl", "--out", "x", "--objective", "dpo"], 1),
        (["rewards", "--policy", TOY / "checkpoint", "--data", TOY / "heldout.jsonl", "--out", "x", "--beta", "-1"], 2),
        (["rewards", "--data", TOY / "heldout.jsonl", "--out", "x"], 2),
        ([], 2),
    ],
)  # fmt: skip
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, words, status):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        command(monkeypatch, *words)
    if status == 1:  # sys.exit prints its message and exits with 1
        assert exit.value.code.startswith("analyze.py: error: ") and "\n" not in exit.value.code
    else:
        assert exit.value.code == 2 and "analyze.py" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
