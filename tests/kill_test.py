"""Kill a run again and again, go on each time as its messages say, and compare its end with that of one never killed.

A population of four trains on a small model, with evaluations, evolutions and a checkpoint after each step. A quarter
of the kills comes at a random moment, the others in the middle of a file operation: one of the first, of the last, or
any. Compared are the adapters, optimizer states, generators, lineage and metrics; nothing else may be left behind, and
no run may be stuck, so that neither the command that began it nor a resume goes on.

    python tests/kill_test.py --kills 200
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import broken, die
from small_run import LIBRARIES, digest, train

AIMS = ("moment", "first", "any", "last")
# File operations at the beginning of a run, before its first checkpoint is there, and at its end.
FEW = 60


def train_and_die(folder: Path, die_at: int | None) -> None:
    """A run that dies at a file operation of its folder, counted from 0; None: not by itself."""
    train(folder, nullcontext() if die_at is None else broken(die_at, die, below=folder.parent))


def count_operations(folder: Path, counted: Any, **changes: Any) -> None:
    """How many file operations a whole run makes."""
    with broken(None, below=folder.parent) as count:
        train(folder, nullcontext(), **changes)
    counted.value = count.calls


@dataclass
class Result:
    """What has come of the kills.

    Attributes:
        runs: Runs that were brought to their end.
        kills: By what they aimed at.
        mismatches: Runs whose end differed.
        stuck: Runs that ended by themselves with an error.
        litter: Names of what was left behind.
    """

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    mismatches: int = 0
    stuck: int = 0
    litter: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.mismatches or self.stuck or self.litter)


def kill_and_compare(kills: int, folder: Path, seed: int = 0) -> Result:
    """Kill runs until there were so many kills."""
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    # The process that forks finds no modules of the tests.
    context.set_forkserver_preload(LIBRARIES)
    total = context.Value("i", 0)
    # By then it has imported them.
    _finish(context.Process(target=int))
    start = time.perf_counter()
    _finish(context.Process(target=count_operations, args=(folder / "whole" / "run", total)))
    duration = time.perf_counter() - start
    expected = digest(folder / "whole" / "run")
    result = Result()
    while result.kills.total() < kills:
        run = folder / f"killed-{result.runs}" / "run"
        while True:
            aim = rng.choice(AIMS) if result.kills.total() < kills else None
            places = {"first": range(FEW), "any": range(total.value), "last": range(total.value - FEW, total.value)}
            die_at = rng.choice(places[aim]) if aim in places else None
            process = context.Process(target=train_and_die, args=(run, die_at))
            process.start()
            process.join(rng.uniform(0, duration) if aim == "moment" else None)
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            if process.exitcode == -signal.SIGKILL:
                result.kills[str(aim)] += 1
                continue
            break
        result.runs += 1
        if process.exitcode == 0:
            result.mismatches += digest(run) != expected
            result.litter += [str(path) for path in run.parent.rglob(".*") if path.name != ".lock"]
        else:
            result.stuck += 1
    return result


def _finish(process: Any) -> None:
    process.start()
    process.join()
    assert process.exitcode == 0


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = kill_and_compare(options.kills, Path(name), options.seed)
    aims = ", ".join(f"{result.kills[aim]} {aim}" for aim in AIMS)
    print(f"{result.kills.total()} kills ({aims}) over {result.runs} runs:")
    print(f"{result.mismatches} ended differently, {result.stuck} were stuck, {len(result.litter)} things left behind")
    print(*result.litter[:5], sep="\n")
    sys.exit(not result.is_good)


if __name__ == "__main__":
    main()
