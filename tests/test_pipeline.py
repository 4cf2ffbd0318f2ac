"""Check the pipeline of bench/ on the toy, its scorer by hand, and decoding beside transformers."""

import json
import subprocess
import sys
from pathlib import Path

import decoding
import pipeline
import pytest

import sample
from formats.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "toy" / "checkpoint"


@pytest.mark.parametrize(
    "prompt, response, ends, fresh, about",
    [
        # tell, about and foxes are asked for
        ("Tell me about foxes.", "Foxes live in woods.", 1, 1, 1 / 3),
        ("Tell me about foxes.", "", 0, 0, 0),
        ("why?", "a b c a b c a b c", 0, 3 / 7, 0),
        ("Why foxes?", "FOXES do", 0, 0, 1),
    ],
)
def test_the_scorer_by_hand(prompt, response, ends, fresh, about):
    expected = {"ends": ends, "fresh": fresh, "about": about}
    assert pipeline.score(prompt, response) == pytest.approx(expected)


def test_the_whole_pipeline(monkeypatch, tmp_path, capsys):
    """Make all products and a report; no question is a training prompt.

    A second run repeats nothing. A run that lost one product makes only that one again.
    """
    texts = ["describe the fox .", "describe the owl .", "write about the fox and the gate ."]
    texts += ["describe the moon .", "describe the horse .", "describe the gate ."]
    questions, out = tmp_path / "questions", tmp_path / "out"
    questions.mkdir()
    asked = [{"dataset": "d", "instruction": texts[0]}] * 2
    (questions / "alpaca_eval.json").write_text(json.dumps(asked))
    question = {"question_id": 1, "category": "math", "turns": texts[:2]}
    (questions / "mt_bench_question.jsonl").write_text(json.dumps(question) + "\n")
    lines = [json.dumps({"prompt": text}) + "\n" for text in texts * 2]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    flags = f"--model {TOY} --prompts {tmp_path}/prompts.jsonl --questions {questions}"
    flags += f" --out {out} --alpaca-eval 1"
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *flags.split()])
    run = pipeline.subprocess.run

    def in_this_process(command: list[str], **options) -> subprocess.CompletedProcess:
        """Run sample.py in this process: starting Python is most of the time the toy takes."""
        if not command[1].endswith("sample.py"):
            return run(command, **options, stdout=subprocess.DEVNULL)
        sample.sample(sample.read_flags(command[2:]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pipeline.subprocess, "run", in_this_process)
    pipeline.main()
    assert [r["prompt"] for r in pipeline.records(out / "prompts.jsonl")] == texts[1:]
    scored = pipeline.records(out / "pairs.jsonl") + pipeline.records(out / "held-out.jsonl")
    assert len(scored) == 5
    assert all(len(r["scores"]) == len(r["responses"]) == 4 for r in scored)
    for name, generator in (("before", "checkpoint"), ("simpo", "simpo"), ("dpo", "dpo")):
        [answer] = json.loads((out / f"alpaca_eval-{name}.json").read_text())
        assert answer["instruction"] == texts[0] and answer["generator"] == generator
        [conversation] = pipeline.records(out / f"mt_bench-{name}.jsonl")
        assert len(conversation["choices"][0]["turns"]) == 2
    report = (out / "PIPELINE.md").read_text()
    assert str(tmp_path) not in report and "5 prompts, 4 candidates each" in report
    assert report.count("`python sample.py") == 7 and report.count("`python train.py") == 2

    ran = []

    def refuse(command: list[str], **options) -> None:
        ran.append(command)
        pytest.fail("ran")

    monkeypatch.setattr(pipeline.subprocess, "run", refuse)
    pipeline.main()
    (out / "alpaca_eval-dpo.json").unlink()
    with pytest.raises(pytest.fail.Exception):
        pipeline.main()
    assert len(ran) == 1 and str(out / "alpaca_eval-dpo.json") in ran[0]


def test_the_committed_report_has_the_prose_of_the_script():
    committed = (ROOT / "bench" / "PIPELINE.md").read_text()
    flags = pipeline.argparse.Namespace(alpaca_eval=20, mt_bench=10)
    assert pipeline.setting(60, flags) in committed
    assert pipeline.caution(answers=20, held_out=12) in committed


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
