"""Check `--like-authors`: tokens, cuts and warm-up of SimPO's authors' trainer.

bench/like_authors.py runs the authors' own functions on made-up pairs and recorded what they gave
in tests/like_authors.json. Here our side is held to that record, then to cases counted by hand.
"""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import like_authors
import pytest
from like_authors import FAMILIES, LENGTHS, digests, our_ids, our_tokenizer, pairs_of
from tokenizers import Tokenizer as Backend
from tokenizers import models

import data
import train
from data import Example
from formats.authors import encode_like_authors, encoder
from formats.errors import CheckpointError, DataError
from formats.tokenizer import Tokenizer, read_template
from runtime import inputs, plan
from runtime.processes import start_ranks
from runtime.settings import Settings, read_settings, table_problem
from study import analyze

ROOT = Path(__file__).resolve().parent.parent
RECORD = json.loads(like_authors.RECORD.read_text())
SMOLLM2 = os.environ.get("SIMPO_SMOLLM2", "")

# --------------------------------------------------------------------------------------------------
# The record of what the authors' functions gave


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_the_authors(tmp_path, name):
    """512 pairs per family and length have the ids that `tokenize_row` gave them."""
    family, recorded = FAMILIES[name], RECORD["families"][name]
    tokenizer, examples = our_tokenizer(tmp_path, family), pairs_of(family)
    for i, theirs in recorded["ids"]:
        assert our_ids(tokenizer, [examples[i]], LENGTHS[-1]) == [theirs]
    for lengths, theirs in zip(LENGTHS, recorded["digests"], strict=True):
        assert digests(our_ids(tokenizer, examples, lengths)) == theirs


def test_record_holds_every_case():
    """The record covers all families, all lengths and at least 500 pairs each."""
    assert RECORD["families"].keys() == FAMILIES.keys()
    for recorded in RECORD["families"].values():
        assert [len(found) * like_authors.BLOCK for found in recorded["digests"]] == [512] * 4
        assert len(set(map(tuple, recorded["digests"]))) == len(LENGTHS)  # each length cuts others
        assert len(recorded["ids"]) == 2


@pytest.mark.skipif(not SMOLLM2, reason="SIMPO_SMOLLM2 names no folder with SmolLM2's checkpoint")
def test_tokens_of_a_real_tokenizer_are_the_authors():
    """The same holds for SmolLM2's tokenizer and template, which writes a system message."""
    tokenizer, examples = Tokenizer(Path(SMOLLM2)), like_authors.made_up()
    for lengths, theirs in zip(LENGTHS, RECORD["checkpoint"]["digests"], strict=True):
        assert digests(our_ids(tokenizer, examples, lengths)) == theirs


# --------------------------------------------------------------------------------------------------
# By hand: the texts

