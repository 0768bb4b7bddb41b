"""File operations that fail, or kill the process, at the n-th call."""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPERATIONS = [
    (Path, "write_bytes"),
    (Path, "write_text"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (os, "fsync"),
    (builtins, "open"),
]


def fail() -> None:
    """As on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> None:
    """As a kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Count:
    """How many operations there were."""

    def __init__(self) -> None:
        self.calls = 0


@contextmanager
def broken(number: int | None, how: Callable[[], None] = fail) -> Iterator[Count]:
    """Break operation `number` inside the block, counted from 0; a write is broken after half of its data."""
    count = Count()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, _counted(getattr(owner, name), name, count, number, how))
        yield count


def _counted(function: Any, name: str, count: Count, number: int | None, how: Callable[[], None]) -> Any:
    def operation(*args: Any, **kwargs: Any) -> Any:
        if name == "open" and "w" not in "".join(map(str, args[1:2])):
            return function(*args, **kwargs)
        calls = count.calls
        count.calls += 1
        if calls == number:
            if name.startswith("write_"):
                path, data, *rest = args
                function(path, data[: len(data) // 2], *rest, **kwargs)
            how()
        return function(*args, **kwargs)

    return operation
