"""Show how far a command is: as a line that changes on a terminal, as a line now and then in a log.

Everything that may take more than two seconds is a `Progress`, and one may contain others. It goes
to stderr, since stdout may be data. Only rank 0 shows anything.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TextIO

from formats.errors import printable

DELAY = 2.0  # seconds until a terminal shows what has not ended by then
FIRST, EVERY = 5.0, 30.0  # seconds until the first line in a log, and from one line to the next
CLEAR = "\r\x1b[K"

_open: list["Progress"] = []  # each contains the next
_lock = threading.RLock()
_watching = False
_drawn = False  # the terminal's last line is ours


class Progress:
    """Iterates over items, or surrounds a block that calls `update`, and shows how far it is.

    A thread shows it, so a single long item is visible, too.

    Args:
        what: what is done, as in "reading weights".
        items: what to iterate over; None for a block.
        total: the number of units; by default the number of items, if they have one.
        first: units that were done earlier.
        each: units that an item stands for.
    """

    def __init__(
        self,
        what: str,
        items: Iterable | None = None,
        total: int | None = None,
        first: int = 0,
        each: int = 1,
    ):
        self.what, self.items, self.each = printable(what), items, each
        if total is None and isinstance(items, Sized):
            total = first + len(items)
        self.total, self.first, self.done = total, first, first
        self.note = ""  # more to say, if there is room

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.items or ():
                yield item
                self.update(self.each)

    def __enter__(self) -> "Progress":
        self.started = self.updated = time.monotonic()
        self.next_line = self.started + FIRST
        if os.environ.get("RANK", "0") == "0":
            with _lock:
                _open.append(self)
                _start_watching()
        return self

    def __exit__(self, *error: object) -> None:
        with _lock:
            if self in _open:
                del _open[_open.index(self) :]
            if not _open:
                _clear()

    def update(self, count: int = 1) -> None:
        """Count units as done."""
        self.done += count
        self.updated = time.monotonic()

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.what} {self.done:,}" if self.done else self.what
        return f"{self.what} {min(self.done, self.total):,} of {self.total:,}"

    def times(self) -> str:
        """Return the time that has passed, and an estimate of the time that is left."""
        now, new = time.monotonic(), self.done - self.first
        passed, since = now - self.started, now - self.updated
        each = (self.updated - self.started) / new if new else 0
        left = ((self.total or 0) - self.done) * each - since
        return f"{_clock(passed)}, {_clock(left)} left" if left > 0 else _clock(passed)


def write(text: str, file: TextIO | None = None) -> None:
    """Print a line on stdout or to `file`, above the line that changes."""
    with _lock:
        drawn = _drawn
        _clear()
        print(text, file=file, flush=True)
        if drawn:
            _show()


def on_terminal() -> bool:
    """Return True if a person sees the line that changes."""
    return sys.stderr.isatty()


def _start_watching() -> None:
    global _watching
    if not _watching:
        _watching = True
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """Show what is open, twice a second; end when nothing is."""
    global _watching
    while True:
        time.sleep(0.5)
        with _lock:
            if not _open:
                _watching = False
                return
            _show()


def _show() -> None:
    global _drawn
    now, outer = time.monotonic(), _open[0]
    inner = [str(p) for p in _open[1:] if now >= p.started + DELAY]
    notes = [p.note for p in _open if p.note]
    text = "; ".join([f"{outer}, {outer.times()}", *inner, *notes])
    if on_terminal():
        if now >= outer.started + DELAY:
            columns = shutil.get_terminal_size().columns
            _write(CLEAR + (text if len(text) < columns else text[: columns - 2] + "…"))
            _drawn = True
    elif now >= outer.next_line:
        outer.next_line = now + EVERY
        _write(text + "\n")


def _clear() -> None:
    global _drawn
    if _drawn:
        _drawn = False
        _write(CLEAR)


def _write(text: str) -> None:
    """Write to stderr. What nobody can read must not cost the work that it tells of."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _clock(seconds: float) -> str:
    """Return minutes and seconds, and hours if there are any.

    >>> _clock(75), _clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
