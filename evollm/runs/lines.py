"""Records of a run as lines of strict JSON: what one failure spoils is one line, and what cannot be written waits."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evollm.errors import CheckpointError
from evollm.own_files import inside, read_bytes, replace_bytes

_NAMED_AT_MOST = 5


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of records, one JSON object with a `kind` in each line.

    A line that is damaged is left out, and a warning names it. So is a last line that was cut short, without a warning:
    it is what a process leaves that is killed.

    Raises:
        CheckpointError: The file is missing or cannot be read.
    """
    try:
        content = read_bytes(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    texts = content.split(b"\n")
    found, damaged = [], []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
                raise ValueError("no record of a run")
            found.append(line)
        except (ValueError, RecursionError):
            if number < len(texts):
                damaged.append(number)
    if damaged:
        listed = ", ".join(map(str, damaged[:_NAMED_AT_MOST])) + (", ..." if len(damaged) > _NAMED_AT_MOST else "")
        warnings.warn(f"{path} is damaged in line {listed}: left out", UserWarning, stacklevel=2)
    return found


def record_line(values: Mapping[str, Any]) -> bytes:
    """A record as its line of strict JSON; numbers that are not finite become the texts "nan", "inf" and "-inf"."""
    return json.dumps(strict(values), allow_nan=False).encode() + b"\n"


def strict(value: Any) -> Any:
    """A nested value with each number that JSON has no word for as a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value


class RecordFiles:
    """The files of a run's records in its folder.

    What cannot be written, since the disk is full for example, is kept in memory and written with the next record. A
    line that could be written in part is taken back, so that it spoils no other.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: dict[str, bytes] = {}
        self._files: dict[str, bytes] = {}
        # Appended to since the last flush.
        self._written: set[str] = set()
        self._warned = False

    def append(self, name: str, **values: Any) -> None:
        """Add a line to a file."""
        self._lines[name] = self._lines.get(name, b"") + record_line(values)
        self._write()

    def replace(self, name: str, content: bytes) -> None:
        """Put content in the place of a file."""
        self._files[name] = content
        self._write()

    def start(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Let a file hold these lines and no other.

        Raises:
            OSError: It cannot be written.
        """
        # A new file: a hard link would lead to somebody else's.
        replace_bytes(inside(self._folder, name), b"".join(map(record_line, lines)))

    def flush(self) -> None:
        """Have everything on disk that has been appended, not only in the system's memory."""
        self._write()
        for name in sorted(self._written):
            try:
                descriptor = os.open(self._folder / name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                self._written.discard(name)
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Write what still waits; a warning says what is lost."""
        self.flush()
        lost = sorted({*self._files, *self._lines})
        if lost:
            warnings.warn(f"{self._folder} lacks the last records of {', '.join(lost)}", UserWarning, stacklevel=3)

    def _write(self) -> None:
        """Write what waits, as far as it can be written."""
        failure = None
        for waiting, write in ((self._files, replace_bytes), (self._lines, _append)):
            for name in list(waiting):
                try:
                    write(inside(self._folder, name), waiting[name])
                    del waiting[name]
                    if waiting is self._lines:
                        # A file that is replaced is on disk already.
                        self._written.add(name)
                except OSError as error:
                    failure = error
        if failure is None:
            self._warned = False
        else:
            self._warn(failure)

    def _warn(self, error: OSError) -> None:
        """Say it once for as long as it lasts."""
        if not self._warned:
            what = "the run goes on, and what is missing is written as soon as there is room"
            warnings.warn(f"records of {self._folder} cannot be written: {error}; {what}", UserWarning, stacklevel=4)
        self._warned = True


def _append(path: Path, content: bytes) -> None:
    """Add content to a file wholly or not at all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, content)
            if written != len(content):
                # The rest would not fit either: the system writes in part when it runs out of room.
                os.write(descriptor, content[written:])
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
