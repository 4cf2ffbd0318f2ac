"""Test the way from data files to packed tokens: formats/, then data.py.

In order: record formats, tokens, templates, bad input, packing. Tests of tokens name the issue in
which users of another trainer met the same mistake. Downloads are tested in tests/test_hub.py.
"""

import datetime
import decimal
import doctest
import functools
import gzip
import itertools
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
import formats.candidates
import formats.checkpoint
import formats.hub
import formats.records
import formats.sandbox
import formats.schemas
from data import Example
from formats.checkpoint import checkpoint_folder
from formats.errors import CheckpointError, DataError
from formats.files import dump_json
from formats.records import data_files, read_records
from formats.schemas import Dropped, parse_record
from formats.tokenizer import Tokenizer, read_template

ROOT = Path(__file__).resolve().parent.parent


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


# --------------------------------------------------------------------------------------------------
# Formats of records and files

TURNS = [system("Be brief."), user("Hi"), assistant("Hello."), user("Bye")]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
ULTRAFEEDBACK = [
    {
        "prompt": "Hi",
        "prompt_id": "a1",
        "chosen": [user("Hi"), assistant("Hello, näive 🙂 friend.")],
        "rejected": [user("Hi"), assistant("No.")],
        "messages": [user("Hi"), assistant("Hello, näive 🙂 friend.")],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    },
    {
        "prompt": None,
        "chosen": [*TURNS, assistant("See you.")],
        "rejected": [*TURNS, assistant("What?")],
    },
]
HH_RLHF = {"chosen": TRANSCRIPT + " See you.", "rejected": TRANSCRIPT + " See?"}
STRINGS = {"chosen": "a", "rejected": "b"}
MESSAGES = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
THREE = {"responses": ["so so", "worst", "best"], "scores": [1, 0.5, 3]}
TWO = {"responses": [[assistant("b")], [assistant("a")]], "scores": [0, 1]}

