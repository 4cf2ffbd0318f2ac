"""What a record says is what is trained, or one line says why not: formats/fidelity.py and around.

Templates here are written for these tests. bench/chat_templates.py does the same with those that
TRL ships.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import chat_templates
import pytest
from ranks import on_ranks
from test_data import (
    CHATML,
    LLAMA3,
    MISTRAL,
    ZEPHYR,
    assistant,
    byte_level,
    byte_level_tokenizer,
    encode,
    ids_of,
    sentencepiece,
    system,
    text_of,
    user,
    write_checkpoint,
)
from test_train import TOY, arguments, fails, run

import data
import sample
import train
from formats import sandbox
from formats.candidates import begun_on
from formats.errors import DataError
from formats.schemas import parse_record
from formats.tokenizer import Tokenizer
from runtime import inputs
from runtime.settings import Settings

TEMPLATES = {
    "ChatML": (byte_level(), CHATML, "<|im_end|>"),
    "Llama 3": (byte_level(), LLAMA3, "<|eot_id|>"),
    "Mistral": (sentencepiece("Prepend"), MISTRAL, "</s>"),
    "Zephyr": (sentencepiece("Metaspace"), ZEPHYR, "</s>"),
    "a private one": (
        byte_level(),
        "{% for m in messages %}{{ '<turn of ' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn of assistant>' }}{% endif %}",
        "</s>",
    ),
}


def tokenizer_of(folder: Path, name: str = "ChatML") -> Tokenizer:
    backend, source, eos = TEMPLATES[name]
    return Tokenizer(write_checkpoint(folder, backend, source, eos))


def refusal(tokenizer: Tokenizer, prompt: str | list[dict], *responses: str) -> str:
    """Return why a record is refused."""
    with pytest.raises(DataError, match="^pairs.jsonl:7: ") as refused:
        encode(tokenizer, prompt, *responses)
    return str(refused.value)


# --------------------------------------------------------------------------------------------------
# Text that went through a template before

RENDERED = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    "<|im_start|>user\nHi",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<s>[INST] Hi [/INST]",
    "<s>[INST] Hi [/INST] Hello.</s> [INST] And? [/INST]",
    "<|user|>\nHi</s>\n<|assistant|>\n",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<｜User｜>Hi<｜Assistant｜>",
    "<|start|>user<|message|>Hi<|end|><|start|>assistant",
    "Below is a task.\n\n### Instruction:\nHi\n\n### Response:",
    "### Human: Hi\n### Assistant:",
    "Hi\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nBye",
    "System: Be brief.\n\nUser: Hi\n\nAssistant:",
    "<|prompter|>Hi<|endoftext|><|assistant|>",
]


@pytest.mark.parametrize("text", RENDERED)
@pytest.mark.parametrize("name", ["ChatML", "Mistral"])
def test_a_rendered_prompt_is_refused(tmp_path, name, text):
    tokenizer = tokenizer_of(tmp_path, name)
    assert "prompt" in refusal(tokenizer, text, "Yes.", "No.")
    assert "went through a chat template" in refusal(tokenizer, [user(text)], "Yes.", "No.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_checkpoint_renders_itself_is_refused(tmp_path, name):
    """The template's own marks need not be in any list."""
    tokenizer = tokenizer_of(tmp_path, name)
    rendered = tokenizer.prompt_text([user("Say hello."), assistant("Hello."), user("Bye")], "")
    assert "went through a chat template" in refusal(tokenizer, rendered, "Yes.", "No.")


