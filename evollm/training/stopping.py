"""Stopping a run with SIGTERM or Ctrl-C, after the current step is done and saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self


class StopSignals:
    """Context manager that records a SIGTERM or Ctrl-C inside its block; a second signal stops at once.

    Python handles signals in the main thread only, so in any other thread no signal is recorded.

    Args:
        told: Whether to print that the run will stop.

    Attributes:
        received: Number of the signal, None if there was none.
    """

    def __init__(self, *, told: bool = True) -> None:
        self._told = told
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
        if self._told:
            print("evollm: saving after this step, then stopping; once more stops at once", file=sys.stderr, flush=True)

    def stop(self, number: int, going_on: str = "") -> None:
        """End the program as the signal would have ended it.

        Args:
            number: Number of the signal.
            going_on: How to resume the run; for SIGTERM printed to stderr unless empty, as an exit status has no text.

        Raises:
            KeyboardInterrupt: The signal was Ctrl-C.
            SystemExit: The signal was SIGTERM; the exit status is 143, as in shells.
        """
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if going_on:
            print(f"evollm: stopped; {going_on}", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGTERM)