PAIRS = [  # format, record, prompt, responses
    ("messages", ULTRAFEEDBACK[0], [user("Hi")], ("Hello, näive 🙂 friend.", "No.")),
    ("messages", ULTRAFEEDBACK[1], TURNS, ("See you.", "What?")),
    ("explicit", {"prompt": "Hi"} | STRINGS, "Hi", ("a", "b")),
    ("explicit", {"prompt": TURNS} | STRINGS, TURNS, ("a", "b")),
    ("explicit", {"prompt": TURNS} | MESSAGES, TURNS, ("a", "b")),
    ("explicit", {"prompt": "Hi"} | MESSAGES, "Hi", ("a", "b")),
    ("transcripts", HH_RLHF, TRANSCRIPT, (" See you.", " See?")),
    ("candidates", {"prompt": "Hi"} | THREE, "Hi", ("best", "worst")),
    ("candidates", {"prompt": TURNS} | TWO, TURNS, ("a", "b")),
]
SINGLES = [  # format, record, prompt, response
    ("messages", {"messages": [*TURNS, assistant("See you.")]}, TURNS, "See you."),
    ("messages", ULTRAFEEDBACK[0], [user("Hi")], "Hello, näive 🙂 friend."),
    ("completions", {"prompt": "Hi", "completion": "a"}, "Hi", "a"),
    ("completions", {"prompt": TURNS, "completion": [assistant("a")]}, TURNS, "a"),
    ("explicit", {"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", "a"),
    ("candidates", {"prompt": "Hi", "responses": ["b", "a"], "scores": [0, 1]}, "Hi", "a"),
]


@pytest.mark.parametrize("kind, record, prompt, responses", PAIRS)
def test_formats_of_pairs(kind, record, prompt, responses):
    """The four formats of published preference data are recognized without conversion."""
    expected = Example(prompt, responses, "a.jsonl:1")
    assert parse_record(record, "a.jsonl:1") == (kind, expected)


@pytest.mark.parametrize("kind, record, prompt, response", SINGLES)
def test_formats_of_single_responses(kind, record, prompt, response):
    """SFT, the start of the paper's Base setting, takes single responses or the chosen of pairs."""
    expected = Example(prompt, (response,), "a.jsonl:1")
    assert parse_record(record, "a.jsonl:1", paired=False) == (kind, expected)


def write(path: Path, records: list[dict]) -> None:
    """Write records to a file, in the file type that its name asks for."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        raw = "".join(lines).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def read(name: Path | str) -> list[tuple]:
    """Return format, prompt and responses of every record in a file or folder."""
    parsed = (parse_record(record, where) for where, record in read_records(str(name)))
    return [(kind, example.prompt, example.responses) for kind, example in parsed]


@pytest.mark.parametrize(
    "names",
    [
        ["a.jsonl"],
        ["a.json"],
        ["a.jsonl.gz"],
        ["a.parquet"],
        ["a.jsonl.gz", "b.parquet"],
        ["a.json", "b.jsonl"],
    ],
)
def test_same_examples_from_every_kind_of_file(tmp_path, names):
    """The same pairs give the same examples from any file type, in one file or in shards."""
    shards = [ULTRAFEEDBACK] if len(names) == 1 else [[record] for record in ULTRAFEEDBACK]
    for name, shard in zip(names, shards):
        write(tmp_path / name, shard)
    expected = [(kind, prompt, responses) for kind, _, prompt, responses in PAIRS[:2]]
    assert read(tmp_path) == expected
    if len(names) == 1:
        assert read(tmp_path / names[0]) == expected


def test_splits_of_a_folder(tmp_path):
    """`FOLDER:train` reads the train split only, not test, `train_extra` or `contest`.

    Without a split, nothing is read: nobody wants the test split among the training pairs.
    """
    for name in (
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
        "test.jsonl",
        "contest.jsonl",
        "train_extra.jsonl",
        "notes.txt",
    ):
        write(tmp_path / name, [{"prompt": name, "chosen": "a", "rejected": "b"}])

    def prompts(split: str) -> list[str]:
        return [prompt for _, prompt, _ in read(f"{tmp_path}{split}")]

    assert prompts(":train") == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert prompts(":test") == ["test.jsonl"]
    with pytest.raises(DataError, match=f"several splits, contest, .*: pass one as {tmp_path}:SP"):
        prompts("")
    with pytest.raises(DataError, match="no .* file of split 'valid'"):
        prompts(":valid")


def test_files_of_windows(tmp_path):
    """A byte order mark, CRLF and blank lines, as Windows tools write them, do no harm."""
    line = b'{"prompt": "Hi", "chosen": "a", "rejected": "b"}'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n")
    assert read(tmp_path / "a.jsonl") == [("explicit", "Hi", ("a", "b"))]


def test_empty_file_holds_no_records(tmp_path):
    """An empty file has no records and is no error; `runtime.inputs` refuses to train on none."""
    (tmp_path / "a.jsonl").touch()
    assert read(tmp_path / "a.jsonl") == []


# --------------------------------------------------------------------------------------------------
# Small tokenizers and templates, built like those of published checkpoints

TEXTS = [
    "Hello, hello. Say hello again, and again?",
    "user assistant system [INST] [/INST]",
    "You say: no.\n\nI say: yes.\n\n\nHello.",
] * 3
SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
BOS_FIRST = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
)
# How Llama 3 splits text before BPE.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def byte_level(prefix_space: bool = False) -> str:
    """Return the file of a tokenizer like Llama 3's: BPE on bytes, with BOS before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = BOS_FIRST
    return tokenizer.to_str()


@functools.cache
def sentencepiece(form: str) -> str:
    """Return the file of a tokenizer like Llama 2's and Mistral's: BPE with byte fallback.

    It puts BOS and a space before every text. `form` says how the space is added: "Prepend" or
    "Metaspace".
    """
    pieces = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    special = SPECIAL[:3] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    pieces.train_from_iterator(TEXTS, trainer)
    model = json.loads(pieces.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(SPECIAL[:3])
    if form == "Prepend":
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    parts = [spaces, decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = BOS_FIRST
    return tokenizer.to_str()


CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}\n"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}\n"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}\n"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}\n"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for m in messages %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
ZEPHYR_WITHOUT_END = ZEPHYR.replace("eos_token", "''")

CONVERSATION = [user("Say hello."), assistant("Hello."), user("And again?")]
ANSWER = "Yes, hello."
CHATML_PROMPT = (
    "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nAnd again?<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3_PROMPT = (
    "<s><|start_header_id|>user<|end_header_id|>\n\nSay hello.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd again?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
MISTRAL_PROMPT = "<s>[INST] Say hello. [/INST] Hello.</s> [INST] And again? [/INST]"
ZEPHYR_PROMPT = (
    "<|user|>\nSay hello.</s>\n<|assistant|>\nHello.</s>\n<|user|>\nAnd again?</s>\n<|assistant|>\n"
)
CHECKPOINTS = {  # tokenizer, template, EOS; the prompt and the response expected from them
    "ChatML": (byte_level(), CHATML, "<|im_end|>", CHATML_PROMPT, "Yes, hello."),
    "Llama 3": (byte_level(), LLAMA3, "<|eot_id|>", LLAMA3_PROMPT, "Yes, hello."),
    "Mistral": (sentencepiece("Prepend"), MISTRAL, "</s>", MISTRAL_PROMPT, " Yes, hello."),
    "Zephyr": (sentencepiece("Metaspace"), ZEPHYR, "</s>", ZEPHYR_PROMPT, "Yes, hello."),
}


def write_checkpoint(
    folder: Path, backend: str, template: str | list | None, eos: str | None, **files: dict
) -> Path:
    """Write the files of a checkpoint that a tokenizer reads; `files` are further JSON files."""
    settings = {"bos_token": "<s>", "eos_token": eos}
    if template:
        settings["chat_template"] = template
    (folder / "tokenizer.json").write_text(backend)
    for name, value in {"tokenizer_config": settings, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def byte_level_tokenizer(folder: Path, template: str | None = None) -> Tokenizer:
    return Tokenizer(write_checkpoint(folder, byte_level(), template, "</s>"))


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """Return the tokenizer of one of `CHECKPOINTS`."""
    backend, template, eos, *_ = CHECKPOINTS[name]
    return Tokenizer(write_checkpoint(folder, backend, template, eos))


def transformers_tokenizer(folder: Path, template: str, eos: str):
    """Return the tokenizer that transformers makes of the same files."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token=eos,
        chat_template=template,
    )


def encode(
    tokenizer: Tokenizer,
    prompt: str | list[dict],
    *responses: str,
    max_length: int = 10**6,
    max_prompt_length: int = 10**5,
) -> tuple[list[int], list[list[int]], Counter]:
    """Return the ids of the prompt, the ids of every response, and counts of what was cut."""
    counts: Counter = Counter()
    examples = [Example(prompt, responses, "pairs.jsonl:7")]
    [pair] = data.encode(examples, tokenizer, max_length, max_prompt_length, counts)
    return pair.prompt.tolist(), [response.tolist() for response in pair.responses], +counts


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.backend.encode([text])[0]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.backend.decode(ids, skip_special_tokens=False)


# --------------------------------------------------------------------------------------------------
# Tokens: the decisions that data.py lists


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prompt_ends_with_generation_prompt_and_response_with_end_of_turn(tmp_path, name):
    """The prompt ends with the generation prompt, and the response with one end-of-turn token."""
    # princeton-nlp/SimPO#8 and #17, trl#1930: models learned the assistant's header as part of the
    # response, or a newline after its end. Llama 3's template trims. ChatML's and Zephyr's write a
    # newline after the end of turn, and this test's Mistral a space.
    tokenizer = tokenizer_of(tmp_path, name)
    _, _, end, prompt_text, response_text = CHECKPOINTS[name]
    assert tokenizer.prompt_text(CONVERSATION, "") == prompt_text
    example = Example(CONVERSATION, (ANSWER,), "")
    assert tokenizer.texts([example]) == [(prompt_text, [response_text])]
    prompt, [response, _], _ = encode(tokenizer, CONVERSATION, ANSWER, "No.")
    whole = ids_of(tokenizer, prompt_text + response_text + end)
    assert prompt + response == whole
    assert prompt == whole[: len(prompt)] == ids_of(tokenizer, prompt_text)
    assert tokenizer.stop_ids >= {response[-1]}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_renders_and_encodes_the_same(tmp_path, name):
    """A prompt has the same text and ids in transformers, which may later serve the model."""
    _, template, eos, *_ = CHECKPOINTS[name]
    ours = tokenizer_of(tmp_path, name)
    theirs = transformers_tokenizer(tmp_path, template, eos)
    for messages in (CONVERSATION, CONVERSATION[:1]):
        render = functools.partial(theirs.apply_chat_template, messages, add_generation_prompt=True)
        assert ours.prompt_text(messages, "") == render(tokenize=False)
        assert encode(ours, messages, ANSWER)[0] == render(tokenize=True, return_dict=False)
    whole = theirs.apply_chat_template([*CONVERSATION, assistant(ANSWER)], tokenize=False)
    [(text, [answer])] = ours.texts([Example(CONVERSATION, (ANSWER,), "")])
    assert whole.rstrip() == text + answer + eos


BOS_CASES = [  # template, prompt, number of BOS tokens expected
    (LLAMA3, CONVERSATION, 1),
    (CHATML, CONVERSATION, 0),
    (None, "Say hello.", 1),
    (None, "<s>Say hello.", 1),
    (None, "", 1),
]
BACKENDS = [
    (byte_level, False),
    (byte_level, True),
    (sentencepiece, "Prepend"),
    (sentencepiece, "Metaspace"),
]


@pytest.mark.parametrize("backend, argument", [BACKENDS[0], *BACKENDS[2:]])
@pytest.mark.parametrize("template, prompt, expected", BOS_CASES)
def test_one_bos(tmp_path, backend, argument, template, prompt, expected):
    """A prompt has one BOS at its start, unless its template renders none; a response has none."""
    # princeton-nlp/SimPO#21, axolotl#1616: the tokenizer added a second BOS to the template's.
    tokenizer = Tokenizer(write_checkpoint(tmp_path, backend(argument), template, "</s>"))
    prompt, responses, _ = encode(tokenizer, prompt, "Hello.", "No.")
    bos = tokenizer.backend.token_to_id("<s>")
    assert prompt.count(bos) == expected == (prompt[0] == bos)
    assert not any(bos in response for response in responses)


@pytest.mark.parametrize(
    "template, prompt, response",
    [(None, "Say ", "hello."), (None, "Say hel", "lo."), (CHATML, "Say hello.", "\n\nHello.")],
)
def test_no_merge_crosses_the_boundary(tmp_path, template, prompt, response):
    """Prompt and response are encoded separately, so the prompt's ids depend on no response."""
    # trl#1153, #2054: "Say " + "hello" encoded as one text is "Say" + " hello". The prompt trained
    # on is then neither the one given at inference nor the same for chosen and rejected.
    tokenizer = byte_level_tokenizer(tmp_path, template)
    [(text, [answer])] = tokenizer.texts([Example(prompt, (response,), "")])
    ids, [chosen, _], _ = encode(tokenizer, prompt, response, "No.")
    bos = [] if template else [tokenizer.bos_id]
    assert ids == bos + ids_of(tokenizer, text)
    assert chosen[:-1] == ids_of(tokenizer, answer)
    joint = bos + ids_of(tokenizer, text + response)
    assert ids + chosen[:-1] != joint, "the case tests nothing: no merge would have crossed"


@pytest.mark.parametrize(
    "response", ["lo, hello.", " Hello.", "\nHello.", "\n\n again", "né 🙂", "[INST]"]
)
@pytest.mark.parametrize("backend, argument", BACKENDS)
def test_a_response_continues_the_text(tmp_path, backend, argument, response):
    """The text of prompt and response together is the prompt's text followed by the response."""
    # Tokenizers like sentencepiece put a space before every text. If a response gets one too, a
    # Llama 2 learns to answer with two spaces, or with a space in the middle of a word. Newlines
    # must survive the remedy.
    tokenizer = Tokenizer(write_checkpoint(tmp_path, backend(argument), None, "</s>"))
    prompt, [ids], _ = encode(tokenizer, "Say hel", response)
    assert tokenizer.decode(prompt + ids) == tokenizer.decode(prompt) + response
    assert ids[-1] == tokenizer.backend.token_to_id("</s>")


LONG = "again " * 50
PROMPTS_CUT, RESPONSES_CUT = "prompts cut at their start", "responses cut at their end"


@pytest.mark.parametrize(
    "responses, max_length, max_prompt_length, cut",
    [
        (("yes", "no"), 1000, 500, {}),
        (("yes", "no"), 1000, 20, {PROMPTS_CUT: 1}),
        ((LONG, "no"), 60, 20, {PROMPTS_CUT: 1, RESPONSES_CUT: 1}),
        ((LONG, LONG + LONG + "!"), 140, 100, {RESPONSES_CUT: 1}),
        (("yes " + LONG, "no " + LONG), 21, 20, {PROMPTS_CUT: 1, RESPONSES_CUT: 2}),
        (("yes " + LONG, "no " + LONG), 2, 1, {PROMPTS_CUT: 1, RESPONSES_CUT: 2}),
    ],
)
def test_truncation(tmp_path, responses, max_length, max_prompt_length, cut):
    """Only what does not fit is cut; BOS and the prompt's end stay, and no response gets empty."""
    # trl#2209, #3382, #6548: BOS, the generation prompt or the end token were lost. Short responses
    # were cut because of a long prompt, or lost as a whole, with a division of 0 by 0.
    tokenizer = tokenizer_of(tmp_path, "Llama 3")
    whole_prompt, whole_responses, _ = encode(tokenizer, LONG, *responses)
    prompt, responses, counts = encode(
        tokenizer, LONG, *responses, max_length=max_length, max_prompt_length=max_prompt_length
    )
    assert counts == cut
    assert len(prompt) == min(len(whole_prompt), max_prompt_length)
    assert prompt == whole_prompt[:1] + whole_prompt[len(whole_prompt) - len(prompt) + 1 :]
    if max_prompt_length > 10:
        generation_prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n"
        assert text_of(tokenizer, prompt).endswith(generation_prompt)
    for response, whole in zip(responses, whole_responses):
        assert response == whole[: max_length - len(prompt)] and response


def test_what_just_fits_is_not_cut(tmp_path):
    """A pair that exactly fits is neither cut nor counted as cut."""
    # The counts at the start of a run tell the user whether to raise --max-length.
    tokenizer = tokenizer_of(tmp_path, "Llama 3")
    prompt, [response, _], _ = encode(tokenizer, LONG, LONG, "no")
    limits = {"max_length": len(prompt) + len(response), "max_prompt_length": len(prompt)}
    same_prompt, [same_response, _], counts = encode(tokenizer, LONG, LONG, "no", **limits)
    assert (same_prompt, same_response, counts) == (prompt, response, {})


EQUAL_WHEN_CUT = "dropped: chosen equal to rejected in what is left of them"


@pytest.mark.parametrize(
    "prompt, responses, why",
    [
        ("Hi", (LONG + "yes", LONG + "no"), EQUAL_WHEN_CUT),
        ("", ("yes", "no"), "dropped: an empty prompt"),
    ],
)
def test_pairs_that_cannot_teach_are_dropped_and_counted(tmp_path, prompt, responses, why):
    """Pairs with an empty prompt, or equal once cut, are dropped and counted."""
    # Equal responses have no gradient, and without a prompt no token predicts the response's first.
    backend = tokenizers.Tokenizer.from_str(byte_level())
    backend.post_processor = processors.ByteLevel()  # adds no BOS
    tokenizer = Tokenizer(write_checkpoint(tmp_path, backend.to_str(), None, "</s>"))
    counts: Counter = Counter()
    assert data.encode([Example(prompt, responses, "")], tokenizer, 30, 20, counts) == []
    assert counts[why] == 1


@pytest.mark.parametrize(
    "eos, generation, config, template, stops, end, learned",
    [
        # Llama 3 Instruct
        ("<|eot_id|>", {"eos_token_id": [2, 7]}, {"eos_token_id": 2}, LLAMA3, {2, 7}, 7, None),
        # its template on the base model
        ("</s>", {"eos_token_id": 2}, {"eos_token_id": 2}, LLAMA3, {2, 7}, 7, [2, 7]),
        ("</s>", {}, {"eos_token_id": [2, 7]}, LLAMA3, {2, 7}, 7, None),
        # only the template says how a turn ends
        (None, {}, {}, LLAMA3, {7}, 7, [7]),
        ("</s>", {}, {}, None, {2}, 2, [2]),
        ("</s>", {"eos_token_id": [7]}, {}, None, {2, 7}, 2, [7, 2]),
        (None, {"eos_token_id": [7, 2]}, {}, None, {2, 7}, 2, None),
        (None, {}, {"eos_token_id": 2}, None, {2}, 2, None),
        # the template marks no end, which is an error
        (None, {}, {"eos_token_id": 2}, ZEPHYR_WITHOUT_END, None, None, None),
    ],
)
def test_end_of_turn(tmp_path, eos, generation, config, template, stops, end, learned):
    """The end-of-turn token is found wherever it is defined, and the trained model names it."""
    # `eos_token_id` is a number, a list or absent, in two files. If neither file names the token
    # that a model learned to end with, generation with it would never stop.
    files = {"generation_config": generation} if generation else {}
    folder = write_checkpoint(tmp_path, byte_level(), template, eos, config=config, **files)
    if end is None:
        with pytest.raises(DataError, match="holds no special token, and there is no EOS"):
            Tokenizer(folder)
        return
    tokenizer = Tokenizer(folder)
    assert (tokenizer.stop_ids, tokenizer.end_id) == (stops, end)
    _, [response], _ = encode(tokenizer, "Hi", "Hello.")
    assert response[-1] == end
    changed = tokenizer.changed_files()
    named = json.loads(changed["generation_config.json"])["eos_token_id"] if changed else None
    assert named == learned


def test_template_that_marks_no_end(tmp_path):
    """EOS ends the response if the template ends a turn with a newline alone."""
    tokenizer = byte_level_tokenizer(tmp_path, ZEPHYR_WITHOUT_END)
    _, [response], _ = encode(tokenizer, "Hi", "Hello.")
    assert text_of(tokenizer, response) == "Hello.</s>"


@pytest.mark.parametrize("eos", ["</s>", 4711, -1, 2**40, 1.5, [2, None, "x"]])
def test_eos_that_is_no_token(tmp_path, eos):
    """An `eos_token_id` that is no token is refused, because samples would never stop."""
    files = {"generation_config": {"eos_token_id": eos}}
    folder = write_checkpoint(tmp_path, byte_level(), None, "</s>", **files)
    problem = "generation_config.json: eos_token_id: .* is not a token of the tokenizer"
    with pytest.raises(DataError, match=problem):
        Tokenizer(folder)


# --------------------------------------------------------------------------------------------------
# Templates: programs of whoever uploaded the checkpoint

SHOW = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
THREE_TURNS = [user("Hi"), assistant("Hello."), user("Bye")]
REFUSED = "^pairs.jsonl:7: the chat template refuses this conversation: "


def from_third_message(template: str) -> str:
    """Run `template` only for conversations of three messages, so that it passes when it loads."""
    return "{% if messages | length > 2 %}" + template + "{% endif %}" + SHOW


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__['os'].system('true') }}", "unsafe"),
        ("{{ strftime_now.__self__.replace(year=1) }}", "unsafe"),
        ("{{ messages.append({'role': 'user', 'content': 'Pwned'}) }}", "unsafe"),
        ("{{ messages[0].update({'content': 'Pwned'}) }}", "unsafe"),
        ("{{ dict.update(messages[0], {'content': 'Pwned'}) }}", "has no attribute 'update'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('No more\nthan this') }}", "No more than this"),
    ],
)
def test_hostile_template(tmp_path, template, message):
    """A template can neither reach Python nor change the data, and its error is one line."""
    prompt = [dict(turn) for turn in THREE_TURNS]
    tokenizer = byte_level_tokenizer(tmp_path, from_third_message(template))
    with pytest.raises(DataError, match=f"{REFUSED}.*{message}") as error:
        encode(tokenizer, prompt, "Yes.")
    assert "\n" not in str(error.value)
    assert prompt == THREE_TURNS


