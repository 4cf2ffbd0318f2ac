"""From files to packed tokens: the formats, the traps of tokens that users of other trainers fell into, bad input, packing."""

import doctest
import functools
import gzip
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import data
from data import DataError, Dropped, Example, Tokenizer

ROOT = Path(__file__).resolve().parent.parent


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


# ---------------------------------------------------------------------------------------------------------------------
# Formats

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
    {"prompt": None, "chosen": [*TURNS, assistant("See you.")], "rejected": [*TURNS, assistant("What?")]},
]

PAIRS = [
    ("messages", ULTRAFEEDBACK[0], [user("Hi")], ("Hello, näive 🙂 friend.", "No.")),
    ("messages", ULTRAFEEDBACK[1], TURNS, ("See you.", "What?")),
    (
        "messages",
        {"chosen": [user("Hi") | {"name": "Ann"}, assistant("a")], "rejected": [user("Hi"), assistant("b")]},
        [user("Hi")],
        ("a", "b"),
    ),
    ("explicit", {"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", ("a", "b")),
    ("explicit", {"prompt": TURNS, "chosen": "a", "rejected": "b"}, TURNS, ("a", "b")),
    ("explicit", {"prompt": TURNS, "chosen": [assistant("a")], "rejected": [assistant("b")]}, TURNS, ("a", "b")),
    ("explicit", {"prompt": "Hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}, "Hi", ("a", "b")),
    (
        "transcripts",
        {"chosen": TRANSCRIPT + " See you.", "rejected": TRANSCRIPT + " See?"},
        TRANSCRIPT,
        (" See you.", " See?"),
    ),
    (
        "candidates",
        {"prompt": "Hi", "responses": ["so so", "worst", "best"], "scores": [1, 0.5, 3]},
        "Hi",
        ("best", "worst"),
    ),
    (
        "candidates",
        {"prompt": TURNS, "responses": [[assistant("b")], [assistant("a")]], "scores": [0, 1]},
        TURNS,
        ("a", "b"),
    ),
]
SINGLES = [
    ("messages", {"messages": [*TURNS, assistant("See you.")]}, TURNS, "See you."),
    ("messages", ULTRAFEEDBACK[0], [user("Hi")], "Hello, näive 🙂 friend."),
    ("completions", {"prompt": "Hi", "completion": "a"}, "Hi", "a"),
    ("completions", {"prompt": TURNS, "completion": [assistant("a")]}, TURNS, "a"),
    ("explicit", {"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Hi", "a"),
    ("candidates", {"prompt": "Hi", "responses": ["b", "a"], "scores": [0, 1]}, "Hi", "a"),
]


@pytest.mark.parametrize("kind, record, prompt, responses", PAIRS)
def test_formats_of_pairs(kind, record, prompt, responses):
    """Published preference data comes in four shapes; a user should not have to convert any of them."""
    assert data.parse_record(record, "here") == (kind, Example(prompt, responses, "here"))


@pytest.mark.parametrize("kind, record, prompt, response", SINGLES)
def test_formats_of_single_responses(kind, record, prompt, response):
    """SFT, where the paper's Base setting starts, reads single responses, or the chosen ones of any pairs."""
    assert data.parse_record(record, "here", paired=False) == (kind, Example(prompt, (response,), "here"))


def write(path: Path, records: list[dict]) -> None:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def read(name: Path | str) -> list[tuple]:
    """Kind, prompt and responses of every record of a file or folder."""
    parsed = (data.parse_record(record, where) for where, record in data.read_records(str(name)))
    return [(kind, example.prompt, example.responses) for kind, example in parsed]


@pytest.mark.parametrize(
    "names",
    [["a.jsonl"], ["a.json"], ["a.jsonl.gz"], ["a.parquet"], ["a.jsonl.gz", "b.parquet"], ["a.json", "b.jsonl"]],
)
def test_same_examples_from_every_kind_of_file(tmp_path, names):
    """The same pairs as downloaded (parquet), as exported (json) or in shards must train the same model."""
    for name, records in zip(names, [ULTRAFEEDBACK] if len(names) == 1 else ([r] for r in ULTRAFEEDBACK)):
        write(tmp_path / name, records)
    expected = [(kind, prompt, responses) for kind, _, prompt, responses in PAIRS[:2]]
    assert read(tmp_path) == expected
    if len(names) == 1:
        assert read(tmp_path / names[0]) == expected


def test_splits_of_a_folder(tmp_path):
    """`FOLDER:train` must not train on the test split, nor take `train_extra` or `contest` for it by accident."""
    for name in (
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
        "test.jsonl",
        "contest.jsonl",
        "train_extra.jsonl",
        "notes.txt",
    ):
        write(tmp_path / name, [{"prompt": name, "chosen": "a", "rejected": "b"}])
    prompts = lambda split: [prompt for _, prompt, _ in read(f"{tmp_path}{split}")]
    assert prompts(":train") == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert prompts(":test") == ["test.jsonl"]
    assert len(prompts("")) == 5
    with pytest.raises(DataError, match="no .* file of split 'valid'"):
        prompts(":valid")


def test_files_of_windows(tmp_path):
    """A byte order mark, CRLF and blank lines, as Windows tools leave them, are not the user's problem."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "Hi", "chosen": "a", "rejected": "b"}\r\n\r\n')
    assert read(tmp_path / "a.jsonl") == [("explicit", "Hi", ("a", "b"))]


def test_empty_file_holds_no_records(tmp_path):
    """It is the caller who knows that none is too few (`train.load_trees` says so)."""
    (tmp_path / "a.jsonl").touch()
    assert read(tmp_path / "a.jsonl") == []


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and templates as real checkpoints have them, small

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


@functools.cache
def byte_level(prefix_space: bool = False) -> str:
    """The file of a tokenizer of Llama 3's kind: BPE on bytes, with its regular expression, BOS put before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split, to_bytes = (
        pre_tokenizers.Split(tokenizers.Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(prefix_space, use_regex=False),
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, to_bytes]), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return tokenizer.to_str()


@functools.cache
def sentencepiece(form: str) -> str:
    """The same of Llama 2's and Mistral's kind: BPE with byte fallback, and a space before every text in one of two forms."""
    pieces = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    special = SPECIAL[:3] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False))
    model = json.loads(pieces.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(SPECIAL[:3])
    if form == "Prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    return tokenizer.to_str()


CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}{% endif %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for m in messages %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

CONVERSATION, ANSWER = [user("Say hello."), assistant("Hello."), user("And again?")], "Yes, hello."
CHATML_PROMPT = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAnd again?<|im_end|>\n<|im_start|>assistant\n"
LLAMA3_PROMPT = (
    "<s><|start_header_id|>user<|end_header_id|>\n\nSay hello.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd again?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
MISTRAL_PROMPT = "<s>[INST] Say hello. [/INST] Hello.</s> [INST] And again? [/INST]"
ZEPHYR_PROMPT = "<|user|>\nSay hello.</s>\n<|assistant|>\nHello.</s>\n<|user|>\nAnd again?</s>\n<|assistant|>\n"
CHECKPOINTS = {  # tokenizer, template, EOS; what must come out for the conversation and the answer
    "ChatML": (byte_level(), CHATML, "<|im_end|>", CHATML_PROMPT, "Yes, hello."),
    "Llama 3": (byte_level(), LLAMA3, "<|eot_id|>", LLAMA3_PROMPT, "Yes, hello."),
    "Mistral": (sentencepiece("Prepend"), MISTRAL, "</s>", MISTRAL_PROMPT, " Yes, hello."),
    "Zephyr": (sentencepiece("Metaspace"), ZEPHYR, "</s>", ZEPHYR_PROMPT, "Yes, hello."),
}


def write_checkpoint(folder: Path, backend: str, template: str | None, eos: str | None, **files: dict) -> Path:
    settings = {"bos_token": "<s>", "eos_token": eos} | ({"chat_template": template} if template else {})
    (folder / "tokenizer.json").write_text(backend)
    for name, value in {"tokenizer_config": settings, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def checkpoint(folder: Path, name: str) -> Tokenizer:
    backend, template, eos, *_ = CHECKPOINTS[name]
    return Tokenizer(write_checkpoint(folder, backend, template, eos))


def transformers_tokenizer(folder: Path, template: str, eos: str):
    """The peer's view of the same files."""
    transformers = pytest.importorskip("transformers")
    file = str(folder / "tokenizer.json")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=file, bos_token="<s>", eos_token=eos, chat_template=template
    )


def encode(
    tokenizer: Tokenizer, prompt: str | list[dict], *responses: str, max_length=10**6, max_prompt_length=10**5
) -> tuple:
    """Ids of the prompt, ids of every response, counts of what was cut."""
    counts: Counter = Counter()
    [tree] = tokenizer.encode([Example(prompt, responses, "pairs.jsonl:7")], max_length, max_prompt_length, counts)
    return tree.prompt.tolist(), [response.tolist() for response in tree.responses], +counts


# ---------------------------------------------------------------------------------------------------------------------
# DESIGN.md, "Tokens: decisions that peers got wrong"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prompt_ends_with_generation_prompt_and_response_with_end_of_turn(tmp_path, name):
    """princeton-nlp/SimPO#8, #17, trl#1930: assistant headers learnt as part of the response, a newline learnt behind its
    end. Llama 3's template trims, ChatML's and Zephyr's write a newline after the end of turn, Mistral's here a space."""
    tokenizer, (_, _, end, prompt_text, response_text) = checkpoint(tmp_path, name), CHECKPOINTS[name]
    assert tokenizer.prompt_text(CONVERSATION, "") == prompt_text
    assert tokenizer.texts([Example(CONVERSATION, (ANSWER,), "")]) == [(prompt_text, [response_text])]
    prompt, [response, _], _ = encode(tokenizer, CONVERSATION, ANSWER, "No.")
    whole = tokenizer.backend.encode(prompt_text + response_text + end, add_special_tokens=False).ids
    assert prompt + response == whole
    assert prompt == whole[: len(prompt)] == tokenizer.backend.encode(prompt_text, add_special_tokens=False).ids
    assert tokenizer.stop_ids >= {response[-1]}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_renders_and_encodes_the_same(tmp_path, name):
    """Who trains here and serves with transformers or vLLM must get the prompt that the model was trained on."""
    ours, (_, template, eos, *_) = checkpoint(tmp_path, name), CHECKPOINTS[name]
    theirs = transformers_tokenizer(tmp_path, template, eos)
    for messages in (CONVERSATION, CONVERSATION[:1]):
        render = functools.partial(theirs.apply_chat_template, messages, add_generation_prompt=True)
        assert ours.prompt_text(messages, "") == render(tokenize=False)
        assert encode(ours, messages, ANSWER)[0] == render(tokenize=True, return_dict=False)
    whole = theirs.apply_chat_template([*CONVERSATION, assistant(ANSWER)], tokenize=False)
    [(text, [answer])] = ours.texts([Example(CONVERSATION, (ANSWER,), "")])
    assert whole.rstrip() == text + answer + eos


BOS_CASES = [  # template, prompt, how many BOS
    (LLAMA3, CONVERSATION, 1),
    (CHATML, CONVERSATION, 0),
    (None, "Say hello.", 1),
    (None, "<s>Say hello.", 1),
    (None, "", 1),
]


@pytest.mark.parametrize(
    "backend, argument", [(byte_level, False), (sentencepiece, "Prepend"), (sentencepiece, "Metaspace")]
)
@pytest.mark.parametrize("template, prompt, expected", BOS_CASES)
def test_one_bos(tmp_path, backend, argument, template, prompt, expected):
    """princeton-nlp/SimPO#21, axolotl#1616: the template rendered BOS, and the tokenizer put another one before it."""
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
    """trl#1153, #2054: "Say " + "hello" encoded as one text is "Say" + " hello", so the prompt that was trained on is not
    the one that is given when the model answers, nor the same for chosen and rejected."""
    tokenizer = Tokenizer(write_checkpoint(tmp_path, byte_level(), template, "</s>"))
    [(text, [answer])] = tokenizer.texts([Example(prompt, (response,), "")])
    ids, [chosen, _], _ = encode(tokenizer, prompt, response, "No.")
    alone = lambda text: tokenizer.backend.encode(text, add_special_tokens=False).ids
    bos = [] if template else [tokenizer.bos_id]
    assert ids == bos + alone(text)
    assert chosen[:-1] == alone(answer)
    assert ids + chosen[:-1] != bos + alone(text + response), "the case tests nothing: no merge would have crossed"


@pytest.mark.parametrize("response", ["lo, hello.", " Hello.", "\nHello.", "\n\n again", "né 🙂", "[INST]"])
@pytest.mark.parametrize(
    "backend, argument",
    [(byte_level, False), (byte_level, True), (sentencepiece, "Prepend"), (sentencepiece, "Metaspace")],
)
def test_a_response_continues_the_text(tmp_path, backend, argument, response):
    """Sentencepiece puts a space before every text. A response encoded alone gets one too, and a Llama 2 trained on it
    answers with two spaces, or with a space in the middle of a word. Newlines must survive whatever prevents it."""
    tokenizer = Tokenizer(write_checkpoint(tmp_path, backend(argument), None, "</s>"))
    prompt, [ids], _ = encode(tokenizer, "Say hel", response)
    assert tokenizer.decode(prompt + ids) == tokenizer.decode(prompt) + response
    assert ids[-1] == tokenizer.backend.token_to_id("</s>")


LONG = "again " * 50


@pytest.mark.parametrize(
    "responses, max_length, max_prompt_length, cut",
    [
        (("yes", "no"), 1000, 500, {}),
        (("yes", "no"), 1000, 20, {"prompts cut at their start": 1}),
        ((LONG, "no"), 60, 20, {"prompts cut at their start": 1, "responses cut at their end": 1}),
        ((LONG, LONG + LONG + "!"), 140, 100, {"responses cut at their end": 1}),
        (("yes " + LONG, "no " + LONG), 21, 20, {"prompts cut at their start": 1, "responses cut at their end": 2}),
        (("yes " + LONG, "no " + LONG), 2, 1, {"prompts cut at their start": 1, "responses cut at their end": 2}),
    ],
)
def test_truncation(tmp_path, responses, max_length, max_prompt_length, cut):
    """trl#2209, #3382, #6548: BOS, the generation prompt or the end token lost, short responses cut because of a long
    prompt, whole responses lost and 0 divided by 0. Only what does not fit is cut here, and nothing becomes empty."""
    tokenizer = checkpoint(tmp_path, "Llama 3")
    whole_prompt, whole_responses, _ = encode(tokenizer, LONG, *responses)
    prompt, responses, counts = encode(
        tokenizer, LONG, *responses, max_length=max_length, max_prompt_length=max_prompt_length
    )
    assert counts == cut
    assert len(prompt) == min(len(whole_prompt), max_prompt_length)
    assert prompt == whole_prompt[:1] + whole_prompt[len(whole_prompt) - len(prompt) + 1 :]
    if max_prompt_length > 10:
        generation_prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n"
        assert tokenizer.backend.decode(prompt, skip_special_tokens=False).endswith(generation_prompt)
    for response, whole in zip(responses, whole_responses):
        assert response == whole[: max_length - len(prompt)] and response


def test_what_just_fits_is_not_cut(tmp_path):
    """Nor counted as cut: the report at the start of a run is what tells the user to raise --max-length."""
    tokenizer = checkpoint(tmp_path, "Llama 3")
    prompt, [response, _], _ = encode(tokenizer, LONG, LONG, "no")
    fits = encode(tokenizer, LONG, LONG, "no", max_length=len(prompt) + len(response), max_prompt_length=len(prompt))
    assert (fits[0], fits[1][0], fits[2]) == (prompt, response, {})


@pytest.mark.parametrize(
    "prompt, responses, why",
    [
        ("Hi", (LONG + "yes", LONG + "no"), "dropped: chosen equal to rejected in what is left of them"),
        ("", ("yes", "no"), "dropped: an empty prompt"),
    ],
)
def test_pairs_that_cannot_teach_are_dropped_and_counted(tmp_path, prompt, responses, why):
    """A pair of equal responses, or one without a token to predict from, has no gradient, or none that means anything."""
    backend = tokenizers.Tokenizer.from_str(byte_level())
    backend.post_processor = processors.ByteLevel()  # no BOS
    tokenizer, counts = Tokenizer(write_checkpoint(tmp_path, backend.to_str(), None, "</s>")), Counter()
    assert tokenizer.encode([Example(prompt, responses, "")], 30, 20, counts) == []
    assert counts[why] == 1


@pytest.mark.parametrize(
    "eos, generation, config, template, stops, end, learnt",
    [
        ("<|eot_id|>", {"eos_token_id": [2, 7]}, {"eos_token_id": 2}, LLAMA3, {2, 7}, 7, None),  # Llama 3 Instruct
        ("</s>", {"eos_token_id": 2}, {"eos_token_id": 2}, LLAMA3, {2, 7}, 7, [2, 7]),  # its template on the base model
        ("</s>", {}, {"eos_token_id": [2, 7]}, LLAMA3, {2, 7}, 7, None),
        (None, {}, {}, LLAMA3, {7}, 7, [7]),  # nothing but the template knows
        ("</s>", {}, {}, None, {2}, 2, [2]),
        ("</s>", {"eos_token_id": [7]}, {}, None, {2, 7}, 2, [7, 2]),
        (None, {"eos_token_id": [7, 2]}, {}, None, {2, 7}, 2, None),
        (None, {}, {"eos_token_id": 2}, None, {2}, 2, None),
        (
            None,
            {},
            {"eos_token_id": 2},
            ZEPHYR.replace("eos_token", "''"),
            None,
            None,
            None,
        ),  # the template marks no end
    ],
)
def test_end_of_turn(tmp_path, eos, generation, config, template, stops, end, learnt):
    """`eos_token_id` is a number, a list or absent, in two files; a model that learns to end with a token which is in
    neither would be served without end, so the trained checkpoint names it."""
    files = {"generation_config": generation} if generation else {}
    folder = write_checkpoint(tmp_path, byte_level(), template, eos, config=config, **files)
    if end is None:
        with pytest.raises(DataError, match="holds no special token, and there is no EOS"):
            Tokenizer(folder)
        return
    tokenizer = Tokenizer(folder)
    assert (tokenizer.stop_ids, tokenizer.end_id) == (stops, end)
    assert encode(tokenizer, "Hi", "Hello.")[1][0][-1] == end
    changed = tokenizer.changed_files()
    assert (json.loads(changed["generation_config.json"])["eos_token_id"] if changed else None) == learnt


def test_template_that_marks_no_end(tmp_path):
    """A template that ends a turn with a newline alone: EOS ends it, and the newline is not the model's to write."""
    tokenizer = Tokenizer(write_checkpoint(tmp_path, byte_level(), ZEPHYR.replace("eos_token", "''"), "</s>"))
    _, [response], _ = encode(tokenizer, "Hi", "Hello.")
    assert tokenizer.backend.decode(response, skip_special_tokens=False) == "Hello.</s>"


@pytest.mark.parametrize("eos", ["</s>", 4711, -1, 2**40, 1.5, [2, None, "x"]])
def test_eos_that_is_no_token(tmp_path, eos):
    """A wrong `eos_token_id` would otherwise surface as samples that never stop."""
    folder = write_checkpoint(tmp_path, byte_level(), None, "</s>", generation_config={"eos_token_id": eos})
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id: .* is not a token of the tokenizer"):
        Tokenizer(folder)


SHOW = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"


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
    """A template is a program by whoever uploaded the checkpoint: it may neither reach Python nor change the data."""
    prompt = [user("Hi"), assistant("Hello."), user("Bye")]
    guarded = "{% if messages | length > 2 %}" + template + "{% endif %}" + SHOW
    tokenizer = Tokenizer(write_checkpoint(tmp_path, byte_level(), guarded, "</s>"))
    with pytest.raises(
        DataError, match=f"^pairs.jsonl:7: the chat template refuses this conversation: .*{message}"
    ) as error:
        encode(tokenizer, prompt, "Yes.")
    assert "\n" not in str(error.value)
    assert prompt == [user("Hi"), assistant("Hello."), user("Bye")]


BOUNDLESS = {  # without a bound each of these takes hours, or all memory
    "a loop that writes nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long string": "{{ 'x' * 10**10 }}",
    "a string that doubles": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a list that holds itself": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "a long list": "{% set l = [1] * 10**10 %}",
    "a wide number": "{{ '%10000000000d' % 1 }}",
    "a wide format": "{{ '{:>10000000000}'.format(1) }}",
    "a wide filter": "{{ 'x' | center(10**10) }}",
    "a large number": "{{ 7 ** (messages | length * 10**9) }}",
    "much text": "{{ messages[0].content * 10**8 }}",
    "a replacement": "{{ ('a' * 10**5) | replace('a', 'a' * 10**5) }}",
    "half a character": r"{{ '\ud83d' }}",
}


@pytest.mark.parametrize("case", BOUNDLESS)
def test_template_without_bounds(tmp_path, case):
    """jinja2's sandbox bounds ranges and little else; whatever the template does, its process has two seconds and 512 MiB. It
    begins with the third message, so that it looks like any other template when it is loaded."""
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # by processes that have ended
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, spent()
    guarded = "{% if messages | length > 2 %}" + BOUNDLESS[case] + "{% endif %}" + SHOW
    tokenizer = Tokenizer(write_checkpoint(tmp_path, byte_level(), guarded, "</s>"))
    with pytest.raises(DataError, match="^pairs.jsonl:7: the chat template refuses this conversation: ") as error:
        encode(tokenizer, [user("Hi"), assistant("Hello."), user("Bye")], "Yes.")
    assert "tokenizer_config.json: chat_template" in str(error.value) and "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16 and spent() - began < 10
    encode(tokenizer, "Hi", "Yes.")  # and the next conversation is rendered as if nothing had happened


@pytest.mark.parametrize("source", ["{{" + "(" * 10**5, "{% if 1 %}" * 5000, "{{ 'x' * 10**10 }}", "{{ 'x' * 10**10 }", "{% include 'x' %}"])
def test_template_that_does_not_compile(tmp_path, source):
    """Compiling is work too: jinja2 folds constants, and calls itself for every bracket."""
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(DataError, match=f"^{tmp_path}.*chat template .*chat_template.jinja|^{tmp_path}/chat_template.jinja: "):
        Tokenizer(write_checkpoint(tmp_path, byte_level(), None, "</s>"))


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="/proc tells the limits of a process")
def test_templates_run_elsewhere(tmp_path):
    """A template that found its way out of jinja2's sandbox would find a process that can write no file."""
    assert Tokenizer(write_checkpoint(tmp_path, byte_level(), SHOW, "</s>")).prompt_text("Hi", "") == "user: Hi</s>"
    child = data.template._child.pid
    table = Path(f"/proc/{child}/limits").read_text()
    assert re.search(r"Max file size +0 +0 ", table) and re.search(rf"Max address space +{2**29} ", table)


def test_template_that_refuses_a_conversation(tmp_path):
    """One record of 60,000 with a system message, which Mistral's template forbids: the user must learn which one."""
    with pytest.raises(
        DataError,
        match=r"^pairs.jsonl:7: the chat template refuses this conversation: Roles must alternate user/assistant",
    ):
        encode(checkpoint(tmp_path, "Mistral"), [system("Be brief."), user("Hi")], "Hello.")


def test_template_that_rewrites_the_prompt(tmp_path):
    """Templates that open the model's thoughts in the generation prompt and drop them afterwards: there is no boundary."""
    template = SHOW + "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    with pytest.raises(
        DataError, match="^pairs.jsonl:7: the chat template renders the prompt differently once it is answered"
    ):
        encode(Tokenizer(write_checkpoint(tmp_path, byte_level(), template, "</s>")), [user("Hi")], "Hello.")


FEATURES = [  # what chat templates of published checkpoints use, and what comes out of it for [user("Hi")]
    ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "Hi"),
    ("{% for m in messages * 3 %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ loop.index }}{% endfor %}", "13"),
    ("{% for m in messages * 3 %}{{ loop.index }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}", "12"),
    ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
    ("{{ {'é': '<b>'} | tojson(indent=1) }}", '{\n "é": "<b>"\n}'),
    (
        "{{ {'é': 1, 'a': 2} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}",
        '{"a":2,"\\u00e9":1}',
    ),
    ("{{ strftime_now('%%') }}", "%"),
    ("{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}", ""),
    ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
    ("{{ dict([['a', 1]], b=2) }}{{ pad_token }}{{ bos_token }}{{ nonsense }}", "{'a': 1, 'b': 2}<s>"),
    ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
]


