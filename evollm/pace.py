"""Progress of long loops: when to print a line, and how much time is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

# Whether `counted` prints; off by default, since scripts print their own output.
_PRINTS: ContextVar[bool] = ContextVar("evollm_prints_progress", default=False)

# Seconds between two lines of a log; in long runs it is this share of the time so far, if that is more.
INTERVAL, _SHARE_OF_TIME = 30.0, 0.02
# A line comes earlier if this share of all steps is done since the last line, but not within so many seconds.
_SHARE_OF_STEPS, _MIN_SECONDS = 0.05, 5.0
# Seconds between two updates of a line in a terminal, and before the first one.
_REFRESH, _WAIT = 0.2, 1.0
_MINUTE, _HOUR = 60, 3600


class Pace:
    """Decides when a line about the progress is due, never for two steps in a row, and estimates the time left.

    Args:
        total: Number of all steps.
        done: Steps done already.
        clock: Returns the time in seconds.
    """

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._first = self._printed = done
        self._begun = self._printed_at = clock()

    def is_due(self, done: int) -> bool:
        """Whether to print a line after so many steps; if so, the line counts as printed."""
        now = self._clock()
        since = now - self._printed_at
        due = since >= max(INTERVAL, _SHARE_OF_TIME * (now - self._begun))
        due = due or (since >= _MIN_SECONDS and done - self._printed >= _SHARE_OF_STEPS * self._total)
        if not due or done - self._printed < (1 if self._printed == self._first else 2) or done >= self._total:
            return False
        self._printed, self._printed_at = done, now
        return True

    def left(self, done: int) -> str:
        """Return the estimated time for the remaining steps as text; "" before the first step."""
        if done <= self._first:
            return ""
        seconds = (self._clock() - self._begun) / (done - self._first) * (self._total - done)
        return f"about {spoken(seconds)} left"


def spoken(seconds: float) -> str:
    """Return a duration as text: `40 s`, `3 min` or `1 h 20 min`."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / _MINUTE)
    hours, rest = divmod(minutes, _HOUR // _MINUTE)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


@contextmanager
def progress_told(told: bool = True) -> Iterator[None]:
    """Turn the output of `counted` on or off inside the block."""
    token = _PRINTS.set(told)
    try:
        yield
    finally:
        _PRINTS.reset(token)


def counted(items: Iterable[T], total: int, what: str, clock: Callable[[], float] = time.monotonic) -> Iterator[T]:
    """Yield the items, and print the progress to standard error if they take more than a second.

    In a terminal one line is updated; elsewhere, such as in a file, new lines are printed from time to time.

    Args:
        items: The items.
        total: Number of items.
        what: The subject of the line, such as "rows tokenised".
        clock: Returns the time in seconds.
    """
    stream = sys.stderr
    if not _PRINTS.get() or stream is None:
        yield from items
        return
    pace, in_terminal, next_update, has_line = Pace(total, clock=clock), stream.isatty(), clock() + _WAIT, False
    try:
        for done, item in enumerate(items, start=1):
            yield item
            if in_terminal:
                now = clock()
                if now >= next_update:
                    next_update, has_line = now + _REFRESH, True
                    stream.write(f"\r{what}: {done} of {total}, {pace.left(done)}\x1b[K")
                    stream.flush()
            elif pace.is_due(done):
                print(f"{what}: {done} of {total}, {pace.left(done)}", file=stream, flush=True)
    finally:
        if has_line:
            stream.write("\r\x1b[K")
            stream.flush()
