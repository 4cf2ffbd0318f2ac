"""Chat templates: programs that come with a checkpoint, from strangers. They run in a process of their own.

jinja2's immutable sandbox keeps a template away from Python and from the data, but does not bound its work: a macro that
calls itself twice, `10 ** 10 ** 10`, `'%1000000000d' % 1`, a list that holds the one before it twice, forty times over.
No list of forbidden operations is complete, so the limits are the kernel's: CPU time and memory of a child process, which
hold whatever the template does. It is started once, renders for all callers, can write no file, and ends with its parent.

    parent → child   length, marshal of (source, variables, conversations)
    child → parent   for each conversation as it is done: kind, length, text; nothing but bytes and UTF-8
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
from datetime import datetime

SECONDS, SECONDS_EACH = 2, 0.005  # of CPU time for a call, and more for each of its conversations (typical: 0.00003)
MEMORY = 2**29  # bytes of address space, of which Python and jinja2 take a tenth
CHARACTERS = 2**24  # of one rendered conversation
LENGTH = 8  # bytes of a length that goes over the pipe
TEXT, REFUSED, INVALID = b"tri"  # kinds of answers: a rendered text; why the template failed; why it does not compile


class TemplateFailure(Exception):
    """Why a template renders nothing for conversation `number`; None: for none at all, since it does not compile."""

    def __init__(self, why: str, number: int | None):
        super().__init__(why)
        self.number = number


# ---------------------------------------------------------------------------------------------------------------------
# The parent

_child: subprocess.Popen | None = None
_one_at_a_time = threading.Lock()


def render(source: str, variables: dict[str, str], conversations: list[tuple[list[dict], bool]]) -> list[str]:
    """The text of every conversation (messages, whether to add the generation prompt). Raises TemplateFailure."""
    global _child
    with _one_at_a_time:
        if _child is None or _child.poll() is not None:
            _child = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        texts: list[str] = []
        try:
            request = marshal.dumps((source, variables, conversations))
            _child.stdin.write(len(request).to_bytes(LENGTH) + request)
            _child.stdin.flush()
            kind = TEXT
            while kind == TEXT and len(texts) < len(conversations):
                kind, text = _answer(_child.stdout)
                texts.append(text)
        except (OSError, EOFError):
            status = _child.wait()
            why = f"takes more than {SECONDS} seconds" if status == -signal.SIGXCPU else f"ends its process ({status})"
            raise TemplateFailure(why, len(texts)) from None
        except BaseException:  # what is still in the pipe must answer nobody else
            _child.kill()
            _child.wait()
            raise
    if kind != TEXT:
        raise TemplateFailure(texts[-1], None if kind == INVALID else len(texts) - 1)
    return texts


def _answer(pipe) -> tuple[int, str]:
    """One answer of the child; EOFError where it is not whole."""
    head = pipe.read(1 + LENGTH)
    size = int.from_bytes(head[1:])
    text = pipe.read(size) if len(head) == 1 + LENGTH else b""
    if len(head) < 1 + LENGTH or len(text) < size:
        raise EOFError
    return head[0], text.decode()


# ---------------------------------------------------------------------------------------------------------------------
# The child


def compile_template(source: str):
    """The template in jinja2's sandbox, with what transformers gives to chat templates."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}`, with which transformers marks the assistant's text, renders its body."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = NOW.strftime
    # the type itself would bring dict.update along, which changes the data
    environment.globals["dict"] = lambda *items, **more: dict(*items, **more)
    return environment.from_string(source)


NOW = datetime.now()  # the same moment, however long the run


def serve(requests, answers) -> None:
    """Render until the parent is gone."""
    template, of = None, None  # the last one, compiled, and its source
    while size := int.from_bytes(requests.read(LENGTH)):
        source, variables, conversations = marshal.loads(requests.read(size))
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        end = math.ceil(used + SECONDS + SECONDS_EACH * len(conversations))
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        failed = INVALID
        for messages, generation_prompt in conversations:
            try:
                if source != of:
                    template, of = compile_template(source), source
                failed = REFUSED
                text = template.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=generation_prompt, **variables
                )
                if len(text) > CHARACTERS:
                    raise ValueError(f"writes {len(text)} characters, more than {CHARACTERS}")
                kind, text = TEXT, text.encode()
            except Exception as e:  # a template may fail in any way that Python may
                kind, text = failed, (str(e)[:1000] or type(e).__name__).encode(errors="replace")
            answers.write(bytes([kind]) + len(text).to_bytes(LENGTH) + text)
            answers.flush()
            if kind != TEXT:
                break


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    import jinja2.sandbox  # noqa: F401  before the limits: Python may want to write its bytecode

    for what, limit in (("AS", MEMORY), ("CORE", 0), ("FSIZE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
    serve(sys.stdin.buffer, sys.stdout.buffer)
    os._exit(0)
