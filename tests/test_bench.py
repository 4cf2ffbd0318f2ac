"""The benches compare like with like: the same tokens and log-probabilities, and ratios that follow from the times."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model as llama
from data import Tree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import compare  # noqa: E402
import limits  # noqa: E402
import peer  # noqa: E402
import switches  # noqa: E402
import workload  # noqa: E402
from train import response_logps  # noqa: E402


def trees_of(*shapes: tuple[int, int, int]) -> list[Tree]:
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(4, 90, n)
    return [Tree(draw(p), (draw(c), draw(r)), "") for p, c, r in shapes]


@pytest.mark.parametrize("shape", workload.SHAPES)
def test_made_up_pairs_have_the_lengths_of_the_known_set(shape):
    median, ratio = workload.SHAPES[shape]
    lengths = workload.shape_lengths(shape, 20000, seed=1)
    prompt, chosen, rejected = np.median(lengths, axis=0)
    assert prompt / chosen == pytest.approx(ratio, rel=0.03) and chosen == pytest.approx(rejected, rel=0.03)
    assert prompt + chosen == pytest.approx(median, rel=0.03)
    assert (lengths[:5] == workload.shape_lengths(shape, 20000, seed=1)[:5]).all()


def test_made_up_pairs_become_as_many_tokens_as_were_asked_for(tmp_path):
    tokenizer = data.Tokenizer(ROOT / "toy" / "checkpoint", "")
    lengths = np.array([[5, 9, 2], [30, 3, 40]])
    records = workload.shaped_records(tokenizer, lengths, seed=0)
    assert len(workload.tokenized(records, 1, tokenizer, 100, 80)[1]) == 1
    kept, many = workload.tokenized(records, 3, tokenizer, 100, 80)
    trees = workload.write_pairs(kept, many, 2, tmp_path / "pairs.jsonl")
    bos = tokenizer.bos_id is not None
    assert [[len(t.prompt), *map(len, t.responses)] for t in trees] == [[p + bos, c, r] for p, c, r in lengths]
    again = [data.parse_record(record, where)[1] for where, record in data.read_records(str(tmp_path / "pairs.jsonl"))]
    assert [e.prompt for e in again] == [r["prompt"] for r in records]  # what train.py reads
    with pytest.raises(data.DataError, match="only 2 usable pairs"):
        workload.write_pairs(kept, many, 3, tmp_path / "pairs.jsonl")


def test_a_random_checkpoint_can_be_trained(tmp_path):
    """From the shape alone: config.json, weights as models begin, the toy's tokenizer; a loss near what chance gives."""
    shape = workload.MODELS["smollm2-135m"] | {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2,
                                               "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    workload.random_checkpoint(tmp_path / "model", shape)
    model, tokenizer = llama.load(tmp_path / "model"), data.Tokenizer(tmp_path / "model", "")
    tokenizer.check_fits(model.config.vocab_size)
    assert model.config.rope_theta == 100000.0 and model.model.norm.weight.eq(1).all()
    assert model.model.layers[1].mlp.up_proj.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    logps, lengths = response_logps(model, trees_of((7, 5, 3), (2, 1, 11)))
    assert (logps / lengths).mean().item() == pytest.approx(-np.log(1000), rel=0.02)


def test_padded_rows_by_hand():
    rows = compare.padded(trees_of((7, 5, 3), (2, 1, 11), (12, 4, 4)), microbatch=2)
    assert [len(row) for row in rows] == [13] * 4 + [16] * 2  # the longest of two pairs: 2 + 11; alone: 12 + 4
    assert sum(len(r) for row in rows for r in row.responses) == 4 * 13 + 2 * 16  # all of it meets the vocabulary


def test_peak_is_of_what_is_allocated_at_once():
    def work() -> None:
        kept = torch.empty(2**20)
        torch.empty(2**21)  # freed at once
        (kept + 1).sum()
        kept.exp().log()  # both, beside what they are made from

    assert limits.peak_bytes("cpu", work) == pytest.approx(3 * 4 * 2**20, rel=1e-3)


def test_every_switch_computes_the_same_log_probabilities():
    model = llama.load(ROOT / "toy" / "checkpoint")
    trees = trees_of((7, 5, 3), (2, 1, 11), (12, 4, 4))
    expected = switches.rectangle(model, trees[:1])  # a single pair by another way: one branch at a time, unpadded
    alone = [switches.rectangle(model, [Tree(trees[0].prompt, (r, r), "")])[0, 0] for r in trees[0].responses]
    torch.testing.assert_close(expected[0], torch.stack(alone))
    expected = switches.rectangle(model, trees)
    for name, logps in switches.VARIANTS.items():
        torch.testing.assert_close(logps(model, trees), expected, msg=lambda m, name=name: f"{name}: {m}")


def test_the_budget_is_the_least_that_takes_no_more_passes():
    trees = trees_of(*[(20, n, 2 * n) for n in (10, 30, 60, 20, 25, 90, 40, 15)])
    budget = compare.microbatch_tokens(trees, batch_size=4, microbatch=2)
    passes = lambda budget: [len(data.plan(list(map(len, trees[i : i + 4])), 1, budget)) for i in (0, 4)]
    assert max(passes(budget)) == 2 and max(passes(budget - 64)) == 3


def test_the_peer_is_told_to_predict_responses_alone():
    row = peer.cpo_row({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]})
    assert row["rejected_input_ids"] == [1, 2, 4, 5] and row["rejected_labels"] == [-100, -100, 4, 5]
    assert row["chosen_labels"] == [-100, -100, 3] and row["chosen_attention_mask"] == [1, 1, 1]


def flags_of(**changes) -> argparse.Namespace:
    flags = {"batch_size": 1, "rounds": 2, "dtype": "fp32", "device": "cpu", "peer": "trl"}
    return argparse.Namespace(model=ROOT / "toy" / "checkpoint", **flags | changes)


def test_the_table_follows_from_the_times(monkeypatch):
    monkeypatch.setattr(compare, "gemm_flops", lambda *_: 1e9)
    ours = iter([[9.0, 1.0, 1.0], [9.0, 2.0, 2.0]])  # seconds a step; the first, however slow, does not count
    run = lambda seconds, peak, loss: {"seconds": seconds, "peak_gib": peak, "loss": loss, "logps": [-1.0, -2.0]}
    contenders = [
        compare.Contender("A", lambda _: run(next(ours), 1.0, 0.5)),
        compare.Contender("B", lambda _: run([1.0, 4.0, 4.0], 2.0, 0.55)),
        compare.Contender("C", lambda _: {"unavailable": "no such device"}),
    ]
    table = compare.compare(flags_of(), trees_of((5, 6, 4), (5, 6, 4), (5, 6, 4)), contenders, [(0, 1), (0, 2)])
    assert "| A | 0.7500 (0.5000–1.0000) | 8 | 1.00 (1.00–1.00) |" in table  # 10 response tokens a pair
    assert "A : B: pairs/s × 3.00 (2.00–4.00), time × 0.38 (0.25–0.50), memory × 0.50 (0.50–0.50)" in table
    assert "at step 1 losses differ by 9e-02, log-probabilities by 0e+00" in table
    assert "THE SIDES DO NOT COMPUTE THE SAME" in table
    assert "not run: no such device" in table and "A : C" not in table
