"""Test the formats of records: 60 schemas of public data, and what is never ignored in silence.

Each schema is a made-up record with the columns of a public data set's card (2026-11), and the
conversation that it stands for. A data set is either read right, which means that the token
ids are those of transformers' `apply_chat_template`, or refused with flags that make it readable.
"""

import functools
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from test_data import (
    CHECKPOINTS,
    assistant,
    ids_of,
    system,
    tokenizer_of,
    transformers_tokenizer,
    user,
)

import data
from data import Example
from formats.candidates import prompt_of
from formats.errors import DataError
from formats.schemas import Columns, parse_record
from formats.tokenizer import as_messages
from runtime.inputs import Block, join_blocks, read_blocks
from runtime.settings import Settings, read_settings

Q, A, B = "Name a colour of the sky.", "Blue, most of the time.", "Green."
LONG = "This is a remark of the judge that goes on for more than a few words, as they do."
ASKED = [user(Q)]
TALK = [user("Hi."), assistant("Hello."), user(Q)]
CHOSEN, REJECTED = [user(Q), assistant(A)], [user(Q), assistant(B)]
PAIR = {"chosen": A, "rejected": B}
LISTS = {"chosen": CHOSEN, "rejected": REJECTED}
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: " + Q + "\n\nAssistant:"


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


class Schema(NamedTuple):
    """Holds a data set's name, a record, and what it says: the prompt as messages, the answers."""

    name: str
    record: dict
    prompt: list[dict] = ASKED
    responses: tuple[str, ...] = (A, B)


