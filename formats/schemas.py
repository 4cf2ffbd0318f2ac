"""Recognize the format of a record: a JSON object of any known format → `Example`.

    parse_record    one record  →  (format, Example)    prompt and responses, as text
    FORMATS         the table of formats: what tells each one, and the function that parses it
    Record          a record whose columns are taken one by one; `account` judges the rest
    Columns         --columns and --ignore-columns

A parser takes the columns that it understands. Whatever is left is judged in one place, by name and
content, so that no part of a conversation is ignored in silence. A new format starts as a row of
FORMATS. Read formats/tokenizer.py next, which turns the text of an `Example` into tokens.
"""

import csv
import functools
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data import Example, Messages
from formats.errors import DataError

HUMAN_MARK = "\n\nHuman:"  # opens the user's turn in HH-RLHF's transcripts
ASSISTANT_MARK = "\n\nAssistant:"  # and the assistant's
EXACT_TURN = re.compile(r"\n\n(Human|Assistant):")  # opens any turn in HH-RLHF's transcripts
TURN = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant)[ \t]*:")  # the same in any white space
FEW = 8  # words of a label; a longer text says something

# fmt: off
ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "bot", "model"), "assistant")
ASKS = {  # column that holds a prompt → format, with chosen and rejected beside it
    "prompt": "explicit", "instruction": "alpaca", "question": "orca", "query": "query",
    "input": "orca", "conversations": "ShareGPT", "conversation": "ShareGPT",
    "messages": "messages and answers", "context": "messages and answers",
}
CARRIED = ("context", "tools", "functions", "documents", "image", "images", "audio", "history")
SYSTEM = ("system", "system_prompt", "system_message")
ANSWERS = ("completion", "response", "output", "answer", "chosen")  # a single response
LISTS = ("responses", "completions", "answers", "generations", "candidates")  # several
SCORES = ("scores", "ratings", "rating", "rewards", "ranks", "rank")  # their scores
RANKS = ("ranks", "rank")  # … of which 1 is the best
TEXT = ("response", "answer", "text", "content", "completion", "output")  # in an object
SCORE = ("overall_score", "score", "pm_score", "rating", "reward", "rank")
NOTES = ("annotations", "critique", "custom_system_prompt", "principle")  # UltraFeedback's
WINNER = {"model_a": 0, "model_b": 1, "a": 0, "b": 1, "A": 0, "B": 1}
LIKERT = dict.fromkeys((-3, -2, -1), 0) | dict.fromkeys((1, 2, 3), 1)
# Two responses, their judgment, which of them it prefers, and notes of the judges.
JUDGED: list[tuple[str, str, str, dict, tuple]] = [
    ("response_1", "response_2", "preference_strength", LIKERT, (
        "preference_statement", "preference_elaboration", "three_most_similar_preferences",
        "all_preferences_unprocessed")),
    ("response1", "response2", "overall_preference", LIKERT, ("individual_preference",)),
    ("response_0", "response_1", "better_response_id", {0: 0, 1: 1}, ()),
    ("output_1", "output_2", "preference", {1: 0, 2: 1}, ()),
    ("human_ref_A", "human_ref_B", "labels", {1: 0, 0: 1}, ()),
    ("conversation_a", "conversation_b", "winner", WINNER, ()),
    ("response_a", "response_b", "winner", WINNER, ()),
]
VERDICTS = {"winner", "preference", "label", "verdict", "choice", "tie", "is_tie"}
TIES = {"tie", "ties", "tied", "draw", "both", "bothbad", "same", "equal", "neither"}
NEGATIVE = {"false", "no", "rejected", "undesirable", "negative", "bad"}  # or no number above 0
LABELS = ("label", "kto_tag", "desirable", "is_chosen")  # of a single response

# Words in the name of a column. These belong to a conversation …
MEDIA = set("image images img video videos audio audios picture pictures attachments".split())
SAID = MEDIA | set(
    "system history input inputs context contexts tool tools function functions document documents "
    "passage passages instruction instructions prompt "
    "question query message messages conversation conversations dialogue persona knowledge "
    "kwargs reason reasoning thinking thought thoughts refusal".split())
LEARNT = ("weight", "train", "loss", "loss_weight")  # of messages; 1 is what happens to answers
SAID_IN_MESSAGES = {*LEARNT} | set(
    "name channel recipient value from content role files mask end_turn prefix".split())