@pytest.mark.parametrize("template, expected", FEATURES)
def test_what_templates_use(tmp_path, template, expected):
    """A checkpoint whose template works in transformers, and only there, cannot be trained here."""
    end = "{% if not add_generation_prompt %}</s>{% endif %}"
    tokenizer = Tokenizer(write_checkpoint(tmp_path, byte_level(), template + end, "</s>"))
    assert tokenizer.prompt_text([user("Hi")], "") == expected


@pytest.mark.parametrize("template, expected", FEATURES)
def test_what_templates_use_in_transformers(tmp_path, template, expected):
    """The expectations above are those of the peer that everybody serves with."""
    (tmp_path / "tokenizer.json").write_text(byte_level())
    theirs = transformers_tokenizer(tmp_path, template, "</s>")
    assert theirs.apply_chat_template([user("Hi")], tokenize=False, add_generation_prompt=True) == expected


def test_the_clock_stands_still(tmp_path):
    """Llama 3.2's template writes today's date: a run over midnight must not find prompt and answered prompt differ."""
    template = "{{ strftime_now('%H:%M:%S.%f') }}" + SHOW
    encode(Tokenizer(write_checkpoint(tmp_path, byte_level(), template, "</s>")), [user("Hi")], "Hello.")


def test_where_templates_stand(tmp_path):
    """In a file of their own since transformers 4.52, before that in the settings, one or several; --chat-template wins."""
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": SHOW + "1"}]
    folder = write_checkpoint(tmp_path, byte_level(), several, "</s>")
    text = lambda own=None: Tokenizer(folder, own).prompt_text([user("Hi")], "")
    assert text() == "user: Hi</s>1"
    (folder / "chat_template.jinja").write_text(SHOW + "2")
    assert text() == "user: Hi</s>2"
    assert text(SHOW + "3") == "user: Hi</s>3"
    assert Tokenizer(folder, SHOW + "3").changed_files()["chat_template.jinja"] == SHOW + "3"