RANKED = [{"answer": B, "model": "m", "rank": 2.0}, {"answer": A, "model": "n", "rank": 1.0}]
EXCHANGE = {"answer_id": 1, "author": "Ann", "author_id": 2, "author_profile": "https://x/2"}
JUDGED = {
    "annotations": {"helpfulness": {"Rating": "4", "Rationale": LONG}}, "critique": LONG,
    "custom_system_prompt": LONG, "principle": "honesty", "fine-grained_score": 4.0,
}  # fmt: skip
WITH_SYSTEM = [system("Be brief."), user(Q)]
READ = [
    Schema("HuggingFaceH4/ultrafeedback_binarized", LISTS | {
        "prompt": Q, "prompt_id": "0f", "messages": CHOSEN, "score_chosen": 8.0,
        "score_rejected": 8.0}),
    Schema("princeton-nlp/llama3-ultrafeedback-armorm", LISTS | {
        "prompt": Q, "prompt_id": "0f", "all_generated_responses": [B, "Red.", A],
        "all_rm_scores": [0.1, 0.2, 0.3]}),
    Schema("argilla/ultrafeedback-binarized-preferences-cleaned", LISTS | {
        "source": "evol_instruct", "prompt": Q, "chosen-rating": 5.0, "chosen-model": "gpt-4",
        "rejected-rating": 3.5, "rejected-model": "llama-2-7b-chat"}),
    Schema("openbmb/UltraFeedback", {
        "source": "flan", "instruction": Q, "models": ["m", "n"], "correct_answers": ["None"],
        "incorrect_answers": [LONG], "completions": [
            {"model": "m", "response": B, "overall_score": 2.0} | JUDGED,
            {"model": "n", "response": A, "overall_score": 7.5} | JUDGED]}),
    Schema("trl-lib/ultrafeedback_binarized", LISTS | {
        "score_chosen": 8.0, "score_rejected": 2.0}),
    Schema("trl-lib/hh-rlhf-helpful-base", {
        "prompt": TALK, "chosen": [assistant(A)], "rejected": [assistant(B)]}, TALK),
    Schema("trl-lib/tldr-preference", PAIR | {"prompt": Q}),
    Schema("TRL explicit, several turns", {
        "prompt": [user("Hi.")], "chosen": TALK[1:] + [assistant(A)],
        "rejected": TALK[1:] + [assistant(B)]}, TALK),
    Schema("Anthropic/hh-rlhf", {"chosen": f"{HH} {A}", "rejected": f"{HH} {B}"}, TALK),
    Schema("Dahoas/full-hh-rlhf", {
        "prompt": HH, "response": f" {A}", "chosen": f" {A}", "rejected": f" {B}"}, TALK),
    Schema("Dahoas/rm-static, with the space behind the mark", {
        "prompt": f"{HH} ", "response": A, "chosen": A, "rejected": B}, TALK),
    Schema("hh-rlhf after strip()", {
        "chosen": f"{HH} {A}".strip(), "rejected": f"{HH} {B}".strip()}, TALK),
    Schema("hh-rlhf with single line breaks", {
        "chosen": f"{HH} {A}".replace("\n\n", "\n"),
        "rejected": f"{HH} {B}".replace("\n\n", "\n")}, TALK),
    Schema("hh-rlhf, split before the mark", {
        "prompt": HH.removesuffix("\n\nAssistant:"), "chosen": f"\n\nAssistant: {A}",
        "rejected": f"\n\nAssistant: {B}"}, TALK),
    Schema("hh-rlhf, with the question beside it", {
        "prompt": Q, "chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}",
        "rejected": f"\n\nHuman: {Q}\n\nAssistant: {B}"}),
    Schema("Intel/orca_dpo_pairs", PAIR | {"system": "Be brief.", "question": Q}, WITH_SYSTEM),
    Schema("kyujinpy/orca_math_dpo", PAIR | {"system": "", "question": Q, "id": "flan.1"}),
    Schema("HuggingFaceH4/orca_dpo_pairs", {
        "prompt": Q, "chosen": WITH_SYSTEM + [assistant(A)],
        "rejected": WITH_SYSTEM + [assistant(B)]}, WITH_SYSTEM),
    Schema("argilla/distilabel-intel-orca, without the judge's texts", PAIR | {
        "system": "Be brief.", "input": Q, "generations": [B, A], "order": ["rejected", "chosen"],
        "labelling_model": "gpt-4", "rating": [9.0, 7.0], "status": "tie?", "chosen_score": 9.0,
        "in_gsm8k_train": False}, WITH_SYSTEM),
    Schema("jondurbin/truthy-dpo-v0.1", PAIR | {
        "id": "a1", "source": "truthy", "system": "Be brief.", "prompt": Q}, WITH_SYSTEM),
    Schema("jondurbin/gutenberg-dpo-v0.1", PAIR | {"prompt": Q, "rejected_model": "llama-2"}),
    Schema("CarperAI/openai_summarize_comparisons", PAIR | {"prompt": Q}),
    Schema("allenai/llama-3.1-tulu-3-8b-preference-mixture", LISTS | {
        "id": "a", "source": "wildchat", "prompt": Q, "chosen_model": "m", "rejected_model": "n"}),
    Schema("allenai/reward-bench", PAIR | {
        "prompt": Q, "chosen_model": "m", "rejected_model": "n", "subset": "refusals", "id": 3}),
    Schema("snorkelai/Snorkel-Mistral-PairRM-DPO-Dataset", LISTS | {
        "prompt_id": "a", "prompt": Q, "all_generated_responses": [A, B], "all_rm_scores": [1, 2]}),
    Schema("Skywork/Skywork-Reward-Preference-80K", LISTS | {"source": "magpie_pro"}),
    Schema("argilla/dpo-mix-7k", LISTS | {
        "dataset": "capybara", "chosen_rating": 5.0, "rejected_rating": 2.0}),
    Schema("mlabonne/orpo-dpo-mix-40k", LISTS | {"source": "x", "prompt": Q, "question": Q}),
    Schema("RLHFlow/UltraFeedback-preference-standard", LISTS | {
        "chosen_score": 8.0, "rejected_score": 2.0}),
    Schema("Magpie-Align/Magpie-Pro-DPO-100K", LISTS | {
        "uuid": "a", "instruction": Q, "task_category": "Advice seeking", "difficulty": "easy"}),
    Schema("hiyouga/DPO-En-Zh-20k (ShareGPT)", {
        "conversations": [{"from": "system", "value": "Be brief."}, human(Q)],
        "chosen": gpt(A), "rejected": gpt(B)}, WITH_SYSTEM),
    Schema("LLaMA-Factory alpaca", PAIR | {
        "instruction": "Name a colour", "input": "of the sky.", "system": "Be brief.",
        "history": [["Hi.", "Hello."]]},
        [system("Be brief."), *TALK[:2], user("Name a colour\nof the sky.")]),
    Schema("allenai/llama-3.1-tulu-3-405b-preference-mixture", LISTS | {
        "id": "a", "source": "x", "chosen_model": "m", "rejected_model": "n"}),
    Schema("messages and string answers", PAIR | {"messages": TALK}, TALK),
    Schema("messages and message answers", {
        "messages": TALK, "chosen": assistant(A), "rejected": assistant(B)}, TALK),
    Schema("vicgalle/configurable-system-prompt-multitask", PAIR | {
        "system": "Be brief.", "prompt": Q, "category": "safety"}, WITH_SYSTEM),
    Schema("berkeley-nest/Nectar", {
        "prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": RANKED, "turns": 1,
        "num_responses": 2, "source": ["lmsys-chat-1m"], "good_natured": True}),
    Schema("HuggingFaceH4/stack-exchange-preferences", {
        "qid": 5, "question": Q, "date": "2016/03/26", "metadata": ["https://a", "https://b"],
        "answers": [EXCHANGE | {"pm_score": 0, "selected": False, "text": B},
                    EXCHANGE | {"pm_score": 3, "selected": True, "text": A}]}),
    Schema("nvidia/HelpSteer2 preference", {
        "split": "train", "prompt": Q, "response_1": B, "response_2": A, "preference_strength": 2,
        "preference_statement": LONG, "preference_elaboration": LONG,
        "three_most_similar_preferences": [{"statement": LONG, "strength": 2}]}),
    Schema("nvidia/HelpSteer3", {
        "domain": "code", "language": "python", "context": TALK, "response1": A, "response2": B,
        "overall_preference": -3, "individual_preference": [
            {"score": -3, "reasoning": LONG, "feedback1": LONG, "feedback2": LONG}]}, TALK),
    Schema("stanfordnlp/SHP", {
        "post_id": "abc", "domain": "askbaking_train", "upvote_ratio": 0.98, "history": Q,
        "c_root_id_A": "a", "c_root_id_B": "b", "created_at_utc_A": 1, "created_at_utc_B": 2,
        "score_A": 3, "score_B": 9, "human_ref_A": B, "human_ref_B": A, "labels": 0,
        "seconds_difference": 2.0, "score_ratio": 3.0}),
    Schema("lmsys/chatbot_arena_conversations", {
        "question_id": "a", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_1",
        "conversation_a": REJECTED, "conversation_b": CHOSEN, "turn": 1, "anony": True,
        "language": "English", "tstamp": 1.0, "toxic_chat_tag": {"roberta": {"flagged": False}},
        "openai_moderation": {"categories": {"hate": False}, "flagged": False}}),
    Schema("lmarena-ai/arena-human-preference-140k", {
        "id": "a", "model_a": "m", "winner": "model_a", "evaluation_order": 1,
        "conversation_a": [user([{"type": "text", "text": Q, "image": None}]),
                           assistant([{"type": "text", "text": A}])],
        "conversation_b": [user([{"type": "text", "text": Q, "image": None}]),
                           assistant([{"type": "text", "text": B}])]}),
    Schema("PKU-Alignment/PKU-SafeRLHF", {
        "prompt": Q, "response_0": B, "response_1": A, "prompt_source": "x",
        "response_0_source": "Alpaca3-8B", "is_response_0_safe": True, "response_0_sha256": "0f",
        "response_0_harm_category": {"Violence": False}, "response_0_severity_level": 0,
        "better_response_id": 1, "safer_response_id": 0}),
    Schema("tatsu-lab/alpaca_farm", {
        "instruction": Q, "input": "", "output_1": A, "output_2": B, "preference": 1,
        "raw_preference": 2}),
    Schema("responses and their ranks", {"prompt": Q, "responses": [B, A], "ranks": [2, 1]}),
    Schema("candidates of sample.py", {
        "prompt": Q, "responses": [B, A], "scores": [0.5, 2], "generation": {"model": "x/y"}}),
]  # fmt: skip
SINGLE = [
    Schema("HuggingFaceH4/ultrachat_200k", {
        "prompt": "Hi.", "prompt_id": "a", "messages": [*TALK, assistant(A)]}, TALK, (A,)),
    Schema("trl-lib/kto-mix-14k", {
        "prompt": TALK, "completion": [assistant(A)], "label": True}, TALK, (A,)),
    Schema("allenai/tulu-3-sft-mixture", {
        "id": "a", "messages": CHOSEN, "source": "x"}, ASKED, (A,)),
    Schema("Open-Orca/OpenOrca", {
        "id": "a", "system_prompt": "Be brief.", "question": Q, "response": A}, WITH_SYSTEM, (A,)),
    Schema("teknium/OpenHermes-2.5", {
        "conversations": [human(Q), gpt(A)], "source": "x", "category": "orca", "idx": None},
        ASKED, (A,)),
    Schema("yahma/alpaca-cleaned", {
        "instruction": "Name a colour", "input": "of the sky.", "output": A},
        [user("Name a colour\nof the sky.")], (A,)),
    Schema("openai/gsm8k", {"question": Q, "answer": A}, ASKED, (A,)),
    Schema("nvidia/HelpSteer2", {
        "prompt": Q, "response": A, "helpfulness": 4, "correctness": 4, "coherence": 4,
        "complexity": 1, "verbosity": 1}, ASKED, (A,)),
]  # fmt: skip
REFUSED = [  # … and the part of the line that names the reason
    (Schema("argilla/distilabel-intel-orca-dpo-pairs", PAIR | {
        "system": "Be brief.", "input": Q, "labelling_prompt": [system(LONG), user(LONG)],
        "raw_labelling_response": LONG, "rationale": LONG, "original_chosen": A}, WITH_SYSTEM),
     "column 'labelling_prompt', column 'raw_labelling_response', column 'rationale'"),
    (Schema("argilla/distilabel-capybara-dpo-7k-binarized", LISTS | {
        "prompt": Q, "conversation": [{"input": Q, "output": "An older answer."}],
        "original_response": "An older answer.", "generation_prompt": [LONG], "source": "x",
        "raw_generation_responses": [LONG], "rating_chosen": 5}), "column 'conversation'"),
    (Schema("argilla/ultrafeedback-binarized-preferences", {
        "source": "x", "instruction": Q, "chosen_response": A, "rejected_response": B,
        "chosen_avg_rating": 5.0, "chosen_model": "m"}), "no known format"),
    (Schema("argilla/distilabel-math-preference-dpo", {
        "metadata": "{}", "instruction": Q, "chosen_response": A, "chosen_rating": "8",
        "rejected_response": B}), "no known format"),
    (Schema("lvwerra/stack-exchange-paired", {
        "qid": 5, "question": Q, "date": "2016/03/26", "metadata": ["https://a"],
        "response_j": A, "response_k": B}), "no known format"),
    (Schema("Vezora/Code-Preference-Pairs", {"input": Q, "accepted": A, "rejected": B, "ID": 3}),
     "no 'chosen' field"),
    (Schema("xinlai/Math-Step-DPO-10K", PAIR | {
        "dataset": "x", "prompt": Q, "initial_reason_steps": "Step 1.", "answer": "3",
        "full_chosen": LONG, "full_rejected": LONG}),
     "column 'initial_reason_steps', column 'full_chosen'"),
    (Schema("davidanugraha/HelpSteer3", PAIR | {
        "context": ASKED, "response1": B, "response2": A, "overall_preference": 1, "score": "1",
        "individual_preference": [{"reasoning": LONG}], "sharegpt_conversations": [human(Q)],
        "sharegpt_chosen": gpt(A)}), "column 'individual_preference'"),
    (Schema("openbmb/RLAIF-V-Dataset", PAIR | {
        "ds_name": "x", "image": {"bytes": "iVBOR", "path": None}, "question": Q, "idx": 3}),
     "column 'image'"),
    (Schema("a translation", {"Frage": Q, "good": A, "bad": B}), "no known format"),
    (Schema("solutions with scores", {"problem": Q, "solutions": [B, A], "scores": [0, 1]}),
     "no known format"),
    (Schema("camelCase", {"userInput": Q, "chosenText": A, "rejectedText": B}), "no known format"),
]  # fmt: skip