# … and these do not, unless the column holds a text.
BOOKKEEPING = set(
    "agreement annotator annotators author batch categories category coherence complexity "
    "confidence config configs correctness count country created data dataset date dates "
    "difficulty domain "
    "evaluator fields file flag from generation generator group harm harmful has hash hashed "
    "helpfulness honesty id ids idx index info instance is judge key kl label labeler labelling "
    "labels lang language languages len length level license likelihood locale logprob logprobs "
    "logps margin meta metadata metrics model models moderation n name num number order origin "
    "original parent path policy preference probability quality rank ranks rating ratings ratio "
    "redacted reward rewards round row safe safety sample score scores seconds seed severity "
    "sha sha256 size skip source sources split stats status step strength subset tag tags task "
    "temperature tie time timestamp title token tokens topic topics toxic toxicity tree "
    "truthfulness tstamp turn turns type types uid updated upvote upvotes url utc uuid verbosity "
    "version votes weight winner worker year".split())
ASKING = {*ASKS, "problem", "request", "post", "ask", "title", "user", "human", "text"}
GOOD = set("chosen good better best winning preferred positive pos accepted correct win j".split())
BAD = set("rejected bad worse worst losing dispreferred negative neg wrong lose loser k".split())
# fmt: on


class Dropped(Exception):
    """Says why a sound record cannot teach anything. It is counted and left out, never an error."""


class _Unknown(Exception):
    """Says what a record lacks; `_parse` turns it into a DataError that advises what to do."""


@dataclass
class Columns:
    """Holds what the user says about columns, and collects what is to be said about them.

    sources: target → source, of --columns.
    ignored: of --ignore-columns; also keys of messages.
    seen: sources and ignored names that some record has.
    unknown: columns that were ignored although their names say nothing, in order.
    """

    sources: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    seen: set[str] = field(default_factory=set)
    unknown: dict[str, None] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: str | None, ignored: str | None) -> "Columns":
        """Read the arguments of the two flags. Raises DataError for what is not TARGET=SOURCE."""
        sources = {}
        for pair in _listed(columns):
            target, _, source = pair.partition("=")
            target = target.strip()
            if not target or not source or target in sources:
                raise DataError(f"--columns {columns}: expected TARGET=SOURCE,TARGET=SOURCE,…")
            if target not in TARGETS:
                known = ", ".join(sorted(TARGETS))
                raise DataError(f"--columns: no format has a column {target!r}, but {known}")
            sources[target] = source
        return cls(sources, tuple(_listed(ignored)))

    def apply(self, record: dict, where: str) -> dict:
        """Return the columns of a record under our names, without null or ignored ones."""
        left = {key: value for key, value in record.items() if value is not None}
        if not self.sources and not self.ignored:
            return left
        self.seen |= record.keys() & {*self.ignored, *self.sources.values()}
        named = {target: left[source] for target, source in self.sources.items() if source in left}
        for name in (*self.sources.values(), *self.ignored):
            left.pop(name, None)
        for name in named.keys() & left.keys():
            [drop] = Columns(ignored=(*self.ignored, name)).flags()
            raise DataError(f"{where}: --columns {name}=…, but there is a column {name!r}: {drop}")
        return left | named

    def flags(self) -> list[str]:
        """Return the flags that say the same."""
        pairs = [f"{target}={source}" for target, source in self.sources.items()]
        flags = {"--columns": pairs, "--ignore-columns": self.ignored}
        return [
            f"{flag} {shlex.quote(','.join(map(_quoted, v)))}" for flag, v in flags.items() if v
        ]

    def missing(self) -> str:
        """Return the names of the two flags that no record has had so far."""
        return ", ".join(sorted({*self.ignored, *self.sources.values()} - self.seen))


def _listed(names: str | None) -> list[str]:
    """Split names at commas; a name with a comma in it stands in double quotes, as in CSV.

    >>> _listed('id, "a, b"')
    ['id', 'a, b']
    """
    return [
        name for row in csv.reader([names or ""], skipinitialspace=True) for name in row if name
    ]


def _quoted(name: str) -> str:
    """Return a name as `_listed` reads it.

    >>> _quoted("a, b")
    '"a, b"'
    """
    plain = name == name.strip() and "," not in name and '"' not in name
    return name if plain else '"' + name.replace('"', '""') + '"'