@pytest.mark.parametrize(
    "chosen, rejected, field",
    [
        ("<|im_start|>assistant\nYes.<|im_end|>", "No.", "chosen"),
        ("Yes.", "<|start_header_id|>assistant<|end_header_id|>\n\nNo.", "rejected"),
        ("Yes.", "<start_of_turn>model\nNo.<end_of_turn>", "rejected"),
        ("Yes.<|eot_id|>", "No.<|eot_id|>", "chosen and rejected"),
        ("Yes.<end_of_turn>\n", "No.<end_of_turn>\n", "chosen and rejected"),
        ("Yes.</s>", "No, for I was cut", "chosen: its end"),
        ("Yes.", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nNo.", "rejected"),
    ],
)
def test_a_rendered_response_is_refused(tmp_path, chosen, rejected, field):
    error = refusal(tokenizer_of(tmp_path), "Hi", chosen, rejected)
    assert f": {field}" in error and "went through a chat template" in error


ABOUT = [  # (prompt, response) of people who write about a template's marks
    ("What does <|im_start|> mean?", "It opens a turn."),
    ("<|im_start|>user is a header of which format?", "ChatML."),
    ("<|im_start|>", "A special token."),
    ("<|im_start|>user\nHi<|im_end|>\nWhich format is this?", "ChatML."),
    ("Print `<|im_start|>user\nHi<|im_end|>`.", "`<|im_start|>user\nHi<|im_end|>`"),
    ("Which token ends a turn?", "It is <|im_end|>"),
    ("Which token ends a turn in Llama 3?", "It is <|eot_id|>"),
    ("Which tokens open a turn?", "<|user|> opens one in Zephyr."),
    ("And the assistant's?", "<|assistant|> does."),
    ("<|start_header_id|>user<|end_header_id|>", "A header of Llama 3."),
    ("[INST] and [/INST] stand around what?", "[INST] opens, [/INST] closes a question."),
    ("Human: or User:, which is right?", "Human: is Anthropic's.\n\nHuman: stands in HH-RLHF."),
    ("Human: Hi", "Assistant: Hello."),
    ("What closes a thought?", "The tag </think> does."),
    ("</think>", "<think> opens what it closes."),
    ("<s>old</s> is struck through in HTML. And bold?", "<b>bold</b>"),
    ("Explain </s>.", "</s> is EOS; <s> is BOS."),
    ("How do I strike old in HTML?", "<s>old</s>"),
    ("Continue this dialogue.\n\nUser: Hi\nAssistant:", "Hello."),
    ("### Instruction: is a heading. Of what?", "Of Alpaca's prompts, before ### Response:"),
    ("USER: and ASSISTANT: are whose marks?", "Vicuna's."),
    ("<start_of_turn>user or [INST]?", "<start_of_turn>user is Gemma's."),
    ("<user>\nBob\n</user>", "An element of XML."),
    ("<b>user\n</b>", "A word in bold."),
]


@pytest.mark.parametrize("name", ["ChatML", "Llama 3"])
def test_text_about_marks_trains(tmp_path, name):
    """It is encoded as transformers does: a special token's text is that token."""
    tokenizer, end = tokenizer_of(tmp_path, name), TEMPLATES[name][2]
    assert len(ABOUT) >= 20
    for question, answer in ABOUT:
        prompt, [response, _], _ = encode(tokenizer, question, answer, "No.")
        assert prompt == ids_of(tokenizer, tokenizer.prompt_text([user(question)], ""))
        assert response == ids_of(tokenizer, answer.removesuffix(end) + end)


@pytest.mark.parametrize("argument", [None, "none"])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "</s>", "<|im_end|></s> \n", ""])
def test_one_end_of_turn(tmp_path, argument, end):
    """A response that has an end-of-turn token gets no second one, with a template or without."""
    files = {"generation_config": {"eos_token_id": [2, 4]}}
    write_checkpoint(tmp_path, byte_level(), CHATML, "<|im_end|>", **files)
    tokenizer = Tokenizer(tmp_path, "" if argument else None)
    _, [response, other], _ = encode(tokenizer, "Hi", "Yes." + end, "<|im_end|> ends it")
    assert text_of(tokenizer, response) == "Yes.<|im_end|>"
    assert text_of(tokenizer, other) == "<|im_end|> ends it<|im_end|>"
    _, both, _ = encode(tokenizer, "Hi", "Yes." + end, "No." + end)
    assert [text_of(tokenizer, ids) for ids in both] == ["Yes.<|im_end|>", "No.<|im_end|>"]


def test_an_answer_of_nothing_is_refused(tmp_path):
    """It would be an end of turn alone, which teaches the model to say nothing."""
    assert "nothing else" in refusal(tokenizer_of(tmp_path), "Hi", "<|im_end|>\n", "No.")


