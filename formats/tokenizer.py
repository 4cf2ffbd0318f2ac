"""Turn conversations into text with a checkpoint's chat template, and text into token ids.

This file owns the special tokens and the boundary between prompt and response. data.py states the
decisions about them; `Tokenizer` carries them out:

    encode_prompts                      at most one BOS: the template's own, or without a template
                                        the tokenizer's
    texts                               the prompt ends with the generation prompt
    _learn_end_of_turn                  the response ends with the end-of-turn token
    encode_responses                    no merge crosses from prompt to response
    Backend, render                     tokenizer and template run in formats/sandbox.py
    check_kept                          its text says what the record says, formats/fidelity.py

Read data.py next: `encode` cuts the ids of an `Example` to length and makes a `Pair` of them.
"""

import itertools
import json
from array import array
from pathlib import Path

from data import Example, Messages
from formats import fidelity, sandbox, special_tokens
from formats.errors import DataError
from formats.files import dump_json, read_json, reading, regular
from formats.progress import Progress
from formats.schemas import ASSISTANT_MARK, EXACT_TURN, HUMAN_MARK, turns_of


def read_template(name: str | None) -> str | None:
    """Read the argument of `--chat-template` into the form that `Tokenizer` takes.

    Return the text of the file, "" for 'none', and None if the flag is absent.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    if name is None:
        return None
    if name == "none":
        return ""
    with reading(name, DataError):
        text = regular(Path(name)).read_text(encoding="utf-8")
    if not text.strip():
        raise DataError(f"{name}: an empty chat template ('none' is for plain text)")
    return text


def as_messages(prompt: str) -> Messages:
    """Turn a prompt string into messages: an HH-RLHF transcript into turns, any other into one."""
    is_transcript = prompt.startswith(HUMAN_MARK) and prompt.endswith(ASSISTANT_MARK)
    turns = turns_of(prompt, EXACT_TURN) if is_transcript else None
    return turns or [{"role": "user", "content": prompt}]


class Backend:
    """Calls the tokenizers library in its sandbox, with one tokenizer.json.

    Every method raises DataError if the tokenizer fails or exceeds the sandbox's limits.

    Attributes:
        size: one more than the largest token id.
        bos_id: the token that the tokenizer would put before a text, or None.
        special: ids of the special tokens.
        added: text of each added token → its "id" and flags.
    """

    def __init__(self, path: Path):
        if not path.exists():
            needs = "a checkpoint needs its fast tokenizer; tokenizer.model alone is not enough"
            raise DataError(f"{path}: no such file ({needs})")
        self.path = path
        with reading(path, DataError):
            self._program = (regular(path).read_bytes(),)
        facts = json.loads(self._ask("describe", [None])[0])
        self.size, self.bos_id = facts["size"], facts["bos_id"]
        self.special, self.added = facts["special"], facts["added"]

    def _ask(self, call: str, items: list) -> list[bytes]:
        try:
            with Progress(f"tokenizer: {call}"):
                return sandbox.TOKENIZERS.ask(self._program, call, items)
        except sandbox.SandboxFailure as e:
            raise DataError(f"{self.path}: not a tokenizer: {e}") from None

    def encode(self, texts: list[str], continuing: bool = False) -> list[list[int]]:
        """Return the ids of texts, without special tokens that the texts do not hold.

        `continuing`: the texts continue others, so they get no space before them.
        """
        answers = self._ask("encode_response" if continuing else "encode", texts)
        return [array("i", answer).tolist() for answer in answers]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._ask("decode", [(ids, skip_special_tokens)])[0].decode()

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, None if there is no such token."""
        return json.loads(self._ask("token_to_id", [token])[0])

    def id_to_token(self, number: int) -> str | None:
        """Return the token with this id, None if there is none."""
        return json.loads(self._ask("id_to_token", [int(number)])[0])