class Record:
    """Hands out the columns of a record; `left` holds those that nobody has taken.

    refused: columns, and keys of messages, that say something and that nobody understands.
    """

    def __init__(self, record: dict, where: str, columns: Columns):
        self.left = columns.apply(record, where)
        self.where = where
        self.columns = columns
        self.refused: dict[str, str] = {}  # name → how to call it

    def error(self, problem: str) -> DataError:
        """Return the error that names the record."""
        return DataError(f"{self.where}: {problem}")

    def take(self, *names: str) -> Any:
        """Remove and return the first of these columns that is not empty; else None."""
        for name in names:
            if not _empty(self.left.get(name)):
                return self.left.pop(name)
        return None

    # -- messages

    def messages(self, value: object, field: str) -> Messages:
        """Return a non-empty list of {"role": str, "content": str}, without any other keys."""
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not value:
            raise self.error(f"{field}: expected a list of messages")
        found = []
        for i, message in enumerate(value):
            if type(message) is not dict:
                raise self.error(f"{field}[{i}]: expected a message with role and content")
            if len(message) == 2 and message.get("role") in ("user", "assistant", "system"):
                content = message.get("content")
                if type(content) is str:  # most messages; the rest of this loop is slower
                    found.append({"role": message["role"], "content": content})
                    continue
            found.append(self._message(message, f"{field}[{i}]"))
        return found

    def _message(self, message: dict, field: str) -> dict:
        """Return a message of another form: `from` and `value`, content in parts, more keys."""
        keys = ("from", "value") if {"from", "value"} <= message.keys() else ("role", "content")
        role, content = (message.get(key) for key in keys)
        answers = ROLES.get(str(role).lower()) == "assistant"
        harmless = {k for k in LEARNT if message.get(k) == 1 or not answers}
        self.judge({k: v for k, v in message.items() if k not in harmless.union(keys)}, field)
        if isinstance(content, list):
            kinds = {part.get("type") for part in content if isinstance(part, dict)} or {None}
            texts: list[Any] = [part.get("text") for part in content if isinstance(part, dict)]
            if kinds == {"text"} and len(texts) == len(content) and all(map(_is_text, texts)):
                for part in content:
                    self.judge({k: v for k, v in part.items() if k not in ("type", "text")}, field)
                content = "".join(texts)
            else:
                held = ", ".join(sorted({str(kind) for kind in kinds}))
                raise self.error(f"{field}: expected a message whose parts are text, not {held}")
        if not isinstance(role, str) or not isinstance(content, str):
            extra = f", not {', '.join(self.refused)} alone" if self.refused else ""
            raise self.error(f"{field}: expected a message with role and content as strings{extra}")
        return {"role": ROLES.get(role.lower(), role), "content": content}

    def response(self, value: object, field: str) -> str:
        """Return the text of a response, which is a string or one assistant message."""
        if isinstance(value, str):
            return value
        messages = self.messages(value, field)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise self.error(f"{field}: expected one assistant message")
        return messages[0]["content"]

    def answered(self, value: object, field: str) -> Messages:
        """Return messages that end with one assistant message; anything else is an error."""
        messages = self.messages(value, field)
        if [message["role"] == "assistant" for message in messages[-2:]] != [False, True]:
            expected = "expected a prompt and then one assistant message at the end"
            raise self.error(f"{field}: {expected}")
        return messages

    # -- prompts

    def prompt(self, value: object, field: str) -> str | Messages:
        """Return a prompt: a string, or messages that the assistant has yet to answer.

        A transcript in other white space than HH-RLHF's becomes messages.
        """
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.error(f"{field}: not valid Unicode text") from None
            exact = value.startswith(HUMAN_MARK)
            if "Human" not in value[:40] or (exact and value.endswith(ASSISTANT_MARK)):
                return value
            messages = turns_of(value) or (turns_of(value + ASSISTANT_MARK) if exact else None)
            if not messages:
                return value
        else:
            messages = self.messages(value, field)
        if messages[-1]["role"] == "assistant":
            problem = "ends with the assistant's message, so there is nothing to answer"
            raise self.error(f"{field}: {problem}")
        return messages

    def ask(self) -> tuple[str, str | Messages]:
        """Take the prompt out of whatever column has it: (format, prompt)."""
        for name, kind in ASKS.items():
            value = self.left.get(name)
            if _empty(value) or (name == "context" and isinstance(value, str)):
                continue
            if name != "prompt" and isinstance(value, list) and _role_of(value[-1]) == "assistant":
                continue
            del self.left[name]
            prompt = self.prompt(value, name)
            texts = value, self.left.get("input")
            if name == "instruction" and all(map(_is_text, texts)):
                prompt = "\n".join(filter(None, [value, self.take("input")]))
            return kind, self.preceded(prompt)
        if "prompt" in self.left:  # an empty one
            return "explicit", self.prompt(self.left.pop("prompt"), "prompt")
        raise _Unknown("no 'prompt' field")

    def preceded(self, prompt: str | Messages) -> str | Messages:
        """Return the prompt after what came before it: a system prompt, and earlier turns."""
        system, history = self.take(*SYSTEM), None
        if isinstance(prompt, str):
            history = self.take("history")
        if system is None and history is None:
            return prompt
        if not isinstance(prompt, list):
            if prompt.endswith(ASSISTANT_MARK):
                prompt = turns_of(prompt) or prompt
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
        if history is not None:
            prompt = self.earlier(history) + prompt
        if system is not None:
            if not isinstance(system, str):
                raise self.error("system: expected a string")
            first = {"role": "system", "content": system}
            if prompt[0]["role"] != "system":
                prompt = [first, *prompt]
            elif prompt[0] != first:
                raise self.error("two system prompts that differ: drop one of them")
        return prompt

    def earlier(self, history: object) -> Messages:
        """Return earlier turns: messages, or LLaMA-Factory's pairs of a question and an answer."""
        pairs: list[Any] = history if isinstance(history, list) else [None]
        if all(isinstance(pair, dict) for pair in pairs):
            return self.messages(history, "history")
        if not all(isinstance(p, list) and len(p) == 2 and all(map(_is_text, p)) for p in pairs):
            raise self.error("history: expected messages, or pairs of a question and an answer")
        roles = ("user", "assistant")
        return [{"role": r, "content": text} for pair in pairs for r, text in zip(roles, pair)]

    # -- what is left

    def judge(self, keys: dict, field: str) -> None:
        """Judge the keys of an object in the record that nobody understands."""
        for key, value in keys.items():
            if key in self.columns.ignored:
                self.columns.seen.add(key)
            elif (verdict := _verdict(key, value, in_message=True)) == "said":
                self.refused[key] = f"{key!r} of {field}"
            elif verdict:
                self.columns.unknown[key] = None

    def account(self, example: Example) -> None:
        """Judge every column that nobody took. Raises DataError if one of them says something.

        A column that repeats what the example says is silent, and so is bookkeeping. Any other is
        noted in `Columns.unknown`.
        """
        for name, value in self.left.items():
            other = self.left.get(name.replace("chosen", "rejected"))
            if (
                _numbers([value, other])
                and value < other
                and {"score", "rating", "reward"} & {*_words_in(name)}
            ):
                self.refused[name] = (
                    f"column {name!r}, which is below that of the rejected response,"
                )
            verdict = _verdict(name, value)
            if not verdict or _repeats(value, example):
                continue
            if verdict == "said":
                self.refused[name] = f"column {name!r}"
            else:
                self.columns.unknown[name] = None
        if self.refused:
            named = ", ".join(self.refused.values())
            [drop] = Columns(ignored=(*self.columns.ignored, *self.refused)).flags()
            advice = f"Say what it is with --columns TARGET=SOURCE, or drop it with {drop}"
            raise self.error(f"{named} would be ignored. {advice}")