# --------------------------------------------------------------------------------------------------
# What the template leaves out

HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
END = (
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (
    "{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}" + END
)
FIRST_LINE = "{% for m in messages %}" + HEADER + "{{ m.content.split('\\n')[0] }}" + END
ESCAPED = "{% for m in messages %}" + HEADER + "{{ m.content | e }}" + END
USERS_ONLY = (
    "{% for m in messages if m.role in ('user', 'assistant') %}" + HEADER + "{{ m.content }}" + END
)
THOUGHT = "<think>\n7 times 3 is 21.\n</think>\n\n21"


@pytest.mark.parametrize(
    "source, response, why",
    [
        (REASONING, THOUGHT, "leaves out the reasoning before </think>"),
        (REASONING, "21</think>", "leaves out the reasoning before </think>"),
        (FIRST_LINE, "21\nis the answer", "leaves out a part of it"),
        (ESCAPED, "7 * 3 > 20", "leaves out a part of it"),
    ],
)
def test_a_cut_response_is_refused(tmp_path, source, response, why):
    tokenizer = byte_level_tokenizer(tmp_path, source)
    assert f": chosen: the chat template {why}" in refusal(tokenizer, "7 * 3?", response, "22")
    assert f": rejected: the chat template {why}" in refusal(tokenizer, "7 * 3?", "22", response)
    assert f": response: the chat template {why}" in refusal(tokenizer, "7 * 3?", response)
    assert encode(tokenizer, "7 * 3?", " 21 ", "22")  # white space at the ends is no loss


@pytest.mark.parametrize(
    "source, messages, at, role",
    [
        (USERS_ONLY, [system("Be brief."), user("Hi")], 0, "system"),
        (
            USERS_ONLY,
            [user("Hi"), assistant("Hello."), {"role": "tool", "content": "1"}],
            2,
            "tool",
        ),
        (USERS_ONLY, [system("a"), user("Say a.")], 0, "system"),  # the user's text holds it
        (USERS_ONLY, [{"role": "User", "content": "Hi"}], 0, "User"),
        (CHATML, [{"role": "human", "content": "Hi"}], 0, "human"),
        (CHATML, [user("Hi"), {"role": "gpt", "content": "Hello."}, user("And?")], 1, "gpt"),
        (ESCAPED, [user("Is 1 < 2?")], 0, "user"),
        (FIRST_LINE, [system("Be brief.\nBe kind."), user("Hi")], 0, "system"),
    ],
)
def test_a_lost_message_is_refused(tmp_path, source, messages, at, role):
    error = refusal(byte_level_tokenizer(tmp_path, source), messages, "Yes.", "No.")
    assert f": prompt[{at}]: " in error and f"role {role!r}" in error


def test_reasoning_of_earlier_turns_may_go(tmp_path):
    """Templates drop it by design, and transformers with them."""
    tokenizer = byte_level_tokenizer(tmp_path, REASONING)
    turns = [user("7 * 3?"), assistant(THOUGHT), user("Sure?")]
    prompt, _, _ = encode(tokenizer, turns, "Yes.", "No.")
    assert "assistant\n21<|im_end|>" in text_of(tokenizer, prompt)


# --------------------------------------------------------------------------------------------------
# --skip-unusable

GOOD = {"prompt": "describe the fox .", "chosen": "the fox runs away .", "rejected": "the fox ."}
BAD = {  # the toy's template refuses system messages
    "refused by the template": GOOD | {"prompt": [system("Be brief."), user("describe the fox .")]},
    "an unknown role": GOOD | {"prompt": [{"role": "narrator", "content": "describe the fox ."}]},
    "malformed": {"prompt": "describe the fox .", "chosen": 1, "rejected": 2},
    "rendered": GOOD | {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
}


def write_pairs(path: Path, *records: dict) -> Path:
    """Write records, among them good ones that differ; return the path."""
    lines = [json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def good(i: int) -> dict:
    words = ("moon", "owl", "bear", "river", "wind")
    return GOOD | {"prompt": f"describe the {words[i % 5]} ."}


@pytest.mark.parametrize("kind", BAD)
def test_an_unusable_record_stops_the_run_or_is_counted(monkeypatch, capsys, tmp_path, kind):
    pairs = write_pairs(tmp_path / "pairs.jsonl", *map(good, range(8)), BAD[kind], good(8))
    line = fails(monkeypatch, capsys, tmp_path / "run", 1, data=pairs)
    assert "pairs.jsonl:9: " in line
    few = fails(monkeypatch, capsys, tmp_path / "run", 1, data=pairs, skip_unusable=0.05)
    assert "1 of 10 records cannot be used, more than --skip-unusable 0.05" in few
    assert "pairs.jsonl:9: " in few
    flags = {"data": pairs, "skip_unusable": 0.1, "max_steps": 1}
    run(monkeypatch, tmp_path / "run", **flags)
    counts = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert counts["dropped: unusable"] == 1 and counts["used"] == 9 and counts["records"] == 10
    assert "; the first unusable, " in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_skips_the_same(monkeypatch, capsys, tmp_path, ranks):
    """Ranks share the records, and one refused conversation takes no other with it."""
    bad = list(BAD.values())[:2]
    records = [*map(good, range(9)), bad[0], good(9), bad[1], *map(good, range(10, 20))]
    file = str(write_pairs(tmp_path / "pairs.jsonl", *records))
    monkeypatch.setattr(inputs, "BLOCK", 4)
    settings = Settings(model="m", data=file, skip_unusable=0.1)
    tokenizer = Tokenizer(TOY / "checkpoint")

    def load() -> inputs.Tokenized:
        return inputs.load_pairs(file, tokenizer, settings)

    for loaded in on_ranks(monkeypatch, ranks, load):
        lines = [int(pair.where.rpartition(":")[2]) for pair in loaded.pairs]
        assert lines == [*range(1, 10), 11, *range(13, 23)]
        assert loaded.counts["dropped: unusable"] == 2 and loaded.counts["used"] == 20
    assert f"the first unusable, {file}:10: " in capsys.readouterr().out
    settings.skip_unusable = 0.05
    for error in on_ranks(monkeypatch, ranks, load):
        assert "2 of 22 records cannot be used" in str(error)
        assert f": the first, {file}:10" in str(error)


def test_a_damaged_file_is_an_error_all_the_same(monkeypatch, capsys, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", *map(good, range(8)))
    pairs.write_text(pairs.read_text() + "{not json\n")
    flags = {"data": pairs, "skip_unusable": 0.5}
    assert "pairs.jsonl:9: not JSON" in fails(monkeypatch, capsys, tmp_path / "run", 1, **flags)


# --------------------------------------------------------------------------------------------------
# Large shares


def warnings_of(monkeypatch, capsys, folder: Path, records: list[dict], **flags) -> list[str]:
    """Return the warnings of a dry run."""
    pairs = write_pairs(folder / "pairs.jsonl", *records)
    words = arguments(folder / "run", data=pairs, **flags)
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "--dry-run"])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("warning: ")]


def test_many_cuts_are_a_warning_that_says_what_to_do(monkeypatch, capsys, tmp_path):
    """The limits that it recommends keep 95 %, and one token less does not."""
    records = [
        {
            "prompt": " ".join(["describe the fox ."] * (1 + i % 4)),
            "chosen": " ".join(["the fox runs away ."] * (1 + i % 7)),
            "rejected": "the fox .",
        }
        for i in range(60)
    ]
    tight = {"max_length": 24, "max_prompt_length": 9}
    prompts, answers = warnings_of(monkeypatch, capsys, tmp_path, records, **tight)
    assert "of the prompts are cut at their start" in prompts
    assert "without an end of turn to learn" in answers
    words = answers.split()
    length, prompt = (
        int(words[words.index(f"--{n}") + 1]) for n in ("max-length", "max-prompt-length")
    )
    assert f"--max-prompt-length {prompt} " in prompts
    tokenizer = Tokenizer(TOY / "checkpoint")
    examples = [parse_record(record, "")[1] for record in records]

    def share_cut(length: int) -> float:
        counts = Counter()
        data.encode(examples, tokenizer, length, prompt, counts)
        return counts["responses cut at their end"] / (2 * len(examples))

    assert share_cut(length) <= 0.05 < share_cut(length - 1)
    wide = {"max_length": length, "max_prompt_length": prompt}
    assert warnings_of(monkeypatch, capsys, tmp_path, records, **wide) == []


def test_many_dropped_records_are_a_warning(monkeypatch, capsys, tmp_path):
    same = GOOD | {"rejected": GOOD["chosen"]}
    [line] = warnings_of(monkeypatch, capsys, tmp_path, [*map(good, range(9)), same])
    assert "10% of the records are dropped" in line and "chosen equal to rejected" in line
    assert warnings_of(monkeypatch, capsys, tmp_path, [*map(good, range(10)), same]) == []


# --------------------------------------------------------------------------------------------------
# Unfinished candidates


@pytest.mark.parametrize("argument", [None, "none"])
def test_an_unfinished_response_gets_no_end_of_turn(tmp_path, argument):
    write_checkpoint(tmp_path, byte_level(), CHATML, "<|im_end|>")
    tokenizer = Tokenizer(tmp_path, "" if argument else None)
    record = {"prompt": "Hi", "responses": ["Hello.", "Bye", "Well, I"], "scores": [1, 2, 0]}
    for finished, ends in (
        ([True, True, False], (True, False)),
        ([False, False, True], (False, True)),
        ([False, True, True], (True, True)),
        (None, (True, True)),
    ):
        _, example = parse_record(record | {"finished": finished}, "pairs.jsonl:7")
        [pair] = data.encode([example], tokenizer, 99, 50, Counter())
        texts = [text_of(tokenizer, ids.tolist()) for ids in pair.responses]
        expected = zip(("Bye", "Well, I"), ends)
        assert texts == [text + "<|im_end|>" * end for text, end in expected]


@pytest.mark.parametrize("finished", [[True], [True, "yes"], True, [1, 0]])
def test_finished_is_a_list_of_booleans(finished):
    record = {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2], "finished": finished}
    with pytest.raises(DataError, match="^here: finished: expected true or false"):
        parse_record(record, "here")