def test_base_checkpoint_without_template(tmp_path):
    """A base model reads plain text and ends with EOS; for messages it needs a template, and the error says how to pass one."""
    folder = write_checkpoint(tmp_path, byte_level(), None, "</s>")
    prompt, [response], _ = encode(Tokenizer(folder), "Say hello.", "Hello.")
    assert Tokenizer(folder).backend.decode(prompt + response, skip_special_tokens=False) == "<s>Say hello.Hello.</s>"
    with pytest.raises(
        DataError, match="^pairs.jsonl:7: a list of messages needs a chat template, .* pass --chat-template FILE"
    ):
        encode(Tokenizer(folder), [user("Say hello.")], "Hello.")
    (tmp_path / "chatml.jinja").write_text(CHATML)
    with_template = Tokenizer(folder, data.read_template(str(tmp_path / "chatml.jinja")))
    assert with_template.prompt_text([user("Hi")], "") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (
        Tokenizer(write_checkpoint(tmp_path, byte_level(), CHATML, "</s>"), data.read_template("none")).prompt_text(
            "Hi", ""
        )
        == "Hi"
    )


def test_transcripts_become_turns(tmp_path):
    """HH-RLHF under a chat template: no "Human:" in the text, and no answer that starts with the space behind "Assistant:"."""
    tokenizer = checkpoint(tmp_path, "ChatML")
    [(text, [answer])] = tokenizer.texts([Example(TRANSCRIPT, (" See you.\n",), "")])
    assert text == tokenizer.prompt_text([user("Hi"), assistant("Hello."), user("Bye")], "")
    assert answer == "See you."


