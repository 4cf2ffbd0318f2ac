"""Adding an objective is a function and a line: here, one that nothing in the project knows of.

This is the documented way to try a loss of your own: write it in the shape of `simpo.py`, add it to
`OBJECTIVES`, and everything else follows from the entry.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_train import TOY, fails, losses, run

from methods.objectives import OBJECTIVES, Objective, hyperparameters, pair_losses
from runtime.settings import check_hyperparameters, read_settings
from study import analyze


def angle_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, delta):
    """Ask the chosen average to win by `delta`; a SLiC-HF on SimPO's reward."""
    chosen_rewards = beta * chosen_logps / chosen_lengths
    rejected_rewards = beta * rejected_logps / rejected_lengths
    losses = F.relu(delta - chosen_rewards + rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


@pytest.fixture
def angle(monkeypatch):
    """Add the objective: the function above and this line."""
    entry = Objective(
        lambda p, s: angle_loss(*p.logps, *p.lengths, s.beta, s.delta), {"beta": 5.0, "delta": 2.0}
    )
    monkeypatch.setitem(OBJECTIVES, "angle", entry)


def test_a_new_objective_trains_on_the_toy(monkeypatch, angle, tmp_path):
    """Without a toy/angle.toml it trains on the model and data of toy/simpo.toml."""
    settings = read_settings(["--objective=angle"])
    assert settings.data == str(TOY / "train.jsonl") and settings.batch_size == 32
    assert (settings.beta, settings.delta) == (
        5.0,
        2.0,
    )  # its own defaults, not those of SimPO's toy
    few = tmp_path / "few.jsonl"
    few.write_text("".join((TOY / "heldout.jsonl").open().readlines()[:100]))
    flags = {"data": TOY / "train.jsonl", "eval_data": few, "batch_size": 32, "max_steps": 12}
    rows = run(monkeypatch, tmp_path / "run", objective="angle", **flags)
    before, after = rows[0], rows[-1]
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert recorded["objective"] == "angle" and recorded["delta"] == 2.0


@pytest.mark.parametrize(
    "returned",
    [
        lambda losses, *rewards: losses,
        lambda losses, *rewards: (losses.mean(), *rewards),
        lambda losses, chosen, rejected: (losses[:, None] + losses, chosen, rejected),
        lambda losses, chosen, rejected: (losses, chosen - rejected),
    ],
    ids=["no rewards", "a mean", "pairs by pairs", "a margin"],
)
def test_a_loss_returns_one_number_per_pair(monkeypatch, returned):
    """What broadcasts would be averaged all the same, with other results in other micro-batches."""
    loss = lambda p, s: returned(*angle_loss(*p.logps, *p.lengths, 5.0, 2.0))  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(loss))
    logps, lengths = -torch.rand(3, 2), torch.ones(3, 2)
    with pytest.raises(TypeError, match="objective mine: its loss must return .losses, chosen_"):
        pair_losses(SimpleNamespace(objective="mine"), logps, lengths, None)


@pytest.mark.parametrize("name", ["tau", "lr"])
def test_a_hyperparameter_is_a_setting_without_a_default(monkeypatch, name):
    """Absent, every command would fail; with a default, every objective would refuse it."""
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(None, {name: 1.0}))
    with pytest.raises(TypeError, match=f"{name} of mine: Settings needs `{name}: float"):
        check_hyperparameters()


def test_rewards_carry_no_gradient(monkeypatch):
    """Even if a loss forgets to detach them."""
    loss = lambda p, s: (p.logps[0] - p.logps[1], *p.logps)  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(loss))
    logps = torch.rand(3, 2, requires_grad=True)
    settings = SimpleNamespace(objective="mine")
    losses, metrics = pair_losses(settings, logps, torch.ones(3, 2), None)
    assert losses.requires_grad and not any(x.requires_grad for x in metrics.values())


def test_a_reference_must_be_asked_for(monkeypatch):
    loss = lambda p, s: p.ref_logps  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "mine", Objective(loss))
    with pytest.raises(TypeError, match='add "reference": "online" to its defaults'):
        pair_losses(SimpleNamespace(objective="mine"), torch.rand(3, 2), torch.ones(3, 2), None)


def test_help_defaults_and_checks_follow(monkeypatch, angle, capsys, tmp_path):
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "angle}" in text and "1.0 for slic; 2.0 for angle" in text
    line = fails(monkeypatch, capsys, tmp_path / "run", 2, objective="angle", length_norm=True)
    assert "--length-norm: not a setting of angle" in line
    line = fails(monkeypatch, capsys, tmp_path / "run", 2, objective="dpo", delta=1.0)
    assert "--delta: not a setting of dpo, but of slic, angle" in line


def test_analyses_know_its_reward(angle):
    logps, lengths = torch.tensor([[-4.0, -6.0]]), torch.tensor([[2, 3]])
    settings = read_settings(["--objective=angle", "--model=m", "--data=d"])
    assert analyze.rewards_of(settings, logps, lengths).tolist() == [[-10.0, -10.0]]


def test_a_statistic_of_the_whole_step(monkeypatch, tmp_path):
    """An entry that asks for one gets it, the same in every micro-batch, before the loss."""
    seen = []

    def centred(p, s):
        seen.append(p.baseline)
        chosen, rejected = (s.beta * logps for logps in p.logps)
        return -F.logsigmoid(chosen - rejected - p.baseline), chosen.detach(), rejected.detach()

    entry = Objective(centred, {"beta": 0.1}, step_baseline=lambda m: m["rewards/margins"])
    monkeypatch.setitem(OBJECTIVES, "centred", entry)
    flags = {"max_steps": 1, "microbatch_tokens": 100}
    [row] = run(monkeypatch, tmp_path / "run", objective="centred", **flags)
    passes = len(seen) // 2
    assert passes > 1 and seen[:passes] == [0.0] * passes
    assert seen[passes:] == pytest.approx([row["rewards/margins"]] * passes)
    assert len(losses([row])) == 1


def test_every_hyperparameter_is_a_setting():
    settings = read_settings(["--model=m", "--data=d"])
    assert all(hasattr(settings, name) for name in hyperparameters())