@pytest.mark.parametrize("schema", READ + SINGLE, ids=lambda schema: schema.name)
def test_read_right(schema):
    """Every published schema says what its card says that it says."""
    paired = len(schema.responses) == 2
    _, example = parse_record(schema.record, "a.jsonl:1", paired)
    assert as_said(example) == (schema.prompt, schema.responses)


def as_said(example: Example) -> tuple[list[dict], tuple[str, ...]]:
    """Return prompt and responses as the tokenizer sees them: messages, and text."""
    if isinstance(example.prompt, list):
        return example.prompt, example.responses
    strip = example.prompt.startswith("\n\nHuman:")
    responses = tuple(text.strip() if strip else text for text in example.responses)
    return as_messages(example.prompt), responses


@pytest.mark.parametrize("schema, why", REFUSED, ids=lambda value: getattr(value, "name", ""))
def test_refused_with_a_command_that_works(tmp_path, schema, why):
    """A schema that is not read says why in one line, with flags that were tried on the record."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(schema.record) + "\n")
    settings = read_settings([f"--model={tmp_path}", f"--data={file}"])
    with pytest.raises(DataError, match=f"pairs.jsonl:1: {why}") as error:
        read_all(file, settings)
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000
    flags = re.findall(r"(--(?:columns|ignore-columns|objective)) (\S+=\S+|[\w,]+)(?=\s|$)", line)
    flags = [word for flag in flags if flag[1] != "TARGET=SOURCE," for word in flag]
    again = read_settings([f"--model={tmp_path}", f"--data={file}", *shlex.split(" ".join(flags))])
    [example] = read_all(file, again).examples
    assert as_said(example) == (schema.prompt, schema.responses)


def test_there_are_enough():
    assert len(READ) + len(SINGLE) >= 50 and len(READ) + len(SINGLE) + len(REFUSED) >= 60


def test_token_ids_of_transformers(tmp_path):
    """Prompt and responses of every schema have the ids of `apply_chat_template`."""
    ours = tokenizer_of(tmp_path, "ChatML")
    _, template, eos, *_ = CHECKPOINTS["ChatML"]
    theirs = transformers_tokenizer(tmp_path, template, eos)
    examples = [
        parse_record(schema.record, schema.name, len(schema.responses) == 2)[1]
        for schema in READ + SINGLE
    ]
    pairs = data.encode(examples, ours, 4096, 2048, Counter())
    for schema, pair in zip(READ + SINGLE, pairs, strict=True):
        ask = functools.partial(theirs.apply_chat_template, return_dict=False, tokenize=True)
        prompt = ask(schema.prompt, add_generation_prompt=True)
        assert pair.prompt.tolist() == prompt, schema.name
        for ids, response in zip(pair.responses, schema.responses, strict=True):
            whole = ask([*schema.prompt, assistant(response)])
            newline = ids_of(ours, "\n")  # which the template writes after the end of turn
            assert [*prompt, *ids.tolist(), *newline] == whole, schema.name


# --------------------------------------------------------------------------------------------------
# What is left of a record

BESIDE = [  # a column beside prompt, chosen and rejected; None: silent, "": named, else refused
    ({"context": "It is noon."}, "column 'context'"),
    ({"input": "3"}, "column 'input'"),
    ({"tools": [{"name": "look_up"}]}, "column 'tools'"),
    ({"functions": "look_up()"}, "column 'functions'"),
    ({"retrieved_documents": ["Sky"]}, "column 'retrieved_documents'"),
    ({"images": [{"bytes": "iVBO", "path": None}]}, "column 'images'"),
    ({"audio_path": "a.wav"}, "column 'audio_path'"),
    ({"Question": "Really?"}, "column 'Question'"),
    ({"critique": LONG}, "column 'critique'"),
    ({"notes": {"first": [LONG]}}, "column 'notes'"),
    ({"anmerkung": "天空在一天中的大部分时间里都是蓝色的而不是绿色的"}, "column 'anmerkung'"),
    ({"turns": [user("Hm?")]}, "column 'turns'"),
    ({"previous_turns": ["Hi.", "Hello."]}, "column 'previous_turns'"),
    ({"metadata": {"source": "x", "system_prompt": "Be brief."}}, "column 'metadata'"),
    ({"info": {"extra": {"history": ["Hi."]}}}, "column 'info'"),
    ({"picture": {"path": "a.png"}}, "column 'picture'"),
    ({"chat_template_kwargs": {"enable_thinking": True, "x": ""}}, "column 'chat_template_kwargs'"),
    ({"dialogue": [human("Hm?")]}, "column 'dialogue'"),
    ({"critique": LONG, "context": "Noon."}, "--ignore-columns critique,context"),
    ({"history": [], "tools": None, "context": " ", "images": [None], "system": ""}, None),
    ({"tools": "[]", "metadata": {"system": "", "tools": []}, "turns": 1}, None),
    ({"source": "a/b", "uid": "x", "tokens": 12, "input_ids": [1, 2], "prompt_id": "x y"}, None),
    ({"chosen-modelName": "gpt", "score_chosen": 1.5, "meta": {"lang": "en", "ok_score": 1}}, None),
    ({"messages": [user(Q), assistant(A)], "all": [A, B, LONG]}, None),
    ({"question": Q, "answer": A}, None),
    ({"mood": "calm"}, ""),
    ({"anony": True, "x1": 3, "tiers": ["a", "b"]}, ""),
]


@pytest.mark.parametrize("beside, why", BESIDE)
def test_columns_that_are_left(beside, why):
    """A column that says something is refused by name, bookkeeping is silent, others are named."""
    columns, record = Columns(), {"prompt": Q} | PAIR | beside
    if why:
        with pytest.raises(DataError, match=rf"^a.jsonl:7: .*{why}"):
            parse_record(record, "a.jsonl:7", columns=columns)
        columns = Columns(ignored=tuple(beside))
    _, example = parse_record(record, "a.jsonl:7", columns=columns)
    assert example == Example(Q, (A, B), "a.jsonl:7")
    assert list(columns.unknown) == (list(beside) if why == "" else [])


IN_MESSAGES = [  # what the assistant's message holds beside its content
    ({"tool_calls": [{"name": "f"}]}, "'tool_calls' of chosen"),
    ({"function_call": {"name": "f"}}, "'function_call' of chosen"),
    ({"reasoning_content": "Hm."}, "'reasoning_content' of chosen"),
    ({"thinking": "Hm."}, "'thinking' of chosen"),
    ({"name": "Ann"}, "'name' of chosen"),
    ({"weight": 0}, "'weight' of chosen"),
    ({"remark": LONG}, "'remark' of chosen"),
    ({"value": "Red."}, "'value' of chosen"),
    ({"loss_weight": 0.0}, "'loss_weight' of chosen"),
    ({"files": ["a.png"]}, "'files' of chosen"),
    ({"role": "gpt5"}, "expected a prompt and then one assistant message"),
    ({"content": [{"type": "text", "text": "a"}, {"type": "image"}]}, "parts are text, not image"),
    ({"content": None, "tool_calls": [{"name": "f"}]}, "strings, not tool_calls alone"),
    ({"tool_calls": None, "name": "", "thinking": [], "id": "x", "created": 3, "model": "m"}, None),
    ({"role": "GPT"}, None),
    ({"weight": 1.0}, None),
    ({"content": [{"type": "text", "text": A, "image": None}]}, None),
    ({"content": [{"type": "text", "text": A, "image": "a.png"}]}, "'image' of chosen"),
    ({"content": [{"type": "text", "text": A[:4]}, {"type": "text", "text": A[4:]}]}, None),
]


@pytest.mark.parametrize("more, why", IN_MESSAGES)
def test_keys_inside_messages(more, why):
    """The same holds for the keys of messages: used, harmless, or refused by name."""
    record = {"chosen": [user(Q), assistant(A) | more], "rejected": REJECTED}
    if why:
        with pytest.raises(DataError, match=rf"^a.jsonl:7: .*{why}"):
            parse_record(record, "a.jsonl:7")
    else:
        assert parse_record(record, "")[1] == Example(ASKED, (A, B), "")


def test_keys_of_candidates():
    """What stands beside the text of a candidate is judged as well."""
    answers = [{"text": A, "score": 2, "author": "Ann"}, {"text": B, "score": 1, "thinking": "Hm."}]
    with pytest.raises(DataError, match=r"'thinking' of answers\[1\] would be ignored"):
        parse_record({"question": Q, "answers": answers}, "a.jsonl:7")


def test_nested_too_deeply():
    """A value that is nested as deeply as JSON may be is no traceback."""
    deep: list = []
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(DataError, match="^a.jsonl:7: values are nested too deeply"):
        parse_record({"prompt": Q, "x": deep} | PAIR, "a.jsonl:7")


def test_every_record_is_judged(tmp_path):
    """A column that only a later record has is refused; one that says little is named once."""
    records = [{"prompt": Q, "mood": "calm"} | PAIR] * 3 + [{"prompt": Q, "why": LONG} | PAIR]
    with pytest.raises(DataError, match="pairs.jsonl:4: column 'why' would be ignored"):
        read(tmp_path, records)
    examples, _, notes = read(tmp_path, records, "--ignore-columns=why")
    assert len(examples) == 4
    [note] = notes
    assert note.endswith("column mood")


def read(
    tmp_path: Path, records: list[dict], *flags: str
) -> tuple[list[Example], Counter, list[str]]:
    """Return what `train.py` makes of a file with these records: examples, counts and notes."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = read_settings([f"--model={tmp_path}", f"--data={file}", *flags])
    whole = read_all(file, settings)
    return whole.examples, whole.counts, whole.notes