BOUNDLESS = {  # without a limit, each of these takes hours or all memory
    "a loop that writes nothing": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long string": "{{ 'x' * 10**10 }}",
    "a string that doubles": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}"
    ),
    "a list that holds itself": (
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}"
        "{% endfor %}{{ ns.l }}"
    ),
    "a long list": "{% set l = [1] * 10**10 %}",
    "a wide number": "{{ '%10000000000d' % 1 }}",
    "a wide format": "{{ '{:>10000000000}'.format(1) }}",
    "a wide filter": "{{ 'x' | center(10**10) }}",
    "a large number": "{{ 7 ** (messages | length * 10**9) }}",
    "much text": "{{ messages[0].content * 10**8 }}",
    "a replacement": "{{ ('a' * 10**5) | replace('a', 'a' * 10**5) }}",
    "half a character": r"{{ '\ud83d' }}",
}


def peak_memory() -> int:
    """Return the most memory that this process has used so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def children_seconds() -> float:
    """Return the CPU time of all child processes that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


@pytest.mark.parametrize("case", BOUNDLESS)
def test_template_without_bounds(tmp_path, case):
    """A template that spends without bound is stopped, and the next conversation is rendered."""
    # jinja2's sandbox limits ranges and little else. The kernel limits the template's process to
    # two seconds and 512 MiB, whatever the template does.
    memory, seconds = peak_memory(), children_seconds()
    tokenizer = byte_level_tokenizer(tmp_path, from_third_message(BOUNDLESS[case]))
    with pytest.raises(DataError, match=REFUSED) as error:
        encode(tokenizer, THREE_TURNS, "Yes.")
    assert "tokenizer_config.json: chat_template" in str(error.value)
    assert "\n" not in str(error.value)
    assert peak_memory() - memory < 2**16 and children_seconds() - seconds < 10
    encode(tokenizer, "Hi", "Yes.")


