"""From a file of preferences to packed micro-batches: record → conversation → tokens → stream.

    read_records     a file, folder or hub data set     →  (where, record)          where = "pairs.jsonl:17", for errors
    parse_record     a record in any known format       →  Example                  prompt and responses, as text
    Tokenizer.encode an Example                         →  Tree                     token ids of prompt and responses
    plan             the lengths of a step's trees      →  micro-batches per rank   who computes what
    pack             the trees of one micro-batch       →  a stream without padding (`model.Llama.forward` takes it)

Decisions about tokens, each of which some trainer got wrong at some time:

* One BOS. A template that renders it is believed; the tokenizer is never asked to add a second one.
* The prompt ends with the generation prompt. The response is what the model would have to generate after it: the
  content and the end-of-turn token, nothing behind that, even where the template goes on with a newline.
* Prompt and response are encoded apart: no merge crosses the boundary, so the prompt is the same for every response.
* A long prompt is cut at its start but keeps BOS and, being at the end, the generation prompt; a response that then does
  not fit is cut at its end. What was cut or dropped is counted. No empty response ever reaches a loss.
* The template comes with the checkpoint, from strangers: `template.py` runs it in a sandbox with a bound on its work.
"""

import glob
import gzip
import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

import template

Messages = list[dict]  # [{"role": "user", "content": "…"}, …]


class DataError(ValueError):
    """Data, a tokenizer or a template that cannot be used; the message names file, line and field."""

    def __init__(self, message: str):  # one line of bounded length, whatever a stranger's file has put into it
        super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message)[:2000])


class Example(NamedTuple):
    """One prompt and the responses to it (chosen, rejected; or one, for SFT), as text."""

    prompt: str | Messages
    responses: tuple[str, ...]
    where: str


class Tree(NamedTuple):
    """The same in token ids, int32; every response continues the prompt."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    where: str

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


# ---------------------------------------------------------------------------------------------------------------------
# Files → records

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet")
LONGEST_LINE = 2**26  # bytes of one record; a small .gz may unpack to a line of any length


def local_path(name: str, kind: str, patterns: Iterable[str] = ("*",)) -> Path:
    """What the user named, as a path here: a path that exists, or a hub id `owner/name` with optional `@revision`, of
    which the files at its top that match `patterns` are fetched into huggingface_hub's cache. kind: "model", "dataset".

    Raises DataError, also for a model's folder with files that are no part of it (`check_folder`)."""
    matches = lambda file: any(fnmatch(file, pattern) for pattern in patterns)
    path = Path(os.path.expanduser(name))
    if not path.exists():
        path = from_hub(name, kind, lambda files: [file for file in files if "/" not in file and matches(file)])
    if kind == "model" and path.is_dir():
        check_folder(path, matches)
    return path


def check_folder(folder: Path, matches: Callable[[str], bool]) -> None:
    """Hold the files of a checkpoint, before any is read, to what a checkpoint is made of: no link that leads out (into
    the user's own files, which a saved checkpoint would copy), no pipe or device, no small file of absurd size."""
    home = Path(os.path.realpath(folder))
    homes = [home]
    if home.parent.name == "snapshots":  # the hub's cache: links into the blobs of this repository, or of all
        homes += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    for file in folder.iterdir():
        target = Path(os.path.realpath(file))
        if not any(target.is_relative_to(home) for home in homes):
            raise DataError(f"{file}: a link to {target}, outside the checkpoint: put the file itself here")
        if not matches(file.name) or target.is_dir():
            continue
        if not target.is_file():
            raise DataError(f"{file}: not a regular file" if target.exists() else f"{file}: a link to no file")
        most = 2**26 if file.name == "tokenizer.json" else 2**24  # Gemma 3's has 2²⁵ bytes
        if not file.name.endswith(".safetensors") and (size := target.stat().st_size) > most:
            raise DataError(f"{file}: {size} bytes, more than such a file of any checkpoint ({most})")