def read_all(file: Path, settings: Settings) -> Block:
    """Return all that `train.py` makes of a file before it tokenizes."""
    return join_blocks(str(file), settings, read_blocks(str(file), settings))


def test_flags_about_columns(tmp_path, capsys):
    """--columns renames; a name that no record has, or that clashes, is an error."""
    record = {"Frage": Q, "gut": A, "übel": B, "prompt_id": 3, "warum": LONG}
    names = "--columns=prompt=Frage,chosen=gut,rejected=übel"
    [example], *_ = read(tmp_path, [record], names, "--ignore-columns=warum")
    assert example[:2] == (Q, (A, B))
    with pytest.raises(DataError, match="no record has gutt, warumm"):
        read(tmp_path, [{"prompt": Q} | PAIR], "--columns=system=gutt", "--ignore-columns=warumm")
    with pytest.raises(
        DataError, match="pairs.jsonl:1: .*column 'prompt': --ignore-columns warum,p"
    ):
        read(tmp_path, [record | {"prompt": "Hm?"}], names, "--ignore-columns=warum")
    for wrong in ("prompt", "prompt=", "prompt=a,prompt=b", "promt=Frage"):
        with pytest.raises(SystemExit):
            read(tmp_path, [record], f"--columns={wrong}")
        assert "error: --columns" in capsys.readouterr().err
    (tmp_path / "a.toml").write_text('columns = "prompt=Frage"\nignore-columns = "warum"\n')
    settings = read_settings([f"--config={tmp_path}/a.toml", "--model=m", "--data=d"])
    assert settings.named_columns == Columns({"prompt": "Frage"}, ("warum",))