# --------------------------------------------------------------------------------------------------
# The day


def dated_template(path: Path) -> Path:
    """Write a template like the toy's that asks for the day."""
    path.write_text(
        "{% for m in messages %}{{ '<|' + m.role + '|> ' }}{% if loop.first %}"
        "{{ strftime_now('%d %b %Y') + ' ' }}{% endif %}{{ m.content + ' <|end|> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
    )
    return path


def set_clock(monkeypatch, day: str) -> None:
    monkeypatch.setattr(sandbox, "today", lambda: day)


def test_a_template_is_told_the_day(monkeypatch, tmp_path):
    set_clock(monkeypatch, "2026-02-03")
    source = dated_template(tmp_path / "dated.jinja").read_text() + "</s>"
    folder = write_checkpoint(tmp_path, byte_level(), source, "</s>")
    for date, text in ((None, "03 Feb 2026"), ("2024-07-26", "26 Jul 2024")):
        tokenizer = Tokenizer(folder, date=date)
        assert text in tokenizer.prompt_text("Hi", "")
        assert tokenizer.date == (date or "2026-02-03")
    assert Tokenizer(folder, CHATML, "2024-07-26").date is None  # this one does not ask


@pytest.mark.parametrize(
    "told, day", [("2026-02-03", "2026-02-03"), ("2026-02-30", None), ("{{ x }}", None), (5, None)]
)
def test_the_day_of_unfinished_answers_is_a_day(tmp_path, told, day):
    """What an edited file tells is no day, so the file is refused as of another day."""
    record = {"generation": {"date": told}}
    (tmp_path / "answers.jsonl.incomplete").write_text(json.dumps(record) + "\n")
    assert begun_on(str(tmp_path / "answers.jsonl")) == day