class Tokenizer:
    """Holds a checkpoint's tokenizer and chat template.

    Attributes:
        backend: tokenizer.json, in the sandbox.
        size: one more than the largest token id.
        special: text of each special token by its name, such as "bos_token".
        bos_id: the token that the tokenizer would put before a text, or None.
        bos_ids: `bos_id` and the id of "bos_token", whichever exist.
        stop_ids: all tokens that end a turn.
        end_id: the one of them that ends every response in training.
        end_texts: the texts of `stop_ids`.
        template: jinja2 source, or None for plain text.
        tail: the text that the template adds after an assistant message, from the end of turn on.
        marks: how the template opens a turn, and the generation prompt; see formats/fidelity.py.
        date: the day that the template gets if it asks for one, else None.
    """

    def __init__(self, folder: Path, chat_template: str | None = None, date: str | None = None):
        """Read the tokenizer of a checkpoint folder.

        `chat_template` is jinja2 source that replaces the checkpoint's own template. "" stands for
        plain text without a template; then EOS ends a response. `date` is what a template gets
        that asks for the day, YYYY-MM-DD; by default today.

        Raises:
            DataError: a file is missing or damaged, the template does not compile, or nothing
                tells which token ends a turn.
        """
        self.folder = folder
        self.backend = Backend(folder / "tokenizer.json")
        self.size, self.bos_id = self.backend.size, self.backend.bos_id
        settings = self._read_json("tokenizer_config.json")
        names = ("special_tokens_map.json", "added_tokens.json")
        told = {"tokenizer_config.json": settings} | {n: self._read_json(n) for n in names}
        special_tokens.check(folder, told, self.backend.added, self._id_of_one_token)
        self.special = self._special_tokens(told["special_tokens_map.json"] | settings)
        named_bos = self._id(self.special.get("bos_token"))
        self.bos_ids = {i for i in (self.bos_id, named_bos) if i is not None}
        self.stop_ids = self._stop_ids()

        self.override_template = chat_template  # None: the checkpoint's own template is used
        if chat_template is None:
            self.template_file, source = self._own_template(settings)
        else:
            self.template_file, source = "--chat-template", chat_template
        self.template = source or None
        asks = "strftime_now" in source
        self.date = (date or sandbox.today()) if asks else None

        self.tail = ""
        self._kept_roles: set[tuple[str, ...]] = set()  # of which the template keeps all messages
        eos = self._id(self.special.get("eos_token"))
        if self.template:
            self.tail, self.end_id = self._learn_end_of_turn(eos)
            self.stop_ids |= {self.end_id}
        elif self.stop_ids:
            self.end_id = min(self.stop_ids) if eos is None else eos
        else:
            files = "generation_config.json, config.json, tokenizer_config.json or the template"
            raise DataError(f"{folder}: no end-of-sequence token: none in {files}")
        texts = (self.backend.id_to_token(i) for i in self.stop_ids)
        self.end_texts = tuple(text for text in texts if text)

    # -- reading the folder

    def _read_json(self, name: str) -> dict:
        return read_json(self.folder / name, DataError, optional=True)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _id_of_one_token(self, text: str) -> int | None:
        """Return the id of a text that the tokenizer encodes as one token, None for any other."""
        number = self._id(text)
        return number if self.backend.encode([text])[0] == [number] else None

    def _special_tokens(self, merged: dict) -> dict[str, str]:
        """Collect the texts of special tokens by their names, such as "bos_token"."""
        named = {key: value for key, value in merged.items() if key.endswith("_token")}
        texts = {key: special_tokens.text_of(value) for key, value in named.items()}
        return {key: text for key, text in texts.items() if text is not None}

    def _stop_ids(self) -> set[int]:
        """Collect `eos_token_id` of both config files, and the id of "eos_token".

        `eos_token_id` is absent, a number or a list; Llama 3 Instruct lists 128001 and 128009.
        Raises DataError if it, or `bos_token_id`, is no token of the tokenizer.
        """
        found = {self._id(self.special.get("eos_token"))}
        for name in ("generation_config.json", "config.json"):
            content = self._read_json(name)
            for key in ("bos_token_id", "eos_token_id"):
                ids = content.get(key)
                for i in ids if isinstance(ids, list) else [ids]:
                    known = type(i) is int and 0 <= i < self.size and self.backend.id_to_token(i)
                    if i is not None and not known:
                        problem = f"{key}: {i!r} is not a token of the tokenizer"
                        raise DataError(f"{self.folder / name}: {problem}")
                    found |= {i} if key == "eos_token_id" else set()
        return {i for i in found if i is not None}

    def _own_template(self, settings: dict) -> tuple[str, str]:
        """Find the checkpoint's template: (where, source). The source is "" if it has none."""
        path = self.folder / "chat_template.jinja"
        more = sorted(self.folder.glob("additional_chat_templates/*.jinja"))
        if more and (not path.exists() or "default.jinja" in [file.name for file in more]):
            problem = f"the default template must be in {path.name} alone"
            raise DataError(f"{more[0].parent}: holds further templates; {problem}")
        if path.exists():
            return str(path), read_template(str(path)) or ""
        file, source = "tokenizer_config.json", settings.get("chat_template")
        if not source:
            file = "chat_template.json"
            source = self._read_json(file).get("chat_template") or ""
        if isinstance(source, list):  # several named templates
            named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
            source = named[-1].get("template") if named else None
        where = f"{self.folder / file}: chat_template"
        if not isinstance(source, str):
            raise DataError(f"{where}: expected a string, or a list with one named 'default'")
        return where, source

    def check_fits(self, vocab_size: int) -> None:
        """Raise DataError if some token has no row in an embedding of `vocab_size` rows."""
        if self.size > vocab_size:
            sizes = f"the tokenizer has {self.size} tokens, the embedding {vocab_size}"
            raise DataError(f"{self.folder}: {sizes}")

    def changed_files(self) -> dict[str, str]:
        """Return the files that differ from the checkpoint's when the trained model is saved.

        They map name → text. The template is among them if `chat_template` gave another one; for
        plain text ("") the checkpoint's own stays. The generation config is among them if it does
        not name the token that ends a turn.
        """
        files = {}
        if self.override_template:
            files["chat_template.jinja"] = self.override_template
        generation = self._read_json("generation_config.json")
        eos = generation.get("eos_token_id", self._read_json("config.json").get("eos_token_id"))
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if self.end_id not in eos:
            generation |= {"eos_token_id": [*eos, self.end_id]}
            files["generation_config.json"] = dump_json(generation, indent=2) + "\n"
        return files

    # -- the template

    def render(self, conversations: sandbox.Conversations, locations: list[str]) -> list[str]:
        """Render conversations, each given as (messages, add the generation prompt?).

        `locations` says where each conversation came from; errors name it.

        Raises:
            DataError: the template does not compile or refuses a conversation.
        """
        assert self.template, "there is no chat template"
        try:
            with Progress("chat template: render"):
                return sandbox.render(self.template, self.special, conversations, self.date)
        except sandbox.SandboxFailure as e:
            if e.number is None:
                problem = f"the chat template does not compile: {e}"
                raise DataError(f"{self.template_file}: {problem}") from None
            problem = f"the chat template refuses this conversation: {e}"
            raise DataError(f"{locations[e.number]}: {problem} ({self.template_file})") from None

    def _learn_end_of_turn(self, eos: int | None) -> tuple[str, int]:
        """Find what the template adds after an assistant message: (text, first end-of-turn token).

        Most templates write the end-of-turn token, some a newline after it, a few nothing at all.
        In the last case, `eos` ends the turn.
        """
        content = "The content of this message."
        question = {"role": "user", "content": "Hello"}
        answer = {"role": "assistant", "content": content}
        conversations = [([question, answer], False), ([question], True), ([question], False)]
        turn, asked, alone = self.render(conversations, [str(self.folder)] * 3)
        tail = turn.rpartition(content)[2]
        turn = turn.strip().removeprefix(self.special.get("bos_token", ""))
        cue = asked[len(alone) :].strip() if asked.startswith(alone) else ""
        self.marks = fidelity.header_of(turn), cue
        [ids] = self.backend.encode([tail])
        ends = [i for i in ids if i in self.stop_ids]
        ends = ends or [i for i in ids if i in self.backend.special]
        end = ends[0] if ends else eos
        if end is None:
            problem = (
                f"ends a turn with {tail!r}, which holds no special token, and there is no EOS"
            )
            raise DataError(f"{self.folder}: the chat template {problem}")
        end_text = self.backend.id_to_token(end) or ""
        return tail[max(0, tail.find(end_text)) :], end

    def prompt_text(self, prompt: str | Messages, where: str) -> str:
        """Return the text that the model reads before it answers, generation prompt included."""
        return self.texts([Example(prompt, (), where)])[0][0]

    def texts(self, examples: list[Example]) -> list[tuple[str, list[str]]]:
        """Render each example and split it into prompt text and response texts.

        The prompt text ends with the generation prompt. Response texts exclude the end-of-turn
        token. A string prompt becomes one user message if there is a chat template; otherwise it
        is used as is.

        Raises:
            DataError: a prompt is a list of messages, but there is no chat template. Also if the
                template refuses an example, or renders its prompt in another way once answered, or
                if formats/fidelity.py finds that it does not say what the example says.
        """
        if not self.template:
            return [self._plain_text(example) for example in examples]
        conversations: sandbox.Conversations = []
        locations: list[str] = []
        prompts: list[Messages] = []
        for example in examples:
            prompt, responses = example.prompt, example.responses
            if isinstance(prompt, str):
                # the answer to a transcript is stripped, as its earlier turns are
                if prompt.endswith(ASSISTANT_MARK):
                    responses = tuple(response.strip() for response in responses)
                prompt = as_messages(prompt)
            bare = tuple(map(self._without_end, responses))
            if any(r.strip() and not text.strip() for r, text in zip(responses, bare)):
                raise DataError(f"{example.where}: a response is an end of turn and nothing else")
            fidelity.check_unrendered(example._replace(responses=bare), prompt, *self.marks)
            prompts.append(prompt)
            conversations.append((prompt, True))
            for response in responses:
                answer = {"role": "assistant", "content": response}
                conversations.append(([*prompt, answer], False))
            locations += [example.where] * (1 + len(responses))
        rendered = iter(self.render(conversations, locations))
        texts = []
        for example, prompt in zip(examples, prompts):
            before = next(rendered)
            answered = list(itertools.islice(rendered, len(example.responses)))
            if not all(text.startswith(before) for text in answered):
                problem = "renders the prompt differently once it is answered"
                unclear = "so the response cannot be told from it"
                raise DataError(f"{example.where}: the chat template {problem}, {unclear}")
            ends = [text[len(before) :].removesuffix(self.tail) for text in answered]
            self.check_kept(example, prompt, before, ends)
            texts.append((before, ends))
        return texts

    def check_kept(
        self, example: Example, prompt: Messages, before: str, answers: list[str]
    ) -> None:
        """Check with formats/fidelity.py that the template keeps all that the record says.

        `prompt` are the example's messages, `before` their text, `answers` that of the responses.
        """
        fidelity.check_known(example, prompt, self.template or "", self.template_file)
        fidelity.check_kept(example, prompt, before, answers, self.template_file)
        roles = tuple(message["role"] for message in prompt)
        if roles in self._kept_roles:
            return
        marked = [{"role": role, "content": f"({i + 1}§{i})"} for i, role in enumerate(roles)]
        try:
            [text] = self.render([(marked, True)], [example.where])
        except DataError:  # the template wants other contents in these roles
            return
        fidelity.check_roles(example, marked, text, self.template_file)
        self._kept_roles.add(roles)

    def _plain_text(self, example: Example) -> tuple[str, list[str]]:
        """Split an example without a template. Raises DataError if its prompt is not a string."""
        if not isinstance(example.prompt, str):
            problem = f"a list of messages needs a chat template, and {self.folder} has none"
            raise DataError(f"{example.where}: {problem}: pass --chat-template FILE")
        return example.prompt, list(example.responses)

    # -- encoding

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Encode prompt texts.

        Without a template, the tokenizer's BOS goes first unless the text already begins with it.
        """
        encoded = self.backend.encode(texts)
        if self.template or self.bos_id is None:
            return encoded
        return [ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids] for ids in encoded]

    def encode_responses(
        self, texts: list[str], finished: list[bool] | None = None
    ) -> list[list[int]]:
        """Encode response texts, each with `end_id` once at its end.

        An end-of-turn token that a text itself ends with is that one, as the model could not write
        a second. finished: False for a response that was cut while it was sampled. It gets no
        `end_id`, which the model never wrote.
        """
        texts = [self._without_end(text) for text in texts]
        ends = [[self.end_id] if done else [] for done in finished or [True] * len(texts)]
        encoded = self.backend.encode(texts, continuing=True)
        return [ids + end for ids, end in zip(encoded, ends)]

    def _without_end(self, text: str) -> str:
        """Return a text without the end-of-turn tokens at its end."""
        while (bare := text.rstrip()).endswith(self.end_texts):
            text = next(bare.removesuffix(e) for e in self.end_texts if bare.endswith(e))
        return text

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.backend.decode(ids)
