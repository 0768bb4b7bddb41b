"""The records of a run as lines of strict JSON: a damaged line is skipped, a line that cannot be written is kept."""

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

_MAX_LISTED = 5


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of records, one JSON object with a `kind` in each line.

    A damaged line is left out, and a warning gives its number. An incomplete last line is left out without a warning,
    since a killed process leaves one.

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
        listed = ", ".join(map(str, damaged[:_MAX_LISTED])) + (", ..." if len(damaged) > _MAX_LISTED else "")
        warnings.warn(f"{path} is damaged in line {listed}: left out", UserWarning, stacklevel=2)
    return found


def record_line(values: Mapping[str, Any]) -> bytes:
    """Return a record as a line of strict JSON; NaN and infinities become "nan", "inf" and "-inf"."""
    return json.dumps(strict(values), allow_nan=False).encode() + b"\n"


def strict(value: Any) -> Any:
    """Return a nested value in which NaN and infinities, which strict JSON lacks, are strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value


class RecordFiles:
    """Writes the records of a run into its folder.

    Content that cannot be written, for example since the disk is full, is kept in memory and written with the next
    record. A line that was written in part is removed again, so that the next line does not continue it.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Content that is not written yet, by file: lines to append, and whole files.
        self._lines: dict[str, bytes] = {}
        self._files: dict[str, bytes] = {}
        # Files with lines that are written, but perhaps not on disk yet.
        self._unflushed: set[str] = set()
        self._has_warned = False

    def append(self, name: str, **values: Any) -> None:
        """Append a line to a file."""
        self._lines[name] = self._lines.get(name, b"") + record_line(values)
        self._write()

    def replace(self, name: str, content: bytes) -> None:
        """Write a file, or replace it."""
        self._files[name] = content
        self._write()

    def start(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of these lines, or replace it.

        Raises:
            OSError: The file cannot be written.
        """
        # A new file, since an existing one could be a hard link to a file outside the run folder.
        replace_bytes(inside(self._folder, name), b"".join(map(record_line, lines)))

    def flush(self) -> None:
        """Write all appended lines to disk with fsync."""
        self._write()
        for name in sorted(self._unflushed):
            try:
                descriptor = os.open(self._folder / name, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                self._unflushed.discard(name)
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Write the content that is still in memory; a warning names the files for which this fails."""
        self.flush()
        lost = sorted({*self._files, *self._lines})
        if lost:
            warnings.warn(f"{self._folder} lacks the last records of {', '.join(lost)}", UserWarning, stacklevel=3)

    def _write(self) -> None:
        """Write the content in memory, as far as possible."""
        failure = None
        for pending, write in ((self._files, replace_bytes), (self._lines, _append)):
            for name in list(pending):
                try:
                    write(inside(self._folder, name), pending[name])
                    del pending[name]
                    if pending is self._lines:  # replace_bytes has called fsync already
                        self._unflushed.add(name)
                except OSError as error:
                    failure = error
        if failure is None:
            self._has_warned = False
        else:
            self._warn(failure)

    def _warn(self, error: OSError) -> None:
        """Warn at the first of several failures in a row."""
        if not self._has_warned:
            what = "the run goes on, and what is missing is written as soon as there is room"
            warnings.warn(f"records of {self._folder} cannot be written: {error}; {what}", UserWarning, stacklevel=4)
        self._has_warned = True


def _append(path: Path, content: bytes) -> None:
    """Append all of the content to a file, or nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, content)
            if written != len(content):
                # A write is partial when the disk becomes full; this one then raises the error.
                os.write(descriptor, content[written:])
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