def test_a_run_keeps_its_day(monkeypatch, capsys, tmp_path):
    """It resumes on another day with the tokens that it began with."""
    out, chat_template = tmp_path / "run", dated_template(tmp_path / "dated.jinja")
    flags = {"chat_template": chat_template, "save_every": 1, "max_steps": 2}

    def date_after(**more) -> str | None:
        rows = run(monkeypatch, out, **flags, **more)
        assert len(rows) == 2
        (out / "model").rename(tmp_path / f"model-{len(list(tmp_path.iterdir()))}")
        return json.loads((out / "config.json").read_text())["settings"]["date"]

    set_clock(monkeypatch, "2026-02-03")
    assert date_after() == "2026-02-03"
    set_clock(monkeypatch, "2026-02-04")
    assert date_after() == "2026-02-03" and "resumed from" in capsys.readouterr().out
    state = out / "checkpoints" / "step-000002" / "state.json"
    whole = state.read_text()
    state.write_text(whole.replace("2026-02-03", "2026-02-0s"))
    line = fails(monkeypatch, capsys, out, 1, **flags)
    assert f"{state} is not what was saved" in line  # nothing in it is believed
    state.write_text(whole)
    last = out / "checkpoints" / "step-000001"
    assert date_after(resume=last) == "2026-02-03"
    line = fails(monkeypatch, capsys, out, 1, **flags, date="2026-02-04")
    assert "date '2026-02-03' (now '2026-02-04')" in line
    assert date_after(resume="never", overwrite=True) == "2026-02-04"
    set_clock(monkeypatch, "2026-02-05")
    (out / "model").mkdir()  # as if that run had finished
    assert date_after(overwrite=True) == "2026-02-05"
    del flags["chat_template"]
    assert date_after(resume="never", overwrite=True) is None