@pytest.mark.parametrize(
    "source",
    [
        "{{" + "(" * 10**5,
        "{% if 1 %}" * 5000,
        "{{ 'x' * 10**10 }}",
        "{{ 'x' * 10**10 }",
        "{% include 'x' %}",
    ],
)
def test_template_that_does_not_compile(tmp_path, source):
    """A template that cannot be compiled within the limits is refused by the name of its file."""
    # Compiling is work too: jinja2 folds constants, and recurses at every bracket.
    (tmp_path / "chat_template.jinja").write_text(source)
    refused = f"^{tmp_path}.*chat template .*chat_template.jinja|^{tmp_path}/chat_template.jinja: "
    with pytest.raises(DataError, match=refused):
        byte_level_tokenizer(tmp_path)


@pytest.mark.parametrize("draw", ["{{ ['a', 'b'] | random }}", "{{ lipsum(1) }}"])
def test_template_that_draws_lots(tmp_path, draw):
    """A template that would write another text in every run is refused."""
    with pytest.raises(DataError, match="random|lipsum"):
        byte_level_tokenizer(tmp_path, draw + SHOW)


@pytest.mark.parametrize("prefix_space", [False, True])
def test_a_tokenizer_that_draws_lots(tmp_path, prefix_space):
    """BPE-dropout is off: a run and its resumed half must get the same tokens."""
    spec = json.loads(byte_level(prefix_space))
    texts, found = ["say hello again"] * 40, []
    for spec["model"]["dropout"] in (None, 0.5, 1.0):
        tokenizer = Tokenizer(write_checkpoint(tmp_path, json.dumps(spec), LLAMA3, "</s>"))
        found += [tokenizer.encode_prompts(texts) + tokenizer.encode_responses(texts)]
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(
    not Path("/proc/self/limits").exists(), reason="/proc tells the limits of a process"
)
def test_templates_run_in_a_limited_process(tmp_path):
    """A template runs in a process that can write no file and hold at most 512 MiB."""
    assert byte_level_tokenizer(tmp_path, SHOW).prompt_text("Hi", "") == "user: Hi</s>"
    limits = Path(f"/proc/{formats.sandbox.TEMPLATES.child.pid}/limits").read_text()
    assert re.search(r"Max file size +0 +0 ", limits)
    assert re.search(rf"Max data size +{2**29} ", limits)


def test_templates_write_no_more_than_their_share(tmp_path):
    """What a template writes for all conversations of a request is bounded, also in the parent."""
    tokenizer = byte_level_tokenizer(tmp_path, from_third_message("{{ 'x' * 2**24 }}"))
    memory = peak_memory()
    with pytest.raises(DataError, match=REFUSED + "writes more than"):
        tokenizer.texts([Example(THREE_TURNS, ("Yes.",), "pairs.jsonl:7")] * 64)
    assert peak_memory() - memory < 2**18


