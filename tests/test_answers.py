"""answers.py and `sample.py --format`: the benchmarks' question files in, answer files that their readers take out."""

import json
import os
from pathlib import Path

import pytest

import answers
import sample
from data import DataError, read_records

ROOT = Path(__file__).resolve().parents[1]
FOX, OWL = "describe the fox .", "describe the owl and the gate ."
QUESTIONS = {
    "alpaca_eval": [{"dataset": "koala", "instruction": FOX}, {"dataset": "vicuna", "instruction": OWL}],
    "arena_hard": [{"uid": name, "category": "c", "cluster": "d", "prompt": FOX} for name in ("a", "b")],
    "mt_bench": [
        {"question_id": 81, "category": "math", "turns": [FOX, OWL], "reference": ["x", "y"]},
        {"question_id": 82, "category": "writing", "turns": [OWL, FOX]},
        {"question_id": 83, "category": "another", "turns": [OWL]},
    ],
}
OUT = {"alpaca_eval": "tiny.json", "arena_hard": "tiny.jsonl", "mt_bench": "tiny.jsonl"}


def ask(format: str, *flags: str) -> list[dict]:
    """The records of the answer file that the command writes for QUESTIONS, in the current folder."""
    suffix = "json" if format == "alpaca_eval" else "jsonl"
    write(f"asked.{suffix}", QUESTIONS[format])
    run("--format", format, "--prompts", f"asked.{suffix}", "--out", OUT[format], "--max-new-tokens", "30", *flags)
    return [record for _, record in read_records(OUT[format])]


def write(path: str, records: list[dict]) -> None:
    text = json.dumps(records) if path.endswith(".json") else "".join(json.dumps(r) + "\n" for r in records)
    Path(path).write_text(text, encoding="utf-8")


def run(*flags: str) -> None:
    sample.sample(sample.read_flags(list(flags)))


def greedy(prompt: str | list[dict]) -> str:
    write("prompt.jsonl", [{"prompt": prompt}])
    run("--prompts", "prompt.jsonl", "--out", "greedy.jsonl", "--overwrite", "--max-new-tokens", "30")
    [record] = [record for _, record in read_records("greedy.jsonl")]
    return record["responses"][0]


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_alpaca_eval():
    made = ask("alpaca_eval")
    assert made == [
        q | {"output": greedy(q["instruction"]), "generator": "checkpoint"} for q in QUESTIONS["alpaca_eval"]
    ]
    assert ask("alpaca_eval", "--generator", "A B", "--overwrite")[1]["generator"] == "A B"


def test_arena_hard():
    """Today's files and those of v0.1; the markdown that style control counts, by hand."""
    today = ask("arena_hard", "--generator", "me")
    for answer, question in zip(today, QUESTIONS["arena_hard"], strict=True):
        assert answer["uid"] == question["uid"] and answer["model"] == "me" and isinstance(answer["tstamp"], float)
        assert answer["messages"] == [
            {"role": "user", "content": FOX}, {"role": "assistant", "content": {"answer": greedy(FOX)}}]  # fmt: skip
        assert answer["metadata"]["token_len"] == len(greedy(FOX).split())  # the toy's tokens are words
    assert len({answer["ans_id"] for answer in today}) == 2

    text = "# a\n### b\n1. c\n  - d\n* e\n**f** and __g__ and **h\ni**\n```py\n# no\n- no\n```\n"
    record = {"question_id": "q", "turns": [{"content": FOX}], "responses": [[text]]}
    assert answers.read_arena_hard(record, "here") == (FOX, [], 0.0)
    old = answers.write_arena_hard(record, "me", len)
    assert old["choices"] == [{"index": 0, "turns": [{"content": text, "token_len": len(text)}]}]
    assert (old["question_id"], old["model_id"]) == ("q", "me") and old["answer_id"]
    headers = {f"h{i}": int(i in (1, 3)) for i in range(1, 7)}
    lists, bold = {"ordered": 1, "unordered": 2}, {"**": 1, "__": 1}
    style = {"token_len": len(text), "header_count": headers, "list_count": lists, "bold_count": bold}
    assert old["conv_metadata"] == style


def test_mt_bench():
    """The second turn answers a conversation that holds the first; the temperature is the category's, or the flag's."""
    made = ask("mt_bench", "--seed", "3")
    assert [set(answer) for answer in made] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 3
    turns = {answer["question_id"]: answer["choices"][0]["turns"] for answer in made}
    assert [len(mine) for mine in turns.values()] == [2, 2, 1] and len(made[0]["choices"]) == 1

    def expected(first: str, second: str) -> list[str]:
        messages = [{"role": "user", "content": first}, {"role": "assistant", "content": greedy(first)}]
        return [messages[1]["content"], greedy([*messages, {"role": "user", "content": second}])]

    assert turns[81] == expected(FOX, OWL)
    assert turns[82] != expected(OWL, FOX) and turns[82][0] != turns[83][0]  # 0.7, each with its own random numbers
    cold = ask("mt_bench", "--temperature", "0", "--overwrite")
    assert cold[1]["choices"][0]["turns"] == expected(OWL, FOX)