@pytest.mark.parametrize("date", ["2026-2-3", "2026-02-30", "today", "20260203"])
def test_usage_of_date(monkeypatch, capsys, tmp_path, date):
    assert "--date" in fails(monkeypatch, capsys, tmp_path / "run", 2, date=date)


def test_a_sampling_run_keeps_its_day(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dated_template(tmp_path / "dated.jinja")
    write_pairs(tmp_path / "asked.jsonl", good(0), good(1))
    words = ["--prompts=asked.jsonl", "--out=out.jsonl", "--chat-template=dated.jinja"]
    words += ["--max-new-tokens=3", "--device=cpu"]

    def records(*more: str) -> list[dict]:
        sample.sample(sample.read_flags([*words, *more]))
        return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]

    set_clock(monkeypatch, "2026-02-03")
    first = records()
    assert {record["generation"]["date"] for record in first} == {"2026-02-03"}
    assert [record["finished"] for record in first] == [[False], [False]]  # 3 tokens are too few
    set_clock(monkeypatch, "2026-02-04")
    left = Path("out.jsonl").read_text().splitlines(keepends=True)[0]
    Path("out.jsonl").unlink()
    Path("out.jsonl.incomplete").write_text(left)
    assert records() == first
    Path("out.jsonl").unlink()
    Path("out.jsonl.incomplete").write_text(left)
    with pytest.raises(DataError, match='made with date = "2026-02-03", not "2026-02-04"'):
        records("--date=2026-02-04")
    assert records("--overwrite")[0]["generation"]["date"] == "2026-02-04"
    assert "date" not in records("--overwrite", "--chat-template=none")[0]["generation"]


# --------------------------------------------------------------------------------------------------
# What the files of a folder say about tokens

