"""Run docs/from_python.py, as its readers will."""

import ast
import runpy
from pathlib import Path

import pytest
import torch

from methods.objectives import OBJECTIVES
from runtime.settings import Settings
from train import train

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "from_python.py"


def flags(folder: Path, name: str) -> dict:
    few = folder / "few.jsonl"
    few.write_text("".join((ROOT / "toy" / "train.jsonl").open().readlines()[:32]))
    toy = {"model": str(ROOT / "toy" / "checkpoint"), "data": str(few), "eval_data": str(few)}
    return toy | {"batch_size": 16, "epochs": 2, "device": "cpu", "out": str(folder / name)}


def test_both_examples_learn(monkeypatch, tmp_path, capsys):
    """Training returns a model folder, and a new objective takes part in everything."""
    monkeypatch.chdir(ROOT)
    example = runpy.run_path(str(FILE), run_name="docs")
    try:
        model = example["simpo"](**flags(tmp_path, "simpo"))
        assert (model / "model.safetensors").exists() and model.parent == tmp_path / "simpo"
        printed = capsys.readouterr().out
        assert "rewards/margins" in printed and "What was learnt" in printed
        settings = Settings(objective="hinge", lr=5e-4, **flags(tmp_path, "hinge"))
        result = train(settings)
        assert result["after"]["loss"] < result["before"]["loss"] - 0.01
        assert "hinge, beta 10.0\n  4 steps" in capsys.readouterr().out
        # per token −1 against −2 and against −1.05, at β 10: margins of 10 and ½
        chosen, rejected = torch.tensor([-4.0, -4.0]), torch.tensor([-4.0, -2.1])
        lengths = torch.tensor([4, 4]), torch.tensor([2, 2])
        losses, *rewards = example["hinge_loss"](chosen, rejected, *lengths, 10.0)
        assert losses.tolist() == pytest.approx([0.0, 0.5], abs=1e-5)
        assert [r.tolist() for r in rewards] == [[-10, -10], [-20, -10.5]]
    finally:
        del OBJECTIVES["hinge"]


@pytest.mark.parametrize("name, most", [("simpo", 10), ("hinge_loss", 10)])
def test_the_examples_are_ten_lines(name, most):
    [function] = [
        node for node in ast.parse(FILE.read_text()).body if getattr(node, "name", "") == name
    ]
    assert function.end_lineno - function.lineno + 1 <= most