def test_what_is_long_is_not_stopped(tmp_path):
    """A response of 6 MB is rendered and encoded, and much of it decoded at once."""
    tokenizer = tokenizer_of(tmp_path, "ChatML")
    long = "hello, again é " * (6 * 2**20 // 16)
    [(_, [text])] = tokenizer.texts([Example("Hi", (long,), "")])
    [ids] = tokenizer.encode_responses([text])
    start = tokenizer.decode(ids[: 2**19])
    assert text == long and long.startswith(start) and len(start) > 2**18


@pytest.mark.parametrize("limit", ["CPU", "DATA", "FSIZE"])
def test_limits_of_whoever_starts_it(limit):
    """Under a finite hard limit, as after `ulimit -t 3600`, templates and tokenizers run."""
    script = f"""if True:
        import ctypes, resource
        ctypes.CDLL(None).prctl(24, 24)  # also root may not raise a hard limit again
        limit = resource.RLIMIT_{limit}
        resource.setrlimit(limit, ({2**28 if limit == "DATA" else 60},) * 2)
        from formats import sandbox
        print(sandbox.render("{{{{ messages[0] }}}}", {{}}, [(["Hi"], True)]))
    """
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "['Hi']\n", done.stderr


def test_template_that_refuses_a_conversation(tmp_path):
    """The error names the record whose conversation the template refuses, and quotes its reason."""
    # Mistral's template, for one, forbids system messages.
    tokenizer = tokenizer_of(tmp_path, "Mistral")
    with pytest.raises(DataError, match=REFUSED + "Roles must alternate user/assistant"):
        encode(tokenizer, [system("Be brief."), user("Hi")], "Hello.")


def test_template_that_rewrites_the_prompt(tmp_path):
    """A template is refused if the answered conversation does not start with the prompt."""
    # Some templates open the model's thoughts in the generation prompt and drop them afterwards.
    template = SHOW + "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    tokenizer = byte_level_tokenizer(tmp_path, template)
    refused = "the chat template renders the prompt differently once it is answered"
    with pytest.raises(DataError, match=f"^pairs.jsonl:7: {refused}"):
        encode(tokenizer, [user("Hi")], "Hello.")


FEATURES = [  # what published chat templates use, and what it renders for [user("Hi")]
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "Hi"),
    (
        "{% for m in messages * 3 %}{% if loop.index == 2 %}{% continue %}{% endif %}"
        "{{ loop.index }}{% endfor %}",
        "13",
    ),
    (
        "{% for m in messages * 3 %}{{ loop.index }}{% if loop.index == 2 %}{% break %}{% endif %}"
        "{% endfor %}",
        "12",
    ),
    ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
    ("{{ {'é': '<b>'} | tojson(indent=1) }}", '{\n "é": "<b>"\n}'),
    (
        "{{ {'é': 1, 'a': 2} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
        '{"a":2,"\\u00e9":1}',
    ),
    ("{{ strftime_now('%%') }}", "%"),
    (
        "{% if tools is not none %}tools{% endif %}"
        "{% if documents is not none %}documents{% endif %}",
        "",
    ),
    (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% endfor %}{{ ns.n }}",
        "1",
    ),
    (
        "{{ dict([['a', 1]], b=2) }}{{ pad_token }}{{ bos_token }}{{ nonsense }}",
        "{'a': 1, 'b': 2}<s>",
    ),
    ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
]


@pytest.mark.parametrize("template, expected", FEATURES)
def test_what_templates_use(tmp_path, template, expected):
    """A template that works in transformers works here, with the same result."""
    end = "{% if not add_generation_prompt %}</s>{% endif %}"
    tokenizer = byte_level_tokenizer(tmp_path, template + end)
    assert tokenizer.render([([user("Hi")], True)], [""]) == [expected]


@pytest.mark.parametrize("template, expected", FEATURES)
def test_what_templates_use_in_transformers(tmp_path, template, expected):
    """The results expected in `FEATURES` are those of transformers."""
    (tmp_path / "tokenizer.json").write_text(byte_level())
    theirs = transformers_tokenizer(tmp_path, template, "</s>")
    text = theirs.apply_chat_template([user("Hi")], tokenize=False, add_generation_prompt=True)
    assert text == expected


def test_the_clock_stands_still(tmp_path):
    """The time in a template does not change between a prompt and its answered conversation."""
    # Llama 3.2's template writes today's date, and a run may last over midnight.
    template = "{{ strftime_now('%H:%M:%S.%f') }}" + SHOW
    encode(byte_level_tokenizer(tmp_path, template), [user("Hi")], "Hello.")


def test_where_templates_are_read_from(tmp_path):
    """--chat-template wins over chat_template.jinja, which wins over tokenizer_config.json."""
    # transformers has written a file of its own since 4.52. Before, the settings held one template
    # or several.
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": SHOW + "1"}]
    folder = write_checkpoint(tmp_path, byte_level(), several, "</s>")

    def text(override: str | None = None) -> str:
        return Tokenizer(folder, override).prompt_text([user("Hi")], "")

    assert text() == "user: Hi</s>1"
    (folder / "chat_template.jinja").write_text(SHOW + "2")
    assert text() == "user: Hi</s>2"
    assert text(SHOW + "3") == "user: Hi</s>3"
    assert Tokenizer(folder, SHOW + "3").changed_files()["chat_template.jinja"] == SHOW + "3"


@pytest.mark.parametrize("name", ["pipe", "folder", "/dev/zero", "no.jinja"])
def test_template_that_is_no_file(tmp_path, name):
    """--chat-template refuses what is no file: a pipe without a writer would never be read."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"{name}: (cannot be read: not a regular|no such) file"):
        read_template(str(tmp_path / name))


def test_base_checkpoint_without_template(tmp_path):
    """A base model reads plain text and ends with EOS; messages need --chat-template."""
    folder = write_checkpoint(tmp_path, byte_level(), None, "</s>")
    prompt, [response], _ = encode(Tokenizer(folder), "Say hello.", "Hello.")
    assert text_of(Tokenizer(folder), prompt + response) == "<s>Say hello.Hello.</s>"
    refused = "a list of messages needs a chat template, .* pass --chat-template FILE"
    with pytest.raises(DataError, match=f"^pairs.jsonl:7: {refused}"):
        encode(Tokenizer(folder), [user("Say hello.")], "Hello.")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    with_template = Tokenizer(folder, read_template(str(tmp_path / "chatml.jinja")))
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert with_template.prompt_text([user("Hi")], "") == expected
    write_checkpoint(tmp_path, byte_level(), CHATML, "</s>")
    assert Tokenizer(folder, read_template("none")).prompt_text("Hi", "") == "Hi"


def test_transcripts_become_turns(tmp_path):
    """A chat template turns an HH-RLHF transcript into messages, and its answer is stripped."""
    # The text holds no "Human:", and no answer starts with the space after "Assistant:".
    tokenizer = tokenizer_of(tmp_path, "ChatML")
    [(text, [answer])] = tokenizer.texts([Example(TRANSCRIPT, (" See you.\n",), "")])
    assert text == tokenizer.prompt_text(THREE_TURNS, "")
    assert answer == "See you."


def test_vocabulary_larger_than_the_embedding(tmp_path):
    """A tokenizer with more tokens than the embedding has rows is refused."""
    # A tokenizer may be extended without its model. On a GPU, the read beyond the embedding would
    # give no message.
    tokenizer = tokenizer_of(tmp_path, "ChatML")
    size = tokenizer.size
    tokenizer.check_fits(size)
    refused = f"the tokenizer has {size} tokens, the embedding {size - 1}"
    with pytest.raises(DataError, match=refused):
        tokenizer.check_fits(size - 1)


# --------------------------------------------------------------------------------------------------
# Bad input

GOOD = b'{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n'
NOT_A_MESSAGE = "expected a message with role and content"
NO_RESPONSE = "expected a prompt and then one assistant message"
UNEQUAL_LISTS = "responses and scores: expected two lists of one length"
BAD_LINES = [  # a line, or the record in it, and the error
    (b"{'prompt': 1}", "not JSON: "),
    (GOOD[:20], "not JSON: "),
    (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
    (b"[" * 100_000, "not JSON: "),
    (b"null", "expected an object, not NoneType"),
    (["a", "b"], "expected an object, not list"),
    (
        {"prompt": "Hi", "chosen": "half of an emoji: \ud83d", "rejected": "b"},
        r"not JSON: .* '\\ud83d'",
    ),
    ({"prompt": "Hi", "rejected": "b"}, "no 'chosen' field"),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, "no 'rejected' field"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no 'prompt' field"),
    ({"prompt": "Hi", "chosen": 3, "rejected": 4}, "chosen: expected a list of messages"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: expected a list of messages"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt: expected a list of messages"),
    ({"prompt": ["Hi"], "chosen": "a", "rejected": "b"}, rf"prompt\[0\]: {NOT_A_MESSAGE}"),
    (
        {"prompt": "Hi", "chosen": "a", "rejected": [assistant("b")]},
        "chosen is a str and rejected a list",
    ),
    (
        {"prompt": "Hi", "chosen": [user("a")], "rejected": [user("b")]},
        "chosen: expected one assistant message",
    ),
    (
        {"prompt": [user("Hi"), assistant("So")], "chosen": "a", "rejected": "b"},
        "prompt: ends with the assistant's message",
    ),
    ({"chosen": [user("Hi"), user("a")], "rejected": TURNS}, f"chosen: {NO_RESPONSE}"),
    (
        {"chosen": [user("Hi"), assistant("a"), assistant("b")], "rejected": TURNS},
        f"chosen: {NO_RESPONSE}",
    ),
    (
        {"chosen": [user("Hi"), assistant("a")], "rejected": [assistant("b")]},
        f"rejected: {NO_RESPONSE}",
    ),
    (
        {"chosen": [user("Hi"), {"role": "assistant", "content": None}], "rejected": TURNS},
        rf"chosen\[1\]: {NOT_A_MESSAGE}",
    ),
    (
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
        "chosen and rejected answer different prompts",
    ),
    ({"chosen": "yes", "rejected": "no"}, "chosen and rejected share no prompt"),
    (
        {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, float("nan")]},
        "scores: expected numbers",
    ),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, "2"]}, "scores: expected numbers"),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1]}, UNEQUAL_LISTS),
    ({"prompt": "Hi", "responses": ["a"], "scores": [1]}, UNEQUAL_LISTS),
    (
        {"prompt": "Hi", "responses": ["a", 2], "scores": [1, 2]},
        r"responses\[1\]: expected a list of messages",
    ),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_line_is_named(tmp_path, line, message):
    """The error of a bad record is one line that names file, line and field."""
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    (tmp_path / "a.jsonl").write_bytes(GOOD * 2 + bad + b"\n" + GOOD)
    with pytest.raises(DataError, match=f"a.jsonl:3: {message}") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"", "a.json: not JSON: "),
        ("a.json", GOOD, "a.json: expected a JSON list of records"),
        ("a.json", b"[" + GOOD + b", 3]", "a.json record 2: expected an object, not int"),
        ("a.json", b'["\xff"]', "a.json: not JSON: 'utf-8' codec can't decode byte 0xff"),
        ("a.jsonl.gz", gzip.compress(GOOD * 100)[:-20], "a.jsonl.gz: cannot be read: "),
        ("a.jsonl.gz", gzip.compress(GOOD)[:10] + b"\xff" * 30, "a.jsonl.gz: cannot be read: "),
        ("a.jsonl.gz", GOOD, "a.jsonl.gz: cannot be read: "),
        ("a.txt", GOOD, "a.txt: not one of .jsonl, .json, .jsonl.gz, .parquet"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, message):
    """A half downloaded file, or one whose suffix is wrong, is refused by its name."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_parquet(tmp_path):
    """A half downloaded parquet file is refused, and a bad row is named."""
    write(tmp_path / "a.parquet", ULTRAFEEDBACK)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a.parquet: not a whole parquet file: [^\n]+$"):
        read(tmp_path)
    good = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    write(tmp_path / "a.parquet", [good, good | {"rejected": None}])
    with pytest.raises(DataError, match="a.parquet row 2: no 'rejected' field"):
        read(tmp_path)


