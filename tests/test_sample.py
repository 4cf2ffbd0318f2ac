"""Test sample.py: decoding against full forward passes, sampling by hand, and the command."""

import hashlib
import io
import json
import os
import re
import shutil
import signal as signals
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import sample
import tiny
from formats.checkpoint import load
from formats.errors import DataError
from formats.schemas import parse_record
from formats.tokenizer import Tokenizer
from model import Llama
from sample import generate, pick

NEVER = {-1}  # no token stops
# The window of mistral-0.1, 7 tokens, is shorter than each of these texts.
FAMILIES = ["llama-3.1", "llama-3.2", "mistral-0.1"]
PROMPTS = [np.random.default_rng(n).integers(3, 97, n).tolist() for n in (9, 1, 14, 2, 14, 5, 30)]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[str, Llama]:
    return {
        name: load(tiny.write(tmp_path_factory.mktemp(name), tiny.FAMILIES[name]))
        for name in FAMILIES
    }


# --------------------------------------------------------------------------------------------------
# Decoding


def greedy(model: Llama, prompt: list[int], stop_ids: set[int], max_new_tokens: int) -> list[int]:
    """Decode without cache or batch: run the whole sequence again for every token."""
    generated: list[int] = []
    while len(generated) < max_new_tokens and not stop_ids & set(generated):
        generated.append(int(tiny.logits(model, prompt + generated)[-1].argmax()))
    return generated


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_full_forward_passes(family, batch_size, llamas):
    """Checks the cache, its window and how rows move, with answers that end at different times.

    The stop tokens end the first answer after 3 tokens and the fourth after 7.
    """
    free = generate(llamas[family], PROMPTS, NEVER, 12, batch_size=batch_size)
    assert free == [greedy(llamas[family], prompt, NEVER, 12) for prompt in PROMPTS]
    stop_ids = {free[0][2], free[3][6]}
    expected = [greedy(llamas[family], prompt, stop_ids, 12) for prompt in PROMPTS]
    assert len(set(map(len, expected))) > 2
    assert generate(llamas[family], PROMPTS, stop_ids, 12, batch_size=batch_size) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_generate(family, llamas, tmp_path):
    """Compares tokens with those of the transformers cache and stopping rule."""
    transformers = pytest.importorskip("transformers", minversion="4.56")
    tiny.write(tmp_path, tiny.FAMILIES[family])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    stop_ids = [11, 12, 13, 14]
    options = {
        "do_sample": False,
        "max_new_tokens": 16,
        "eos_token_id": stop_ids,
        "pad_token_id": 0,
    }
    for prompt, tokens in zip(PROMPTS, generate(llamas[family], PROMPTS, set(stop_ids), 16)):
        assert [prompt + tokens] == theirs.generate(torch.tensor([prompt]), **options).tolist()


def test_any_stop_token_ends_an_answer(llamas):
    """The first of several stop tokens ends an answer and belongs to it; else its length does."""
    [free] = generate(llamas["llama-3.1"], PROMPTS[:1], NEVER, 10)
    first_uses = sorted(free.index(token) for token in set(free))
    assert len(first_uses) > 4
    for i, end in enumerate(first_uses):
        stop_ids = {free[later] for later in first_uses[i:]}
        assert generate(llamas["llama-3.1"], PROMPTS[:1], stop_ids, 10) == [free[: end + 1]]
    assert generate(llamas["llama-3.1"], PROMPTS[:1], NEVER, 1) == [free[:1]]


def test_decode_yields_every_token_once_and_ends_every_answer(llamas):
    """A caller that streams gets each answer's tokens in order, with the last one marked."""
    model, stop_ids = llamas["llama-3.1"], {11, 12, 13}
    generated, ended = [[] for _ in PROMPTS], []
    for index, token, last in sample.decode(model, PROMPTS, stop_ids, 8, batch_size=2):
        assert index not in ended
        generated[index].append(token)
        ended += [index] * last
    assert sorted(ended) == list(range(len(PROMPTS)))
    assert generated == generate(model, PROMPTS, stop_ids, 8)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.5}], ids=str)
