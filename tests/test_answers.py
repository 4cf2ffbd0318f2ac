"""Test `sample.py --format`: read question files of benchmarks, write the answer files they read.

Covers formats/benchmarks.py, and the parts of formats/candidates.py that depend on a benchmark.
"""

import json
import os
from pathlib import Path

import pytest

import sample
from formats import benchmarks, candidates
from formats.errors import DataError
from formats.records import read_records

ROOT = Path(__file__).resolve().parents[1]
FOX, OWL = "describe the fox .", "describe the owl and the gate ."
QUESTIONS = {
    "alpaca_eval": [
        {"dataset": "koala", "instruction": FOX},
        {"dataset": "vicuna", "instruction": OWL},
    ],
    "arena_hard": [
        {"uid": name, "category": "c", "cluster": "d", "prompt": FOX} for name in ("a", "b")
    ],
    "mt_bench": [
        {"question_id": 81, "category": "math", "turns": [FOX, OWL], "reference": ["x", "y"]},
        {"question_id": 82, "category": "writing", "turns": [OWL, FOX]},
        {"question_id": 83, "category": "another", "turns": [OWL]},
    ],
}
OUT = {"alpaca_eval": "tiny.json", "arena_hard": "tiny.jsonl", "mt_bench": "tiny.jsonl"}


def ask(format: str, *flags: str) -> list[dict]:
    """Answer QUESTIONS in the current folder; return the records of the answer file."""
    asked = "asked.json" if format == "alpaca_eval" else "asked.jsonl"
    write(asked, QUESTIONS[format])
    files = ("--prompts", asked, "--out", OUT[format])
    run("--format", format, *files, "--max-new-tokens", "30", *flags)
    return [record for _, record in read_records(OUT[format])]


def write(path: str, records: list[dict]) -> None:
    if path.endswith(".json"):
        text = json.dumps(records)
    else:
        text = "".join(json.dumps(record) + "\n" for record in records)
    Path(path).write_text(text, encoding="utf-8")


def run(*flags: str) -> None:
    sample.sample(sample.read_flags(list(flags)))


def greedy(prompt: str | list[dict]) -> str:
    """Return the greedy answer to one prompt, without a benchmark."""
    write("prompt.jsonl", [{"prompt": prompt}])
    files = ("--prompts", "prompt.jsonl", "--out", "greedy.jsonl", "--overwrite")
    run(*files, "--max-new-tokens", "30")
    [record] = [record for _, record in read_records("greedy.jsonl")]
    return record["responses"][0]


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_alpaca_eval():
    """The file is a list of questions with output and generator; --generator names the model."""
    assert ask("alpaca_eval") == [
        question | {"output": greedy(question["instruction"]), "generator": "checkpoint"}
        for question in QUESTIONS["alpaca_eval"]
    ]
    assert ask("alpaca_eval", "--generator", "A B", "--overwrite")[1]["generator"] == "A B"


def test_arena_hard():
    """Answers to current questions hold the benchmark's keys, each with an id of its own."""
    answers = ask("arena_hard", "--generator", "me")
    for answer, question in zip(answers, QUESTIONS["arena_hard"], strict=True):
        assert answer["uid"] == question["uid"] and answer["model"] == "me"
        assert isinstance(answer["tstamp"], float)
        assert answer["messages"] == [
            {"role": "user", "content": FOX},
            {"role": "assistant", "content": {"answer": greedy(FOX)}},
        ]
        # The toy's tokens are words.
        assert answer["metadata"]["token_len"] == len(greedy(FOX).split())
    assert len({answer["ans_id"] for answer in answers}) == 2


def test_arena_hard_v01_and_its_style():
    """A question of v0.1 gets an answer of v0.1; its markdown is counted by hand."""
    text = "# a\n### b\n1. c\n  - d\n* e\n**f** and __g__ and **h\ni**\n```py\n# no\n- no\n```\n"
    record = {"question_id": "q", "turns": [{"content": FOX}], "responses": [[text]]}
    assert benchmarks.read_arena_hard(record, "here") == (FOX, [], 0.0)
    answer = benchmarks.write_arena_hard(record, "me", len)
    turns = [{"content": text, "token_len": len(text)}]
    assert answer["choices"] == [{"index": 0, "turns": turns}]
    assert (answer["question_id"], answer["model_id"]) == ("q", "me") and answer["answer_id"]
    assert answer["conv_metadata"] == {
        "token_len": len(text),
        "header_count": {f"h{i}": int(i in (1, 3)) for i in range(1, 7)},
        "list_count": {"ordered": 1, "unordered": 2},
        "bold_count": {"**": 1, "__": 1},
    }