def test_vocabulary_larger_than_the_embedding(tmp_path):
    """A tokenizer that was extended without its model would read beyond the embedding, on a GPU without a message."""
    tokenizer = checkpoint(tmp_path, "ChatML")
    size = tokenizer.backend.get_vocab_size(with_added_tokens=True)
    tokenizer.check_fits(size)
    with pytest.raises(DataError, match=f"the tokenizer has {size} tokens, the embedding {size - 1}"):
        tokenizer.check_fits(size - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input

GOOD = b'{"prompt": "Hi", "chosen": "a", "rejected": "b"}\n'
BAD_LINES = [
    (b"{'prompt': 1}", "not JSON: "),
    (GOOD[:20], "not JSON: "),
    (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
    (b"[" * 100_000, "not JSON: "),
    (b"null", "expected an object, not NoneType"),
    (["a", "b"], "expected an object, not list"),
    ({"prompt": "Hi", "chosen": "half of an emoji: \ud83d", "rejected": "b"}, r"not JSON: .* '\\ud83d'"),
    ({"prompt": "Hi", "rejected": "b"}, "no 'chosen' field"),
    ({"prompt": "Hi", "chosen": "a", "rejected": None}, "no 'rejected' field"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no 'prompt' field"),
    ({"prompt": "Hi", "chosen": 3, "rejected": 4}, "chosen: expected a list of messages"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: expected a list of messages"),
    ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt: expected a list of messages"),
    ({"prompt": ["Hi"], "chosen": "a", "rejected": "b"}, r"prompt\[0\]: expected a message with role and content"),
    ({"prompt": "Hi", "chosen": "a", "rejected": [assistant("b")]}, "chosen is a str and rejected a list"),
    ({"prompt": "Hi", "chosen": [user("a")], "rejected": [user("b")]}, "chosen: expected one assistant message"),
    (
        {"prompt": [user("Hi"), assistant("So")], "chosen": "a", "rejected": "b"},
        "prompt: ends with the assistant's message",
    ),
    (
        {"chosen": [user("Hi"), user("a")], "rejected": TURNS},
        "chosen: expected a prompt and then one assistant message",
    ),
    (
        {"chosen": [user("Hi"), assistant("a"), assistant("b")], "rejected": TURNS},
        "chosen: expected a prompt and then one assistant message",
    ),
    (
        {"chosen": [user("Hi"), assistant("a")], "rejected": [assistant("b")]},
        "rejected: expected a prompt and then one assistant message",
    ),
    (
        {"chosen": [user("Hi"), {"role": "assistant", "content": None}], "rejected": TURNS},
        r"chosen\[1\]: expected a message with role and content",
    ),
    (
        {"chosen": [user("Hi"), assistant("a")], "rejected": [user("Ho"), assistant("b")]},
        "chosen and rejected answer different prompts",
    ),
    ({"chosen": "yes", "rejected": "no"}, "chosen and rejected share no prompt"),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, float("nan")]}, "scores: expected numbers"),
    ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, "2"]}, "scores: expected numbers"),
    (
        {"prompt": "Hi", "responses": ["a", "b"], "scores": [1]},
        "responses and scores: expected two lists of one length",
    ),
    ({"prompt": "Hi", "responses": ["a"], "scores": [1]}, "responses and scores: expected two lists of one length"),
    ({"prompt": "Hi", "responses": ["a", 2], "scores": [1, 2]}, r"responses\[1\]: expected a list of messages"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_line_is_named(tmp_path, line, message):
    """Hours into preparing 60,000 pairs, "KeyError: 'content'" is no help; file, line and field are."""
    (tmp_path / "a.jsonl").write_bytes(
        GOOD * 2 + (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" + GOOD
    )
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
    """Half a download, or a file of another kind under a wrong name."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_bad_parquet(tmp_path):
    """Half a download again, and a bad row of a whole file."""
    write(tmp_path / "a.parquet", ULTRAFEEDBACK)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a.parquet: not a whole parquet file: [^\n]+$"):
        read(tmp_path)
    write(
        tmp_path / "a.parquet",
        [{"prompt": "Hi", "chosen": "a", "rejected": "b"}, {"prompt": "Hi", "chosen": "a", "rejected": None}],
    )
    with pytest.raises(DataError, match="a.parquet row 2: no 'rejected' field"):
        read(tmp_path)


def test_empty_folder(tmp_path):
    """A folder that holds no data is named as such, not trained on for no steps."""
    with pytest.raises(DataError, match="no .jsonl, .json, .jsonl.gz, .parquet file in "):
        read(tmp_path)


@pytest.mark.parametrize(
    "record, why",
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen equal to rejected"),
        ({"prompt": "Hi", "chosen": "a", "rejected": " \n"}, "an empty response"),
        ({"prompt": "Hi", "chosen": "", "rejected": "b"}, "an empty response"),
        ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 1.0]}, "candidates that all score the same"),
        (
            {"chosen": TRANSCRIPT + " a\n\nHuman: x\n\nAssistant: y", "rejected": TRANSCRIPT + " b"},
            "a conversation that goes on",
        ),
    ],
)
def test_records_that_cannot_teach(record, why):
    """Real data holds some of each; they are counted and left out, and never stop a run (trl#2209: a loss of NaN)."""
    with pytest.raises(Dropped, match=why):
        data.parse_record(record, "")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "Hi", "completion": 3}, "completion: expected a list"),
        ({"prompt": "Hi", "answer": "a"}, "prompt and completion"),
    ],
)
def test_bad_single_responses(record, message):
    """Somebody with SFT data is told what is read there, not only about pairs."""
    with pytest.raises(DataError, match=f"^a.jsonl:1: .*{message}"):
        data.parse_record(record, "a.jsonl:1", paired=False)