# --------------------------------------------------------------------------------------------------
# Judging by name and content


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _numbers(values: list) -> bool:
    """Return True if all values are numbers, which NaN is not."""
    return all(isinstance(value, (int, float)) and value == value for value in values)


def _empty(value: Any) -> bool:
    """Return True for null, blank text, and lists and objects of nothing else."""
    if isinstance(value, str):
        return not value or value.isspace()
    if isinstance(value, (list, dict)):
        return all(map(_empty, value.values() if isinstance(value, dict) else value))
    return value is None


def _role_of(message: object) -> str | None:
    """Return our name of a message's role; None for an unknown one and for what is no message."""
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return ROLES.get(role.lower()) if isinstance(role, str) else None


def _words_in(name: str) -> list[str]:
    """Return the words of a column's name: `raw_Output2` and `rawOutput2` have the same."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)]


def _words(text: str) -> int:
    """Count up to 100 words; two characters of a script without spaces count as one."""
    return len(text.split(None, 99)) + (
        0 if text.isascii() else sum(c >= "\u2e80" for c in text) // 2
    )


def _says_something(value: Any) -> bool:
    """Return True for a text of more than a few words or for messages, however deep."""
    if isinstance(value, str):
        return _words(value) > FEW
    if isinstance(value, dict):
        is_message = {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
        carries = any(not _empty(value.get(name)) for name in (*SYSTEM, *CARRIED))
        return is_message or carries or any(map(_says_something, value.values()))
    if isinstance(value, list):
        return any(_says_something(item) for item in value if not isinstance(item, (int, float)))
    return False


@functools.lru_cache(4096)
def _judge_name(name: str, in_message: bool) -> tuple[bool, bool, bool]:
    """Judge a name by its words: (bookkeeping, part of a conversation, the very name of one)."""
    words = _words_in(name)
    names = SAID | SAID_IN_MESSAGES if in_message else SAID
    exact = name.lower() in names
    head = words[-1] if words else ""  # prompt_id is an id
    said = exact or (not names.isdisjoint(words) and head not in BOOKKEEPING)
    said = said or not MEDIA.isdisjoint(words)
    return not BOOKKEEPING.isdisjoint(words), said, exact


def _verdict(name: str, value: Any, in_message: bool = False) -> str:
    """Judge a column or a key: "said" in the conversation, "unknown", or "" for bookkeeping."""
    bookkeeping, said, exact = _judge_name(name[:200], in_message)
    if isinstance(value, (int, float)):
        said = exact
    elif _empty(value) or value in ("[]", "{}"):
        return ""
    else:  # a number of turns is bookkeeping, a list of them is not
        is_list = isinstance(value, list)
        said = said or _says_something(value) or (is_list and name.lower().endswith("turns"))
    return "said" if said else "" if bookkeeping else "unknown"


def _texts_in(value: Any) -> Iterator[str]:
    """Yield every text in a value, without the roles of messages."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, (list, dict)):
        items = enumerate(value) if isinstance(value, list) else value.items()
        for key, item in items:
            yield from _texts_in(item if key not in ("role", "from", "type") else None)


