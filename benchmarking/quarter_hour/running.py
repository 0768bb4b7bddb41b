"""Parts of a run, each in a process of its own and under its own time limit, so that none can lose another's results.

This module knows nothing but the standard library: whoever waits for the parts starts at once and cannot crash with
them.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from result_lines import append, read

# A part that would have less time than this is not begun.
_SHORTEST = 3.0
_LINES_OF_LOG = 12


class UnavailableError(RuntimeError):
    """What a part needs is not there; the other parts go on."""


@dataclass(frozen=True)
class Part:
    """One part of a run.

    Attributes:
        name: For people, and for the rows that it writes.
        target: `module:function`, called with a `Place` and the arguments.
        expected: Seconds that it should take on an H100.
        limit: Seconds after which it is killed.
        arguments: More keyword arguments.
    """

    name: str
    target: str
    expected: float
    limit: float
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a part finds and leaves things.

    Attributes:
        part: Its name.
        run: Name of the run that it belongs to, and of its files.
        out: Folder of the results.
        keep: Folder that outlasts the call.
        toy: Everything at a tiny size on the CPU.
    """

    part: str
    run: str
    out: Path
    keep: Path
    toy: bool

    @property
    def results(self) -> Path:
        """The file of rows of this run."""
        return self.out / f"{self.run}.jsonl"

    @property
    def log(self) -> Path:
        """The file of all that the parts of this run print."""
        return self.out / f"{self.run}.log"

    def write(self, kind: str, **row: Any) -> None:
        """Add a row to the results."""
        append(self.results, {"run": self.run, "part": self.part, "kind": kind, **row})


def run_parts(parts: Sequence[Part], place: Place, seconds: float, preloaded: Sequence[str] = ()) -> None:
    """Run parts one after the other; every row and what became of each part goes to the console and the results.

    While a part runs, the process of the next one imports what it needs, which takes some 15 s, and waits.

    Args:
        parts: In order of importance: what no time is left for is left out.
        place: Where results go; each part gets one of its own.
        seconds: For all of them.
        preloaded: Modules that parts are forked with rather than load themselves. On a card there must be none: a
            process that has touched CUDA cannot be forked.
    """
    context: BaseContext = multiprocessing.get_context("spawn")
    if preloaded:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preloaded))
    until = time.monotonic() + seconds
    place.out.mkdir(parents=True, exist_ok=True)
    waiting: list[_Waiting] = []
    try:
        for number, part in enumerate(parts):
            waiting += [_Waiting.start(one, place, context) for one in parts[number + len(waiting) : number + 2]]
            _run_part(part, replace(place, part=part.name), waiting.pop(0), until)
    finally:
        for one in waiting:
            one.process.kill()


@dataclass(frozen=True)
class _Waiting:
    """The process of a part that has not begun yet.

    Attributes:
        process: It imports, and waits.
        limit: Says that it may begin, and how many seconds it has.
    """

    process: BaseProcess
    limit: Connection

    @classmethod
    def start(cls, part: Part, place: Place, context: BaseContext) -> _Waiting:
        """Start the process."""
        read_end, limit = context.Pipe(duplex=False)
        target = replace(place, part=part.name)
        process = context.Process(target=_inside, args=(part, target, read_end))  # type: ignore[attr-defined]
        process.start()
        return cls(process, limit)


def _run_part(part: Part, place: Place, waiting: _Waiting, until: float) -> None:
    """Run one part, which has until its limit or until a moment of `time.monotonic`."""
    process = waiting.process
    limit = min(part.limit, until - time.monotonic())
    if limit < min(_SHORTEST, part.limit):
        process.kill()
        _finish(place, "not begun: no time is left", 0.0)
        return
    print(f"--- {part.name}: at most {limit:.0f} s", flush=True)
    shown, begun = len(read(place.results)), place.log.stat().st_size if place.log.exists() else 0
    started = time.monotonic()
    try:
        waiting.limit.send(limit)
        while process.is_alive() and (left := started + limit - time.monotonic()) > 0:
            process.join(min(0.2, left))
            shown = _show(place.results, shown)
    finally:
        was_alive = process.is_alive()
        process.kill()
        process.join(10)
    _show(place.results, shown)
    seconds = time.monotonic() - started
    if was_alive:
        status = f"killed after {limit:.0f} s" if limit >= 1 else f"killed after {limit:.2f} s"
    elif process.exitcode:
        status = f"failed (exit code {process.exitcode})"
    else:
        status = "done"
    _finish(place, status, seconds)
    if status != "done":
        print("\n".join(_tail(place.log, begun)), flush=True)


def brief(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    told = {key: value for key, value in row.items() if key not in ("run", "part", "kind", "machine", "date")}
    return f"{row['part']}: {row['kind']}: " + ", ".join(f"{key} {_short(value)}" for key, value in told.items())


def _inside(part: Part, place: Place, allowed: Connection) -> None:
    """What runs in a part's process: it imports at once, and begins when it is told how long it may take."""
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
    faulthandler.enable()
    try:
        function = _imported(part.target)
        limit = allowed.recv()
        print(f"--- {part.name}")
        # So that the log says where a part hung.
        faulthandler.dump_traceback_later(max(0.01, limit - 1))
        function(place, **part.arguments)
    except UnavailableError as error:
        place.write("skipped", why=str(error))
    except BaseException:
        traceback.print_exc()
        _leave(1)
    _leave(0)


def _imported(target: str) -> Callable[..., None]:
    """The function of a part; one that cannot be imported fails when its turn has come."""
    module, name = target.split(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except Exception as error:
        failure = error

    def fail(place: Place, **arguments: Any) -> None:
        raise failure

    return fail


def _leave(code: int) -> None:
    """End the process at once: what a library does at exit may hang, and the results are on the disk."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _finish(place: Place, status: str, seconds: float) -> None:
    place.write("status", status=status, seconds=seconds)
    print(f"--- {place.part}: {status}, {seconds:.1f} s", flush=True)


def _show(path: Path, shown: int) -> int:
    rows = read(path)
    for row in rows[shown:]:
        print(brief(row), flush=True)
    return len(rows)


def _tail(log: Path, start: int) -> list[str]:
    if not log.exists():
        return []
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", "replace").splitlines()[-_LINES_OF_LOG:]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_short(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


def plan(parts: Sequence[Part], seconds: float) -> str:
    """What is going to run, and how long it may take."""
    lines = [f"{'part':<34}{'expected s':>11}{'limit s':>9}"]
    lines += [f"{part.name:<34}{part.expected:>11.0f}{part.limit:>9.0f}" for part in parts]
    expected = sum(part.expected for part in parts)
    return "\n".join([*lines, f"{'together':<34}{expected:>11.0f}{seconds:>9.0f}"])
