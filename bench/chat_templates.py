"""Compare our token ids with those of transformers for every chat template that TRL ships.

    python bench/chat_templates.py [FOLDER] [--out bench/CHAT_TEMPLATES.md]

FOLDER holds .jinja files; by default, those of the installed package trl. Each template gets a
small tokenizer with the template's own special tokens, and then the conversations below: several
turns, system messages, reasoning, tools, roles that few templates know, texts about special tokens.
One of three things may come out for a template and a conversation:

    equal      prompt and response have transformers' token ids
    refused    we raise an error that names the record and the reason
    DIFFERENT  anything else; the command then exits with status 1
"""

import argparse
import datetime
import importlib.util
import json
import re
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Example, Messages  # noqa: E402
from formats.errors import DataError  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402

DAY = "2026-02-03"
MARK = re.compile(r"<[|｜]?[^<>|｜\s'\"{}]{1,40}[|｜]?>|\[/?[A-Z_]{3,30}\]")


def message(role: str, content: str, **keys) -> dict:
    return {"role": role, "content": content} | keys


SYSTEM = message("system", "Answer in one sentence.")
ASK, REPLY = message("user", "Name a colour."), message("assistant", "Green is one.")
MORE = message("user", " And another one? ")
THOUGHT = message("assistant", "<think>\nGrass comes to mind.\n</think>\n\nGreen is one.")
ABOUT = message("user", "What do <|im_end|>, [/INST] and </think> mean in a text?")
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "colour"}}}
CALLS = message("assistant", "I look it up.", tool_calls=[CALL | {"id": "abcdefghi"}])
RESULT = message("tool", '{"colour": "blue"}', name="look_up", tool_call_id="abcdefghi")

CONVERSATIONS: dict[str, tuple[Messages, str]] = {  # name: the prompt and a response
    "one turn": ([ASK], "Blue is one."),
    "three turns": ([ASK, REPLY, MORE, REPLY, MORE], "Blue is one."),
    "system": ([SYSTEM, ASK], "Blue is one.\n"),
    "system, turns": ([SYSTEM, ASK, REPLY, MORE], "```\nblue\n```"),
    "reasoning before": ([ASK, THOUGHT, MORE], "Blue is one."),
    "reasoning": ([ASK], "<think>\nThe sky.\n</think>\n\nBlue is one."),
    "tools": ([ASK, CALLS, RESULT], "Blue is one."),
    "about marks": ([ABOUT], "They end a turn: <|eot_id|> does so in Llama 3."),
    "about thoughts": ([ASK], "The tag </think> ends a thought."),
    "developer": ([message("developer", "Answer in one sentence."), ASK], "Blue is one."),
    "human": ([message("human", "Name a colour.")], "Blue is one."),
    "User": ([SYSTEM, message("User", "Name a colour.")], "Blue is one."),
}


def templates(folder: str | None) -> list[Path]:
    """Return the template files of a folder, or of the installed package trl.

    Raises:
        FileNotFoundError: there are none.
    """
    root = Path(folder) if folder else None
    if not root and (spec := importlib.util.find_spec("trl")) and spec.origin:
        root = Path(spec.origin).parent / "chat_templates"
    found = sorted(root.glob("*.jinja")) if root else []
    if not found:
        raise FileNotFoundError("no chat templates: install trl, or name a folder of .jinja files")
    return found


