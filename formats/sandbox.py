"""Run chat templates, tokenizers and parquet files, which strangers made, in limited processes.

A template is a program, and a tokenizer.json is one, too. Some that exceed any machine are a macro
that calls itself twice, `10 ** 10 ** 10`, a list that holds the previous list twice, forty times
over, a decoder that replaces each "e" by ten, eight times over, and a regular expression that
backtracks. No list of forbidden operations is complete, so the kernel limits CPU time and memory of
a child process: one for templates, in jinja2's immutable sandbox, one for tokenizers, and one for
the parquet files of a data set, which may unpack to far more than their size. A child can write no
file and ends with its parent. The parent limits how much a child may answer.

    parent → child   length, marshal of (program or None for the last one, call, items, CPU seconds)
    child → parent   per item, once it is done: kind, length, bytes

This file imports nothing of ours, because the child runs it as a script and must start fast. The
callers are formats/tokenizer.py and formats/records.py.
"""

import array
import contextlib
import importlib
import json
import marshal
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import IO, Any

# CPU seconds of a request, beside the child's own: an item takes about 0.00003, a byte 0.0000006
SECONDS_EACH, SECONDS_PER_BYTE = 0.005, 4e-6
REQUEST = 2**22  # bytes of the items in one request, unless a single item is larger
GROWTH = 64  # bytes of answers per byte of items, beside the child's own `room`
MOST_TOKENS = 2**20  # the library walks all ids up to the last one, which may be four billion
LENGTH = 8  # bytes of a length sent through the pipe
ANSWER, REFUSED, INVALID = range(3)  # an answer, or why there is none

# (messages, whether to add the generation prompt)
Conversations = list[tuple[list[dict], bool]]
# a loaded program: it takes the name of a call and the items, and yields an answer for each item
Program = Callable[[str, list], Iterator[bytes]]


class SandboxFailure(Exception):
    """Says why a program cannot answer.

    number: the item's index; None if the program does not even load.
    """

    def __init__(self, why: str, number: int | None):
        super().__init__(why)
        self.number = number


def today() -> str:
    """Return the day, YYYY-MM-DD."""
    return datetime.now().date().isoformat()


# --------------------------------------------------------------------------------------------------
# The parent