def test_advice_never_asks_the_rejected_response():
    """Two texts that no format splits are no question and answer, whatever the objective."""
    texts = (f"User: {Q}\nBot: {text}" for text in (A, B))
    with pytest.raises(DataError, match="columns are chosen, rejected. Name them with") as error:
        parse_record(dict(zip(("chosen", "rejected"), texts)), "a.jsonl:7")
    assert "prompt=rejected" not in str(error.value)


def test_names_with_commas_and_quotes():
    """The advice quotes them, and the flags read it back."""
    record = {'a "prompt", so to say': Q, " notes, later": LONG} | PAIR
    with pytest.raises(DataError) as error:
        parse_record(record, "a.jsonl:7")
    words = shlex.split(str(error.value).partition("explicit: ")[2])
    columns = Columns.of(words[1], words[3])
    assert words[::2] == ["--columns", "--ignore-columns"]
    assert parse_record(record, "", columns=columns)[1] == Example(Q, (A, B), "")


def test_several_reasons_in_one_line():
    """A prompt that disagrees is refused together with other columns, so one command is enough."""
    record = LISTS | {"prompt": "Another.", "remark": LONG}
    with pytest.raises(DataError, match="--ignore-columns prompt,remark$"):
        parse_record(record, "a.jsonl:7")


