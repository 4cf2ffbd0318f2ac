"""Render chat templates, which are programs by strangers, in a process of their own.

jinja2's immutable sandbox keeps a template away from Python and from the data, but it does not
limit the work. Four ways to exceed any machine are a macro that calls itself twice,
`10 ** 10 ** 10`, `'%1000000000d' % 1`, and a list that holds the previous list twice, forty times
over. No list of forbidden operations is complete, so the kernel limits CPU time and memory of a
child process. The child starts once, renders for all callers, can write no file and ends with its
parent.

    parent → child   length, marshal of (source, variables, conversations, date)
    child → parent   per conversation, once rendered: kind, length, UTF-8 text

This file imports nothing of ours, because the child runs it as a script and must start fast. The
caller is formats/tokenizer.py.
"""

import json
import marshal
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from typing import IO, Any

# CPU seconds per request, and in addition per conversation, which takes about 0.00003
SECONDS, SECONDS_EACH = 2, 0.005
MEMORY = 2**29  # bytes of address space; Python and jinja2 take a tenth
CHARACTERS = 2**24  # per rendered conversation
LENGTH = 8  # bytes of a length sent through the pipe
TEXT, REFUSED, INVALID = range(3)  # an answer: a rendered text, or why there is none

# (messages, whether to add the generation prompt)
Conversations = list[tuple[list[dict], bool]]


class TemplateFailure(Exception):
    """Says why a template cannot render a conversation.

    number: the conversation's index; None if the template does not even compile.
    """

    def __init__(self, why: str, number: int | None):
        super().__init__(why)
        self.number = number


# --------------------------------------------------------------------------------------------------
# The parent


def today() -> str:
    """Return the day, YYYY-MM-DD."""
    return datetime.now().date().isoformat()


_child: subprocess.Popen | None = None
_one_at_a_time = threading.Lock()


def render(
    source: str, variables: dict[str, str], conversations: Conversations, date: str | None = None
) -> list[str]:
    """Return the rendered text of every conversation, in order.

    `source` is the template in jinja2's language, `variables` are the special tokens that it may
    use by name. `date` is what `strftime_now` tells, YYYY-MM-DD; by default today.

    Raises:
        TemplateFailure: the template does not compile, fails, or exceeds a limit.
    """
    with _one_at_a_time:
        child, requests, answers = _running_child()
        texts: list[str] = []
        try:
            request = marshal.dumps((source, variables, conversations, date))
            requests.write(len(request).to_bytes(LENGTH) + request)
            requests.flush()
            kind = TEXT
            while kind == TEXT and len(texts) < len(conversations):
                kind, text = _read_answer(answers)
                texts.append(text)
        except (OSError, EOFError):
            status = child.wait()
            why = f"its process ended ({status})"
            if status == -signal.SIGXCPU:
                why = f"takes more than {cpu_seconds(len(conversations)):g} seconds of CPU time"
            raise TemplateFailure(why, len(texts)) from None
        except BaseException:  # such as Ctrl-C
            child.kill()  # the next caller must not get the rest of these answers
            child.wait()
            raise
    if kind != TEXT:
        raise TemplateFailure(texts[-1], None if kind == INVALID else len(texts) - 1)
    return texts


def cpu_seconds(conversations: int) -> float:
    """Return the CPU time that a request may take; the child rounds it up to whole seconds."""
    return SECONDS + SECONDS_EACH * conversations


def _running_child() -> tuple[subprocess.Popen, IO[bytes], IO[bytes]]:
    """Return the child process and its two pipes; start it if there is none."""
    global _child
    if _child is None or _child.poll() is not None:
        # -P keeps the folder of this file off the child's sys.path
        _child = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    assert _child.stdin and _child.stdout
    return _child, _child.stdin, _child.stdout


def _read_answer(pipe: IO[bytes]) -> tuple[int, str]:
    """Read one answer as (kind, text). Raises EOFError if it is incomplete."""
    head = pipe.read(1 + LENGTH)
    size = int.from_bytes(head[1:])
    text = pipe.read(size) if len(head) == 1 + LENGTH else b""
    if len(head) < 1 + LENGTH or len(text) < size:
        raise EOFError
    return head[0], text.decode()


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
    now = datetime.fromisoformat(date or today())
    environment.globals["strftime_now"] = now.strftime
    environment.globals["dict"] = new_dict
    return environment.from_string(source)


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Render requests until the parent closes the pipe.

    A template that fails ends its request: its answer is the last one.
    """
    template: Any = None  # of the previous request, which usually had the same
    compiled = None  # its source and date
    while size := int.from_bytes(requests.read(LENGTH)):
        source, variables, conversations, date = marshal.loads(requests.read(size))
        _allow_cpu_seconds(cpu_seconds(len(conversations)))
        failure = INVALID
        for messages, generation_prompt in conversations:
            try:
                if compiled != (source, date):
                    template, compiled = compile_template(source, date), (source, date)
                failure = REFUSED
                text = _render_one(template.render, messages, generation_prompt, variables)
                kind = TEXT
            except Exception as e:  # a template may fail in any way that Python may
                kind = failure
                text = (str(e)[:1000] or type(e).__name__).encode(errors="replace")
            answers.write(bytes([kind]) + len(text).to_bytes(LENGTH) + text)
            answers.flush()
            if kind != TEXT:
                break


def _allow_cpu_seconds(seconds: float) -> None:
    """Let this process use `seconds` more of CPU time, rounded up; then SIGXCPU ends it."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used + seconds), resource.RLIM_INFINITY))


def _render_one(
    render: Callable[..., str], messages: list[dict], generation_prompt: bool, variables: dict
) -> bytes:
    """Return one conversation's text in UTF-8. Raises ValueError if it is too long."""
    text = render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=generation_prompt,
        **variables,
    )
    if len(text) > CHARACTERS:
        raise ValueError(f"writes {len(text)} characters, more than {CHARACTERS}")
    return text.encode()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    import jinja2.sandbox  # noqa: F401  before the limits, because Python may write its bytecode

    for what, limit in (("AS", MEMORY), ("CORE", 0), ("FSIZE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
    serve(sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)  # Python's clean-up is of no use, and slow if a template has left many objects
