"""The benchmarks' files: from the questions of AlpacaEval, Arena-Hard and MT-Bench to the answers that their own tools read.

    read     a record of the question file   →  prompt, what the user says after each answer, temperature
    write    the same record with `responses`, [[the answer of every turn]]  →  a record of the answer file

AlpacaEval's file is one JSON list, the others have an object a line. `sample.py --format` does the answering.
"""

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from data import DataError, Messages

Asked = tuple[str | Messages, list[str], float]
Count = Callable[[str], int]  # how many tokens a text has


class Format(NamedTuple):
    read: Callable[[dict, str], Asked]  # a question and its place, for errors
    write: Callable[[dict, str, Count], dict]  # a record with its `responses`, and the model's name
    jsonl: bool = True


def wanted(record: dict, where: str, field: str, kind: type = str):
    """A field of a question. Raises DataError where it is absent, empty or of another type."""
    value = record.get(field)
    if type(value) is not kind or value in ("", []):
        words = {str: "a string with something in it", int: "a whole number", list: "a list with something in it"}
        raise DataError(f"{where}: {field}: expected {words[kind]}")
    return value


def read_alpaca_eval(question: dict, where: str) -> Asked:
    wanted(question, where, "dataset")
    return wanted(question, where, "instruction"), [], 0.0


def write_alpaca_eval(record: dict, name: str, count_tokens: Count) -> dict:
    """What `alpaca_eval --model_outputs FILE` reads (tatsu-lab/alpaca_eval, README, "Evaluating a model")."""
    [[output]] = record["responses"]
    return {key: record[key] for key in ("dataset", "instruction")} | {"output": output, "generator": name}


def read_arena_hard(question: dict, where: str) -> Asked:
    """Its questions of today, and those it was first published with, under v0.1."""
    if "question_id" not in question:
        wanted(question, where, "uid")
        return wanted(question, where, "prompt"), [], 0.0
    wanted(question, where, "question_id")
    turns = wanted(question, where, "turns", list)
    if len(turns) > 1 or not isinstance(turns[0], dict):
        raise DataError(f"{where}: turns: expected one object")
    return wanted(turns[0], f"{where}: turns[0]", "content"), [], 0.0


def write_arena_hard(record: dict, name: str, count_tokens: Count) -> dict:
    """What `gen_judgment.py` and `show_result.py` read (lmarena/arena-hard-auto, as of 2025 and of v0.1).

    The metadata are what its style control regresses on. Tokens are the model's own; the benchmark counts tiktoken's,
    and its `add_markdown_info.py` writes those over ours where the difference matters."""
    [[output]] = record["responses"]
    prose = re.sub(r"```[^`]*```", "", output)  # code's comments are no headers
    count = lambda pattern: len(re.findall(pattern, prose, re.MULTILINE))
    tokens = count_tokens(output)
    style = {
        "token_len": tokens,
        "header_count": {f"h{depth}": count(rf"^#{{{depth}}}\s") for depth in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
    if "question_id" in record:
        turns = [{"content": output, "token_len": tokens}]
        return mt_bench_answer(record, name, turns) | {"conv_metadata": style}
    messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": {"answer": output}}]
    answer = {"uid": record["uid"], "ans_id": answer_id(record, name), "model": name, "messages": messages}
    return answer | {"tstamp": time.time(), "metadata": style}


# FastChat's, lm-sys/FastChat fastchat/llm_judge/common.py, temperature_config; 0.7 elsewhere (gen_model_answer.py)
MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1,
}  # fmt: skip


def read_mt_bench(question: dict, where: str) -> Asked:
    wanted(question, where, "question_id", int)
    turns = wanted(question, where, "turns", list)
    for i, turn in enumerate(turns):
        if not isinstance(turn, str) or not turn:
            raise DataError(f"{where}: turns[{i}]: expected a string with something in it")
    temperature = MT_BENCH_TEMPERATURES.get(wanted(question, where, "category"), 0.7)
    return [{"role": "user", "content": turns[0]}], turns[1:], temperature


def write_mt_bench(record: dict, name: str, count_tokens: Count) -> dict:
    """What `gen_judgment.py` reads (lm-sys/FastChat, fastchat/llm_judge/gen_model_answer.py)."""
    [turns] = record["responses"]
    return mt_bench_answer(record, name, turns)


def mt_bench_answer(record: dict, name: str, turns: list) -> dict:
    head = {"question_id": record["question_id"], "answer_id": answer_id(record, name), "model_id": name}
    return head | {"choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}


def answer_id(record: dict, name: str) -> str:
    """The same for the same answer to the same question, unlike a random one."""
    question = record.get("uid", record.get("question_id"))
    return uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([name, question, record["responses"]])).hex


FORMATS = {
    "alpaca_eval": Format(read_alpaca_eval, write_alpaca_eval, jsonl=False),
    "arena_hard": Format(read_arena_hard, write_arena_hard),
    "mt_bench": Format(read_mt_bench, write_mt_bench),
}
