"""`--show N`: what is printed is what is trained on, and nothing else."""

import json
import sys
from collections import Counter

import like_authors
import pytest
from test_train import TOY, arguments, fails

import train
from data import encode
from formats.errors import printable
from formats.records import read_records
from formats.schemas import parse_record
from formats.tokenizer import Tokenizer

GOOD = {"prompt": "describe the fox .", "chosen": "the fox runs away .", "rejected": "the fox ."}


def shown(monkeypatch, capsys, tmp_path, *records: dict, **flags) -> str:
    """Return what `train.py --show` prints for these records."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = arguments(tmp_path / "run", data=pairs, show=len(records), **flags)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train.main()
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().out


def test_a_pair_is_shown_as_it_is_trained(monkeypatch, capsys, tmp_path):
    """Special tokens are visible, and the marks stand around what is predicted."""
    out = shown(monkeypatch, capsys, tmp_path, GOOD)
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].endswith("pairs.jsonl:1: explicit")
    [(where, record)] = read_records(str(tmp_path / "pairs.jsonl"))
    tokenizer = Tokenizer(TOY / "checkpoint")
    [pair] = encode([parse_record(record, where)[1]], tokenizer, 2048, 1800, Counter())
    for name, ids in zip(("prompt", "chosen", "rejected"), (pair.prompt, *pair.responses)):
        text = tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)
        assert f"{name}, {len(ids)} tokens" in lines
        assert (text if name == "prompt" else f"⟦{text}⟧") in lines
    assert out.count("<|end|>") == 3


def test_what_was_cut_and_dropped_is_said(monkeypatch, capsys, tmp_path):
    long = GOOD | {"chosen": " ".join(["the fox runs away ."] * 20)}
    same = GOOD | {"rejected": GOOD["chosen"]}
    flags = {"max_length": 40, "max_prompt_length": 10}
    out = shown(monkeypatch, capsys, tmp_path, long, same, **flags)
    assert "chosen, 33 tokens, 68 cut at its end" in out
    assert "pairs.jsonl:2: dropped: chosen equal to rejected" in out


def test_a_dry_run_ends_with_a_pair(monkeypatch, capsys, tmp_path):
    """It is shown as by --show 1, if tokenizer and data are on this machine."""
    first = shown(monkeypatch, capsys, tmp_path, GOOD)
    out = shown(monkeypatch, capsys, tmp_path, GOOD, dry_run=True)
    assert out.endswith(first) and "⟦" in first and len(out) > 2 * len(first)


def test_an_unusable_record_is_shown_as_dropped(monkeypatch, capsys, tmp_path):
    odd = GOOD | {"prompt": [{"role": "narrator", "content": "describe the fox ."}]}
    out = shown(monkeypatch, capsys, tmp_path, odd, GOOD, skip_unusable=0.9)
    assert "dropped: unusable: " in out and "pairs.jsonl:1: prompt[0]: " in out
    assert "pairs.jsonl:2: explicit" in out
    with pytest.raises(SystemExit):
        shown(monkeypatch, capsys, tmp_path, odd, GOOD)
    assert "pairs.jsonl:1: prompt[0]: " in capsys.readouterr().err


def test_colours_on_a_terminal(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("runtime.show.on_terminal", lambda: True)
    out = shown(monkeypatch, capsys, tmp_path, GOOD)
    assert "\x1b[4m" in out and "⟦" not in out and out.count("\x1b[0m") == 3


def test_what_steers_a_terminal_is_escaped():
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\nb\\u202e"


@pytest.mark.parametrize("flags", [{"show": -1}])
def test_usage(monkeypatch, capsys, tmp_path, flags):
    assert "--show" in fails(monkeypatch, capsys, tmp_path / "run", 2, **flags)


def test_the_switch_reaches_show(monkeypatch, capsys, tmp_path):
    """The switch is followed: the toy names no BOS, without which the authors' way is refused."""
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, show=1, like_authors=True)
    assert "bos_token" in line and "--like-authors" in line


def test_nothing_but_small_files_is_asked_of_the_hub(monkeypatch, capsys, tmp_path):
    """An 8B model's weights are 16 GB, and a look at three pairs needs none of them."""
    asked = []
    monkeypatch.setattr(
        "formats.hub.from_hub",
        lambda name, kind, choose: (
            asked.append(
                choose(["model-00001-of-00002.safetensors", "tokenizer.json", "config.json"])
            )
            or TOY / "checkpoint"
        ),
    )
    out = shown(monkeypatch, capsys, tmp_path, GOOD, model="owner/name")
    assert asked == [["tokenizer.json", "config.json"]] and "⟦" in out


def test_the_authors_tokens_are_shown(monkeypatch, capsys, tmp_path):
    """The assistant's header is part of the response, and predicted."""
    words = like_authors.write_training(tmp_path, 1)
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--show=1"])
    train.main()
    # this tokenizer has no decoder: its pieces stand apart
    assert capsys.readouterr().out.replace(" ", "").count("⟦<|assistant|>") == 2