def from_hub(name: str, kind: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """The folder in huggingface_hub's cache with the files of `owner/name[@revision]` that `choose` takes from the list
    of all; those that are not there yet are fetched. Where the hub cannot be asked, what is cached is what there is."""
    absent = f"{name}: no such file or folder"
    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or name.endswith(SUFFIXES):
        raise DataError(absent)
    import huggingface_hub
    import huggingface_hub.errors as hub

    def refuse(e: Exception, otherwise: str):
        url = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
        match e:
            case hub.HFValidationError():
                raise DataError(absent) from None
            case hub.GatedRepoError():
                terms = f"accept its terms at {url}, then run `hf auth login`"
                raise DataError(f"{name}: gated on the hub: {terms}") from None
            case hub.RepositoryNotFoundError():
                raise DataError(f"{absent} here, and no such {kind} on the hub (or private: `hf auth login`)") from None
            case hub.RevisionNotFoundError():
                raise DataError(f"{name}: the {kind} has no revision {revision!r} on the hub") from None
        reason = next(iter(str(e).splitlines()), "") or type(e).__name__
        raise DataError(f"{name}: {otherwise.format(reason)}") from None

    which = {"repo_id": repository, "repo_type": kind, "revision": revision or None}
    try:
        files = [file.rfilename for file in huggingface_hub.HfApi().repo_info(**which, timeout=20).siblings]
    except Exception as e:  # errors of the HTTP library too, and which one that is depends on the version
        try:
            return Path(huggingface_hub.snapshot_download(**which, local_files_only=True, allow_patterns=[]))
        except Exception:
            hint = "download it where there is a network and pass the folder"
            refuse(e, f"no such file or folder here, and the hub cannot be reached ({{}}); {hint}")
    wanted = [glob.escape(file) for file in choose(files)]
    try:
        return Path(huggingface_hub.snapshot_download(**which, allow_patterns=wanted))
    except Exception as e:
        refuse(e, "the download broke off ({}): run the same command again, files that came whole are kept")


def at_hand(name: str) -> bool:
    """Whether `name`, or what it names a split of, is here; if not, it may be on the hub. DataError if it cannot be."""
    if Path(name).expanduser().exists() or Path(name.partition("@")[0].partition(":")[0]).exists():
        return True
    if name.endswith(SUFFIXES) or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w./-]+)?", name):
        raise DataError(f"{name}: no such file or folder")
    return False


