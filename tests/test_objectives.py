"""Adding an objective is a function and a line: here, one that nothing in the project knows of.

This is the documented way to try a loss of your own: write it in the shape of `simpo.py`, add it to
`OBJECTIVES`, and everything else follows from the entry.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from test_train import TOY, fails, losses, run

from methods.objectives import OBJECTIVES, Objective, hyperparameters
from runtime.settings import read_settings
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
