"""Define the two errors that a stranger's files can cause: one base class, two kinds.

`DataError` is about data sets, tokenizers and templates, `CheckpointError` about model folders and
the checkpoints of a run. Commands catch `InputError`, print it as one line and exit with status 1.
"""

import re


class InputError(ValueError):
    """Reports input that cannot be used. The message names the file, the line and the field.

    The message becomes one line of bounded length, whatever control characters, line breaks or
    megabytes it quotes from a stranger's file.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message)[:2000])


class DataError(InputError):
    """Reports a data set, a tokenizer or a chat template that cannot be used."""


class CheckpointError(InputError):
    """Reports a model folder, or a checkpoint of a run, that cannot be used."""