HI = [{"role": "user", "content": "Hi"}]
# family, template in recipes/, text of the prompt, text of the response "Yes."
RENDERED = [
    (
        "Llama 3, EOS <|eot_id|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    ),
    (
        "Llama 3, EOS <|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|><|end_of_text|>",
    ),
    (
        "Llama 3, April 2024",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|end_of_text|>",
    ),
    (
        "Zephyr, space first only",
        "<s>▁<|system|>\n</s>\n<|user|>\nHi</s>\n",
        "<|assistant|>\nYes.</s>\n</s>",
    ),
    ("Mistral, space first only", "<s>▁[INST]▁Hi▁[/INST]", "▁Yes.▁</s>"),
]


@pytest.mark.parametrize("name, prompt, response", RENDERED)
def test_header_and_end_belong_to_the_response(tmp_path, name, prompt, response):
    """The response has the assistant's header, what the template writes after it, and EOS."""
    tokenizer = our_tokenizer(tmp_path, FAMILIES[name])
    [ids] = our_ids(tokenizer, [Example(HI, ("Yes.", "No."), "")], LENGTHS[0])
    texts = ["".join(map(tokenizer.backend.id_to_token, part)) for part in ids]
    spelled = [t.replace("<0x0A>", "\n").replace("Ċ", "\n") for t in texts]
    assert spelled == [prompt, response, response.replace("Yes", "No")]


SYSTEM = [{"role": "system", "content": "Rhyme."}]
EMPTY = [  # template, prompt, text of the prompt
    ("{# system #}[{{ m.role }}]{{ m.content }};", HI, "[system];[user]Hi;"),
    ("{# system #}[{{ m.role }}]{{ m.content }};", SYSTEM + HI, "[system]Rhyme.;[user]Hi;"),
    ("<|im_start|>{{ m.role }} {{ m.content }};", HI, "<|im_start|>system ;<|im_start|>user Hi;"),
    ("[{{ m.role }}]{{ m.content }};", HI, "[user]Hi;"),
]


@pytest.mark.parametrize("body, messages, expected", EMPTY)
def test_empty_system_message(tmp_path, body, messages, expected):
    """It comes first if the template's text knows that role, in the prompt and not elsewhere."""
    template = "{% for m in messages %}" + body + "{% endfor %}"
    tokenizer = our_tokenizer(tmp_path, FAMILIES["Llama 3, EOS <|eot_id|>"], template)
    [ids] = our_ids(tokenizer, [Example(messages, ("Yes.", "No."), "")], LENGTHS[0])
    prompt, response, _ = (tokenizer.backend.decode(part, False) for part in ids)
    assert prompt == "<|begin_of_text|>" + expected
    assert "assistant" in response and "system" not in response


@pytest.mark.parametrize("default", ["", "<s>[system]Be kind.;"])
def test_a_turn_before_an_answer_alone_is_counted(tmp_path, default):
    """The authors' trainer would have the model predict a template's default system message."""
    first = "{% if messages[0].role != 'system' %}" + default + "{% endif %}"
    body = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    tokenizer = our_tokenizer(tmp_path, FAMILIES["Zephyr"], first + body)
    counts = Counter()
    [pair] = encode_like_authors([Example(HI, ("Yes.", "No."), "")], tokenizer, 99, 90, counts)
    spelled = tokenizer.backend.decode(pair.responses[0].tolist(), False).replace(" ", "")
    assert ("[system]" in spelled) == bool(default)
    said = [name for name in counts if "--no-like-authors" in name and counts[name] == 2]
    assert bool(said) == bool(default)


def test_prompt_may_be_text(tmp_path):
    """A string becomes one user message, a transcript its turns, as without the switch."""
    tokenizer = our_tokenizer(tmp_path, FAMILIES["Zephyr"])
    transcript = "\n\nHuman: Hi\n\nAssistant:"
    for prompt, answer in (("Hi", "Yes."), (transcript, " Yes. ")):
        examples = [Example(HI, ("Yes.", "No."), "1"), Example(prompt, (answer, "No."), "2")]
        first, second = our_ids(tokenizer, examples, LENGTHS[0])
        assert first == second


def test_template_that_refuses_the_assistant_alone(tmp_path):
    """Mistral's own template cannot render a response; the error names the pair."""
    refuses = "{% if messages[0].role != 'user' %}{{ raise_exception('roles') }}{% endif %}x"
    tokenizer = our_tokenizer(tmp_path, FAMILIES["Mistral"], refuses)
    with pytest.raises(DataError, match="a.jsonl:3: the chat template refuses .*roles"):
        our_ids(tokenizer, [Example(HI, ("Yes.", "No."), "a.jsonl:3")], LENGTHS[0])


# --------------------------------------------------------------------------------------------------
# By hand: boundary, ends and cuts, with one token per character

CHARACTERS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
MERGED = [("a", "b"), ("y", "z"), ("x", "yz")]


def by_character(folder: Path, **special: str) -> Tokenizer:
    """Return a tokenizer without a template: a token is a character, or one of `MERGED`."""
    pieces = [*CHARACTERS, *map("".join, MERGED)]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, MERGED))
    backend.add_special_tokens(CHARACTERS[:2])
    (folder / "tokenizer.json").write_text(backend.to_str())
    named = special or {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    return Tokenizer(folder)


def spell(tokenizer: Tokenizer, example: Example, *lengths: int) -> tuple[list[str] | None, dict]:
    """Return prompt and responses, tokens separated by spaces, and the counts."""
    counts: Counter = Counter()
    pairs = encode_like_authors([example], tokenizer, *(lengths or LENGTHS[0]), counts)
    for pair in pairs:
        parts = (pair.prompt, *pair.responses)
        return [" ".join(map(tokenizer.backend.id_to_token, ids)) for ids in parts], dict(+counts)
    return None, dict(+counts)


BOUNDARIES = [  # prompt, chosen, rejected; what becomes of them
    ("cd", "ef", "gh", ["<s> c d", "e f </s>", "g h </s>"]),
    # the prompt's last token merges with both responses and goes to them
    ("ca", "be", "bf", ["<s> c", "ab e </s>", "ab f </s>"]),
    ("ca", "be", "fg", None),  # with one of them: no prompt is common to both
    ("cxy", "z", "z", None),  # so much merges that the response has no token of its own
    ("c", "e</s>", "</s>", ["<s> c", "e </s>", "</s>"]),  # one EOS
    ("<s>c", "e", "f", ["<s> c", "e </s>", "f </s>"]),  # one BOS
    ("", "e", "f", ["<s>", "e </s>", "f </s>"]),
    ("c", "", "f", ["<s> c", "</s>", "f </s>"]),
    ("c", "e", "e", ["<s> c", "e </s>", "e </s>"]),  # equal responses stay
]


@pytest.mark.parametrize("prompt, chosen, rejected, expected", BOUNDARIES)
def test_boundary_and_ends(tmp_path, prompt, chosen, rejected, expected):
    """Prompt and response are encoded together; BOS and EOS are there once."""
    spelled, counts = spell(by_character(tmp_path), Example(prompt, (chosen, rejected), ""))
    assert spelled == expected
    dropped = "dropped: chosen and rejected leave the prompt at different tokens"
    assert counts == ({} if expected else {dropped: 1})


CUTS = [  # tokens of prompt, chosen, rejected, with BOS and EOS, at 2048/1800; what is left of them
    ((731, 1317, 10), (731, 1317, 10)),  # fits to the token
    # The pair: 731, 1310 and 3 tokens with BOS before them and a header of seven tokens.
    # A response loses 1,069 tokens since the pair is one too long, and the prompt none.
    ((732, 1317, 10), (732, 248, 10)),
    ((732, 10, 1317), (732, 10, 248)),  # the longer response decides, whichever it is
    ((1900, 100, 60), (1900, 100, 60)),  # a prompt beyond 1800 is not cut as long as all fits
    ((1990, 100, 60), (1800, 100, 60)),
    ((1801, 248, 3), (1800, 248, 3)),
    ((1801, 249, 3), (1800, 248, 3)),
    ((1990, 300, 260), (1800, 248, 248)),
    ((100, 3000, 5), (100, 248, 5)),
]


@pytest.mark.parametrize("before, after", CUTS)
def test_cuts(tmp_path, before, after):
    """Nothing is cut unless prompt and longer response are too long: the prompt, then both."""
    prompt, chosen, rejected = (letter * (n - 1) for letter, n in zip("per", before))
    example = Example(prompt, (chosen, rejected), "")
    spelled, counts = spell(by_character(tmp_path), example, 2048, 1800)
    p, c, r = (text.split() for text in spelled)
    assert (len(p), len(c), len(r)) == after
    assert p == ["<s>", *prompt][-after[0] :]  # its end stays, and BOS goes
    assert (c, r) == ([*chosen, "</s>"][: after[1]], [*rejected, "</s>"][: after[2]])
    cut = [n < m for n, m in zip(after, before)]
    assert counts.get("prompts cut at their start", 0) == cut[0]
    assert counts.get("responses cut at their end", 0) == sum(cut[1:])


def test_the_rules_of_data_py_stay_the_default(tmp_path):
    """Without the switch the issue's pair keeps 1310 and 3 tokens."""
    assert encoder(False) is data.encode and encoder(True) is encode_like_authors
    example = Example("p" * 730, ("c" * 1309, "rr"), "")
    [pair] = data.encode([example], by_character(tmp_path), 2048, 1800, Counter())
    assert [len(response) for response in pair.responses] == [1310, 3]


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_missing_special_tokens_are_named(tmp_path, missing):
    """The authors' trainer would put None among the ids."""
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    del named[missing]
    tokenizer = by_character(tmp_path, **named)
    with pytest.raises(DataError, match=f"no {missing}: --like-authors needs one"):
        spell(tokenizer, Example("c", ("e", "f"), ""))


# --------------------------------------------------------------------------------------------------
# Warm-up, runs, and what follows the switch


def test_warm_up_starts_at_zero():
    """The rates of Hugging Face's schedule with warm-up: 0 first, the same ones after it."""
    ours = Settings(lr=1.0, warmup_ratio=0.2)
    theirs = Settings(lr=1.0, warmup_ratio=0.2, like_authors=True)
    rates = [[train.learning_rate(s, step, 20) for step in range(20)] for s in (ours, theirs)]
    assert rates[0][:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[1][:4] == [0.0, 0.25, 0.5, 0.75]
    assert rates[0][4:] == rates[1][4:] and rates[1][4] == 1.0
    assert train.learning_rate(Settings(warmup_ratio=0.0, lr=1.0, like_authors=True), 0, 9) == 1.0


def test_losses_are_the_authors(tmp_path):
    """Eight steps of a run have the losses of the authors' functions on their own batches."""
    flags = like_authors.write_training(tmp_path, steps=8)
    losses = like_authors.our_losses(tmp_path, flags)
    assert losses == pytest.approx(RECORD["losses"], rel=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert rows[0]["learning_rate"] == 0 < rows[1]["learning_rate"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["like_authors"] is True
    without = [*flags[1:], f"--out={tmp_path}/without", "--max-steps=1"]
    without.append("--skip-unusable=0.1")  # a prompt looks as if a template had rendered it
    assert train.train(read_settings(without))["steps"] == 1
    [row, *_] = map(json.loads, (tmp_path / "without" / "metrics.jsonl").open())
    assert row["loss"] != pytest.approx(RECORD["losses"][0], rel=1e-2)


def test_resuming_refuses_a_changed_switch(tmp_path):
    """The switch is part of what a run is."""
    flags = like_authors.write_training(tmp_path, steps=2)
    train.train(read_settings([*flags, "--save-every=1"]))
    shutil.rmtree(tmp_path / "out" / "model")  # as if it had not finished
    with pytest.raises(CheckpointError, match=r"like-authors True \(now False\)"):
        train.train(read_settings(flags[1:]))


def test_plan_and_analyses_follow_the_switch(tmp_path):
    """They see the tokens that training sees."""
    flags = like_authors.write_training(tmp_path, steps=2)
    checkpoint = tmp_path / "checkpoint"
    seen = []
    for words in (flags, flags[1:]):
        settings = read_settings(words)
        start_ranks(settings)
        tokenizer = Tokenizer(checkpoint, read_template(settings.chat_template))
        pairs = inputs.load_pairs(settings.data, tokenizer, settings).pairs
        lengths = [[len(response) for response in pair.responses] for pair in pairs]
        planned, *_ = plan.sampled_pairs(settings, checkpoint)
        assert [[len(r) for r in pair.responses] for pair in planned] == lengths
        _, scored = analyze.score_checkpoint(checkpoint, settings.data, settings)
        assert scored.tolist() == lengths
        seen.append(lengths)
    assert seen[0] != seen[1]


def test_single_responses_are_refused():
    """The authors' trainer has no SFT; that run would claim what it does not do."""
    settings = Settings(objective="sft", model="m", data="d", like_authors=True)
    assert "--like-authors" in table_problem(settings)
    settings.like_authors = False
    assert table_problem(settings) is None