def test_parquet_of_every_type(tmp_path):
    """Columns that no pair needs may have any type: what is no plain value becomes text."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = {"bytes": b"\xff\xd8", "path": "a.jpg"}
    columns = {
        "prompt": pa.array(["Hi", "Ho"]).dictionary_encode(),
        "chosen": pa.array(["a", "b"], pa.large_string()),
        "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
        "zoned": pa.array([0, 1], pa.timestamp("us", "Europe/Berlin")),
        "far": pa.array([2**60, 0], pa.timestamp("ms")),
        "date": pa.array([datetime.date(1, 1, 1), None]),
        "time": pa.array([1, None], pa.time64("ns")),
        "duration": pa.array([1, None], pa.duration("ns")),
        "decimal": pa.array([decimal.Decimal("1.50"), None]),
        "image": pa.array([image, None]),
        "images": pa.array([[image], []]),
        "bytes": pa.array([b"\xff", None]),
        "half": pa.array([1, 2], pa.float16()),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "list": pa.array([[1, 2], None], pa.list_(pa.int8(), 2)),
        "turns": pa.array([[{"content": "x", "at": datetime.datetime(1, 1, 1)}], []]),
        "score": pa.array([0.5, True], pa.float64()),
        "flag": pa.array([True, None]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    [(where, first), (_, second)] = read_records(str(tmp_path))
    assert where.endswith("a.parquet row 1") and list(first) == list(columns)
    kept = ("prompt", "chosen", "score", "flag", "list")
    assert [first[name] for name in kept] == ["Hi", "a", 0.5, True, [1, 2]]
    assert first["nanoseconds"] == "1970-01-01 00:00:00.000000001" and first["decimal"] == "1.50"
    assert first["turns"] == [{"content": "x", "at": "0001-01-01 00:00:00.000000"}]
    assert (
        first["image"] == "<struct<bytes: binary, path: string>>" and first["bytes"] == "<binary>"
    )
    assert [second[name] for name in ("nanoseconds", "image", "bytes", "map")] == [None] * 4
    json.dumps([first, second])


def test_a_bad_row_is_named(tmp_path):
    """Text that is not UTF-8 is refused with the number of its row; the rows before it are read."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pa.array([b"a"] * 698 + [b"\xff"] + [b"b"]).view(pa.string())
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet")
    records = read_records(str(tmp_path))
    assert len(list(itertools.islice(records, 698))) == 698
    with pytest.raises(DataError, match="a.parquet row 699: 'utf-8' codec can't decode"):
        next(records)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "nested.parquet"])
def test_records_that_unpack_without_bound(tmp_path, monkeypatch, name):
    """A small file that unpacks to gigabytes is refused with the record at which it is too much."""
    monkeypatch.setattr(formats.records, "MOST_UNPACKED", 2**23)
    record, size = json.loads(GOOD) | {"prompt": "x" * 2**20}, 2**20
    if name == "nested.parquet":
        record, size = {"chosen": [user("x" * 2**20), assistant("a")] * 2}, 2**21
    path = tmp_path / name
    if name == "a.jsonl.gz":
        path.write_bytes(gzip.compress((json.dumps(record) + "\n").encode() * 100))
    else:
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.Table.from_pylist([record])
        with parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for _ in range(4):
                writer.write_table(pa.concat_tables([table] * 100))
    memory = peak_memory()
    with pytest.raises(DataError, match="unpacks to more than 200 times its size") as error:
        for _ in read_records(str(tmp_path)):
            pass
    [row] = re.findall(rf"^{path}(?: row |:)(\d+): ", str(error.value))
    assert abs(int(row) * size - max(2**23, 200 * path.stat().st_size)) <= 1.01 * size
    assert peak_memory() - memory < 2**18


def test_files_that_are_json(tmp_path):
    """What is not a number is null in our JSON, at any depth, so that every reader takes it."""
    value = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": math.nan}, "e": "NaN"}
    text = dump_json(value)
    assert json.loads(text, parse_constant=fails_on) == {
        "a": None, "b": [None, [1.5, None]], "c": {"d": None}, "e": "NaN"
    }  # fmt: skip
    dumped = formats.candidates.dump({"scores": [math.nan, 1], "day": datetime.date(1, 2, 3)})
    assert dumped == '{"scores": [null, 1], "day": "0001-02-03"}\n'