END_TOKEN = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False,
             "single_word": False, "special": True}  # fmt: skip


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer_config", {"pad_token": "<pad>"}, "tokenizer_config.json: pad_token: '<pad>'"),
        ("tokenizer_config", {"bos_token": {"content": "<B>"}}, "config.json: bos_token: '<B>'"),
        ("tokenizer_config", {"eot_token": "<eot>"}, "config.json: eot_token: '<eot>'"),
        (
            "tokenizer_config",
            {"additional_special_tokens": ["<|im_start|>", "<|tool|>"]},
            "additional_special_tokens: '<|tool|>' is not a token",
        ),
        ("tokenizer_config", {"extra_special_tokens": {"image_token": "<img>"}}, "'<img>'"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"4": END_TOKEN | {"content": "<|end|>"}}},
            "added_tokens_decoder: 4: '<|end|>' is not a token",
        ),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"5": END_TOKEN}},
            "added_tokens_decoder: 5: '<|im_end|>' has the id 4 in tokenizer.json",
        ),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"4": END_TOKEN | {"lstrip": True}}},
            "'<|im_end|>' has lstrip = True, and False in tokenizer.json",
        ),
        ("tokenizer_config", {"added_tokens_decoder": {"4": 1}}, "4: expected a token's text"),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "decoder: : expected a token's text"),
        ("special_tokens_map", {"extra_special_tokens": 5}, "expected a token's text"),
        ("special_tokens_map", {"unk_token": "[UNK]"}, "special_tokens_map.json: unk_token"),
        ("special_tokens_map", {"eos_token": "</s>"}, "eos_token is '<|im_end|>' in tokenizer_con"),
        (
            "added_tokens",
            {"<|im_end|>": 7},
            "added_tokens.json: '<|im_end|>': '<|im_end|>' has the",
        ),
        ("added_tokens", {"<|new|>": 340}, "'<|new|>' is not a token of tokenizer.json"),
        ("config", {"bos_token_id": 999}, "config.json: bos_token_id: 999 is not a token"),
        ("generation_config", {"eos_token_id": [4, True]}, "eos_token_id: True is not a token"),
    ],
)
def test_files_that_disagree_about_tokens(tmp_path, name, content, message):
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    write_checkpoint(tmp_path, byte_level(), None, None)
    files = {"tokenizer_config": settings} | {name: content}
    files["tokenizer_config"] = settings | files["tokenizer_config"]
    for file, value in files.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(value))
    with pytest.raises(DataError) as refused:
        Tokenizer(tmp_path)
    assert message in str(refused.value) and str(refused.value).startswith(str(tmp_path))


def test_files_that_agree_about_tokens(tmp_path):
    """Whatever of these files a version of transformers wrote, they say one thing."""
    files = {
        "special_tokens_map": {"bos_token": {"content": "<s>"}, "additional_special_tokens": []},
        "added_tokens": {"<|im_end|>": 4},
        "config": {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": -1},
    }
    write_checkpoint(tmp_path, byte_level(), CHATML, "<|im_end|>", **files)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"added_tokens_decoder": {"4": END_TOKEN}, "add_bos_token": False}
    settings |= {"pad_token": None, "extra_special_tokens": {}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer(tmp_path).special == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("name", ["tool_use", "default"])
def test_further_templates(tmp_path, name):
    """As in transformers, further templates leave the default one alone, or they are refused."""
    write_checkpoint(tmp_path, byte_level(), LLAMA3, "<|im_end|>")
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / f"{name}.jinja").write_text("other")
    with pytest.raises(DataError, match="the default template must be in chat_template.jinja"):
        Tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    if name == "default":
        with pytest.raises(DataError, match="the default template must be in chat_template.jinja"):
            Tokenizer(tmp_path)
    else:
        assert Tokenizer(tmp_path).prompt_text("Hi", "").startswith("<|im_start|>user\nHi")


# --------------------------------------------------------------------------------------------------
# transformers


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_templates_are_equal_or_refused(tmp_path, name):
    pytest.importorskip("transformers")
    folder = chat_templates.write_tokenizer(tmp_path, TEMPLATES[name][1])
    found = {n: chat_templates.compare(folder, *c) for n, c in chat_templates.CONVERSATIONS.items()}
    assert not [outcome for outcome in found.values() if outcome.startswith("DIFFERENT")]
    assert found["one turn"] == found["three turns"] == found["about marks"] == "equal"
    assert found["human"].startswith("refused") and found["User"].startswith("refused")


def test_templates_of_trl_are_equal_or_refused(tmp_path):
    """Every fifth template that TRL ships; bench/chat_templates.py compares all."""
    pytest.importorskip("transformers")
    try:
        paths = chat_templates.templates(None)
    except FileNotFoundError as e:
        pytest.skip(str(e))
    table = chat_templates.compare_all(paths[::5], tmp_path)
    outcomes = [outcome for row in table.values() for outcome in row.values()]
    assert not [outcome for outcome in outcomes if outcome.startswith("DIFFERENT")]
    assert sum(outcome == "equal" for outcome in outcomes) >= len(outcomes) // 3