def _repeats(value: Any, example: Example) -> bool:
    """Return True if the example says all that a value says, or if the pair was chosen from it."""
    texts, responses = {*_texts_in(value)} - {""}, {*_texts_in(list(example.responses))}
    if len(responses) > 1 and responses <= texts:
        return True
    said = {*_texts_in(example.prompt), *responses}
    return bool(texts) and all(
        text in said or (_words(text) > FEW and any(text in s for s in said)) for text in texts
    )


def turns_of(transcript: str, mark: re.Pattern = TURN) -> Messages | None:
    """Return the messages of a transcript that the assistant has yet to answer; None if it is none.

    mark: what opens a turn.

    >>> turns_of("Human: Hi\\nAssistant:")
    [{'role': 'user', 'content': 'Hi'}]
    """
    before, *rest = mark.split(transcript)
    if before.strip() or rest[:1] != ["Human"] or rest[-2] != "Assistant" or rest[-1].strip():
        return None
    turns = zip(rest[:-2:2], rest[1:-2:2])
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": text.strip()} for speaker, text in turns]


# --------------------------------------------------------------------------------------------------
# The parsers. Each returns (format, Example), or None if the record is of another format.

Parsed = tuple[str, Example] | None


def _chosen_rejected(r: Record) -> Parsed:
    """Parse `chosen` and `rejected`: strings, messages, lists of messages, transcripts."""
    if "chosen" not in r.left or "rejected" not in r.left:
        return None
    chosen, rejected = (r.left.pop(name) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        types = f"chosen is a {type(chosen).__name__} and rejected a {type(rejected).__name__}"
        raise r.error(types)
    if isinstance(chosen, list) and len(chosen) > 1:
        return _lists(r, chosen, rejected)
    if isinstance(chosen, str):
        shared = os.path.commonprefix([chosen, rejected])
        asked = {name: r.left[name] for name in ASKS if name in r.left}
        repeated = all(isinstance(v, str) and v.strip() in shared for v in asked.values())
        if repeated and (not asked or ("Human" in shared[:40] and TURN.search(shared))):
            r.left = {name: value for name, value in r.left.items() if name not in asked}
            return "transcripts", _from_transcripts(r, chosen, rejected)
    transcript = r.left.get("prompt")
    kind, prompt = r.ask()
    texts = r.response(chosen, "chosen"), r.response(rejected, "rejected")
    is_transcript = isinstance(transcript, str) and TURN.match(transcript.lstrip())
    if is_transcript and isinstance(prompt, list):  # in other white space than HH-RLHF's
        first, second = (re.sub(r"^\s*Assistant[ \t]*:", "", text).strip() for text in texts)
        return "transcripts", Example(prompt, (first, second), r.where)
    if isinstance(prompt, str) and _words(prompt) > 2 and all(t.startswith(prompt) for t in texts):
        kind = "full texts that repeat the prompt"
        texts = texts[0][len(prompt) :], texts[1][len(prompt) :]
    return kind, Example(prompt, texts, r.where)


def _lists(r: Record, chosen: list, rejected: list) -> tuple[str, Example]:
    """Parse two lists of messages: each with the prompt, or both continuing it (TRL)."""
    kind, before = "messages", Messages()
    if r.left.get("messages") == chosen:  # UltraFeedback; `account` would find that, more slowly
        del r.left["messages"]
    if _role_of(chosen[0]) == "assistant":
        kind, prompt = r.ask()
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    good, bad = r.answered(before + chosen, "chosen"), r.answered(before + rejected, "rejected")
    shared, last = 0, min(len(good), len(bad)) - 1
    while shared < last and good[shared] == bad[shared]:
        shared += 1
    if not good[shared]["role"] == bad[shared]["role"] == "assistant":
        problem = "chosen and rejected answer different prompts"
        raise r.error(f"{problem} (they may differ in the last message only)")
    if max(len(good), len(bad)) > shared + 1:
        raise Dropped("a conversation that goes on after the two part")
    prompt, responses = good[:shared], (good[-1]["content"], bad[-1]["content"])
    if kind == "messages":
        _agree(r, r.take("prompt"), prompt)
        prompt = r.preceded(prompt)
    return kind, Example(prompt, responses, r.where)


def _agree(r: Record, value: Any, prompt: Messages) -> None:
    """Refuse the column `prompt` if it is not the prompt that the messages hold."""
    if isinstance(value, str):
        users = [message["content"] for message in prompt if message["role"] == "user"]
        same = not users or any(value.strip() == user.strip() for user in (users[0], users[-1]))
    elif value is not None:
        given = r.prompt(value, "prompt")
        same = given in (prompt, prompt[1:]) or given == prompt[: len(given)]
    if value is not None and not same:
        problem = "not the first user message of the conversation, nor the last one"
        r.refused["prompt"] = f"column 'prompt' ({problem})"


def _from_transcripts(r: Record, chosen: str, rejected: str) -> Example:
    """Split two transcripts where they part: after the last mark that they have in common."""
    shared = os.path.commonprefix([chosen, rejected])
    exact = shared.startswith(HUMAN_MARK) and ASSISTANT_MARK in shared
    if exact:
        cut = shared.rfind(ASSISTANT_MARK) + len(ASSISTANT_MARK)
    else:
        cut = max((m.end() for m in TURN.finditer(shared) if m[1] == "Assistant"), default=0)
    turns = turns_of(shared[:cut])
    if not turns:
        missing = f"no 'prompt' field, and no common text from 'Human:' up to {ASSISTANT_MARK!r}"
        raise _Unknown(f"chosen and rejected share no prompt: {missing}")
    responses = chosen[cut:], rejected[cut:]
    if any(HUMAN_MARK in text if exact else TURN.search(text) for text in responses):
        raise Dropped("a conversation that goes on after the two part")
    prompt = r.preceded(shared[:cut] if exact else turns)
    if isinstance(prompt, list):
        responses = responses[0].strip(), responses[1].strip()
    return Example(prompt, responses, r.where)


def _candidates(r: Record) -> Parsed:
    """Parse a list of responses with their scores or ranks: the best against the worst.

    The responses are texts beside a list of scores, or objects that hold a score (raw
    UltraFeedback: `overall_score`) or a rank (Nectar: 1 is the best).
    """
    name = next((name for name in LISTS if isinstance(r.left.get(name), list)), "")
    values: list[Any] = r.left.get(name) or []
    objects = bool(values) and all(isinstance(v, dict) and "role" not in v for v in values)
    lists = [name for name in SCORES if isinstance(r.left.get(name), list)]
    lists = lists or ["scores"] * ("scores" in r.left)
    keys = [key for key in SCORE if objects and key in values[0].keys() - {*r.columns.ignored}]
    if not name or not (lists or keys):
        return None
    r.left.pop(name)
    judgments: dict[str, Any] = {name: r.left.pop(name) for name in lists}
    judgments |= {key: [value.get(key) for value in values] for key in keys}
    key, scores = next(iter(judgments.items()))
    if not isinstance(scores, list) or len(values) != len(scores) or len(scores) < 2:
        raise r.error(f"{name} and {key}: expected two lists of one length, at least 2")
    if not _numbers(scores):
        raise r.error(f"{key}: expected numbers")
    sign = dict.fromkeys(RANKS, -1)
    scores = [sign.get(key, 1) * score for score in scores]
    finished = r.left.pop("finished", None) if name == "responses" else None
    finished = [True] * len(values) if finished is None else finished
    if not isinstance(finished, list) or [type(f) for f in finished] != [bool] * len(values):
        raise r.error("finished: expected true or false for every response")
    kind, prompt = "candidates", r.ask()[1]
    if key == "overall_score":
        kind = "UltraFeedback, raw"
        for notes in ("models", "correct_answers", "incorrect_answers"):
            r.left.pop(notes, None)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if best == worst:
        raise Dropped("candidates that all score the same")
    for other, judged in judgments.items():
        pair = [judged[best], judged[worst]] if len(judged) == len(values) else []
        if _numbers(pair) and pair and sign.get(other, 1) * (pair[0] - pair[1]) < 0:
            r.refused[other] = f"{other!r}, which orders the responses in another way than {key!r},"
    texts = []
    for i in (best, worst):
        value = values[i]
        if objects:
            text = next((text for text in TEXT if text in value), "")
            known = (text, *keys, *(NOTES if key == "overall_score" else ()))
            r.judge({k: v for k, v in value.items() if k not in known}, f"{name}[{i}]")
            value = value.get(text)
        texts.append(r.response(value, f"{name}[{i}]"))
    ends = (finished[best], finished[worst])
    return kind, Example(prompt, tuple(texts), r.where, () if all(ends) else ends)


def _judged(r: Record) -> Parsed:
    """Parse two responses and a judgment between them: a row of JUDGED."""
    for first, second, verdict, better, notes in JUDGED:
        if {first, second, verdict} <= r.left.keys():
            break
    else:
        return None
    values, choice = [r.left.pop(first), r.left.pop(second)], r.left.pop(verdict)
    for name in notes:
        r.left.pop(name, None)
    if isinstance(choice, (list, dict)) or choice not in better:
        if choice == 0 or _is_tie(verdict, choice):
            raise Dropped("no preference between the two responses")
        raise r.error(f"{verdict}: {choice!r} is none of {', '.join(map(str, better))}")
    chosen, rejected = (values[better[choice]], values[1 - better[choice]])
    if first == "human_ref_A":  # Stanford's SHP calls the post its history
        r.left["prompt"] = r.left.pop("history", None)
    if isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1:
        return "judged pairs", _lists(r, chosen, rejected)[1]
    prompt = r.ask()[1]
    texts = r.response(chosen, first), r.response(rejected, second)
    return "judged pairs", Example(prompt, texts, r.where)


def _single(r: Record) -> Parsed:
    """Parse one response: `messages` that end with the assistant's, or a prompt and an answer."""
    for name in LABELS:
        label = r.left.get(name)
        if _is_negative(label):
            raise Dropped(f"{name}: {label}, a response that should not be learnt")
    answer = next((name for name in ANSWERS if name in r.left), None)
    for name in ("messages", "conversations", "conversation"):
        value = r.left.get(name)
        if value and isinstance(value, list) and not (answer and _role_of(value[-1]) == "user"):
            messages = r.answered(r.left.pop(name), name)
            _agree(r, r.take("prompt"), messages[:-1])
            prompt = r.preceded(messages[:-1])
            return "messages", Example(prompt, (messages[-1]["content"],), r.where)
    if answer is None or ASKS.keys().isdisjoint(r.left):
        return None
    value = r.left.pop(answer)
    return "completions", Example(r.ask()[1], (r.response(value, answer),), r.where)


class Format(NamedTuple):
    """A row of the table of formats: the columns that tell it, who uses it, and its parser."""

    columns: str
    users: str
    parse: Callable[[Record], Parsed]
    paired: bool = True


# fmt: off
FORMATS = [
    Format("chosen + rejected", "UltraFeedback binarized, HH-RLHF, TRL, LLaMA-Factory's alpaca and "
           "ShareGPT, orca pairs", _chosen_rejected),
    Format("responses + scores, or a list of scored or ranked answers",
           "sample.py, UltraFeedback, Nectar", _candidates),
    Format("two responses + a judgment",
           "HelpSteer 2 and 3, SHP, Chatbot Arena, PKU-SafeRLHF, AlpacaFarm", _judged),
    Format("messages, or prompt + completion", "--objective sft only", _single, paired=False),
]
# fmt: on
TARGETS = {*ASKS, *SYSTEM, *ANSWERS, *LISTS, *SCORES, "rejected", "history", "finished"}
TARGETS |= {name for row in JUDGED for name in row[:3]}


def parse_record(
    record: dict, where: str, paired: bool = True, columns: Columns | None = None
) -> tuple[str, Example]:
    """Recognize the format of a record; return the format's name and the example.

    A field that is null counts as absent. With `paired=False`, for SFT, the example has one
    response: the only one, or the chosen one of a pair.

    Raises:
        DataError: the record is malformed, its format is not known, or a part of it would be
            ignored. The message names the column and a flag.
        Dropped: the record is sound but useless, such as a pair of equal responses.
    """
    r = Record(record, where, columns or Columns())
    try:
        kind, example = _understood(record, r, paired)
    except RecursionError:
        raise r.error("values are nested too deeply") from None
    if paired and any(_is_tie(name, r.left[name]) for name in VERDICTS & r.left.keys()):
        raise Dropped("no preference between the two responses")
    if not paired:
        example = example._replace(responses=example.responses[:1], finished=example.finished[:1])
    if any(map(_empty, example.responses)):
        raise Dropped("an empty response")
    if len(set(example.responses)) < len(example.responses):
        raise Dropped("chosen equal to rejected")
    return kind, example


def _understood(record: dict, r: Record, paired: bool) -> tuple[str, Example]:
    """Parse and account for every column. Raises DataError with advice for an unknown format."""
    try:
        kind, example = _parse(r, paired)
    except _Unknown as e:
        known = "; ".join(row.columns for row in FORMATS if row.paired or not paired)
        named = "prompt=…,chosen=…,rejected=…" if paired else "prompt=…,output=…"
        advice = _advice(record, r, paired) or f"Name them with --columns {named}, or use {known}"
        raise r.error(f"{e}; its columns are {', '.join(record)}. {advice}") from None
    r.account(example)
    return kind, example


def _parse(r: Record, paired: bool) -> tuple[str, Example]:
    """Return what the first parser makes of the record. Raises _Unknown if none knows it."""
    for row in FORMATS:
        if (row.paired or not paired) and (parsed := row.parse(r)):
            return parsed
    absent = {"chosen", "rejected"} - r.left.keys()
    one = len(absent) == 1 and paired
    raise _Unknown(f"no {min(absent)!r} field" if one else "no known format")


def _advice(record: dict, r: Record, paired: bool) -> str:
    """Return the flags with which a record of no known format can be read; "" without any.

    The guess goes by names, and it is tried on the record before anybody reads of it.
    """
    names = [name for name, value in record.items() if isinstance(value, (str, list))]

    def first(wanted: set[str], *taken: str) -> str:
        free = [name for name in names if name not in taken]
        return next((n for n in free if wanted.intersection(_words_in(n))), "")

    good, bad = first(GOOD), first(BAD)
    answer = first({*ANSWERS, "solution", "reply", "target", "generation"})
    several = first({"solutions", "outputs", "samples", "replies", "texts", "options"})
    guesses = [
        (True, {"chosen": good, "rejected": bad}),
        (True, {"responses": several}),
        (False, {}),
        (False, {"output": answer}),
    ]
    for as_pair, sources in guesses:
        if as_pair > paired or not all(sources.values()):
            continue
        if ASKS.keys().isdisjoint(record):
            others = [name for name in names if name not in (good, bad, *sources.values())]
            sources |= {"prompt": first(ASKING, *sources.values()) or (others or [""])[0]}
        sources = r.columns.sources | {to: name for to, name in sources.items() if to != name}
        columns = Columns(sources, r.columns.ignored)
        kind, trial = "completions", None
        try:
            trial = Record(record, r.where, columns)
            kind, example = _parse(trial, as_pair)
            trial.account(example)
        except (DataError, _Unknown):
            if not trial or not trial.refused:
                continue
            columns.ignored += tuple(trial.refused)
        except Dropped:  # the record is useless, but its format is known
            pass
        flags = ["--objective sft"] * (as_pair < paired) + columns.flags()
        return f"The nearest format is {kind}: {' '.join(flags)}"
    return ""


def _is_negative(label: object) -> bool:
    """Return True if a label says that a response is bad: a word, or a number that is not above 0.

    A column of true and false with gaps comes out of pandas as 1.0 and 0.0.
    """
    try:
        return float(label) <= 0  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return str(label).strip().lower() in NEGATIVE


def _is_tie(name: str, value: object) -> bool:
    """Return True if a judgment is that there is no preference."""
    words = re.findall("[a-z]+", str(value).lower())
    if name in ("tie", "is_tie"):
        return words == ["true"] or value == 1
    return isinstance(value, str) and len(words) < 4 and not TIES.isdisjoint(words)


def check_prompt(
    value: object, where: str, field: str = "prompt", beside: dict | None = None
) -> str | Messages:
    """Return a prompt: a string, or a message list that the assistant has yet to answer.

    A system prompt and earlier turns among the columns `beside` it come first, as in training.

    Raises:
        DataError: it is neither, not valid Unicode, or holds more than roles and texts. The message
            names `where` and `field`.
    """
    r = Record(beside or {}, where, Columns())
    prompt = r.preceded(r.prompt(value, field))
    left = [f"column {name!r}" for name in CARRIED if not _empty(r.left.get(name))]
    if named := ", ".join([*r.refused.values(), *left]):
        raise r.error(f"{named} would be ignored: remove it from the prompts")
    return prompt
