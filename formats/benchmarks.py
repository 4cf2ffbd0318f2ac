"""Read the question files of AlpacaEval, Arena-Hard and MT-Bench; write the answer files they read.

    read_question   a record of a question file  →  prompt, follow-ups, temperature
    write_answer    the same record with its `responses`, [[one answer per turn]]
                                                 →  a record of an answer file

AlpacaEval's answer file is one JSON list, the others hold one object per line. `sample.py --format`
does the answering, and formats/candidates.py writes the files.

The paper (arXiv 2405.14734) samples AlpacaEval at temperature 0.9 from its Llama 3 models, at 0.7
from Mistral-Base and at 0.5 from Mistral-Instruct. It decodes Arena-Hard greedily. MT-Bench has a
temperature for each category, which `--temperature` overrides.
"""

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from data import Messages
from formats.errors import DataError

Asked = tuple[str | Messages, list[str], float]  # prompt, what the user says later, temperature
CountTokens = Callable[[str], int]


class Benchmark(NamedTuple):
    """Holds the reader and the writer of one benchmark's files."""

    read_question: Callable[[dict, str], Asked]  # (record, its location for error messages)
    write_answer: Callable[[dict, str, CountTokens], dict]  # (record, name of the model, …)
    json_lines: bool = True  # False: the answer file is one JSON list


def required(record: dict, where: str, field: str, kind: type = str) -> Any:
    """Return a field of a question. Raises DataError if it is missing, empty or of another type."""
    value = record.get(field)
    if type(value) is not kind or value in ("", []):
        expected = {str: "a non-empty string", int: "a whole number", list: "a non-empty list"}
        raise DataError(f"{where}: {field}: expected {expected[kind]}")
    return value


def read_alpaca_eval(question: dict, where: str) -> Asked:
    """Read a question of AlpacaEval: `dataset` and `instruction`."""
    required(question, where, "dataset")
    return required(question, where, "instruction"), [], 0.0


def write_alpaca_eval(record: dict, name: str, count_tokens: CountTokens) -> dict:
    """Return a record for `alpaca_eval --model_outputs FILE`.

    Source: tatsu-lab/alpaca_eval, README, "Evaluating a model".
    """
    [[output]] = record["responses"]
    question = {key: record[key] for key in ("dataset", "instruction")}
    return question | {"output": output, "generator": name}


def read_arena_hard(question: dict, where: str) -> Asked:
    """Read a question of Arena-Hard: `uid` and `prompt`, or v0.1's `question_id` and `turns`."""
    if "question_id" not in question:
        required(question, where, "uid")
        return required(question, where, "prompt"), [], 0.0
    required(question, where, "question_id")
    turns = required(question, where, "turns", list)
    if len(turns) > 1 or not isinstance(turns[0], dict):
        raise DataError(f"{where}: turns: expected one object")
    return required(turns[0], f"{where}: turns[0]", "content"), [], 0.0


def write_arena_hard(record: dict, name: str, count_tokens: CountTokens) -> dict:
    """Return a record for `gen_judgment.py` and `show_result.py` of lmarena/arena-hard-auto.

    A question of v0.1 gets an answer of v0.1, any other the form of 2025. The metadata are the
    regressors of the benchmark's style control. `token_len` counts the model's own tokens, but
    the benchmark counts tiktoken's. Its `add_markdown_info.py` overwrites ours with those.
    """
    [[output]] = record["responses"]
    style = style_of(output, count_tokens)
    if "question_id" in record:
        turns = [{"content": output, "token_len": style["token_len"]}]
        return mt_bench_answer(record, name, turns) | {"conv_metadata": style}
    messages = [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": {"answer": output}},
    ]
    answer = {"uid": record["uid"], "ans_id": answer_id(record, name), "model": name}
    return answer | {"messages": messages, "tstamp": time.time(), "metadata": style}


def style_of(text: str, count_tokens: CountTokens) -> dict:
    """Count the tokens of an answer and its markdown headers, list items and bold spans."""
    prose = re.sub(r"```[^`]*```", "", text)  # a comment in a code block is not a header

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "token_len": count_tokens(text),
        "header_count": {f"h{depth}": count(rf"^#{{{depth}}}\s") for depth in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


# FastChat's temperature_config, lm-sys/FastChat fastchat/llm_judge/common.py.
# gen_model_answer.py uses 0.7 for any other category.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}


def read_mt_bench(question: dict, where: str) -> Asked:
    """Read a question of MT-Bench: `question_id`, `category` and `turns`."""
    required(question, where, "question_id", int)
    turns = required(question, where, "turns", list)
    for i, turn in enumerate(turns):
        if not isinstance(turn, str) or not turn:
            raise DataError(f"{where}: turns[{i}]: expected a non-empty string")
    temperature = MT_BENCH_TEMPERATURES.get(required(question, where, "category"), 0.7)
    return [{"role": "user", "content": turns[0]}], turns[1:], temperature


def write_mt_bench(record: dict, name: str, count_tokens: CountTokens) -> dict:
    """Return a record for FastChat's `gen_judgment.py`.

    Source: lm-sys/FastChat, fastchat/llm_judge/gen_model_answer.py.
    """
    [turns] = record["responses"]
    return mt_bench_answer(record, name, turns)


def mt_bench_answer(record: dict, name: str, turns: list) -> dict:
    """Return an answer in FastChat's form, which Arena-Hard v0.1 shares."""
    return {
        "question_id": record["question_id"],
        "answer_id": answer_id(record, name),
        "model_id": name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def answer_id(record: dict, name: str) -> str:
    """Return an id made from model, question and answer: the same answer gets the same id again."""
    question = record.get("uid", record.get("question_id"))
    return uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([name, question, record["responses"]])).hex


BENCHMARKS = {
    "alpaca_eval": Benchmark(read_alpaca_eval, write_alpaca_eval, json_lines=False),
    "arena_hard": Benchmark(read_arena_hard, write_arena_hard),
    "mt_bench": Benchmark(read_mt_bench, write_mt_bench),
}