def test_help_names_the_formats(capsys):
    with pytest.raises(SystemExit):
        read_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in ("HelpSteer", "alpaca", "Nectar", "chosen + rejected"))


# --------------------------------------------------------------------------------------------------
# Two statements about one thing

AGREE = [  # columns, and the prompt; None: they disagree
    ({"prompt": Q} | LISTS, ASKED),
    ({"prompt": ASKED} | LISTS, ASKED),
    ({"prompt": "Hi.", "chosen": [*TALK, assistant(A)], "rejected": [*TALK, assistant(B)]}, TALK),
    ({"prompt": "Another."} | LISTS, None),
    ({"prompt": [user("Another.")]} | LISTS, None),
    ({"prompt": TALK} | LISTS, None),
    ({"system": "Be brief."} | LISTS, WITH_SYSTEM),
    ({"system": "Be brief.", "prompt": WITH_SYSTEM} | PAIR, WITH_SYSTEM),
    ({"system": "Be kind.", "prompt": WITH_SYSTEM} | PAIR, None),
    ({"system": "Be brief.", "system_prompt": "Be kind.", "prompt": Q} | PAIR, None),
    ({"system": "Be brief.", "prompt": HH} | PAIR, [system("Be brief."), *TALK]),
    (
        {"system": "Be brief.", "chosen": f"{HH} {A}", "rejected": f"{HH} {B}"},
        [system("Be brief."), *TALK],
    ),
    ({"prompt": Q, "history": [["Hi.", "Hello."]]} | PAIR, TALK),
    ({"prompt": Q, "history": TALK[:2]} | PAIR, TALK),
    ({"prompt": Q, "history": "Hi."} | PAIR, None),
    ({"prompt": ASKED, "history": [["Hi.", "Hello."]]} | PAIR, None),
    ({"messages": ASKED, "question": "Another."} | PAIR, None),
    ({"question": Q, "input": "Another."} | PAIR, None),
    ({"instruction": ASKED, "input": "Another."} | PAIR, None),
]