def test_samples_depend_on_seed_and_stream_alone(options, llamas):
    """Neither the batch size nor the other prompts change a sample.

    Prompts 2 and 4 are equally long; a prompt answered alone keeps its stream.
    """
    options = {"temperature": 1.0, "seed": 7} | options

    def answers(prompts: list[list[int]], **more) -> list[list[int]]:
        return generate(llamas["llama-3.1"], prompts, {11, 12, 13}, 20, **options | more)

    together = answers(PROMPTS)
    for batch_size in (1, 3, 32):
        assert answers(PROMPTS, batch_size=batch_size) == together
    for i in (0, 4):
        assert answers([PROMPTS[i]], streams=[i]) == [together[i]]
        assert answers([PROMPTS[i]], streams=[i + 2**40]) != [together[i]]
    assert answers(PROMPTS, seed=8) != together


# --------------------------------------------------------------------------------------------------
# Picking a token

EIGHTHS = torch.tensor([0.125, 0.5, 0.0, 0.25, 0.125])  # by token; every sum is exact


def frequencies(probabilities: torch.Tensor, **options) -> list[float]:
    """Return how often each token is picked, over draws that cover [0, 1) evenly.

    Exact to one draw at each edge.
    """
    draws = 4096
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    picked = pick(probabilities.log().expand(draws, -1), uniform, **options)
    return (picked.bincount(minlength=len(probabilities)) / draws).tolist()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1 / 8, 1 / 2, 0, 1 / 4, 1 / 8]),
        ({"temperature": 0}, [0, 1, 0, 0, 0]),
        # squares: 1 + 16 + 4 + 1 sixty-fourths
        ({"temperature": 0.5}, [1 / 22, 16 / 22, 0, 4 / 22, 1 / 22]),
        ({"temperature": 0.01}, [0, 1, 0, 0, 0]),
        (
            {"temperature": 1e6},
            [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4],
        ),  # impossible tokens stay impossible
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_k": 4}, [1 / 8, 1 / 2, 0, 1 / 4, 1 / 8]),
        ({"top_k": 99}, [1 / 8, 1 / 2, 0, 1 / 4, 1 / 8]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),  # never fewer than one
        ({"top_p": 0.5}, [0, 1, 0, 0, 0]),  # ½ reaches ½
        ({"top_p": 0.501}, [0, 2 / 3, 0, 1 / 3, 0]),
        ({"top_p": 0.75}, [0, 2 / 3, 0, 1 / 3, 0]),  # ½ + ¼ reaches ¾
        ({"top_p": 0.9}, [1 / 8, 1 / 2, 0, 1 / 4, 1 / 8]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),  # of the two left, ⅔ reaches 0.6
        ({"top_k": 2, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3, 0]),
        # temperature comes first: ¹⁶⁄₂₂ reaches 0.7
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_pick_by_hand(options, expected):
    assert frequencies(EIGHTHS, **options) == pytest.approx(expected, abs=2 / 4096)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}], ids=str
)
def test_pick_against_a_naive_filter(options):
    """A loop over 200 tokens keeps the likeliest until k or p is reached, then renormalises."""
    p = np.random.default_rng(0).dirichlet(np.full(200, 0.3))
    order = np.argsort(-p)[: options.get("top_k") or None]
    kept, reached = [], 0.0
    for token in order:
        if reached >= options.get("top_p", 1.0) * p[order].sum():
            break
        kept.append(token)
        reached += p[token]
    expected = np.zeros(200)
    expected[kept] = p[kept] / reached
    picked = frequencies(torch.from_numpy(p).float(), **options)
    assert picked == pytest.approx(expected.tolist(), abs=2 / 4096)


def test_pick_at_the_edges_of_a_draw():
    """Draws of 0 and just below 1 pick possible tokens; a draw on an edge picks the upper token."""
    logits = torch.tensor([0.0, 0.5, 0.5, 0.0]).log()
    edges = [0.0, np.nextafter(0.5, 0), 0.5, np.nextafter(1.0, 0)]
    draws = torch.tensor(edges, dtype=torch.float64)
    assert pick(logits.expand(4, -1), draws, 1.0, 1.0, 0).tolist() == [1, 1, 2, 2]
    assert set(pick(logits.expand(4, -1), draws, 1.0, 0.99, 3).tolist()) == {1, 2}