@pytest.mark.parametrize("format", answers.FORMATS)
def test_an_interrupted_answer_file_goes_on(format, monkeypatch):
    """The same answers under the same ids, from any point; until they are all there, --out is not."""
    flags = ("--batch-size", "1", "--temperature", "1")
    monkeypatch.setattr(answers.time, "time", lambda: 1.5)
    ask(format, *flags)
    whole = Path(OUT[format]).read_bytes()
    Path(OUT[format]).unlink()
    part = Path(OUT[format] + ".incomplete")
    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(sample, "finish", lambda *args: None)
        ask(format, *flags)
    lines = part.read_bytes()
    for cut in (0, lines.index(b"\n") + 1, len(lines) - 3, len(lines)):
        part.write_bytes(lines[:cut])
        ask(format, *flags)
        assert Path(OUT[format]).read_bytes() == whole and not part.exists()
        Path(OUT[format]).unlink()


BAD = [  # format, a question, the field that is named
    ("alpaca_eval", {"dataset": "koala"}, "instruction"),
    ("alpaca_eval", {"dataset": "koala", "instruction": ""}, "instruction"),
    ("alpaca_eval", {"instruction": FOX}, "dataset"),
    ("arena_hard", {"prompt": FOX}, "uid"),
    ("arena_hard", {"uid": "a"}, "prompt"),
    ("arena_hard", {"question_id": "a", "turns": []}, "turns"),
    ("arena_hard", {"question_id": "a", "turns": [FOX]}, "turns"),
    ("arena_hard", {"question_id": "a", "turns": [{"text": FOX}]}, "turns[0]: content"),
    ("mt_bench", {"category": "math", "turns": [FOX]}, "question_id"),
    ("mt_bench", {"question_id": True, "category": "math", "turns": [FOX]}, "question_id"),
    ("mt_bench", {"question_id": 1, "turns": [FOX]}, "category"),
    ("mt_bench", {"question_id": 1, "category": "math", "turns": FOX}, "turns"),
    ("mt_bench", {"question_id": 1, "category": "math", "turns": [FOX, None]}, "turns[1]"),
]


@pytest.mark.parametrize("format, question, field", BAD)
def test_bad_questions(format, question, field):
    """Named by file, line and field, before anything is decoded or written."""
    write("asked.jsonl", [QUESTIONS[format][0], question])
    with pytest.raises(DataError) as error:
        run("--format", format, "--prompts", "asked.jsonl", "--out", "out")
    assert str(error.value).startswith(f"asked.jsonl:2: {field}: expected ") and sorted(os.listdir()) == ["asked.jsonl"]


@pytest.mark.parametrize(
    "model, name", [("runs/simpo-1/model", "simpo-1"), ("some/dir/", "dir"), ("owner/Name", "owner/Name")]
)
def test_the_name_in_the_file(model, name):
    if name != model:
        Path(model).mkdir(parents=True)
    assert sample.model_name(sample.read_flags(["--model", model])) == name


# ---------------------------------------------------------------------------------------------------------------------
# The real question files, and the benchmarks' own readers

BENCHMARKS = ROOT.parent / "shared" / "data" / "benchmarks"
REAL = {
    "alpaca_eval": ("alpaca_eval.json", 805),
    "arena_hard": ("arena_hard_v0.1_question.jsonl", 500),
    "mt_bench": ("mt_bench_question.jsonl", 80),
}


@pytest.mark.parametrize("format", REAL)
def test_real_question_files(format):
    """All of them are read; some are answered, and read as FastChat's and Arena-Hard's `load_model_answers` does:
    JSON line by line into a dictionary by question_id or uid; AlpacaEval's reader is `pandas.read_json`."""
    name, count = REAL[format]
    if not (BENCHMARKS / name).exists():
        pytest.skip(f"{BENCHMARKS / name} is not here")
    questions = list(read_records(str(BENCHMARKS / name)))
    asked = [answers.FORMATS[format].read(question, where) for where, question in questions]
    assert len(asked) == count
    if format == "mt_bench":
        assert sorted(t for _, _, t in asked) == [0.0] * 40 + [0.1] * 20 + [0.7] * 20
    flags = ("--prompts", str(BENCHMARKS / name), "--limit", "3", "--max-new-tokens", "3", "--out", OUT[format])
    run("--format", format, *flags)
    if format == "alpaca_eval":
        pandas = pytest.importorskip("pandas")
        frame = pandas.read_json(OUT[format])
        assert set(frame.columns) == {"dataset", "instruction", "output", "generator"}
        assert frame.instruction.tolist() == [question["instruction"] for _, question in questions[:3]]
    else:
        key = "uid" if format == "arena_hard" else "question_id"
        answer = {}
        with open(OUT[format]) as fin:
            for line in fin:
                line = json.loads(line)
                answer[line[key]] = line
        assert list(answer) == [question[key] for _, question in questions[:3]]
        for line in answer.values():
            if format == "arena_hard":
                assert isinstance(line["messages"][-1]["content"]["answer"], str)
            else:
                assert all(isinstance(line["choices"][0]["turns"][turn], str) for turn in (0, 1))


def test_alpaca_eval_s_own_reader():
    """Where `alpaca_eval` is installed, its loader and the merge with reference outputs that it judges by."""
    utils = pytest.importorskip("alpaca_eval.utils")
    ask("alpaca_eval")
    frame = utils.load_or_convert_to_dataframe(OUT["alpaca_eval"])
    assert frame.to_dict("records") == json.loads(Path(OUT["alpaca_eval"]).read_text())
