"""Check bench/decoding.py: the same tokens as transformers, and a difference is seen."""

import json
import sys
from pathlib import Path

import decoding
import pytest

import sample
from formats.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy" / "checkpoint"


def test_decoding_bench(monkeypatch, tmp_path, capsys):
    """Give the same tokens as transformers, with and without stop tokens, and see a difference."""
    pytest.importorskip("transformers", minversion="4.56")
    texts = ["describe the fox .", "describe the fox and the moon and the owl .", "the owl"]
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    flags = f"--model {TOY} --prompts {tmp_path}/prompts.jsonl --batch-size 2"
    flags += " --max-new-tokens 24 --repeats 1"
    for extra in ([], ["--stop"]):
        monkeypatch.setattr(sys, "argv", ["decoding.py", *flags.split(), *extra])
        decoding.main()
        out = capsys.readouterr().out
        assert "3 prompts of " in out and "ratio " in out and out.endswith("equal\n"), out
        assert "first difference" not in out


def test_decoding_bench_sees_a_difference():
    model, prompts = load(TOY), [[1, 2, 3], [4, 5]]
    generated = sample.generate(model, prompts, set(), 5)
    changed = [generated[0], list(generated[1])]
    changed[1][3] += 1
    said = decoding.first_difference(model, prompts, generated, changed)
    assert said.startswith("1 of 2 answers equal")
    assert "token 3 of answer 1" in said
    assert decoding.cut([5, 7, 2, 0, 2], {2}) == [5, 7, 2] and decoding.cut([5, 7], {2}) == [5, 7]