@pytest.mark.parametrize("record, prompt", AGREE)
def test_statements_agree_or_are_refused(record, prompt):
    """Where two columns speak of the prompt, they agree, join or are refused; none wins."""
    if prompt is None:
        with pytest.raises(DataError, match="^a.jsonl:7: "):
            parse_record(record, "a.jsonl:7")
    else:
        assert as_said(parse_record(record, "")[1]) == (prompt, (A, B))


DISAGREE = [  # … about which response is better, and the name of the column or key
    ({"prompt": Q, "chosen_score": 1, "rejected_score": 9.5} | PAIR, "chosen_score"),
    ({"prompt": Q, "chosen-rating": 1, "rejected-rating": 2} | LISTS, "chosen-rating"),
    ({"prompt": Q, "responses": [A, B], "scores": [2, 1], "ratings": [1, 2]}, "ratings"),
    (
        {
            "prompt": Q,
            "answers": [
                {"text": A, "score": 5, "rank": 2}, {"text": B, "score": 1, "rank": 1},
            ],
        },
        "rank",
    ),
]  # fmt: skip


@pytest.mark.parametrize("record, name", DISAGREE)
def test_judgments_agree_or_are_refused(record, name):
    """Where two judgments order a pair in two ways, a run has to be told which one counts."""
    with pytest.raises(DataError, match=f"^a.jsonl:7: .*{name}.*--ignore-columns {name}$"):
        parse_record(record, "a.jsonl:7")
    assert parse_record(record, "", columns=Columns(ignored=(name,)))[1].responses == (A, B)


def test_full_texts_that_repeat_the_prompt():
    """They lose the prompt, and the format's name says so. A word that repeats by chance stays."""
    record = {"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is wet."}
    kind, example = parse_record(record, "")
    assert kind == "full texts that repeat the prompt" and example.responses == (" blue.", " wet.")
    record = {"prompt": "Hi", "chosen": "Hi, Ann.", "rejected": "Hi."}
    assert parse_record(record, "")[1].responses == ("Hi, Ann.", "Hi.")