@pytest.mark.parametrize("name", ["./pairs", "../pairs", "a--b/c", "data/pairs.jsonl", "pairs", "/no/such/folder"])
def test_no_such_file(name, tmp_path, monkeypatch):
    """A path with a slip of the pen is no hub id: no download is tried, and no traceback comes from the hub's checks."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder$"):
        data.data_files(name)


@pytest.mark.parametrize("setting", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_hub_out_of_reach(tmp_path, setting):
    """On a cluster node without a network a hub id is one clear line at once, not a minute of retries and a traceback."""
    script = "import data\ntry: data.data_files('owner/name:train@main')\nexcept data.DataError as e: print(e)"
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | setting
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    [message] = done.stdout.splitlines()
    assert message.startswith("owner/name@main: no such file or folder here, and the hub cannot be reached (")
    assert message.endswith("; download it where there is a network and pass the folder")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer.json": None}, "tokenizer.json: no such file"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: not a tokenizer: "),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: expected a JSON object"),
        ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json: not JSON: "),
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
    """What is wrong with a downloaded checkpoint, by the name of its file."""
    write_checkpoint(tmp_path, byte_level(), None, "</s>")
    for name, content in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


LIBRARY = {  # parts of a tokenizer.json that the library takes when it reads the file
    "panics when it encodes": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "panics when it loads": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "makes a text a million times as long": {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 1000}]}] * 2}},
    "knows no word": {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]]}},
    "has an id of four billion": {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 2**32 - 2}}},
}  # fmt: skip


@pytest.mark.parametrize("case", LIBRARY)
def test_tokenizer_that_breaks_the_library(tmp_path, case):
    """A panic of the Rust library is no Exception: `except Exception` lets it through, and some ids cost minutes."""
    spec = json.loads(byte_level()) | LIBRARY[case] | {"added_tokens": [], "post_processor": None}
    began = time.process_time()
    with pytest.raises(DataError, match=f"^{tmp_path}/tokenizer.json: ") as error:
        Tokenizer(write_checkpoint(tmp_path, json.dumps(spec), CHATML, "</s>"))
    assert "\n" not in str(error.value) and time.process_time() - began < 2


PATTERNS = ("*.safetensors", "tokenizer*", "chat_template.*")


def test_links_of_a_checkpoint(tmp_path):
    """A link may lead to the user's own files, which a saved checkpoint would copy and publish. Inside the folder links
    are sound, and so are those of the hub's cache into its blobs."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "models--owner--name" / "snapshots" / "0a1b"
    (folder / "sub").mkdir(parents=True)
    check = lambda: data.local_path(str(folder), "model", PATTERNS)
    for blobs in (folder.parents[1] / "blobs", tmp_path / "blobs", folder / "sub"):
        blobs.mkdir(exist_ok=True)
        (blobs / "1f").write_text("{}")
        (folder / "tokenizer.json").symlink_to(os.path.relpath(blobs / "1f", folder))
        assert check() == folder
        (folder / "tokenizer.json").unlink()
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "LICENSE", "sub2"):
        for target in (tmp_path / "secret", "../../../secret", "/etc/passwd", "../../../blobs/../secret", tmp_path):
            (folder / name).symlink_to(target)
            with pytest.raises(DataError, match=f"{folder / name}: a link to /.*, outside the checkpoint"):
                check()
            (folder / name).unlink()
    (tmp_path / "blobs" / "2f").symlink_to(tmp_path / "secret")
    (folder / "tokenizer.json").symlink_to("../../../blobs/2f")
    with pytest.raises(DataError, match="outside the checkpoint"):
        check()