def fails_on(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_empty_folder(tmp_path):
    """A folder without data files is refused."""
    with pytest.raises(DataError, match="no .jsonl, .json, .jsonl.gz, .parquet file in "):
        read(tmp_path)


LONGER = {"chosen": TRANSCRIPT + " a\n\nHuman: x\n\nAssistant: y", "rejected": TRANSCRIPT + " b"}


@pytest.mark.parametrize(
    "record, why",
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen equal to rejected"),
        ({"prompt": "Hi", "chosen": "a", "rejected": " \n"}, "an empty response"),
        ({"prompt": "Hi", "chosen": "", "rejected": "b"}, "an empty response"),
        (
            {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 1.0]},
            "candidates that all score the same",
        ),
        (LONGER, "a conversation that goes on"),
    ],
)
def test_records_that_cannot_teach(record, why):
    """A sound record that cannot teach anything is dropped for a stated reason."""
    # Real data holds some of each, and some made a trainer's loss NaN (trl#2209).
    with pytest.raises(Dropped, match=why):
        parse_record(record, "")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "Hi", "completion": 3}, "completion: expected a list"),
        ({"prompt": "Hi", "score": 1}, "no known format; .* prompt \\+ completion"),
    ],
)
def test_bad_single_responses(record, message):
    """The error of a bad SFT record names the fields of SFT data too, not only those of pairs."""
    with pytest.raises(DataError, match=f"^a.jsonl:1: .*{message}"):
        parse_record(record, "a.jsonl:1", paired=False)


@pytest.mark.parametrize(
    "name", ["./pairs", "../pairs", "a--b/c", "data/pairs.jsonl", "pairs", "/no/such/folder"]
)
def test_no_such_file(name, tmp_path, monkeypatch):
    """A misspelled path is not taken for a hub id: no download is tried."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder$"):
        data_files(name)


@pytest.mark.parametrize(
    "setting", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}]
)
def test_hub_out_of_reach(tmp_path, setting):
    """Without a network, the error of a hub id is one line that comes without long retries."""
    script = (
        "from formats.errors import DataError\n"
        "from formats.records import data_files\n"
        "try: data_files('owner/name:train@main')\n"
        "except DataError as e: print(e)"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | setting
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    [message] = done.stdout.splitlines()
    problem = "no such file or folder on this machine, and the hub cannot be reached ("
    assert message.startswith(f"owner/name@main: {problem}")
    assert message.endswith("; download it where there is a network and pass the folder")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer.json": None}, "tokenizer.json: no such file"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: not a tokenizer: "),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: expected a JSON object"),
        ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json: cannot be read as JSON: "),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "rag"}]}'},
            "chat_template: expected a string, or a list with one named 'default'",
        ),
        ({"tokenizer_config.json": "{}"}, "no end-of-sequence token"),
        ({"chat_template.jinja": "{% if %}"}, "the chat template does not compile: "),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja: cannot be read: "),
    ],
)
def test_bad_checkpoint_folder(tmp_path, files, message):
    """The error of a damaged checkpoint is one line that names the file."""
    write_checkpoint(tmp_path, byte_level(), None, "</s>")
    for name, content in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            raw = content if isinstance(content, bytes) else content.encode()
            (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def replace(old: str, new: str, count: int = 1, kind: str = "decoders") -> dict:
    """Return a stage that replaces one text by another, `count` times over."""
    stage = {"type": "Replace", "pattern": {"String": old}, "content": new}
    return {"type": "Sequence", kind: [stage] * count}


def split(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


BACKTRACKING_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Fuse"},
        {"type": "Replace", "pattern": {"Regex": "(e|ee)+b"}, "content": ""},
    ],
}
LIBRARY = {  # parts of a tokenizer.json that the library accepts when it reads the file
    "panics when it encodes": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "panics when it loads": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "makes a text a million times as long": {
        "normalizer": replace("x", "x" * 1000, 2, "normalizers")
    },
    "puts a million characters first": {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}},
    "decodes without end": {"decoder": replace("e", "e" * 10, 12)},
    "decodes to much": {"decoder": replace("e", "e" * 10, 3)},
    "backtracks": {"pre_tokenizer": split("(a|aa)+b")},
    "backtracks when it decodes": {"decoder": BACKTRACKING_DECODER},
    "has no unknown token": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
    "has an id of four billion": {
        "model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**32 - 2}}
    },
}


@pytest.mark.parametrize("case", LIBRARY)
def test_tokenizer_that_breaks_the_library(tmp_path, monkeypatch, case):
    """A tokenizer that would make the library panic, or spend without bound, is stopped."""
    # A panic of the Rust library is no Exception, so `except Exception` lets it through.
    monkeypatch.setattr(formats.sandbox.TOKENIZERS, "seconds", 0.5)
    spec = json.loads(byte_level()) | {"post_processor": None} | LIBRARY[case]
    spec |= {"added_tokens": []} if "model" in LIBRARY[case] else {}
    memory, seconds = peak_memory(), children_seconds()
    with pytest.raises(DataError, match=f"^{tmp_path}/tokenizer.json: ") as error:
        folder = write_checkpoint(tmp_path, json.dumps(spec), CHATML, "</s>")
        tokenizer = Tokenizer(folder)
        _, [ids], _ = encode(tokenizer, ("x" + "a" * 28) * 300, ("e" * 28 + ".") * 300)
        tokenizer.decode(ids)
    assert "\n" not in str(error.value)
    assert peak_memory() - memory < 2**16 and children_seconds() - seconds < 10
    (tmp_path / "tokenizer.json").write_text(byte_level())
    assert Tokenizer(tmp_path).backend.encode(["hello"])[0]


def test_links_of_a_checkpoint(tmp_path):
    """Links inside a checkpoint or into its hub cache are followed; any other is refused."""
    # A link could lead to the user's own files, which a saved checkpoint would copy and publish.
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "models--owner--name" / "snapshots" / "0a1b"
    (folder / "sub").mkdir(parents=True)
    for blobs in (folder.parents[1] / "blobs", tmp_path / "blobs", folder / "sub"):
        blobs.mkdir(exist_ok=True)
        (blobs / "1f").write_text("{}")
        (folder / "tokenizer.json").symlink_to(os.path.relpath(blobs / "1f", folder))
        assert checkpoint_folder(str(folder)) == folder
        (folder / "tokenizer.json").unlink()
    shard, secret = "model-00001-of-00002.safetensors", tmp_path / "secret"
    for name in ("tokenizer.json", shard, "chat_template.jinja", "LICENSE", "sub2"):
        for target in (
            secret,
            "../../../secret",
            "/etc/passwd",
            "../../../blobs/../secret",
            tmp_path,
        ):
            (folder / name).symlink_to(target)
            refused = f"{folder / name}: a link to /.*, outside the checkpoint"
            with pytest.raises(CheckpointError, match=refused):
                checkpoint_folder(str(folder))
            (folder / name).unlink()
    (tmp_path / "blobs" / "2f").symlink_to(secret)
    (folder / "tokenizer.json").symlink_to("../../../blobs/2f")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        checkpoint_folder(str(folder))


def test_files_of_a_checkpoint(tmp_path):
    """Pipes, dangling links and absurdly large files are refused; weights may be large."""
    # Reading a pipe would never end.
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer.json: not a regular file"):
        checkpoint_folder(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match="tokenizer.json: a link to no file"):
        checkpoint_folder(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    for name, size in (("tokenizer.json", 2**40), ("chat_template.jinja", 2**25)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # a sparse file, which takes no space on the disk
        refused = f"{name}: {size} bytes, more than such a file of any checkpoint"
        with pytest.raises(CheckpointError, match=refused):
            checkpoint_folder(str(tmp_path))
        (tmp_path / name).unlink()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(2**40)
    assert checkpoint_folder(str(tmp_path)) == tmp_path


def test_a_line_without_end(tmp_path):
    """A line of more than 64 MiB is refused without being held in memory."""
    # A .gz of 200 KiB unpacks to a line of 200 MiB, and one of a gigabyte to a terabyte.
    endless = GOOD + b'{"prompt": "' + b" " * 200 * 2**20
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(endless, 1))
    memory = peak_memory()
    with pytest.raises(DataError, match=f"a.jsonl.gz:2: a line of more than {2**26} bytes"):
        read(tmp_path / "a.jsonl.gz")
    assert peak_memory() - memory < 2**18


def test_error_is_one_short_line(tmp_path):
    """An error that quotes line breaks, terminal commands or megabytes is still one short line."""
    message = "'a\\n\\x1b[2J\\u2028' + 'b' * 10**6"
    template = from_third_message("{{ raise_exception(" + message + ") }}")
    tokenizer = byte_level_tokenizer(tmp_path, template)
    with pytest.raises(DataError) as error:
        encode(tokenizer, THREE_TURNS, "Yes.")
    assert str(error.value).isprintable() and len(str(error.value)) < 3000


@pytest.mark.parametrize(
    "parts", [["train-00001-of-00002"], ["train-00000-of-00002-aa", "test-00001-of-00002-aa"]]
)
def test_half_a_split(tmp_path, parts):
    """A split is refused if one of its two parts is missing, as after an interrupted copy."""
    for part in parts:
        write(tmp_path / f"{part}.jsonl", ULTRAFEEDBACK)
    with pytest.raises(DataError, match=r"/train-…: 1 of 2 parts are on this machine"):
        read(f"{tmp_path}:train")


def test_splits_in_folders(tmp_path):
    """A folder named after a split holds it, as in the hub's own conversion to parquet."""
    for split in ("train", "test"):
        folder = tmp_path / "default" / split
        folder.mkdir(parents=True)
        write(folder / "0000.jsonl", [{"prompt": split, "chosen": "a", "rejected": "b"}])
    assert [prompt for _, prompt, _ in read(f"{tmp_path}:test")] == ["test"]


