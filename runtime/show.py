"""`train.py --show N`: pairs as the model will see them, without loading weights.

Use it to find a doubled BOS, a missing end of turn or an answer that was cut. It prints the text of
every token that training uses, special tokens included, and marks the tokens that are predicted.
`data.py` explains the rules.
"""

import itertools
import sys
from collections import Counter

from data import Pair
from formats import hub, records
from formats.authors import encoder
from formats.checkpoint import COMPANIONS, check_folder
from formats.errors import DataError, printable
from formats.schemas import Dropped, parse_record
from formats.tokenizer import Tokenizer, read_template
from methods.objectives import OBJECTIVES
from runtime.processes import print0
from runtime.settings import Settings

UNLIMITED = 2**40  # tokens: encoded with this limit, nothing is cut
DIM, GREEN, RED, UNDERLINE, RESET = (f"\x1b[{n}m" for n in (2, 32, 31, 4, 0))
PARTS = ("prompt", DIM), ("chosen", GREEN + UNDERLINE), ("rejected", RED + UNDERLINE)


def show(settings: Settings) -> None:
    """Print the pairs of the first `settings.show` records of the training data.

    Raises:
        DataError, CheckpointError: data or tokenizer cannot be used.
    """
    folder = hub.local_path(settings.model, "model", COMPANIONS)  # everything but the weights
    check_folder(folder, COMPANIONS)
    tokenizer = Tokenizer(folder, read_template(settings.chat_template), settings.date)
    show_records(settings, tokenizer, settings.show)


def show_records(settings: Settings, tokenizer: Tokenizer, count: int) -> None:
    """Print the pairs of the first `count` records of the training data.

    Raises:
        DataError: a record cannot be used, and `--skip-unusable` is 0.
    """
    encode = encoder(settings.like_authors)
    limits = settings.max_length, settings.max_prompt_length
    paired = OBJECTIVES[settings.objective].responses == 2
    columns = settings.named_columns
    for where, record in itertools.islice(records.read_records(settings.data), count):
        counts: Counter = Counter()
        try:
            kind, example = parse_record(record, where, paired, columns)
            pairs = encode([example], tokenizer, *limits, counts)
        except Dropped as e:
            print0(printable(f"{where}: dropped: {e}\n"))
            continue
        except DataError as e:
            if not settings.skip_unusable:
                raise
            print0(f"dropped: unusable: {e}\n")
            continue
        whole = encode([example], tokenizer, UNLIMITED, UNLIMITED - 1, Counter())
        if not pairs:
            print0(f"{where}: {'; '.join(reason for reason, n in counts.items() if n)}\n")
            continue
        print0("\n".join([printable(f"{where}: {kind}"), *lines_of(pairs[0], whole[0], tokenizer)]))


def lines_of(pair: Pair, whole: Pair, tokenizer: Tokenizer) -> list[str]:
    """Return the lines for one pair: per part its length, what was cut, and its text.

    On a terminal, parts have colours and predicted tokens are underlined. Elsewhere, ⟦ and ⟧ stand
    around the predicted tokens.
    """
    lines = []
    parts = zip(PARTS, (pair.prompt, *pair.responses), (whole.prompt, *whole.responses))
    for (name, colour), ids, uncut in parts:
        cut = f", {len(uncut) - len(ids)} cut at its {'start' if name == 'prompt' else 'end'}"
        lines += [f"  {name}, {len(ids)} tokens{cut if len(ids) < len(uncut) else ''}"]
        text = printable(tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False))
        if on_terminal():
            lines += [f"    {colour}{line}{RESET}" for line in text.split("\n")]
        else:
            text = text if name == "prompt" else f"⟦{text}⟧"
            lines += [f"    {line}" for line in text.split("\n")]
    return [*lines, ""]


def on_terminal() -> bool:
    """Return True if colours would be seen."""
    return sys.stdout.isatty()