def test_files_of_a_checkpoint(tmp_path):
    """A pipe would be waited for without end; a tokenizer of many gigabytes is none."""
    check = lambda: data.local_path(str(tmp_path), "model", PATTERNS)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="tokenizer.json: not a regular file"):
        check()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(DataError, match="tokenizer.json: a link to no file"):
        check()
    (tmp_path / "tokenizer.json").unlink()
    for name, size in (("tokenizer.json", 2**40), ("chat_template.jinja", 2**25)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(size)  # takes no room on the disk
        with pytest.raises(DataError, match=f"{name}: {size} bytes, more than such a file of any checkpoint"):
            check()
        (tmp_path / name).unlink()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(2**40)
    assert check() == tmp_path


def test_a_line_without_end(tmp_path):
    """A .gz of 200 KiB unpacks to a line of 200 MiB, and one of a gigabyte to a terabyte."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD + b'{"prompt": "' + b" " * 200 * 2**20, 1))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=f"a.jsonl.gz:2: a line of more than {2**26} bytes"):
        read(tmp_path / "a.jsonl.gz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


def test_error_is_one_short_line(tmp_path):
    """Messages quote strangers: line breaks, a terminal's commands and megabytes among it."""
    source = "{% if messages | length > 2 %}{{ raise_exception('a\\n\\x1b[2J\\u2028' + 'b' * 10**6) }}{% endif %}" + SHOW
    tokenizer = Tokenizer(write_checkpoint(tmp_path, byte_level(), source, "</s>"))
    with pytest.raises(DataError) as error:
        encode(tokenizer, [user("Hi"), assistant("Hello."), user("Bye")], "Yes.")
    assert str(error.value).isprintable() and len(str(error.value)) < 3000


@pytest.mark.parametrize("parts", [["train-00001-of-00002"], ["train-00000-of-00002-aa", "test-00001-of-00002-aa"]])
def test_half_a_split(tmp_path, parts):
    """One of two parts, as an interrupted copy leaves them, is not the split."""
    for part in parts:
        write(tmp_path / f"{part}.jsonl", ULTRAFEEDBACK)
    with pytest.raises(DataError, match=r"/train-…: 1 of 2 parts are here"):
        read(f"{tmp_path}:train")


def test_splits_in_folders(tmp_path):
    """The hub's own conversion to parquet names the folder after the split and numbers the files."""
    for split in ("train", "test"):
        (tmp_path / "default" / split).mkdir(parents=True)
        write(tmp_path / "default" / split / "0000.jsonl", [{"prompt": split, "chosen": "a", "rejected": "b"}])
    assert [prompt for _, prompt, _ in read(f"{tmp_path}:test")] == ["test"]


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def test_docstrings():
    """The tiny batch that `pack` shows to the reader is what it makes."""
    failed, tried = doctest.testmod(data)
    assert tried and not failed


@pytest.mark.parametrize("branches", [[1], [2], [3], [1, 2, 3, 1], [4, 4, 2]])
def test_pack_sees_and_predicts_as_if_every_branch_were_alone(branches):
    """An off-by-one in a packed layout trains on leaked or misplaced tokens, and the loss still falls."""
    rng = random.Random(0)
    text = lambda: np.array([rng.randrange(10**6) for _ in range(rng.randint(1, 6))])
    trees = [data.Tree(text(), tuple(text() for _ in range(n)), "") for n in branches]
    packed = data.pack(trees)

    seen = []  # what each position of the stream sees, up to itself
    for q, q_end, k, k_end in zip(packed["cu_q"], packed["cu_q"][1:], packed["cu_k"], packed["cu_k"][1:]):
        seen += [packed["tokens"][packed["key_index"][k : k_end - (q_end - 1 - i)]].tolist() for i in range(q, q_end)]
    assert [len(tokens) - 1 for tokens in seen] == packed["positions"].tolist()
    assert [tokens[-1] for tokens in seen] == packed["tokens"].tolist()
    predicted = [seen[i] + [target] for i, target in zip(packed["predict"], packed["targets"].tolist())]
    alone = [
        tree.prompt.tolist() + response[: n + 1].tolist()
        for tree in trees
        for response in tree.responses
        for n in range(len(response))
    ]
    assert predicted == alone


def test_plan():
    """A tree lost or computed twice changes the loss; a rank with one forward pass fewer than the others hangs FSDP; a
    micro-batch above the budget runs out of memory at step 3,000."""
    rng = random.Random(0)
    for _ in range(500):
        sizes = [rng.randint(1, rng.choice([10, 300])) for _ in range(rng.randint(0, 70))]
        ranks, budget = rng.randint(1, 8), rng.randint(1, 600)
        rounds = data.plan(sizes, ranks, budget)
        assert rounds == data.plan(sizes, ranks, budget)
        assert all(len(shares) == ranks for shares in rounds)
        shares = [share for shares in rounds for share in shares]
        assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
        assert all(len(share) <= 1 or sum(sizes[i] for i in share) <= budget for share in shares)
        assert len(rounds) == 1 or all(any(shares) for shares in rounds)


@pytest.mark.parametrize("count, batch_size", [(10, 3), (12, 4), (2, 5), (1000, 128)])
def test_batches(count, batch_size):
    """The same pairs in the same order on any hardware, and every pair once an epoch, the last few too."""
    steps = list(data.batches(count, batch_size, epochs=3, seed=1))
    epochs = np.concatenate(steps).reshape(3, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert [len(step) for step in steps] == (
        [batch_size] * (count // batch_size) + [count % batch_size] * (count % batch_size > 0)
    ) * 3
    if count > 2:
        assert (epochs[0] != epochs[1]).any()
        assert (np.concatenate(list(data.batches(count, batch_size, epochs=1, seed=2))) != epochs[0]).any()
    for other in (1, 7):
        assert (
            np.concatenate(list(data.batches(count, other, epochs=2, seed=1))).reshape(2, count) == epochs[:2]
        ).all()


# ---------------------------------------------------------------------------------------------------------------------
# A real tokenizer on real data

SMOLLM2, PREFERENCES = (
    os.environ.get("SIMPO_SMOLLM2", ""),
    ROOT.parent / "shared" / "data" / "alpaca-eval-prefs" / "test.jsonl",
)


@pytest.mark.skipif(not SMOLLM2, reason="SIMPO_SMOLLM2 names no folder with SmolLM2's checkpoint")
@pytest.mark.skipif(not PREFERENCES.exists(), reason="no ../shared/data with real preference pairs")
def test_real_pairs_get_the_ids_of_transformers():
    """The prompt's ids, and each response's up to its end of turn, are those of `apply_chat_template`."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer(Path(SMOLLM2)), transformers.PreTrainedTokenizerFast.from_pretrained(SMOLLM2)
    for where, record in data.read_records(str(PREFERENCES)):
        _, example = data.parse_record(record, where)
        prompt, responses, _ = encode(ours, example.prompt, *example.responses)
        assert prompt == theirs.apply_chat_template(example.prompt, add_generation_prompt=True, return_dict=False)
        text = theirs.apply_chat_template(example.prompt, add_generation_prompt=True, tokenize=False)
        for response, field in zip(responses, ("chosen", "rejected")):
            whole = theirs.apply_chat_template(record[field], tokenize=False)
            assert whole.startswith(text) and whole.endswith("<|im_end|>\n")
            assert response == theirs(whole[len(text) : -1], add_special_tokens=False).input_ids