def write_tokenizer(folder: Path, template: str) -> Path:
    """Write a tokenizer on bytes whose special tokens are the marks that the template writes."""
    special = dict.fromkeys(["<bos>", "<eos>", "<|im_end|>", "<|eot_id|>", "</think>", "[/INST]"])
    special |= dict.fromkeys(MARK.findall(template))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def compare(folder: Path, prompt: Messages, response: str) -> str:
    """Return "equal", "refused: …" or "DIFFERENT: …" for one conversation and a checkpoint folder.

    The response's ids are compared up to the end of turn, where ours end.
    """
    try:
        ours = Tokenizer(folder, date=DAY)
        [(before, [answer])] = ours.texts([Example(prompt, (response,), "pairs.jsonl:1")])
        ids = ours.encode_prompts([before])[0], ours.encode_responses([answer])[0]
    except DataError as e:
        return f"refused: {str(e).replace(str(folder), 'DIR')}"
    theirs, clock = transformers_tokenizer(folder), mock.Mock()
    clock.now.return_value = datetime.datetime.fromisoformat(DAY)
    answered = [*prompt, message("assistant", response)]
    with mock.patch("transformers.utils.chat_template_utils.datetime", clock):
        try:
            asked = theirs.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            whole = theirs.apply_chat_template(answered, tokenize=False)
        except Exception as e:
            return f"DIFFERENT: transformers refuses it: {e}"

    def encode(text: str) -> list[int]:
        return theirs(text, add_special_tokens=False)["input_ids"]

    if ids[0] != encode(asked):
        return f"DIFFERENT: prompt {asked!r}, ours {before!r}"
    rest, end = encode(whole[len(asked) :]), len(ids[1]) - 1
    same = ids[1][:end] == rest[:end] and ids[1][end:] == (rest[end : end + 1] or [ours.end_id])
    if not same or response.strip() not in whole[len(asked) :]:
        return f"DIFFERENT: response {whole[len(asked) :]!r}, ours {answer!r}"
    return "equal"


def transformers_tokenizer(folder: Path):
    """Return the tokenizer that transformers makes of a checkpoint folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def compare_all(paths: list[Path], work: Path) -> dict[str, dict[str, str]]:
    """Return the outcome of every template and conversation: [template][conversation]."""
    table: dict[str, dict[str, str]] = {}
    for path in paths:
        folder = write_tokenizer(work / path.stem, path.read_text(encoding="utf-8"))
        table[path.stem] = {n: compare(folder, *asked) for n, asked in CONVERSATIONS.items()}
    return table


def report(table: dict[str, dict[str, str]]) -> str:
    """Return the table in Markdown: a row per template, then every reason to refuse."""
    kinds = Counter(v.split(":")[0] for row in table.values() for v in row.values())
    usual = ("one turn", "three turns", "system", "system, turns")
    whole = sum(all(row[name] == "equal" for name in usual) for row in table.values())
    lines = [
        "# Chat templates: our token ids against transformers'",
        "",
        f"`python bench/chat_templates.py`: {len(table)} templates of TRL, {len(CONVERSATIONS)} "
        f"conversations each, transformers {version('transformers')}. {kinds['equal']} equal, "
        f"{kinds['refused']} refused, {kinds['DIFFERENT']} different.",
        "",
        "= equal, r refused, X different",
        "",
        "| template | " + " | ".join(CONVERSATIONS) + " |",
        "|---|" + "---|" * len(CONVERSATIONS),
    ]
    signs = {"equal": "=", "refused": "r", "DIFFERENT": "X"}
    for name, row in table.items():
        lines += [f"| {name} | " + " | ".join(signs[v.split(":")[0]] for v in row.values()) + " |"]
    lines += ["", f"The first four columns are equal for {whole} templates. Reasons to refuse:", ""]
    why = Counter(
        re.sub(r"^refused: [^ ]+ |\(DIR[^)]*\)", "", v)[:200]
        for row in table.values()
        for v in row.values()
        if v.startswith("refused")
    )
    lines += [f"* {n} times: {reason}" for reason, n in why.most_common()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        table = compare_all(templates(flags.folder), Path(work))
    text = report(table)
    print(text)
    if flags.out:
        flags.out.write_text(text, encoding="utf-8")
    different = [f"{t}, {c}: {v}" for t, r in table.items() for c, v in r.items() if v[0] == "D"]
    sys.exit("\n".join(different) or None)


if __name__ == "__main__":
    main()