def data_files(name: str) -> list[Path]:
    """The files that `--data` names: one file, all of a folder, or those of `owner/name[@revision]` on the hub.

    `NAME:SPLIT` keeps the files named after the split (train-00000-of-00003.parquet is train) or in a folder that is. A
    hub data set with several splits must be asked for one, lest somebody train on its test set."""
    root, split = name, ""
    if not Path(name).exists():
        before, at, revision = name.partition("@")
        root, _, split = before.partition(":")
        root += at + revision
    local = Path(os.path.expanduser(root))
    if local.is_file():
        return [local]

    def choose(files: list[str]) -> list[str]:
        splits = {file: _split_of(Path(file)) for file in sorted(files) if file.endswith(SUFFIXES)}
        names = sorted(set(splits.values()))
        if not split and len(names) > 1 and not local.exists():
            raise DataError(f"{name}: holds several splits, {', '.join(names)}: pass one as {root}:SPLIT")
        chosen = [f for f, of in splits.items() if not split or split in (of, *Path(f).parts[:-1])]
        if not chosen:
            of = f" of split {split!r}" if split else ""
            there = f": it has {', '.join(names)}" if names else ""
            raise DataError(f"{name}: no {', '.join(SUFFIXES)} file{of} in {local if local.exists() else root}{there}")
        return chosen

    folder = local if local.exists() else from_hub(root, "dataset", choose)
    chosen = choose([str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
    parts = {m.groups() for file in chosen if (m := re.search(r"^(.*)-(\d+)-of-(\d+)[^/]*$", file))}
    for stem, _, count in parts:
        if (here := sum(part[::2] == (stem, count) for part in parts)) != int(count):
            raise DataError(f"{name}: {folder / stem}-…: {here} of {int(count)} parts are here")
    return [folder / file for file in chosen]


def _split_of(file: Path) -> str:
    """`data/train-00000-of-00003-0a1b2c.parquet` → train; `train/0000.parquet` → train."""
    name = re.sub(r"(-\d+-of-\d+(-\w+)?)?\.(jsonl|json|jsonl\.gz|parquet)$", "", file.name)
    return file.parent.name if name.isdigit() and file.parent.name else name


def read_records(name: str) -> Iterator[tuple[str, dict]]:
    """Every record of `name` with its place, in file order. Raises DataError naming file and line."""
    for path in data_files(name):
        try:
            for where, record in _read_file(path):
                if not isinstance(record, dict):
                    raise DataError(f"{where}: expected an object, not {type(record).__name__}")
                yield where, record
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
            raise DataError(f"{path}: cannot be read: {e}") from None


def _read_file(path: Path) -> Iterator[tuple[str, object]]:
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            row = 0
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(1024):
                    for record in batch.to_pylist():
                        row += 1
                        yield f"{path} row {row}", record
        except (pyarrow.ArrowException, OSError) as e:
            raise DataError(f"{path}: not a whole parquet file: {e}") from None
    elif path.name.endswith(".json"):
        records = _parse_json(path.read_bytes(), str(path))
        if not isinstance(records, list):
            raise DataError(f"{path}: expected a JSON list of records")
        for i, record in enumerate(records, 1):
            yield f"{path} record {i}", record
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{path}:{number}: a line of more than {LONGEST_LINE} bytes")
                if line.strip():
                    yield f"{path}:{number}", _parse_json(line, f"{path}:{number}")
    else:
        raise DataError(f"{path}: not one of {', '.join(SUFFIXES)}")


def _parse_json(raw: bytes, where: str) -> object:
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        if re.search(rb"\\u[dD][89a-fA-F]", raw):  # half of a surrogate pair, alone, is no text: this fails on it
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Records → examples

ASSISTANT_MARK = "\n\nAssistant:"  # HH-RLHF's transcripts


class Dropped(Exception):
    """A sound record that cannot teach anything; the argument says why. Counted, never an error."""


def parse_record(record: dict, where: str, paired: bool = True) -> tuple[str, Example]:
    """(name of the format recognised, example). Formats of pairs:

    messages      chosen, rejected: message lists that both hold the prompt (UltraFeedback)
    explicit      prompt + chosen + rejected: strings, or message lists
    transcripts   chosen, rejected: strings that share a prompt up to the last "\\n\\nAssistant:" (HH-RLHF)
    candidates    prompt + responses + scores: the best against the worst

    and, with `paired=False` (SFT), of single responses: `messages` that end with the assistant's, `prompt` +
    `completion`, or the chosen response of a pair. Raises DataError for a malformed record, Dropped for a useless one."""
    has = {key for key, value in record.items() if value is not None}
    if not paired and ("messages" in has or {"prompt", "completion"} <= has):
        if "messages" in has:
            kind, (prompt, response) = "messages", _split_messages(record["messages"], where, "messages")
        else:
            kind, prompt, response = (
                "completions",
                check_prompt(record["prompt"], where),
                _response(record["completion"], where, "completion"),
            )
        if not response.strip():
            raise Dropped("an empty response")
        return kind, Example(prompt, (response,), where)

    if {"prompt", "responses", "scores"} <= has and "chosen" not in has:
        kind, example = "candidates", _from_candidates(record, where)
    else:
        for key in ("chosen", "rejected"):
            if key not in has:
                single = "" if paired else ", or messages, or prompt and completion"
                raise DataError(
                    f"{where}: no {key!r} field; expected chosen and rejected, or prompt, responses and scores{single}"
                )
        chosen, rejected = record["chosen"], record["rejected"]
        if type(chosen) is not type(rejected):
            raise DataError(f"{where}: chosen is a {type(chosen).__name__} and rejected a {type(rejected).__name__}")
        if isinstance(chosen, list) and len(chosen) > 1:
            kind, example = "messages", _from_messages(chosen, rejected, where)
        elif "prompt" in has:
            responses = _response(chosen, where, "chosen"), _response(rejected, where, "rejected")
            kind, example = "explicit", Example(check_prompt(record["prompt"], where), responses, where)
        elif isinstance(chosen, str):
            kind, example = "transcripts", _from_transcripts(chosen, rejected, where)
        else:
            raise DataError(f"{where}: no 'prompt' field, and chosen holds no prompt either")
    chosen, rejected = example.responses
    if not chosen.strip() or not rejected.strip():
        raise Dropped("an empty response")
    if chosen == rejected:
        raise Dropped("chosen equal to rejected")
    return kind, example if paired else example._replace(responses=(chosen,))


def _messages(value: object, where: str, field: str) -> Messages:
    """Checked: a non-empty list of {"role": str, "content": str}; other keys are left out."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {field}: expected a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: {field}[{i}]: expected a message with role and content as strings")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def check_prompt(value: object, where: str, field: str = "prompt") -> str | Messages:
    """A prompt as a string, or as a list of messages that it is the assistant's turn to answer."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: {field}: not valid Unicode text") from None
        return value
    messages = _messages(value, where, field)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{where}: {field}: ends with the assistant's message, so there is nothing to answer")
    return messages


def _response(value: object, where: str, field: str) -> str:
    """A response as a string, or as a list of one assistant message."""
    if isinstance(value, str):
        return value
    messages = _messages(value, where, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(f"{where}: {field}: expected one assistant message")
    return messages[0]["content"]


def _split_messages(value: object, where: str, field: str) -> tuple[Messages, str]:
    messages = _messages(value, where, field)
    if [message["role"] == "assistant" for message in messages[-2:]] != [False, True]:
        raise DataError(f"{where}: {field}: expected a prompt and then one assistant message at the end")
    return messages[:-1], messages[-1]["content"]


def _from_messages(chosen: object, rejected: object, where: str) -> Example:
    prompt, chosen = _split_messages(chosen, where, "chosen")
    other, rejected = _split_messages(rejected, where, "rejected")
    if prompt != other:
        raise DataError(
            f"{where}: chosen and rejected answer different prompts (they may differ in the last message only)"
        )
    return Example(prompt, (chosen, rejected), where)


def _from_transcripts(chosen: str, rejected: str, where: str) -> Example:
    cut = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT_MARK)
    if cut < 0:
        shared = f"no 'prompt' field, and no common text up to {ASSISTANT_MARK!r}"
        raise DataError(f"{where}: chosen and rejected share no prompt: {shared}")
    cut += len(ASSISTANT_MARK)
    if any("\n\nHuman:" in text[cut:] for text in (chosen, rejected)):
        raise Dropped("a conversation that goes on after the two part")
    return Example(chosen[:cut], (chosen[cut:], rejected[cut:]), where)


def _from_candidates(record: dict, where: str) -> Example:
    responses, scores = record["responses"], record["scores"]
    both_lists = isinstance(responses, list) and isinstance(scores, list)
    if not both_lists or len(responses) != len(scores) or len(scores) < 2:
        raise DataError(f"{where}: responses and scores: expected two lists of one length, at least 2")
    if not all(isinstance(score, (int, float)) and score == score for score in scores):
        raise DataError(f"{where}: scores: expected numbers")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if best == worst:
        raise Dropped("candidates that all score the same")
    texts = tuple(_response(responses[i], where, f"responses[{i}]") for i in (best, worst))
    return Example(check_prompt(record["prompt"], where), texts, where)


def as_messages(prompt: str) -> Messages:
    """A prompt string as a conversation: HH-RLHF transcripts become turns, anything else one user message."""
    if not prompt.startswith("\n\nHuman:") or not prompt.endswith(ASSISTANT_MARK):
        return [{"role": "user", "content": prompt}]
    turns = re.split(r"\n\n(Human|Assistant):", prompt.removesuffix(ASSISTANT_MARK))[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2])]