def test_a_split_at_home(tmp_path, monkeypatch):
    """`~/FOLDER:SPLIT` is on this machine for a dry run, as it is for training."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "train.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    for name in ("~/pairs", "~/pairs:train"):
        assert formats.hub.at_hand(name) and len(read(name)) == 1
    with pytest.raises(DataError, match="^~/absent:train: no such file or folder$"):
        formats.hub.at_hand("~/absent:train")


# --------------------------------------------------------------------------------------------------
# Packing


def test_docstrings():
    """The examples in docstrings, such as the packed batch of `data.pack`, show real results."""
    for module in (data, formats.records, formats.schemas, formats.checkpoint):
        failed, tried = doctest.testmod(module)
        assert tried and not failed, module.__name__


@pytest.mark.parametrize("branches", [[1], [2], [3], [1, 2, 3, 1], [4, 4, 2]])
def test_pack_sees_and_predicts_as_if_every_branch_were_alone(branches):
    """Each packed token sees, and predicts, what it would if its response were encoded alone."""
    # With an off-by-one the model would train on leaked or misplaced tokens, and the loss would
    # still fall.
    rng = random.Random(0)

    def some_tokens() -> np.ndarray:
        return np.array([rng.randrange(10**6) for _ in range(rng.randint(1, 6))])

    pairs = [data.Pair(some_tokens(), tuple(some_tokens() for _ in range(n)), "") for n in branches]
    packed = data.pack(pairs)

    seen = []  # the tokens that each position of the stream sees, its own included
    cu_q, cu_k = packed["cu_q"], packed["cu_k"]
    for q, q_end, k, k_end in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        for i in range(q, q_end):
            keys = packed["key_index"][k : k_end - (q_end - 1 - i)]
            seen.append(packed["tokens"][keys].tolist())
    assert [len(tokens) - 1 for tokens in seen] == packed["positions"].tolist()
    assert [tokens[-1] for tokens in seen] == packed["tokens"].tolist()
    predicted = [seen[i] + [y] for i, y in zip(packed["predict"], packed["targets"].tolist())]
    alone = [
        pair.prompt.tolist() + response[: n + 1].tolist()
        for pair in pairs
        for response in pair.responses
        for n in range(len(response))
    ]
    assert predicted == alone


def test_assign():
    """Every pair is assigned once, every rank has as many micro-batches, and none is too large."""
    # A pair lost or computed twice changes the loss. FSDP hangs if a rank has one forward pass less
    # than the others. A micro-batch above the budget runs out of memory, maybe at step 3,000.
    rng = random.Random(0)
    for _ in range(500):
        sizes = [rng.randint(1, rng.choice([10, 300])) for _ in range(rng.randint(0, 70))]
        ranks, budget = rng.randint(1, 8), rng.randint(1, 600)
        rounds = data.assign(sizes, ranks, budget)
        assert rounds == data.assign(sizes, ranks, budget)
        assert all(len(shares) == ranks for shares in rounds)
        shares = [share for shares in rounds for share in shares]
        assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
        assert all(len(share) <= 1 or sum(sizes[i] for i in share) <= budget for share in shares)
        assert len(rounds) == 1 or all(any(shares) for shares in rounds)


@pytest.mark.parametrize("count, batch_size", [(10, 3), (12, 4), (2, 5), (1000, 128)])
def test_batches(count, batch_size):
    """Every epoch has every pair once, in an order that depends on seed and epoch alone."""

    def order(batch_size: int, epochs: int, seed: int) -> np.ndarray:
        steps = data.batches(count, batch_size, epochs=epochs, seed=seed)
        return np.concatenate(list(steps)).reshape(epochs, count)

    epochs = order(batch_size, 3, seed=1)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    full, rest = divmod(count, batch_size)
    steps = data.batches(count, batch_size, epochs=3, seed=1)
    assert [len(step) for step in steps] == ([batch_size] * full + [rest] * (rest > 0)) * 3
    if count > 2:
        assert (epochs[0] != epochs[1]).any()
        assert (order(batch_size, 1, seed=2) != epochs[0]).any()
    for other in (1, 7):
        assert (order(other, 2, seed=1) == epochs[:2]).all()


# --------------------------------------------------------------------------------------------------
# A real tokenizer on real data

SMOLLM2 = os.environ.get("SIMPO_SMOLLM2", "")
PREFERENCES = ROOT.parent / "shared" / "data" / "alpaca-eval-prefs" / "test.jsonl"


@pytest.mark.skipif(not SMOLLM2, reason="SIMPO_SMOLLM2 names no folder with SmolLM2's checkpoint")
@pytest.mark.skipif(not PREFERENCES.exists(), reason="no ../shared/data with real preference pairs")
def test_real_pairs_get_the_ids_of_transformers():
    """The ids of prompts, and of responses up to the end of turn, are those of transformers."""
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer(Path(SMOLLM2))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(SMOLLM2)
    for where, record in read_records(str(PREFERENCES)):
        _, example = parse_record(record, where)
        prompt, responses, _ = encode(ours, example.prompt, *example.responses)
        render = functools.partial(
            theirs.apply_chat_template, example.prompt, add_generation_prompt=True
        )
        assert prompt == render(return_dict=False)
        text = render(tokenize=False)
        for response, field in zip(responses, ("chosen", "rejected")):
            whole = theirs.apply_chat_template(record[field], tokenize=False)
            assert whole.startswith(text) and whole.endswith("<|im_end|>\n")
            assert response == theirs(whole[len(text) : -1], add_special_tokens=False).input_ids
