"""Define the two errors that a stranger's files can cause, and what of their text is printed.

`DataError` is about data sets, tokenizers and templates, `CheckpointError` about model folders and
the checkpoints of a run. Commands catch `InputError`, print it as one line and exit with status 1.
"""

import re
import unicodedata


def printable(text: str) -> str:
    r"""Escape what could steer a terminal, such as colours, or turn its text around.

    Line breaks and tabs stay, and so do the joiners that emoji and some scripts need.

    >>> print(printable("\x1b[31mred"))
    \x1b[31mred
    """

    def safe(c: str) -> bool:
        return c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"

    return "".join(c if safe(c) else repr(c)[1:-1] for c in text)


class InputError(ValueError):
    """Reports input that cannot be used. The message names the file, the line and the field.

    The message becomes one line of bounded length, whatever control characters, line breaks or
    megabytes it quotes from a stranger's file.

    Attributes:
        record: the number of the record that it is about, if ranks read different ones.
    """

    record = 0

    def __init__(self, message: str):
        one_line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message[:10000])
        super().__init__(printable(one_line)[:2000])


class DataError(InputError):
    """Reports a data set, a tokenizer or a chat template that cannot be used."""


class CheckpointError(InputError):
    """Reports a model folder, or a checkpoint of a run, that cannot be used."""