# --------------------------------------------------------------------------------------------------
# The command

ROOT = Path(__file__).resolve().parents[1]
WORDS = r"[a-z ,.]+"


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `sample.py` with the given arguments in an empty folder → (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
        status = 0
        try:
            sample.main()
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
        return status, *capsys.readouterr()

    return run


def write_jsonl(path: str, records: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


FOX, OWL = "describe the fox .", "describe the owl and the gate ."
ASKED = [
    {"prompt": FOX, "id": "α-1", "generator": "none", "tags": [1, None]},
    {"messages": [{"role": "user", "content": OWL}], "prompt_id": 7},
    {"prompt": [{"role": "user", "content": FOX}], "messages": "ignored"},
]


def test_prompts_from_records(command):
    """Every record is kept and gains `responses`; string and messages get the same answer."""
    write_jsonl("asked.jsonl", ASKED)
    flags = "--prompts asked.jsonl --out answers.jsonl --max-new-tokens 40"
    assert command(*flags.split())[0] == 0
    answers = read_jsonl("answers.jsonl")
    responses = [answer.pop("responses") for answer in answers]
    assert all(answer.pop("finished") == [True] for answer in answers)
    assert all(answer.pop("generation")["max_new_tokens"] == 40 for answer in answers)
    assert answers == [
        record | {"prompt": record.get("prompt", record.get("messages"))} for record in ASKED
    ]
    assert all(len(mine) == 1 and re.fullmatch(WORDS, mine[0]) for mine in responses)
    assert responses[0] == responses[2]


def test_prompts_from_parquet(command):
    """A value that JSON has no type for, such as a date, is kept as text."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"prompt": FOX, "made": date(2024, 5, 23)}])
    parquet.write_table(table, "asked.parquet")
    flags = "--prompts asked.parquet --out answers.jsonl --max-new-tokens 5"
    assert command(*flags.split())[0] == 0
    assert read_jsonl("answers.jsonl")[0]["made"] == "2024-05-23"


def test_prompts_from_text(command):
    """Each line is a prompt, blank lines are skipped; a form feed or U+2028 does not end a line.

    Without --out, answers are printed.
    """
    Path("asked.txt").write_text(f"{FOX}\n\n{OWL}\x0c\u2028again\n\n", encoding="utf-8")
    status, out, _ = command("--prompts", "asked.txt", "--prompt", "", "--max-new-tokens", "40")
    assert status == 0
    asked = ["", FOX, rf"{OWL}\x0c\u2028again", ""]  # shown, not sent to the terminal
    assert [answer.split("\n  ")[0] for answer in out.split("\n\n")] == asked
    command("--prompts", "asked.txt", "--out", "answers.jsonl", "--max-new-tokens", "40")
    keys = ["prompt", "responses", "finished", "generation"]
    assert [list(answer) for answer in read_jsonl("answers.jsonl")] == [keys] * 2


def test_several_samples(command):
    """N responses per prompt, not all alike; the batch and the group of prompts change none."""
    write_jsonl("asked.jsonl", ASKED * 4)
    flags = "--prompts asked.jsonl --num-samples 5 --temperature 1 --max-new-tokens 20"
    sampling = flags.split()
    for batch_size in ("1", "7", "32"):
        out = f"{batch_size}.jsonl"
        assert command(*sampling, "--batch-size", batch_size, "--out", out)[0] == 0
    one, seven, all_at_once = (read_jsonl(f"{batch_size}.jsonl") for batch_size in (1, 7, 32))
    assert one == seven == all_at_once and len(one) == 12
    assert all(len(answer["responses"]) == 5 for answer in one)
    assert all(len(set(answer["responses"])) > 1 for answer in one)
    assert one[0]["responses"] != one[3]["responses"]  # the same prompt with another index
    command(*sampling, "--seed", "1", "--out", "seed.jsonl")
    assert read_jsonl("seed.jsonl") != one


def test_overwriting_must_be_asked_for(command):
    flags = ("--prompt", FOX, "--out", "answers.jsonl", "--max-new-tokens", "5")
    Path("answers.jsonl").write_text("precious")
    status, _, error = command(*flags)
    assert status == 2 and "answers.jsonl" in error and "--overwrite" in error
    assert Path("answers.jsonl").read_text() == "precious"
    assert command(*flags, "--overwrite")[0] == 0
    assert len(read_jsonl("answers.jsonl")) == 1


# --------------------------------------------------------------------------------------------------
# Interrupted and resumed

# A batch size of 1 makes groups of 4 prompts.
SAMPLING = (
    "--prompts asked.jsonl --out answers.jsonl --num-samples 2 --temperature 1 "
    "--max-new-tokens 12 --batch-size 1"
).split()
PART = Path("answers.jsonl.incomplete")


@pytest.fixture
def unbroken(command) -> bytes:
    """Return the answers of an uninterrupted command, moved out of the way."""
    write_jsonl("asked.jsonl", [ASKED[i % 3] | {"id": f"é{i}"} for i in range(10)])
    assert command(*SAMPLING)[0] == 0 and not PART.exists()
    Path("answers.jsonl").rename("unbroken.jsonl")
    return Path("unbroken.jsonl").read_bytes()


def test_an_interrupted_command_resumes_to_the_same_bytes(command, unbroken, monkeypatch):
    """Cut in a line, within a group or between groups; complete groups are not decoded again."""
    starts, respond = [], sample.respond

    def spy(*args, **options):
        starts.append(args[3])
        return respond(*args, **options)

    monkeypatch.setattr(sample, "respond", spy)
    ends = [i + 1 for i, byte in enumerate(unbroken) if byte == ord("\n")]
    for cut, expected in (
        (0, [0, 4, 8]),
        (1, [0, 4, 8]),
        (ends[0], [0, 4, 8]),
        (ends[3] - 1, [0, 4, 8]),
        (ends[3], [4, 8]),
        (ends[5] + 40, [4, 8]),
        (ends[8] + 1, [8]),
        (len(unbroken), []),
    ):
        PART.write_bytes(unbroken[:cut])
        starts.clear()
        assert command(*SAMPLING)[0] == 0
        assert Path("answers.jsonl").read_bytes() == unbroken and starts == expected
        assert not PART.exists()
        Path("answers.jsonl").unlink()


def test_ctrl_c_says_what_is_kept(command, unbroken, monkeypatch):
    """The message counts the answered prompts, names the file and says how to resume."""
    respond = sample.respond

    def interrupted(*args, **options):
        if args[3] == 8:
            raise KeyboardInterrupt
        return respond(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "respond", interrupted)
        status, _, error = command(*SAMPLING)
    assert status == 1 and "same command" in error
    assert all(part in error for part in ("interrupted", "8 of 10", "answers.jsonl.incomplete"))
    assert not Path("answers.jsonl").exists() and unbroken.startswith(PART.read_bytes())
    assert command(*SAMPLING)[0] == 0 and Path("answers.jsonl").read_bytes() == unbroken


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGINT"])
def test_a_killed_process_resumes(signal, command, unbroken):
    """The real command, killed as soon as it has written something, is started again."""
    line = [sys.executable, ROOT / "sample.py", *SAMPLING]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (PART.exists() and PART.stat().st_size):
        time.sleep(0.002)
    process.send_signal(getattr(signals, signal))
    _, error = process.communicate()
    if process.returncode:  # it may have been faster
        assert "Traceback" not in error and not Path("answers.jsonl").exists()
        assert subprocess.run(line, capture_output=True, check=False).returncode == 0
    assert Path("answers.jsonl").read_bytes() == unbroken


# For each unfinished file: how its first line changes, the new flags, and the parts of the message:
# the line, and what differs.
OTHERS = [
    (lambda r: r, "--temperature 0.5", [":1:", "temperature", "1.0", "0.5"]),
    (lambda r: r, "--seed 1", [":1:", "seed", "0", "1"]),
    (lambda r: r, "--limit 1", [":2:", "more prompts", "1"]),
    (lambda r: r | {"prompt": "another"}, "", [":1:", "another prompt", "asked.jsonl:1"]),
    (lambda r: {"responses": []}, "", [":1:", "not a line"]),
    (lambda r: r | {"responses": r["responses"][:-1]}, "", [":1:", "not a line"]),
    (lambda r: r | {"responses": 3}, "", [":1:", "not a line"]),
    (lambda r: [], "", [":1:", "not a line"]),
]


@pytest.mark.parametrize("change, flags, named", OTHERS)
def test_an_unfinished_file_of_something_else_is_refused(change, flags, named, command, unbroken):
    """The one line names file, line and difference, and advises --overwrite, which starts over."""
    lines = [json.loads(line) for line in unbroken.splitlines()[:2]]
    write_jsonl(PART, [change(lines[0]), lines[1]])
    before = PART.read_bytes()
    status, _, error = command(*SAMPLING, *flags.split())
    assert status == 1 and error.count("\n") == 1
    assert all(part in error for part in [f"{PART}{named[0]}", *named, "--overwrite"]), error
    assert PART.read_bytes() == before and not Path("answers.jsonl").exists()
    assert command(*SAMPLING, *flags.split(), "--overwrite")[0] == 0 and not PART.exists()


def rewrite(name: str, old: bytes, new: bytes) -> None:
    """Replace bytes in a file of the folder `model`, once."""
    path = Path("model") / name
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


CHANGES = {
    "weights": lambda: rewrite("model.safetensors", b"\x01", b"\x02"),
    "config": lambda: rewrite("config.json", b'"rope_theta": 1', b'"rope_theta": 2'),
    "tokenizer": lambda: rewrite("tokenizer.json", b"fox", b"fux"),
    "template of the checkpoint": lambda: rewrite("tokenizer_config.json", b"{{ ", b"{{  "),
    "template": lambda: Path("template.jinja").write_text("{{ messages[0].content }}<|end|>"),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_file_holds_the_answers_of_one_model(change, command):
    """Another model under the same path is refused; the same model under another path resumes."""
    write_jsonl("asked.jsonl", ASKED * 2)
    shutil.copytree(sample.TOY, "model")
    Path("template.jinja").write_text("{{ messages[0].content }} <|end|>")
    flags = [*SAMPLING, "--chat-template", "template.jinja"]
    assert command(*flags, "--model", "model")[0] == 0
    whole = Path("answers.jsonl").read_bytes()
    begun = whole[: whole.index(b"\n") + 1]
    Path("answers.jsonl").rename(PART)
    PART.write_bytes(begun)
    CHANGES[change]()
    Path("model").rename("moved")
    status, _, error = command(*flags, "--model", "moved")
    if change == "nothing":
        assert status == 0
        both = Path("answers.jsonl").read_bytes()
        assert both.startswith(begun) and both.replace(b"moved", b"model") == whole
    else:
        assert status == 1 and f"{PART}:1: made with model_sha256" in error, error
        assert PART.read_bytes() == begun


def test_what_is_only_printed_digests_nothing(command, monkeypatch):
    monkeypatch.delattr(hashlib, "file_digest")
    assert command("--prompt", FOX, "--max-new-tokens", "5")[0] == 0


def test_candidates_become_pairs(command):
    """Scores pair the best response with the worst; older preferences on a record are dropped."""
    stale = {"chosen": "old", "rejected": "older", "scores": [1, 2, 3]}
    write_jsonl("asked.jsonl", [record | stale for record in ASKED])
    sampling = "--num-samples 3 --temperature 1 --max-new-tokens 20 --limit 2".split()
    assert command("--prompts", "asked.jsonl", "--out", "candidates.jsonl", *sampling)[0] == 0
    records = read_jsonl("candidates.jsonl")
    assert len(records) == 2
    assert not any({"chosen", "rejected", "scores"} & record.keys() for record in records)
    for record, scores in zip(records, ([0.1, 0.3, 0.2], [5, 0, 1])):
        best, worst = np.argmax(scores), np.argmin(scores)
        kind, example = parse_record(record | {"scores": scores}, "here")
        assert kind == "candidates" and example.prompt == record["prompt"]
        assert example.responses == (record["responses"][best], record["responses"][worst])


USAGE = [
    ("--num-samples 2", "--num-samples"),
    ("--num-samples 0 --temperature 1", "--num-samples"),
    ("--temperature -1", "--temperature"),
    ("--temperature nan", "--temperature"),
    ("--temperature inf", "--temperature"),
    ("--top-p 0", "--top-p"),
    ("--top-p 1.1", "--top-p"),
    ("--top-k -1", "--top-k"),
    ("--seed -1", "--seed"),
    ("--seed 18446744073709551616", "--seed"),
    ("--max-new-tokens 0", "--max-new-tokens"),
    ("--batch-size 0", "--batch-size"),
    ("--chat --prompt x", "--chat"),
    ("--chat --out x", "--chat"),
    ("--prom x", "--prompt"),
    ("--dtype fp16", "--dtype"),
    ("--limit 0", "--limit"),
    ("--format alpaca --prompts x --out y", "--format"),
    ("--format mt_bench --prompts x", "--format"),
    ("--format mt_bench --prompt x --out y", "--format"),
    ("--format mt_bench --prompts x --out y --num-samples 2 --temperature 1", "--format"),
]


@pytest.mark.parametrize("arguments, named", USAGE)
def test_usage_errors(arguments, named, command):
    """Exit with status 2 before anything is loaded; the last line of stderr names the flag."""
    status, out, error = command(*arguments.split())
    last = error.splitlines()[-1]
    assert status == 2 and not out and "sample.py: error: " in last and named in last


UNUSABLE = [  # arguments, and what the one line must name
    ("--model nowhere --prompt x", "nowhere"),
    ("--model empty --prompt x", "empty"),
    ("--model qwen2 --prompt x", "qwen2/config.json: model_type"),
    ("--model cut --prompt x", "cut/model.safetensors"),
    ("--model small --prompt x", "small: the tokenizer has"),
    ("--model cut", "nothing to answer"),
    ("--prompts nowhere.txt", "nowhere.txt"),
    ("--prompts nowhere.jsonl", "nowhere.jsonl"),
    ("--prompts latin.txt", "latin.txt"),
    ("--prompts blank.txt", "blank.txt"),
    ("--prompts bare.jsonl", "bare.jsonl:2"),
    ("--prompts broken.jsonl", "broken.jsonl:1"),
    ("--prompts answered.jsonl", "answered.jsonl:1"),
    ("--prompts system.jsonl", "system.jsonl:1"),
    ("--prompts good.jsonl --chat-template none", "good.jsonl:1"),
    ("--prompts good.jsonl --chat-template nowhere.jinja", "nowhere.jinja"),
    ("--prompts good.jsonl --out nowhere/answers.jsonl", "nowhere/answers.jsonl"),
]


@pytest.mark.parametrize("arguments, named", UNUSABLE)
def test_unusable_input(arguments, named, command):
    """Exit with status 1 and one line that names the file, and the line in it."""
    Path("empty").mkdir()
    changes = {"qwen2": {"model_type": "qwen2"}, "small": {"vocab_size": 5}, "cut": {}}
    for name, change in changes.items():
        path = Path(shutil.copytree(ROOT / "toy" / "checkpoint", name), "config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    os.truncate("cut/model.safetensors", 2000)
    Path("latin.txt").write_bytes("déjà".encode("latin-1"))
    Path("blank.txt").write_text("\n \n")
    Path("broken.jsonl").write_text("{")
    roles = ("system", "user", "assistant")
    system, user, assistant = ({"role": role, "content": "x"} for role in roles)
    write_jsonl("bare.jsonl", [{"prompt": FOX}, {"instruction": FOX}])
    write_jsonl("answered.jsonl", [{"messages": [user, assistant]}])
    write_jsonl("system.jsonl", [{"messages": [system, user]}])
    write_jsonl("good.jsonl", [{"messages": [user]}])
    status, out, error = command(*arguments.split())
    assert status == 1 and not out
    assert error.startswith("sample.py: error: ") and error.count("\n") == 1, error
    assert named in error, error


def test_chat_through_a_pipe():
    """The real command answers line by line, and leaves at the end of its input."""
    command = [sys.executable, ROOT / "sample.py", "--chat", "--max-new-tokens", "30"]
    done = subprocess.run(command, input=f"{FOX}\n{OWL}\n", capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    _, first, second, rest = done.stdout.split("\n> ")
    assert re.fullmatch(WORDS + "\n", first) and re.fullmatch(WORDS + "\n", second)
    assert not rest.strip()


@pytest.mark.parametrize("temperature, top_p", [(1e-40, 1.0), (1e-300, 1.0), (1.0, 1e-46)])
def test_extreme_settings_are_greedy(temperature, top_p):
    """A tiny temperature must not yield infinities, nor a tiny p an empty set of tokens."""
    logits, draws = torch.tensor([[1.0, 5.0, 2.0]] * 2), torch.tensor([0.0, 0.999])
    assert pick(logits, draws, temperature, top_p, 0).tolist() == [1, 1]


def test_a_prompt_or_an_answer_beyond_the_positions_of_the_model():
    """RoPE would accept positions never trained; a huge limit must not make a huge cache."""
    model = load(ROOT / "toy" / "checkpoint")
    context = model.config.max_position_embeddings
    [generated] = sample.generate(model, [[1] * (context - 3)], set(), 10**12)
    assert len(generated) == 3
    with pytest.raises(DataError, match=str(context)):
        sample.generate(model, [[1] * context], set(), 1)


def test_chat_remembers_and_ends_with_an_empty_line(monkeypatch, capsys):
    """Each turn's prompt is the conversation so far; input after the empty line is not read."""
    tokenizer = Tokenizer(ROOT / "toy" / "checkpoint")
    asked, answer = [], tokenizer.encode_responses(["the fox sleeps ."])[0]

    def decode(model, prompts, stop_ids, **options):
        asked.append(tokenizer.backend.decode(prompts[0], skip_special_tokens=False))
        yield from ((0, token, token in stop_ids) for token in answer)

    monkeypatch.setattr(sample, "decode", decode)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{FOX}\n{OWL}\n\n{FOX}\n"))
    sample.chat(None, tokenizer)
    first = f"<|user|> {FOX} <|end|> <|assistant|>"
    second = f"{first} the fox sleeps . <|end|> <|user|> {OWL} <|end|> <|assistant|>"
    assert asked == [first, second]
    assert capsys.readouterr().out.count("the fox sleeps .") == 2


def byte_tokenizer(folder: Path) -> Tokenizer:
    """Return a tokenizer with one token per byte, and one that ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(folder)


@pytest.mark.parametrize("pieces", [["n", "é"], ["€", " ", "🦊", "!"], ["\ufffd?"]], ids="".join)
def test_chat_streams_whole_characters(pieces, monkeypatch, tmp_path):
    """A character of several tokens appears with the last, never as a replacement mark before."""
    tokenizer = byte_tokenizer(tmp_path)
    ids = tokenizer.encode_responses(["".join(pieces)])[0]
    monkeypatch.setattr(
        sample, "decode", lambda *args, **options: ((0, token, False) for token in ids)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **options: printed.extend(words))
    sample.chat(None, tokenizer)
    assert [words for words in printed[1:] if words] == pieces


@pytest.mark.parametrize(
    "text", ["\x1b]0;title\x07", "a\x1b[2Jb", "\x9b31m", "\u202egnp.exe", "\r"]
)
def test_answers_do_not_steer_a_terminal(text, monkeypatch, capsys, tmp_path):
    """A model may answer with any bytes; in the terminal, and in an error, they are only shown."""
    tokenizer = byte_tokenizer(tmp_path)
    ids = tokenizer.encode_responses([text])[0]
    monkeypatch.setattr(
        sample, "decode", lambda *args, **options: ((0, token, False) for token in ids)
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    sample.chat(None, tokenizer)
    out = capsys.readouterr().out + str(DataError(text))
    assert not set(out) & set("\x1b\x07\x9b\u202e\r")


def test_chat_with_bytes_that_are_no_text(command, monkeypatch):
    """Input that is not UTF-8 ends a chat with one line."""
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    status, out, error = command("--chat")
    assert status == 1 and "sample.py: error: 'utf-8' codec can't decode" in error
