"""bench/: the pipeline from prompts to answer files on the toy, its scorer by hand, and decoding beside transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

import pipeline  # noqa: E402
import sample  # noqa: E402

TOY = ROOT / "toy" / "checkpoint"


@pytest.mark.parametrize(
    "prompt, response, expected",
    [
        ("Tell me about foxes.", "Foxes live in woods.", {"ends": 1, "fresh": 1, "about": 1 / 3}),  # tell, about, foxes
        ("Tell me about foxes.", "", {"ends": 0, "fresh": 0, "about": 0}),
        ("why?", "a b c a b c a b c", {"ends": 0, "fresh": 3 / 7, "about": 0}),
        ("Why foxes?", "FOXES do", {"ends": 0, "fresh": 0, "about": 1}),
    ],
)
def test_the_scorer_by_hand(prompt, response, expected):
    assert pipeline.score(prompt, response) == pytest.approx(expected)


def test_the_whole_pipeline(monkeypatch, tmp_path, capsys):
    """All products and a report; the questions are no training prompts; a second run does nothing again, and one that
    lost a product makes that one."""
    texts = ["describe the fox .", "describe the owl .", "write about the fox and the gate .", "describe the moon ."]
    texts += ["describe the horse .", "describe the gate ."]
    questions, out = tmp_path / "questions", tmp_path / "out"
    questions.mkdir()
    (questions / "alpaca_eval.json").write_text(json.dumps([{"dataset": "d", "instruction": texts[0]}] * 2))
    question = {"question_id": 1, "category": "math", "turns": texts[:2]}
    (questions / "mt_bench_question.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts * 2))
    flags = f"--model {TOY} --prompts {tmp_path}/prompts.jsonl --questions {questions} --out {out} --alpaca-eval 1"
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *flags.split()])
    run = pipeline.subprocess.run

    def here(command: list[str], **options):
        """sample.py in this process: a start of Python is most of what the toy takes."""
        if not command[1].endswith("sample.py"):
            return run(command, **options, stdout=subprocess.DEVNULL)
        sample.sample(sample.read_flags(command[2:]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pipeline.subprocess, "run", here)
    pipeline.main()
    assert [r["prompt"] for r in pipeline.records(out / "prompts.jsonl")] == texts[1:]
    scored = pipeline.records(out / "pairs.jsonl") + pipeline.records(out / "held-out.jsonl")
    assert len(scored) == 5 and all(len(r["scores"]) == len(r["responses"]) == 4 for r in scored)
    for name in ("before", "simpo", "dpo"):
        [answer] = json.loads((out / f"alpaca_eval-{name}.json").read_text())
        assert answer["instruction"] == texts[0] and answer["generator"] == {"before": "checkpoint"}.get(name, name)
        assert len(pipeline.records(out / f"mt_bench-{name}.jsonl")[0]["choices"][0]["turns"]) == 2
    report = (out / "PIPELINE.md").read_text()
    assert str(tmp_path) not in report and "5 prompts, 4 candidates each" in report
    assert report.count("`python sample.py") == 7 and report.count("`python train.py") == 2

    ran = []
    monkeypatch.setattr(
        pipeline.subprocess, "run", lambda command, **options: ran.append(command) or pytest.fail("ran")
    )
    pipeline.main()
    (out / "alpaca_eval-dpo.json").unlink()
    with pytest.raises(pytest.fail.Exception):
        pipeline.main()
    assert len(ran) == 1 and str(out / "alpaca_eval-dpo.json") in ran[0]


def test_decoding_bench(monkeypatch, tmp_path, capsys):
    """The toy's tokens are the same as transformers', with and without stop tokens, and a difference is seen."""
    pytest.importorskip("transformers", minversion="4.56")
    import decoding

    texts = ["describe the fox .", "describe the fox and the moon and the owl .", "the owl"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    flags = f"--model {TOY} --prompts {tmp_path}/prompts.jsonl --batch-size 2 --max-new-tokens 24 --repeats 1"
    for extra in ([], ["--stop"]):
        monkeypatch.setattr(sys, "argv", ["decoding.py", *flags.split(), *extra])
        decoding.main()
        out = capsys.readouterr().out
        assert "3 prompts of " in out and "ratio " in out and out.endswith("all tokens equal\n"), out
    model, prompts = decoding.llama.load(TOY), [[1, 2, 3], [4, 5]]
    made = decoding.sample.generate(model, prompts, set(), 5)
    changed = [made[0], [*made[1][:3], made[1][3] + 1, made[1][4]]]
    said = decoding.first_difference(model, prompts, made, changed)
    assert said.startswith("1 of 2 answers equal; the first difference is at token 3 of answer 1, where"), said
    assert decoding.cut([5, 7, 2, 0, 2], {2}) == [5, 7, 2] and decoding.cut([5, 7], {2}) == [5, 7]
