"""Check that the benches compare like with like, and that every script explains itself.

Both sides get the same tokens and compute the same log-probabilities; ratios follow from the times.
"""

import argparse
import ast
import runpy
import sys
from pathlib import Path

import compare
import limits
import numpy as np
import peer
import pytest
import switches
import torch

import workload
from data import Pair, assign
from formats.checkpoint import load
from formats.errors import DataError
from formats.records import read_records
from formats.schemas import parse_record
from formats.tokenizer import Tokenizer
from train import response_logps

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "toy" / "checkpoint"
SCRIPTS = sorted([*(ROOT / "bench").glob("*.py"), *(ROOT / "toy").glob("*.py")])


def pairs_of(*shapes: tuple[int, int, int]) -> list[Pair]:
    """Return pairs of random tokens; shapes: tokens of prompt, chosen and rejected."""
    rng = np.random.default_rng(0)
    pairs = []
    for p, c, r in shapes:
        prompt, chosen, rejected = (rng.integers(4, 90, n) for n in (p, c, r))
        pairs.append(Pair(prompt, (chosen, rejected)))
    return pairs


# Every script explains itself.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_prints_the_docstring(script, monkeypatch, capsys):
    """Print it even without the packages that only the comparisons need."""
    for name in ("datasets", "transformers", "trl"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as e:
        assert not e.code
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert docstring and docstring.strip() in capsys.readouterr().out


@pytest.mark.parametrize("script", ["decoding", "parity"])
def test_a_missing_peer_is_one_line(script, monkeypatch):
    """Say what is missing and how to install it, not a traceback."""
    for name in ("transformers", "trl"):
        monkeypatch.setitem(sys.modules, name, None)
    flags = ["--model=a", "--prompts=b"] if script == "decoding" else []
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as e:
        __import__(script).main()
    assert "\n" not in str(e.value) and "bench/requirements.txt" in str(e.value)


# Pairs and checkpoints to compare on.


@pytest.mark.parametrize("shape", workload.SHAPES)
def test_made_up_pairs_have_the_lengths_of_the_known_set(shape):
    median, ratio = workload.SHAPES[shape]
    lengths = workload.shape_lengths(shape, 20000, seed=1)
    prompt, chosen, rejected = np.median(lengths, axis=0)
    assert prompt / chosen == pytest.approx(ratio, rel=0.03)
    assert chosen == pytest.approx(rejected, rel=0.03)
    assert prompt + chosen == pytest.approx(median, rel=0.03)
    assert (lengths[:5] == workload.shape_lengths(shape, 20000, seed=1)[:5]).all()


def test_made_up_pairs_become_as_many_tokens_as_were_asked_for(tmp_path):
    tokenizer = Tokenizer(TOY, "")
    lengths = np.array([[5, 9, 2], [30, 3, 40]])
    records = workload.shaped_records(tokenizer, lengths, seed=0)
    assert len(workload.tokenized(records, 1, tokenizer, 100, 80)[1]) == 1
    kept, many = workload.tokenized(records, 3, tokenizer, 100, 80)
    assert kept == records and len(many) == 2
    pairs = workload.write_pairs(kept, many, 2, tmp_path / "pairs.jsonl")
    bos = tokenizer.bos_id is not None
    found = [[len(pair.prompt), *map(len, pair.responses)] for pair in pairs]
    assert found == [[p + bos, c, r] for p, c, r in lengths]
    read = read_records(str(tmp_path / "pairs.jsonl"))  # as train.py does
    prompts = [parse_record(record, where)[1].prompt for where, record in read]
    assert prompts == [record["prompt"] for record in records]
    with pytest.raises(DataError, match="only 2 usable pairs"):
        workload.write_pairs(kept, many, 3, tmp_path / "pairs.jsonl")


def test_a_random_checkpoint_can_be_trained(tmp_path):
    """Make new weights from the shape alone; the loss is near what chance gives."""
    small = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    workload.random_checkpoint(tmp_path / "model", workload.MODELS["smollm2-135m"] | small)
    model, tokenizer = load(tmp_path / "model"), Tokenizer(tmp_path / "model", "")
    tokenizer.check_fits(model.config.vocab_size)
    assert model.config.rope_theta == 100000.0 and model.model.norm.weight.eq(1).all()
    deviation = model.model.layers[1].mlp.up_proj.weight.float().std().item()
    assert deviation == pytest.approx(0.02, rel=0.05)
    logps, lengths = response_logps(model, pairs_of((7, 5, 3), (2, 1, 11)))
    assert (logps / lengths).mean().item() == pytest.approx(-np.log(1000), rel=0.02)


# What each side computes.


def test_padded_rows_by_hand():
    """Pad to 2 + 11 tokens, the longest of two pairs; the third, alone, has 12 + 4."""
    rows = compare.padded(pairs_of((7, 5, 3), (2, 1, 11), (12, 4, 4)), microbatch=2)
    assert [row.tokens for row in rows] == [13] * 4 + [16] * 2
    # all of it meets the vocabulary
    assert sum(len(r) for row in rows for r in row.responses) == 4 * 13 + 2 * 16


def test_peak_is_of_what_is_allocated_at_once():
    def work() -> None:
        kept = torch.empty(2**20)
        torch.empty(2**21)  # freed at once
        (kept + 1).sum()
        kept.exp().log()  # both, beside what they are made from

    assert limits.peak_bytes("cpu", work) == pytest.approx(3 * 4 * 2**20, rel=1e-3)


@pytest.mark.parametrize("check", ["vocabulary", "tokens", "data"])
def test_limits_print_a_line(check, monkeypatch, capsys):
    monkeypatch.setattr(limits, "SMALL", limits.Config(97, 24, 32, 1, 3, 1, 8))
    monkeypatch.setattr(sys, "argv", ["limits.py", check, "--tokens=2048", "--device=cpu"])
    limits.main()
    assert "2048 tokens" in capsys.readouterr().out


def test_every_switch_computes_the_same_log_probabilities():
    model = load(TOY)
    pairs = pairs_of((7, 5, 3), (2, 1, 11), (12, 4, 4))
    # One pair by another way: one response at a time, without padding.
    first, expected = pairs[0], switches.rectangle(model, pairs[:1])
    singles = [Pair(first.prompt, (response, response)) for response in first.responses]
    alone = torch.stack([switches.rectangle(model, [single])[0, 0] for single in singles])
    torch.testing.assert_close(expected[0], alone)
    expected = switches.rectangle(model, pairs)
    for name, logps in switches.VARIANTS.items():
        torch.testing.assert_close(
            logps(model, pairs), expected, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_budget_is_the_least_that_takes_no_more_passes():
    pairs = pairs_of(*[(20, n, 2 * n) for n in (10, 30, 60, 20, 25, 90, 40, 15)])
    budget = compare.microbatch_tokens(pairs, batch_size=4, microbatch=2)

    def passes(budget: int) -> list[int]:
        steps = ([pair.tokens for pair in pairs[i : i + 4]] for i in (0, 4))
        return [len(assign(step, 1, budget)) for step in steps]

    assert max(passes(budget)) == 2 and max(passes(budget - 64)) == 3


def test_the_peer_is_told_to_predict_responses_alone():
    row = peer.cpo_row({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]})
    assert row["rejected_input_ids"] == [1, 2, 4, 5]
    assert row["rejected_labels"] == [-100, -100, 4, 5]
    assert row["chosen_labels"] == [-100, -100, 3]
    assert row["chosen_attention_mask"] == [1, 1, 1]


# The comparison.


def flags_of(**changes) -> argparse.Namespace:
    flags = {"batch_size": 1, "rounds": 2, "dtype": "fp32", "device": "cpu", "peer": "trl"}
    return argparse.Namespace(model=TOY, **flags | changes)


def test_the_table_follows_from_the_times(monkeypatch):
    """Leave out the first step, however slow. A pair has 10 response tokens."""
    monkeypatch.setattr(compare, "gemm_flops", lambda *_: 1e9)
    ours = iter([[9.0, 1.0, 1.0], [9.0, 2.0, 2.0]])  # seconds per step

    def run(seconds: list[float], peak: float, loss: float) -> dict:
        return {"seconds": seconds, "peak_gib": peak, "loss": loss, "logps": [-1.0, -2.0]}

    contenders = [
        compare.Contender("A", lambda _: run(next(ours), 1.0, 0.5)),
        compare.Contender("B", lambda _: run([1.0, 4.0, 4.0], 2.0, 0.55)),
        compare.Contender("C", lambda _: {"unavailable": "no such device"}),
    ]
    pairs = pairs_of((5, 6, 4), (5, 6, 4), (5, 6, 4))
    table = compare.compare(flags_of(), pairs, contenders, [(0, 1), (0, 2)])
    assert "| A | 0.7500 (0.5000–1.0000) | 8 | 1.00 (1.00–1.00) |" in table
    speed, time = "pairs/s × 3.00 (2.00–4.00)", "time × 0.38 (0.25–0.50)"
    assert f"A : B: {speed}, {time}, memory × 0.50 (0.50–0.50)" in table
    assert "at step 1 losses differ by 9e-02, log-probabilities by 0e+00" in table
    assert "THE SIDES DO NOT COMPUTE THE SAME" in table
    assert "not run: no such device" in table and "A : C" not in table


@pytest.mark.parametrize("objective, given", [("simpo", False), ("dpo", True)])
def test_only_an_objective_with_a_reference_is_given_one(objective, given, monkeypatch, tmp_path):
    """Leave the flag out for any other, since train.py refuses it."""
    started = []

    def start(script: Path, *arguments: str) -> str:
        started.extend(arguments)
        (tmp_path / "run").mkdir()
        row = '{"pairs_per_second": 1, "loss": 1, "peak_memory_gib": 1, '
        row += ", ".join(
            f'"{kind}/{name}": 1'
            for kind in ("logps", "avg_logps")
            for name in ("chosen", "rejected")
        )
        (tmp_path / "run" / "metrics.jsonl").write_text(row + "}\n")
        return ""

    monkeypatch.setattr(compare, "start", start)
    flags = flags_of(max_length=64, microbatch_tokens=64, shape=None, activation_checkpointing=True)
    compare.our_run(flags, tmp_path / "pairs.jsonl", objective, "cached", "", tmp_path)
    assert ("--reference=cached" in started) is given
