"""How far something long has come: when to say so, and how much time is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO, TypeVar

T = TypeVar("T")

# Whether a person is told how far rows have come; off for scripts, which print what they want.
_TOLD: ContextVar[bool] = ContextVar("evollm_told", default=False)

# Seconds between two lines in a log, as long as not much time has passed.
INTERVAL = 30.0
# Afterwards a line comes whenever the time has grown by this share.
_GROWTH = 0.02
# A share of the whole after which a line comes earlier, and the fewest seconds between two of these.
_SHARE, _AT_LEAST = 0.05, 5.0
# Seconds between two changes of a line in a terminal, and before the first one.
_REFRESH, _WAIT = 0.2, 1.0
_MINUTE, _HOUR = 60, 3600


class Pace:
    """Says when a line about the progress is due: now and then, never for each of two steps in a row.

    Args:
        total: Steps in all.
        done: Steps done already.
        clock: Gives the time in seconds.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._first = self._said = done
        self._begun = self._said_at = clock()

    def is_due(self, done: int) -> bool:
        """Whether to say now that so many steps are done; if so, it counts as said."""
        now = self._clock()
        since = now - self._said_at
        due = since >= max(INTERVAL, _GROWTH * (now - self._begun))
        due = due or (since >= _AT_LEAST and done - self._said >= _SHARE * self._total)
        if not due or done - self._said < (1 if self._said == self._first else 2) or done >= self._total:
            return False
        self._said, self._said_at = done, now
        return True

    def left(self, done: int) -> str:
        """About how much time the rest takes at the pace so far, in words; "" while nothing is known."""
        if done <= self._first:
            return ""
        seconds = (self._clock() - self._begun) / (done - self._first) * (self._total - done)
        return f"about {spoken(seconds)} left"


def spoken(seconds: float) -> str:
    """A duration for a person: `40 s`, `3 min`, `1 h 20 min`."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    hours, rest = divmod(minutes, _HOUR // _MINUTE)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


@contextmanager
def progress_told(told: bool = True) -> Iterator[None]:
    """Have `counted` tell, or not tell, how far it is inside the block."""
    token = _TOLD.set(told)
    try:
        yield
    finally:
        _TOLD.reset(token)


def counted(items: Iterable[T], total: int, what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[T]:
    """Pass items on, and tell whoever waits how far they have come, on standard error.

    Nothing is told of what takes a moment. In a terminal one line changes; elsewhere, such as in a file, there is a new
    line now and then.

    Args:
        items: What is passed on.
        total: How many there are.
        what: What is being done, and to what, such as "tokenising rows".
        clock: Gives the time in seconds.
    """
    stream = sys.stderr
    if not _TOLD.get() or stream is None:
        yield from items
        return
    pace = Pace(total, clock=clock)
    changes = _Line(stream, clock) if stream.isatty() else None
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if changes is not None:
                changes.show(lambda done=done: _told(pace, what, done, total))  # type: ignore[misc]
            elif pace.is_due(done):
                print(_told(pace, what, done, total), file=stream, flush=True)
    finally:
        if changes is not None:
            changes.remove()


def _told(pace: Pace, what: str, done: int, total: int) -> str:
    return f"{what}: {done} of {total}, {pace.left(done)}"


class _Line:
    """A line of a terminal that changes, and is gone in the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._next = clock() + _WAIT
        self._shown = False

    def show(self, text: Callable[[], str]) -> None:
        """Show a text, unless the last one is recent."""
        now = self._clock()
        if now >= self._next:
            self._next = now + _REFRESH
            self._stream.write(f"\r{text()}\x1b[K")
            self._stream.flush()
            self._shown = True

    def remove(self) -> None:
        """Leave the line empty."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