ABOUT = [  # prompt and answers of people who write about transcripts
    ("What does Human: mean in this data?", "Human: opens a turn.", "Assistant: does."),
    ("Human: is a mark, isn't it?", "It is.", "No."),
    ("Human rights, please.\n\nHuman: what are they?", "Many.", "Few."),
    ("Write a dialogue.", "Human: Hi.\nAssistant: Hello.", "Human: Hi.\nAssistant: What?"),
    (
        "Write a dialogue.",
        "\n\nHuman: Hi.\n\nAssistant: Hello.",
        "\n\nHuman: Hi.\n\nAssistant: No.",
    ),
    ("Explain Assistant:", "\n\nAssistant: opens an answer.", "Assistant: hm."),
    ("End with a mark.\n\nHuman:", "Done.\n\nHuman:", "Done."),
    ("Is it 'Human:' or 'User:'?", "'Human:'\n\nHuman: is right.", "Human:"),
    ("Human", "Human", "Human: Human"),
    ("Assistant: who am I?", "The user.", "Assistant: you."),
]


@pytest.mark.parametrize("prompt, chosen, rejected", ABOUT)
def test_people_may_write_about_transcripts(prompt, chosen, rejected):
    """A mark in the middle of a text is text: nothing is split, cut or refused."""
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert parse_record(record, "")[1] == Example(prompt, (chosen, rejected), "")
    record = {
        "chosen": [user(prompt), assistant(chosen)],
        "rejected": [user(prompt), assistant(rejected)],
    }
    assert parse_record(record, "")[1] == Example([user(prompt)], (chosen, rejected), "")


# --------------------------------------------------------------------------------------------------
# Records without a preference

NO_PREFERENCE = [
    {"prompt": Q, "winner": "tie"} | PAIR,
    {"prompt": Q, "label": "Tie"} | PAIR,
    {"prompt": Q, "preference": "same"} | PAIR,
    {"conversation_a": CHOSEN, "conversation_b": REJECTED, "winner": "tie (bothbad)"},
    {"prompt": Q, "response_1": A, "response_2": B, "preference_strength": 0},
    {"prompt": Q, "responses": [A, B], "scores": [1, 1]},
    {"prompt": Q, "is_tie": True} | PAIR,
    {"prompt": Q, "verdict": "draw"} | PAIR,
    {"prompt": Q, "response_a": A, "response_b": B, "winner": "both bad"},
]


@pytest.mark.parametrize("record", NO_PREFERENCE)
def test_no_preference(tmp_path, record):
    """A tie is dropped and counted with the reason; equal scores beside a choice are none."""
    examples, counts, _ = read(tmp_path, [record, {"prompt": Q, "score_chosen": 1} | PAIR])
    assert len(examples) == 1
    [reason] = [what for what in counts if what.startswith("dropped: ")]
    assert "no preference" in reason or "score the same" in reason


def test_negative_labels(tmp_path):
    """SFT learns no response that is labelled as bad, and counts it."""
    record = {"prompt": Q, "completion": A}
    labels = [{"label": True}, {"label": False}, {"kto_tag": False}, {"label": None}, {"label": 0}]
    labels += [
        {"label": 10**400},
        {"label": 1.0},
        {"label": 0.0},
        {"label": -1.0},
        {"label": "False "},
    ]
    examples, counts, _ = read(tmp_path, [record | label for label in labels], "--objective=sft")
    assert len(examples) == 4
    assert sum(n for what, n in counts.items() if "should not be learnt" in what) == 6


def test_prompts_are_sampled_as_they_are_trained_on():
    """sample.py puts a system prompt and earlier turns before the prompt, too."""
    record = {"prompt": Q, "system": "Be brief.", "history": [["Hi.", "Hello."]], "chosen": LONG}
    assert prompt_of(record, "") == [system("Be brief."), *TALK]
    with pytest.raises(DataError, match="^a.jsonl:7: column 'tools' .* remove it"):
        prompt_of({"prompt": Q, "tools": [{"name": "f"}]}, "a.jsonl:7")


def test_candidates_that_were_cut():
    """`finished` goes with its response; a list of another length or type is an error."""
    record = {"prompt": Q, "responses": [B, "Red.", A], "scores": [0, 1, 2]}
    for finished, expected in [
        ([False, False, True], (True, False)), ([True, False, True], ()), (None, ()),
    ]:  # fmt: skip
        assert parse_record(record | {"finished": finished}, "")[1].finished == expected
    _, example = parse_record(record | {"finished": [True, True, False]}, "", paired=False)
    assert example.responses == (A,) and example.finished == (False,)
    for wrong in ([True], "yes", [1, 0, 1]):
        with pytest.raises(DataError, match="a.jsonl:7: finished: expected true or false"):
            parse_record(record | {"finished": wrong}, "a.jsonl:7")
