"""Check that the files of a checkpoint folder agree about special tokens.

tokenizer.json is what encodes. Older versions of transformers wrote the same tokens into further
files, and transformers still reads them: it adds a token that tokenizer.json lacks under a new id,
and replaces one whose flags differ. We refuse both by name. `statements` lists what the files say.
Read formats/tokenizer.py next.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from formats.errors import DataError

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # they change the tokens of a text
LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")


class Statement(NamedTuple):
    """Holds what one file says about one token."""

    where: str  # "tokenizer_config.json: bos_token"
    text: str | None  # None: it is not given as a token is
    id: object = None  # None: not said
    flags: dict = {}


def statements(files: dict[str, dict]) -> Iterator[Statement]:
    """Yield what files say about tokens; `files` maps a file's name to its content."""
    for text, i in files["added_tokens.json"].items():
        yield Statement(f"added_tokens.json: {text!r}", text, i)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in files[name].items():
            where = f"{name}: {key}"
            if key == "added_tokens_decoder":
                for i, token in value.items() if isinstance(value, dict) else [("", value)]:
                    number = int(i) if i.isdecimal() and len(i) < 20 else i
                    yield Statement(f"{where}: {i}", text_of(token), number, _flags(token))
            elif key in LISTS and value:
                members = list(value.values()) if isinstance(value, dict) else value
                for token in members if isinstance(members, list) else [None]:
                    yield Statement(where, text_of(token))
            elif key.endswith("_token") and (text := text_of(value)):
                yield Statement(where, text)


def _flags(token: Any) -> dict:
    if not isinstance(token, dict):
        return {}
    token = {"normalized": not token.get("special")} | token  # the library's defaults
    return {flag: token.get(flag, False) for flag in FLAGS}


def text_of(token: object) -> str | None:
    """Return the text of a token, given as a string or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def check(
    folder: Path, files: dict[str, dict], added: dict[str, dict], id_of: Callable[[str], int | None]
) -> None:
    """Raise DataError if a file names a token that tokenizer.json does not have, or has otherwise.

    Also if two files name different tokens for one purpose, such as bos_token.

    added: the added tokens of tokenizer.json: text → its "id" and those of `FLAGS` that matter.
    id_of: returns the id of a text that is one token, else None.
    """
    for where, text, number, flags in statements(files):
        if text is None:
            raise DataError(f"{folder}/{where}: expected a token's text, or an object with it")
        ours = added.get(text) or {"id": id_of(text)}
        if ours["id"] is None:
            problem = f"{text!r} is not a token of tokenizer.json"
            raise DataError(f"{folder}/{where}: {problem}: add it there, or remove it here")
        if number is not None and number != ours["id"]:
            raise DataError(f"{folder}/{where}: {text!r} has the id {ours['id']} in tokenizer.json")
        for flag in flags.keys() & ours.keys():
            if flags[flag] != ours[flag]:
                problem = f"{text!r} has {flag} = {flags[flag]}, and {ours[flag]} in tokenizer.json"
                raise DataError(f"{folder}/{where}: {problem}")
    one, other = files["tokenizer_config.json"], files["special_tokens_map.json"]
    for key in sorted(key for key in one.keys() & other.keys() if key.endswith("_token")):
        texts = text_of(one[key]), text_of(other[key])
        if all(texts) and texts[0] != texts[1]:
            two = f"{texts[0]!r} in tokenizer_config.json, {texts[1]!r} in special_tokens_map.json"
            raise DataError(f"{folder}: {key} is {two}: make them equal")