class Sandbox:
    """Owns a child process for one kind of program, a key of `LOADERS`.

    memory: bytes of data that the child may hold.
    seconds: CPU time of a request that asks for nothing.
    room: bytes that it may answer.
    """

    def __init__(self, kind: str, memory: int, seconds: float, room: int):
        self.kind, self.memory, self.seconds, self.room = kind, memory, seconds, room
        self.child: subprocess.Popen | None = None
        self._loaded: tuple | None = None  # the child's program
        self._one_at_a_time = threading.Lock()

    def ask(self, program: tuple, call: str, items: Iterable) -> list[bytes]:
        """Return the program's answer to every item, in order. Items are what marshal can write.

        Raises:
            SandboxFailure: the program does not load, fails, or exceeds a limit.
        """
        answers: list[bytes] = []
        with self._one_at_a_time:
            try:
                for batch in _batches(map(marshal.dumps, items)):
                    self._request(program, call, batch, answers)
            except SandboxFailure:
                self._loaded = None
                raise
            except BaseException:  # such as Ctrl-C
                self.end()  # the next caller must not get the rest of these answers
                raise
        return answers

    def _request(self, program: tuple, call: str, batch: list[bytes], answers: list[bytes]) -> None:
        """Append the answers to one request to `answers`. Raises SandboxFailure."""
        requests, pipe = self._pipes()
        news, self._loaded = None if program == self._loaded else program, program
        size = sum(map(len, batch))
        work = size + sum(len(part) for part in news or () if isinstance(part, bytes))
        seconds = self.seconds + SECONDS_EACH * len(batch) + SECONDS_PER_BYTE * work
        room, done = self.room + GROWTH * size, len(answers) + len(batch)
        try:
            request = marshal.dumps((news, call, batch, seconds))
            requests.write(len(request).to_bytes(LENGTH) + request)
            requests.flush()
            while len(answers) < done:
                kind, length = pipe.read(1), int.from_bytes(_read(pipe, LENGTH))
                if (room := room - length) < 0:
                    self.end()
                    raise SandboxFailure(f"writes more than {GROWTH} times as much", len(answers))
                answer = _read(pipe, length)
                if kind[0] != ANSWER:
                    number = None if kind[0] == INVALID else len(answers)
                    raise SandboxFailure(answer.decode(errors="replace"), number)
                answers.append(answer)
        except (OSError, EOFError):
            assert self.child
            why = self.child.wait()
            limits = f"{seconds:.3g} seconds of CPU time or {self.memory / 2**30:g} GiB of memory"
            number = None if news else len(answers)
            raise SandboxFailure(f"takes more than {limits} (its process ended: {why})", number)

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """Return the pipes to the child and from it; start the child if there is none."""
        if self.child is None or self.child.poll() is not None:
            self._loaded = None
            # -P keeps the folder of this file off the child's sys.path
            self.child = subprocess.Popen(
                [sys.executable, "-P", __file__, self.kind, str(self.memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert self.child.stdin and self.child.stdout
        return self.child.stdin, self.child.stdout

    def end(self) -> None:
        """Kill the child; the next request starts another."""
        if self.child:
            self.child.kill()
            self.child.wait()


TEMPLATES = Sandbox("template", memory=2**29, seconds=2, room=2**26)
TOKENIZERS = Sandbox("tokenizer", memory=2**32, seconds=10, room=2**20)


def render(
    source: str, variables: dict[str, str], conversations: Conversations, date: str | None = None
) -> list[str]:
    """Return the rendered text of every conversation, in order.

    `source` is the template in jinja2's language, `variables` are the special tokens that it may
    use by name. `date` is what `strftime_now` tells, YYYY-MM-DD; by default today.

    Raises:
        SandboxFailure: the template does not compile, fails, or exceeds a limit.
    """
    answers = TEMPLATES.ask((source, variables, date), "render", conversations)
    return [answer.decode() for answer in answers]


def _batches(items: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Split items into requests of at most `REQUEST` bytes; a larger item gets its own."""
    batch: list[bytes] = []
    size = 0
    for item in items:
        if batch and size + len(item) > REQUEST:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item)
    if batch:
        yield batch


def _read(pipe: IO[bytes], size: int) -> bytes:
    """Read `size` bytes. Raises EOFError if the pipe ends before."""
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


# --------------------------------------------------------------------------------------------------
# The child


def compile_template(source: str, date: str | None):
    """Compile a template in jinja2's sandbox, with everything that transformers offers to one.

    The clock stands at the start of `date`, so that a run and its resumption tell the same time.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Render the body of `{% generation %}…{% endgeneration %}` as if the tags were absent.

        transformers marks the assistant's text with them.
        """

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def new_dict(*items, **more):  # the type itself would offer dict.update, which changes the data
        return dict(*items, **more)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    del environment.filters["random"], environment.globals["lipsum"]  # other tokens in every run
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.fromisoformat(date or today()).strftime
    environment.globals["dict"] = new_dict
    return environment.from_string(source)


def load_template(source: str, variables: dict[str, str], date: str | None) -> Program:
    """Return a program that renders conversations to text in UTF-8."""
    template = compile_template(source, date)

    def run(call: str, conversations: list) -> Iterator[bytes]:
        for messages, generation_prompt in conversations:
            text = template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **variables,
            )
            yield text.encode()

    return run


def load_tokenizer(source: bytes) -> Program:
    """Return a program that works with the tokenizer.json `source`. Its calls:

    encode, encode_response   text → ids as int32
    decode                    (ids, whether to leave out special tokens) → text in UTF-8
    token_to_id, id_to_token  one or the other → JSON
    describe                  None → JSON: size, bos_id, ids of special tokens, added tokens by text
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_buffer(source)
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # BPE-dropout draws other tokens in every run
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > MOST_TOKENS:
        raise ValueError(f"a token has the id {size - 1}, too large for any vocabulary")
    encoders = {"encode": backend, "encode_response": _without_prefix_space(backend)}

    def describe() -> dict:
        """Find the facts that callers need; BOS is what goes before a text, if anything does."""
        bare, whole = (backend.encode("x", add_special_tokens=flag).ids for flag in (False, True))
        bos = whole[0] if whole and whole[1 : len(bare) + 1] == bare else None
        added = backend.get_added_tokens_decoder()
        special = [i for i, token in added.items() if token.special]
        flags = ["lstrip", "rstrip", "single_word"]
        if backend.normalizer is not None:  # else `normalized` changes nothing
            flags.append("normalized")
        tokens = {
            token.content: {"id": i} | {flag: getattr(token, flag) for flag in flags}
            for i, token in added.items()
        }
        return {"size": size, "bos_id": bos, "special": special, "added": tokens}

    def run(call: str, items: list) -> Iterator[bytes]:
        if call in encoders:
            for encoding in encoders[call].encode_batch_fast(items, add_special_tokens=False):
                yield array.array("i", encoding.ids).tobytes()
        elif call == "decode":
            for ids, bare in items:
                yield backend.decode(ids, skip_special_tokens=bare).encode()
        elif call == "describe":
            yield json.dumps(describe()).encode()
        else:
            yield from (json.dumps(getattr(backend, call)(item)).encode() for item in items)

    return run


def _without_prefix_space(backend):
    """Return the tokenizer for responses, which puts no space before a text.

    Tokenizers like sentencepiece (Llama 2, Mistral) add one, in one of three ways. A response
    continues a text, so it must not get one.
    """

    def flat(stage: dict) -> list[dict]:
        members = stage.get("normalizers") or stage.get("pretokenizers") or []
        return [part for member in members for part in flat(member)] or [stage]

    spec = json.loads(backend.to_str())
    parts = flat(spec["normalizer"] or {}) + flat(spec["pre_tokenizer"] or {})
    off = {"prepend": "", "prepend_scheme": "never", "add_prefix_space": False}
    prefixing = [p for p in parts if any(p.get(key, value) != value for key, value in off.items())]
    for part in prefixing:
        part |= {key: off[key] for key in off.keys() & part.keys()}
    return type(backend).from_str(json.dumps(spec)) if prefixing else backend


def load_parquet(path: str, first: int, rows: int) -> Program:
    """Return a program that answers the next `rows` rows from row `first` (0-based) on, as marshal.

    Rows that are not needed are None. The answer after the last rows is empty. Text, numbers,
    booleans, lists and structs stay what they are; times, decimals and the like become text. A
    column that text cannot show, such as images, has its type in place of its values, such as
    "<struct<bytes: binary, path: string>>".
    """
    from pyarrow import ArrowException, parquet, string, struct, types
    from pyarrow import list_ as list_of

    def plain(kind):
        """Return the type that a column of this type is cast to."""
        if types.is_struct(kind):
            return struct([field.with_type(plain(field.type)) for field in kind])
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return list_of(kind.value_field.with_type(plain(kind.value_type)))
        if types.is_dictionary(kind):
            return plain(kind.value_type)
        good = "boolean", "integer", "float32", "float64", "string", "large_string", "null"
        return kind if any(getattr(types, f"is_{name}")(kind) for name in good) else string()

    def values(column) -> list:
        wanted = plain(column.type)
        try:
            return (column if column.type == wanted else column.cast(wanted)).to_pylist()
        except ArrowException:
            return [f"<{column.type}>" if value.is_valid else None for value in column]

    def batches() -> Iterator:
        row = 0
        for batch in file.iter_batches(rows, use_threads=False):
            if row + len(batch) > first:
                yield batch.slice(max(0, first - row))
            row += len(batch)

    file = parquet.ParquetFile(path, pre_buffer=False)
    source = batches()

    def run(call: str, items: list) -> Iterator[bytes]:
        for needed in items:
            batch = next(source, None)
            columns = [values(column) for column in batch.columns] if batch and needed else []
            names = batch.schema.names if batch else []
            rows = [dict(zip(names, row)) for row in zip(*columns)]
            yield marshal.dumps(rows if needed or not batch else [None] * len(batch))

    return run


LOADERS: dict[str, Callable[..., Program]]
LOADERS = {"template": load_template, "tokenizer": load_tokenizer, "parquet": load_parquet}
LIBRARIES = {"template": "jinja2.sandbox", "tokenizer": "tokenizers", "parquet": "pyarrow.parquet"}


def serve(load: Callable[..., Program], requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until the parent closes the pipe.

    A program that fails ends its request: why it failed is the last answer.
    """
    run: Any = None
    while size := int.from_bytes(requests.read(LENGTH)):
        program, call, items, seconds = marshal.loads(requests.read(size))
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        # beyond the soft limit, SIGXCPU ends this process
        set_limit(resource.RLIMIT_CPU, math.ceil(used + seconds), resource.RLIM_INFINITY)
        kind = INVALID
        try:
            if program:
                run = load(*program)
            kind = REFUSED
            for answer in run(call, [marshal.loads(item) for item in items]):
                _send(answers, ANSWER, answer)
        except BaseException as e:  # a panic of the tokenizers library is not even an Exception
            _send(answers, kind, (str(e)[:1000] or type(e).__name__).encode(errors="replace"))


def _send(pipe: IO[bytes], kind: int, answer: bytes) -> None:
    pipe.write(bytes([kind]) + len(answer).to_bytes(LENGTH) + answer)
    pipe.flush()


def set_limit(what: int, soft: int, hard: int) -> None:
    """Set a limit of this process, as far as the hard limit that it was started with allows."""
    allowed = resource.getrlimit(what)[1]
    if allowed != resource.RLIM_INFINITY:
        soft, hard = (
            allowed if limit == resource.RLIM_INFINITY else min(limit, allowed)
            for limit in (soft, hard)
        )
    resource.setrlimit(what, (soft, hard))


if __name__ == "__main__":
    # The parent handles what the terminal or a job manager sends; this process ends with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    kind, memory = sys.argv[1], int(sys.argv[2])
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others reserve more than they use
    with contextlib.suppress(ImportError):  # before the limits: Python may write its bytecode
        importlib.import_module(LIBRARIES[kind])

    # not the address space, of which threads reserve much that they never use
    for what, limit in (("DATA", memory), ("CORE", 0), ("FSIZE", 0)):
        set_limit(getattr(resource, f"RLIMIT_{what}"), limit, limit)
    serve(LOADERS[kind], sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)  # Python's clean-up is of no use, and slow if a program has left many objects
