"""Stopping a run from outside: SIGTERM and Ctrl-C wait until a step is done and saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self


class StopSignals:
    """Remembers a SIGTERM or Ctrl-C that comes inside the block; a second one stops at once.

    Python delivers signals to the main thread only: in another one nothing is remembered.

    Attributes:
        received: Number of the signal, None while there was none.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        print("evollm: saving after this step, then stopping; once more stops at once", file=sys.stderr, flush=True)

    def stop(self, number: int, going_on: str = "") -> None:
        """End the program as the signal would have.

        Args:
            number: Of the signal.
            going_on: How to go on with the run, printed unless it is empty: SIGTERM cannot tell whoever sent it.

        Raises:
            KeyboardInterrupt: It was Ctrl-C.
            SystemExit: It was SIGTERM; with the exit status that shells give to it.
        """
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if going_on:
            print(f"evollm: stopped; {going_on}", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)
