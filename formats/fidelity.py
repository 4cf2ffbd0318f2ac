"""Check that the text which a chat template writes says what the record says, no more and no less.

    check_unrendered    a record's text holds no conversation that a template has rendered already
    check_known         the template or its model knows the roles of the messages
    check_kept          the template's text holds every message and every response of the record

Text *about* a template's marks is sound: it may quote `<|im_start|>` anywhere. transformers and we
encode such a mark as the special token that it names. Only a text that has the whole form of a
rendered conversation is refused: it opens a turn, and it ends with the end of a turn, or with the
opening of one. Read formats/tokenizer.py next, which calls them for every record.
"""

import re

from data import Example, Messages
from formats.errors import DataError

ROLES = "system|developer|user|human|assistant|model|chatbot|tool|ipython|observation"
BOS = re.compile(
    r"\s*(?:(?:<s>|<bos>|<BOS_TOKEN>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>)\s*)*"
)
# The opening of a turn in ChatML, Llama 3 and Gemma, where a mark or a line break has to follow the
# role; in Cohere's; in Phi-3, Zephyr and GLM; in DeepSeek; OpenAssistant; in Llama 2 and Mistral.
OPENING = re.compile(
    rf"(?:<\|\w+\|?>|<\w+_turn>)\s*(?P<role>{ROLES})(?:<\|\w+\|?>|[^\S\n]*\n)"
    rf"|<\|START_OF_TURN_TOKEN\|><\|(?P<cohere>{ROLES})_TOKEN\|>"
    rf"|<\|(?P<mark>{ROLES})\|>[^\S\n]*\n"
    rf"|<｜(?P<wide>{ROLES})｜>(?! )"
    r"|<\|prompter\|>"
    r"|\[(?:INST|SYSTEM_PROMPT)\]",
    re.IGNORECASE,
)
NEMOTRON = re.compile(r"<extra_id_1>Assistant\n.*\n<extra_id_1>User\n", re.DOTALL)  # HelpSteer 2
CLOSING = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|eot|eom|end|return|end_of_text|endoftext|END_OF_TURN_TOKEN)\|>"
    r"|<end_of_turn>|<turn\|>|<end_of_utterance>|<eos>|</s>|<｜end▁of▁sentence｜>|\[/INST\]"
)
FOREIGN_END = re.compile(rf"(?<![\s`'\"])(?:{CLOSING.pattern})$")
PLAIN = re.compile(  # Alpaca and its like; Vicuna; and a dialogue from its first word on
    r".*### (?:Instruction|Human|User):.*### (?:Response|Assistant):"
    r"|.*USER:.*ASSISTANT:"
    r"|(?:System:.*\n\s*)?(?:Human|User):.*\n\s*(?:Assistant|AI|Bot):",
    re.DOTALL,
)
USUAL = ("system", "user", "assistant", "tool")  # roles
REASONING_END = "</think>"


def field_name(example: Example, index: int) -> str:
    """Return what an error calls one of the responses."""
    return ("chosen", "rejected")[index] if len(example.responses) == 2 else "response"


def header_of(turn: str) -> re.Pattern:
    """Return a pattern for the header that opens a turn, given a text that begins with one.

    >>> bool(header_of("<|im_start|>user Hello").match("<|im_start|>system"))
    True
    """
    header = re.escape(turn.split(maxsplit=1)[0]) if turn.strip() else ""
    return re.compile(re.sub("system|user", f"(?:{ROLES})", header, count=1, flags=re.IGNORECASE))


def is_rendered(text: str, own_header: re.Pattern, own_cue: str) -> bool:
    """Return True if a text has the form of a conversation that a template has rendered.

    own_header, own_cue: what this checkpoint's own template begins a turn with, and what it ends a
    prompt with, the generation prompt.
    """
    bare = text[bos_length(text) :].rstrip()
    if own_header.pattern and own_cue and bare.endswith(own_cue) and own_header.match(bare):
        return True
    if NEMOTRON.search(bare) or bare.endswith(":") and PLAIN.fullmatch(bare):
        return True
    start = OPENING.match(bare + "\n")
    if not start:
        return False
    ends = [mark.end() for mark in CLOSING.finditer(bare)]
    opens = list(OPENING.finditer(bare + "\n"))
    rest = bare[max(ends, default=0) :].strip()
    if ends:  # after the last turn: nothing, or another turn
        return not rest or OPENING.match(rest + "\n") is not None
    if len(opens) > 1 and opens[-1].end() >= len(bare):
        return True
    return start.end() < len(bare) and "\n" in bare[start.end() - 1 : start.end() + 1]


