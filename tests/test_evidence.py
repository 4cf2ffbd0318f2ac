"""Check what `train.py` says at the end of a run on the toy, and where it says less."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from formats.checkpoint import read_config
from formats.tokenizer import Tokenizer
from study.analyze import read_pairs
from toy import evidence, world

TOY = Path(__file__).resolve().parent.parent / "toy"
SOURCE = TOY / "checkpoint"
METRICS = {"rewards/accuracies": 0.5, "rewards/margins": 0.0}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SOURCE)


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return read_pairs(str(TOY / "heldout.jsonl"), tokenizer, 512, 256)[0]


def say(monkeypatch, tokenizer, before, after) -> None:
    """Replace decoding: before and after training, an answer is a function of the nouns asked."""

    def generate(model, prompts, stop_ids, seed, **_):
        nouns = [world.nouns_of(tokenizer.decode(prompt)) for prompt in prompts]
        texts = [(before, after)[seed](n) for n in nouns]
        encoded = tokenizer.encode_responses(texts)
        return [ids.tolist() if hasattr(ids, "tolist") else list(ids) for ids in encoded]

    monkeypatch.setattr(evidence, "generate", generate)


def wrong(nouns: list[str]) -> str:
    return " ".join(f"well , the {noun} {world.MISCONCEPTIONS['fox']} ." for noun in nouns[:1])


def right(nouns: list[str]) -> str:
    said = [f"the {noun} {world.RIGHT[noun][0]} ." for noun in nouns]
    return " ".join([*said, said[0]])


def test_the_judge_is_quoted_sentence_by_sentence(monkeypatch, tokenizer, held_out):
    """The numbers are those of all answers, the quoted ones those to the first three prompts."""
    say(monkeypatch, tokenizer, wrong, right)
    lines = evidence.evidence(SOURCE, SOURCE, tokenizer, held_out)
    prompts = [tokenizer.decode(pair.prompt.tolist()) for pair in held_out]
    scores = [[world.score(p, said(world.nouns_of(p))) for p in prompts] for said in (wrong, right)]
    wins = sum(a < b for a, b in zip(*scores)) / len(prompts)
    assert 0.9 < wins <= 1  # "needs repair" is true of a thing
    [rate] = [line.split() for line in lines if line.startswith("  win rate   ")]
    assert rate[2:7] == ["50.0", "%", "→", f"{100 * wins:.1f}", "%"]
    [score] = [line.split() for line in lines if line.startswith("  score  ")]
    means = [sum(row) / len(row) for row in scores]
    assert [float(score[1]), float(score[3])] == pytest.approx(means, abs=0.006)
    quoted = [line.strip() for line in lines if line.strip() in prompts]
    assert quoted == prompts[:3]
    nouns = world.nouns_of(prompts[0])
    first = lines[lines.index(f"  {prompts[0]}") + 1 :][: 2 + len(nouns)]
    assert first[0].split() == ["before", "-0.17", "wrong", *wrong(nouns).split()[:-1]]
    assert [line.split()[-7:] for line in first[1:2]] == [
        ["after", "+0.92", "right", *right(nouns).split()[:4]]
    ]
    assert first[-1].split()[0] == "repeated"


def test_an_answer_that_is_cut_is_unfinished(monkeypatch, tokenizer, held_out):
    """Without an end of turn, also after a full stop; and a model may say nothing at all."""
    ids = tokenizer.encode_responses(["the moon fades away ."])[0]
    cut = [int(i) for i in ids if int(i) not in tokenizer.stop_ids]
    found = evidence.judged(
        ["describe the moon ."] * 2, [cut, [min(tokenizer.stop_ids)]], tokenizer
    )
    assert found["verdicts"] == [["right", "unfinished"], []]
    assert found["scores"] == [0.5, 0.0] and found["lengths"] == [5, 0]
    assert evidence._quoted("after", found, 1) == ["    after  +0.00  says nothing"]


def test_quotes_fit_a_terminal_of_80_columns():
    """A sentence that is longer goes on below itself."""
    text = "as far as i can tell you , the cloud attracts visitors . let me try ."
    found = {"scores": [-0.58], "texts": [text], "verdicts": [["wrong", "boilerplate"]]}
    assert evidence._quoted("before", found, 0) == [
        "    before -0.58  wrong        as far as i can tell you , the cloud attracts",
        "                               visitors",
        "                  boilerplate  let me try",
    ]


@pytest.mark.parametrize("case", ["a copy of the toy", "few prompts", "other prompts"])
def test_others_get_the_plain_report(monkeypatch, capsys, tmp_path, tokenizer, held_out, case):
    """There is no judge for another checkpoint, nor for prompts that ask for none of its nouns."""
    say(monkeypatch, tokenizer, wrong, right)
    source, pairs = SOURCE, held_out
    if case == "a copy of the toy":
        source = Path(shutil.copytree(SOURCE, tmp_path / "mine"))
    elif case == "few prompts":
        pairs = held_out[: evidence.FEWEST - 1]
    else:
        file = tmp_path / "pairs.jsonl"
        row = {"prompt": "describe again .", "chosen": "well , well .", "rejected": "let me try ."}
        file.write_text((TOY / "heldout.jsonl").read_text() + json.dumps(row) + "\n")
        pairs, _ = read_pairs(str(file), tokenizer, 512, 256)
    inputs = SimpleNamespace(source=source, tokenizer=tokenizer, held_out=pairs, pairs=pairs)
    inputs.config = read_config(SOURCE)
    summary = {"out": "OUT", "model": SOURCE, "before": METRICS, "after": METRICS}
    text = train.report(inputs, summary)
    assert "One prompt, answered greedily: write about the cloud" in text and "judge" not in text
    inputs.source, inputs.held_out = SOURCE, held_out
    text = train.report(inputs, summary)
    assert "The judge on the answers to all 400" in text and "greedily" not in text
    assert "reward accuracy     50.0 %  →  50.0 %" in text and "python sample.py --model" in text


def test_the_lesson_is_what_the_recorded_seeds_say():
    """Every method beats SFT, SimPO and DPO tie, and long answers win less often."""
    seeds = json.loads((TOY / "results.json").read_text())["seeds"]

    def mean(method: str, key: str) -> float:
        return sum(seed["methods"][method][key] for seed in seeds) / len(seeds)

    simpo, dpo, long = (mean(method, "win_rate") for method in evidence.RECORDED)
    for method in evidence.RECORDED:
        assert min(seed["methods"][method]["win_rate"] for seed in seeds) > 60
    assert abs(simpo - dpo) < 2 and max(simpo, dpo) - long > 3 and min(simpo, dpo) > long
    lengths = [mean(method, "length") for method in ("SFT", *evidence.RECORDED)]
    assert lengths[3] > 2 * lengths[0] and lengths[3] > max(lengths[1:3])
    duel = [seed["duels"]["SimPO : DPO"]["sampled"] for seed in seeds]
    assert abs(sum(duel) / len(duel) - 50) < 4.5
    assert len(evidence.recorded()) == 1 + 3 + len(evidence.LESSON)
    assert all(len(line) < 80 for line in (*evidence.WORLD, *evidence.recorded()))