def test_mt_bench():
    """The second turn continues the first; the flag overrides the temperature of the category."""
    answers = ask("mt_bench", "--seed", "3")
    keys = {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert [set(answer) for answer in answers] == [keys] * 3
    turns = {answer["question_id"]: answer["choices"][0]["turns"] for answer in answers}
    assert [len(mine) for mine in turns.values()] == [2, 2, 1] and len(answers[0]["choices"]) == 1

    def expected(first: str, second: str) -> list[str]:
        answer = greedy(first)
        roles, contents = ("user", "assistant", "user"), (first, answer, second)
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
        return [answer, greedy(messages)]

    assert turns[81] == expected(FOX, OWL)
    # 0.7, with random numbers of its own for each question
    assert turns[82] != expected(OWL, FOX) and turns[82][0] != turns[83][0]
    cold = ask("mt_bench", "--temperature", "0", "--overwrite")
    assert cold[1]["choices"][0]["turns"] == expected(OWL, FOX)


@pytest.mark.parametrize("format", benchmarks.BENCHMARKS)
def test_an_interrupted_answer_file_resumes(format, monkeypatch):
    """From any point come the same answers with the same ids; OUT appears once all are written."""
    flags = ("--batch-size", "1", "--temperature", "1")
    monkeypatch.setattr(benchmarks.time, "time", lambda: 1.5)
    ask(format, *flags)
    whole = Path(OUT[format]).read_bytes()
    Path(OUT[format]).unlink()
    part = Path(OUT[format] + ".incomplete")
    with monkeypatch.context() as patch, pytest.raises(DataError):
        patch.setattr(candidates.AnswerFile, "finish", lambda *args: None)
        ask(format, *flags)
    lines = part.read_bytes()
    for cut in (0, lines.index(b"\n") + 1, len(lines) - 3, len(lines)):
        part.write_bytes(lines[:cut])
        ask(format, *flags)
        assert Path(OUT[format]).read_bytes() == whole and not part.exists()
        Path(OUT[format]).unlink()


BAD = [  # format, a question, the field that the error names
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
    """The error names file, line and field, before anything is decoded or written."""
    write("asked.jsonl", [QUESTIONS[format][0], question])
    with pytest.raises(DataError) as error:
        run("--format", format, "--prompts", "asked.jsonl", "--out", "out")
    assert str(error.value).startswith(f"asked.jsonl:2: {field}: ")
    assert os.listdir() == ["asked.jsonl"]


@pytest.mark.parametrize(
    "model, name",
    [("runs/simpo-1/model", "simpo-1"), ("some/dir/", "dir"), ("owner/Name", "owner/Name")],
)
def test_the_name_in_the_file(model, name):
    """A folder takes its own name or its run's, a hub id is its name; --generator overrides all."""
    if name != model:
        Path(model).mkdir(parents=True)
    assert candidates.model_name(model) == name
    assert candidates.model_name(model, "A B") == "A B"


# --------------------------------------------------------------------------------------------------
# Real question files, and the benchmarks' own readers

QUESTION_FILES = ROOT.parent / "shared" / "data" / "benchmarks"
REAL = {
    "alpaca_eval": ("alpaca_eval.json", 805),
    "arena_hard": ("arena_hard_v0.1_question.jsonl", 500),
    "mt_bench": ("mt_bench_question.jsonl", 80),
}


@pytest.mark.parametrize("format", REAL)
def test_real_question_files(format):
    """All questions are read; three are answered and read back as the benchmark reads them.

    `load_model_answers` of FastChat and Arena-Hard reads JSON lines into a dictionary by
    question_id or uid; AlpacaEval uses `pandas.read_json`.
    """
    name, count = REAL[format]
    if not (QUESTION_FILES / name).exists():
        pytest.skip(f"{QUESTION_FILES / name} is not on this machine")
    questions = list(read_records(str(QUESTION_FILES / name)))
    read = benchmarks.BENCHMARKS[format].read_question
    asked = [read(question, where) for where, question in questions]
    assert len(asked) == count
    if format == "mt_bench":
        assert sorted(t for _, _, t in asked) == [0.0] * 40 + [0.1] * 20 + [0.7] * 20
    files = ("--prompts", str(QUESTION_FILES / name), "--out", OUT[format])
    run("--format", format, *files, "--limit", "3", "--max-new-tokens", "3")
    if format == "alpaca_eval":
        pandas = pytest.importorskip("pandas")
        frame = pandas.read_json(OUT[format])
        assert set(frame.columns) == {"dataset", "instruction", "output", "generator"}
        assert frame.instruction.tolist() == [
            question["instruction"] for _, question in questions[:3]
        ]
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
                turns = line["choices"][0]["turns"]
                assert all(isinstance(turns[turn], str) for turn in (0, 1))


def test_alpaca_eval_s_own_reader():
    """If `alpaca_eval` is installed, its own loader reads the file."""
    utils = pytest.importorskip("alpaca_eval.utils")
    ask("alpaca_eval")
    frame = utils.load_or_convert_to_dataframe(OUT["alpaca_eval"])
    assert frame.to_dict("records") == json.loads(Path(OUT["alpaca_eval"]).read_text())