def bos_length(text: str) -> int:
    """Return the number of characters that white space and BOS tokens take at a text's start."""
    match = BOS.match(text)
    return match.end() if match else 0


def check_unrendered(
    example: Example, messages: Messages, own_header: re.Pattern, own_cue: str
) -> None:
    """Raise DataError if a part of a record went through a chat template before.

    messages: those of the prompt. own_header, own_cue: see `is_rendered`.
    """
    for message in messages:
        text = message.get("content")
        if isinstance(text, str) and is_rendered(text, own_header, own_cue):
            _refuse_rendered(example, f"prompt: a message of role {message['role']!r}", text)
    last = messages[-1]["content"] if messages else ""
    asked = last.strip() if isinstance(last, str) else ""
    for i, response in enumerate(example.responses):
        start = OPENING.match(response, bos_length(response))
        role = next(filter(None, start.groups()), "") if start else ""
        repeats = start and asked and asked in response  # the whole conversation
        if repeats or role.lower() in ("assistant", "model", "chatbot"):
            _refuse_rendered(example, field_name(example, i), response)
    # An end of turn is left over if all responses have it, or if nothing else speaks of it. An
    # answer may be about it, or about the HTML tag <s>.
    ends = [FOREIGN_END.search(response.rstrip()[-40:]) for response in example.responses]
    texts = [end[0] if end else "" for end in ends]
    for i, text in enumerate(texts):
        spoken = sum(t.count(text) + t.count("<s>") for t in (asked, *example.responses))
        same = len(texts) == texts.count(text) > 1
        if text and (same or spoken == 1):
            name = (
                "chosen and rejected: their end" if same else f"{field_name(example, i)}: its end"
            )
            _refuse_rendered(example, name, text)


def _refuse_rendered(example: Example, name: str, text: str) -> None:
    problem = f"went through a chat template already ({text.strip()[:40]!r})"
    advice = "pass its text without the template's marks, or --chat-template none"
    raise DataError(f"{example.where}: {name} {problem}: {advice}")


def check_known(example: Example, messages: Messages, source: str, template: str) -> None:
    """Raise DataError for a role that is neither usual nor named by the template.

    Many templates write any role into a header, of which the model then knows nothing. source: the
    template's own text. template: where it was read from.
    """
    for i, message in enumerate(messages):
        role = message["role"]
        if role not in USUAL and f"'{role}'" not in source and f'"{role}"' not in source:
            problem = f"the chat template does not name the role {role!r} ({template})"
            advice = f"rename it to one of {', '.join(USUAL)}, or pass --chat-template FILE"
            raise DataError(f"{example.where}: prompt[{i}]: {problem}: {advice}")


def check_kept(
    example: Example, messages: Messages, before: str, answers: list[str], template: str
) -> None:
    """Raise DataError if the template has left out a message or a part of a response.

    White space at the ends of a text may go. So may the reasoning in earlier turns of the
    assistant, up to `</think>`, which many templates drop by design.

    before, answers: the text of the prompt, and of each response after it.
    template: where the template was read from.
    """
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or content.strip() in before:
            continue
        if message["role"] == "assistant" and REASONING_END in content:
            if content.rpartition(REASONING_END)[2].strip() in before:
                continue
        _refuse_lost(example, f"prompt[{i}]", message["role"], template)
    for i, (response, text) in enumerate(zip(example.responses, answers)):
        if response.strip() not in text:
            cut = REASONING_END in response
            why = f"the reasoning before {REASONING_END}" if cut else "a part of it"
            problem = f"the chat template leaves out {why} ({template})"
            advice = "remove it from the data, or pass --chat-template FILE with one that keeps it"
            raise DataError(f"{example.where}: {field_name(example, i)}: {problem}: {advice}")


def _refuse_lost(example: Example, name: str, role: str, template: str) -> None:
    problem = f"the chat template leaves out this message of role {role!r} ({template})"
    advice = "use the roles that it knows, or pass --chat-template FILE"
    raise DataError(f"{example.where}: {name}: {problem}: {advice}")


def check_roles(example: Example, messages: Messages, before: str, template: str) -> None:
    """Raise DataError if `before` lacks a message; every content is a mark that occurs once."""
    for i, message in enumerate(messages):
        if message["content"] not in before:
            _refuse_lost(example, f"prompt[{i}]", message["role"], template)
