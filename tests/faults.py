"""File operations that fail, or kill the process, at the n-th call; those relative to an open folder (dir_fd) too."""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPERATIONS: list[tuple[Any, str]] = [
    (Path, "write_bytes"),
    (Path, "write_text"),
    *((os, name) for name in ("open", "write", "fsync", "ftruncate", "mkdir", "rename", "replace", "unlink", "rmdir")),
    (builtins, "open"),
    (io, "open"),
]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


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
def broken(
    number: int | None, how: Callable[[], None] = fail, *, last: int | None = None, below: Path | None = None
) -> Iterator[Count]:
    """Break operation `number` inside the block, counted from 0; a write is broken after half of its data.

    Args:
        number: None: none, they are only counted.
        how: What happens instead.
        last: Break all up to this one; -1: all that follow.
        below: Count only operations whose path is below this folder; of others, and of open files, none.
    """
    count = Count()
    # Whether an operation is being made, which may be made of others.
    inside: list[str] = []

    def is_due() -> bool:
        if number is None or count.calls < number:
            return False
        return count.calls == number if last is None else last == -1 or count.calls <= last

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in OPERATIONS:
            patch.setattr(owner, name, _counted(getattr(owner, name), name, count, is_due, how, below, inside))
        yield count


def _counted(
    function: Any,
    name: str,
    count: Count,
    is_due: Callable[[], bool],
    how: Callable[[], None],
    below: Path | None,
    inside: list[str],
) -> Any:
    def operation(*args: Any, **kwargs: Any) -> Any:
        if inside or not _counts(name, args, kwargs) or (below is not None and not _is_below(args, kwargs, below)):
            return function(*args, **kwargs)
        inside.append(name)
        try:
            return break_or_do(*args, **kwargs)
        finally:
            inside.pop()

    def break_or_do(*args: Any, **kwargs: Any) -> Any:
        due = is_due()
        count.calls += 1
        if due:
            if name.startswith("write"):
                path, data, *rest = args
                function(path, data[: len(data) // 2], *rest, **kwargs)
            how()
        return function(*args, **kwargs)

    return operation


def _counts(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes something on disk."""
    if name != "open":
        return True
    how = args[1] if len(args) > 1 else kwargs.get("mode", kwargs.get("flags", "r"))
    return bool(how & _WRITES) if isinstance(how, int) else bool(set(how) & set("wax+"))


def _is_below(args: tuple[Any, ...], kwargs: dict[str, Any], folder: Path) -> bool:
    """Whether a call is about a file below a folder, by its path or by the file that is open."""
    target = args[0]
    at = kwargs.get("dir_fd") or kwargs.get("src_dir_fd")
    if isinstance(target, int):
        path = os.readlink(f"/proc/self/fd/{target}")
    else:
        path = os.path.join(os.readlink(f"/proc/self/fd/{at}") if at is not None else os.getcwd(), os.fspath(target))
    return Path(path).is_relative_to(folder)