# ---------------------------------------------------------------------------------------------------------------------
# Examples → tokens


def read_template(name: str | None) -> str | None:
    """The argument of `--chat-template` as `Tokenizer` takes it: a file's text, "" for 'none', None if absent."""
    if name is None or name == "none":
        return name and ""
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise DataError(f"{name}: cannot be read: {e}") from None
    if not text.strip():
        raise DataError(f"{name}: an empty chat template ('none' is for plain text)")
    return text


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    chat_template: jinja2 source to use instead of the checkpoint's own; "" for none: plain text, with EOS at the end of
    a response. `stop_ids` are all tokens that end a turn; `end_id` is the one that training data gets.
    """

    def __init__(self, folder: Path, chat_template: str | None = None):
        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.exists():
            raise DataError(
                f"{path}: no such file (a checkpoint needs its fast tokenizer; tokenizer.model alone is not enough)"
            )
        with self._library():
            self.backend = tokenizers.Tokenizer.from_file(str(path))
            self.backend.no_truncation()
            self.backend.no_padding()
            self.size = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
            if self.size > 2**20:  # the library goes through all ids up to the last one, and there may be four billion
                raise DataError(f"{path}: a token has the id {self.size - 1}, too large for any vocabulary")
            self.continuing = self._continuing()
            self.bos_id = self._bos_id()
        settings = self._json("tokenizer_config.json")
        named = {
            key: v for key, v in (self._json("special_tokens_map.json") | settings).items() if key.endswith("_token")
        }
        texts = {key: v.get("content") if isinstance(v, dict) else v for key, v in named.items()}
        self.special = {key: text for key, text in texts.items() if isinstance(text, str)}
        self.stop_ids = self._stop_ids()
        self.own_template = chat_template  # the caller's, not the checkpoint's
        own = chat_template is not None
        self.template_file, source = ("--chat-template", chat_template) if own else self._template_source(settings)
        self.template = source or None
        self.tail = self._learn_end_of_turn() if self.template else ""
        if not self.stop_ids:
            files = "generation_config.json, config.json, tokenizer_config.json or the template"
            raise DataError(f"{folder}: no end-of-sequence token: none in {files}")
        if not self.template:
            self.end_id = self._id(self.special.get("eos_token"))
            self.end_id = min(self.stop_ids) if self.end_id is None else self.end_id

    # -- reading the folder

    @contextmanager
    def _library(self):
        """tokenizers is Rust: it raises bare Exceptions, and panics, which are not even that."""
        try:
            yield
        except (DataError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:
            raise DataError(f"{self.folder / 'tokenizer.json'}: not a tokenizer: {e}") from None

    def _json(self, name: str) -> dict:
        path = self.folder / name
        try:
            value = _parse_json(path.read_bytes(), str(path))
        except FileNotFoundError:
            return {}
        except OSError as e:
            raise DataError(f"{path}: cannot be read: {e}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}: expected a JSON object")
        return value

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _stop_ids(self) -> set[int]:
        """`eos_token_id` is a number, a list (Llama 3 Instruct: 128001, 128009) or absent, in either of two files."""
        ids: set[int | None] = set()
        for name in ("generation_config.json", "config.json"):
            eos = self._json(name).get("eos_token_id")
            for i in eos if isinstance(eos, list) else [eos]:
                if i is not None and (not isinstance(i, int) or i not in range(self.size)):
                    raise DataError(f"{self.folder / name}: eos_token_id: {i!r} is not a token of the tokenizer")
                ids.add(i)
        return (ids | {self._id(self.special.get("eos_token"))}) - {None}

    def _bos_id(self) -> int | None:
        """The token that the tokenizer would put before a text; None for most byte-level tokenizers."""
        bare, dressed = (self.backend.encode("x", add_special_tokens=flag).ids for flag in (False, True))
        return dressed[0] if dressed and dressed[1 : len(bare) + 1] == bare else None

    def _continuing(self) -> tokenizers.Tokenizer:
        """The tokenizer for responses. Sentencepiece-like ones (Llama 2, Mistral) put a space before every text, in one of
        three ways; a response continues a text, so it gets none."""

        def flat(stage: dict) -> list[dict]:
            members = stage.get("normalizers") or stage.get("pretokenizers") or []
            return [part for member in members for part in flat(member)] or [stage]

        spec = json.loads(self.backend.to_str())
        normalizers = flat(spec["normalizer"] or {})
        longer = math.prod(max(1, len(str(part.get("content", "")))) for part in normalizers)
        if longer > 64:  # known ones replace one character by one, or by a few
            raise DataError(f"{self.folder / 'tokenizer.json'}: normalizer: makes a text up to {longer} times as long")
        parts = normalizers + flat(spec["pre_tokenizer"] or {})
        none = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
        prefixing = [part for part in parts if any(part.get(key, off) != off for key, off in none.items())]
        for part in prefixing:
            part |= {key: none[key] for key in none.keys() & part.keys()}
        return tokenizers.Tokenizer.from_str(json.dumps(spec)) if prefixing else self.backend

    def _template_source(self, settings: dict) -> tuple[str, str]:
        """(where it stands, source); the source is "" where there is none."""
        path = self.folder / "chat_template.jinja"
        if path.exists():
            return str(path), read_template(str(path))
        where, source = "tokenizer_config.json", settings.get("chat_template")
        if not source:
            where, source = "chat_template.json", self._json("chat_template.json").get("chat_template") or ""
        if isinstance(source, list):  # several named templates
            named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
            source = named[-1].get("template") if named else None
        where = f"{self.folder / where}: chat_template"
        if not isinstance(source, str):
            raise DataError(f"{where}: expected a string, or a list with one named 'default'")
        return where, source

    def check_fits(self, vocab_size: int) -> None:
        """Raises DataError where a token of the tokenizer has no row in an embedding of `vocab_size`."""
        if self.size > vocab_size:
            raise DataError(f"{self.folder}: the tokenizer has {self.size} tokens, the embedding {vocab_size}")

    def changed_files(self) -> dict[str, str]:
        """Files of the checkpoint, name → text, that must change for others to use it as it was trained: the template
        that was passed instead of its own, and the end of turn that it taught."""
        files = {}
        if self.own_template:
            files["chat_template.jinja"] = self.own_template
        generation = self._json("generation_config.json")
        eos = generation.get("eos_token_id", self._json("config.json").get("eos_token_id"))
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if self.end_id not in eos:
            files["generation_config.json"] = (
                json.dumps(generation | {"eos_token_id": [*eos, self.end_id]}, indent=2) + "\n"
            )
        return files

    # -- the template

    def render(self, conversations: list[tuple[Messages, bool]], places: list[str]) -> list[str]:
        """The text of every conversation (messages, whether to add the generation prompt); `places` are for errors."""
        try:
            return template.render(self.template, self.special, conversations)
        except template.TemplateFailure as e:
            if e.number is None:
                raise DataError(f"{self.template_file}: the chat template does not compile: {e}") from None
            problem = f"the chat template refuses this conversation: {e}"
            raise DataError(f"{places[e.number]}: {problem} ({self.template_file})") from None

    def _learn_end_of_turn(self) -> str:
        """What the template writes behind an assistant's last message; sets `end_id` to the token that opens it.

        Most write the end-of-turn token, some a newline after it, a few nothing at all: then EOS ends the turn."""
        content = "The content of this message."
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": content}]
        [turn] = self.render([(messages, False)], [str(self.folder)])
        tail = turn.rpartition(content)[2]
        with self._library():
            ids = self.backend.encode(tail, add_special_tokens=False).ids
        added = self.backend.get_added_tokens_decoder()
        ends = [i for i in ids if i in self.stop_ids] or [i for i in ids if i in added and added[i].special]
        end = ends[0] if ends else self._id(self.special.get("eos_token"))
        if end is None:
            ending = f"ends a turn with {tail!r}, which holds no special token, and there is no EOS"
            raise DataError(f"{self.folder}: the chat template {ending}")
        self.end_id = end
        self.stop_ids |= {end}
        return tail[max(0, tail.find(self.backend.id_to_token(end))) :]

    # -- encoding

    def prompt_text(self, prompt: str | Messages, where: str) -> str:
        """What the model reads before it answers, generation prompt included."""
        return self.texts([Example(prompt, (), where)])[0][0]

    def texts(self, examples: list[Example]) -> list[tuple[str, list[str]]]:
        """For every example what the model reads before it answers, generation prompt included, and what it would have
        to write then, up to but without the end-of-turn token. A string prompt is one user message where there is a
        template, and itself where there is none."""
        if not self.template:
            for example in examples:
                if not isinstance(example.prompt, str):
                    needs = f"a list of messages needs a chat template, and {self.folder} has none"
                    raise DataError(f"{example.where}: {needs}: pass --chat-template FILE")
            return [(example.prompt, list(example.responses)) for example in examples]
        conversations, places = [], []
        for prompt, responses, where in examples:
            if isinstance(prompt, str):
                # an answer to a transcript is stripped as the turns before it are
                responses = [r.strip() for r in responses] if prompt.endswith(ASSISTANT_MARK) else responses
                prompt = as_messages(prompt)
            conversations.append((prompt, True))
            conversations += [([*prompt, {"role": "assistant", "content": r}], False) for r in responses]
            places += [where] * (1 + len(responses))
        rendered = iter(self.render(conversations, places))
        texts = []
        for example in examples:
            prompt, wholes = next(rendered), list(itertools.islice(rendered, len(example.responses)))
            if not all(whole.startswith(prompt) for whole in wholes):
                problem = "renders the prompt differently once it is answered, so the response cannot be told from it"
                raise DataError(f"{example.where}: the chat template {problem}")
            texts.append((prompt, [whole[len(prompt) :].removesuffix(self.tail) for whole in wholes]))
        return texts

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        with self._library():
            encoded = [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        if self.template or self.bos_id is None:
            return encoded
        return [ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids] for ids in encoded]

    def encode_responses(self, texts: list[str]) -> list[list[int]]:
        with self._library():
            return [e.ids + [self.end_id] for e in self.continuing.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def encode(self, examples: list[Example], max_length: int, max_prompt_length: int, counts: Counter) -> list[Tree]:
        """Trees within `max_length` tokens per path; adds what was cut or dropped, and why, to `counts`."""
        texts = self.texts(examples)
        encoded = iter(self.encode_responses([answer for _, answers in texts for answer in answers]))
        trees = []
        for example, prompt in zip(examples, self.encode_prompts([prompt for prompt, _ in texts])):
            responses = [next(encoded) for _ in example.responses]
            if not prompt:
                counts["dropped: an empty prompt"] += 1
                continue
            if len(prompt) > max_prompt_length:
                bos = prompt[:1] if prompt[0] in (self.bos_id, self._id(self.special.get("bos_token"))) else []
                prompt = bos + prompt[len(prompt) - max_prompt_length + len(bos) :]
                counts["prompts cut at their start"] += 1
            room = max_length - len(prompt)
            counts["responses cut at their end"] += sum(len(r) > room for r in responses)
            responses = [r[:room] for r in responses]
            if len(responses) > 1 and responses[0] == responses[1]:
                counts["dropped: chosen equal to rejected in what is left of them"] += 1
                continue
            trees.append(
                Tree(np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses), example.where)
            )
        return trees


# ---------------------------------------------------------------------------------------------------------------------
# Tokens → micro-batches


def plan(sizes: list[int], ranks: int, budget: int, costs: list[float] | None = None) -> list[list[list[int]]]:
    """Spread one step's trees over ranks and micro-batches: [micro-batch][rank] → indices into `sizes`.

    Every rank gets as many micro-batches as any other, the fewest with which none exceeds `budget` tokens (a tree larger
    than that travels alone), filled dearest first into the one with the least work. A rank may be left with an empty one.
    costs: the work of each tree, in any unit; its number of tokens if absent.

    >>> plan([5, 3, 4, 4], ranks=2, budget=8)
    [[[0, 1], [2, 3]]]
    """
    costs = costs or sizes
    dearest_first = sorted(range(len(sizes)), key=lambda i: -costs[i])
    rounds = max(1, -(-sum(min(size, budget) for size in sizes) // (ranks * budget)))
    while True:
        bins: list[list[int]] = [[] for _ in range(rounds * ranks)]
        work = [0.0] * len(bins)
        for i in dearest_first:
            idlest = work.index(min(work))
            bins[idlest].append(i)
            work[idlest] += costs[i]
        if all(len(trees) <= 1 or sum(sizes[i] for i in trees) <= budget for trees in bins):
            return [[sorted(bins[r * ranks + rank]) for rank in range(ranks)] for r in range(rounds)]
        rounds += 1


def pack(trees: list[Tree]) -> dict[str, np.ndarray]:
    """One stream without padding; each prompt stands in it once. The keys are the parameters of `model.Llama.forward`.

    >>> tree = Tree(np.array([10, 11, 12]), (np.array([20, 21]), np.array([30, 31, 32])), "")
    >>> for name, value in pack([tree]).items(): print(f"{name:9}", value)
    tokens    [10 11 12 20 21 30 31 32]
    positions [0 1 2 3 4 3 4 5]
    key_index [0 1 2 3 4 0 1 2 5 6 7]
    cu_q      [0 5 8]
    cu_k      [ 0  5 11]
    predict   [2 3 2 5 6]
    targets   [20 21 30 31 32]

    The first response's queries share a segment with the prompt's (here: stream 0–4 see 0–4); each further response is
    a segment of its own whose keys are the prompt's and its own (5–7 see 0–2 and 5–7). The prompt's last token predicts
    the first token of every response.
    """
    tokens, positions, key_index, q_lengths, k_lengths, predict, targets = ([] for _ in range(7))
    end = 0  # of the stream so far
    for prompt, responses, where in trees:
        assert len(prompt) and all(map(len, responses)), f"{where}: an empty prompt or response"
        root, p = end, len(prompt)
        tokens.append(prompt)
        positions.append(np.arange(p))
        end += p
        for i, response in enumerate(responses):
            r = len(response)
            tokens.append(response)
            positions.append(np.arange(p, p + r))
            key_index += [np.arange(root, root + p), np.arange(end, end + r)]
            q_lengths.append(r if i else p + r)
            k_lengths.append(p + r)
            predict += [[root + p - 1], np.arange(end, end + r - 1)]
            targets.append(response)
            end += r
    join = lambda parts: np.concatenate(parts).astype(np.int64)
    offsets = lambda lengths: np.cumsum([0, *lengths], dtype=np.int32)
    return {
        "tokens": join(tokens), "positions": join(positions), "key_index": join(key_index),
        "cu_q": offsets(q_lengths), "cu_k": offsets(k_lengths), "predict": join(predict), "targets": join(targets),
    }  # fmt: skip


def batches(count: int, batch_size: int, epochs: int, seed: int, shuffle: bool = True) -> Iterator[np.ndarray]:
    """The indices of every step, in an order that depends on seed and epoch alone; an epoch's last step may be short."""
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)
        yield from (order[i : i + batch_size] for i in range(0, count, batch_size))
