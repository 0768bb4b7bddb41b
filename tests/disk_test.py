"""Make every write, fsync, rename and unlink of a run fail, once and for good, and see what the run ends with.

A population of two trains on a small model, with evaluations, evolutions and a checkpoint after each step. Then there
is room again, and the run goes on as its messages say; its end must have the bits of a run that always had room. Where
there was no room for a single checkpoint, nothing can go on: the best agent must lie where the message says.

    python tests/disk_test.py --every 1
    python tests/disk_test.py --tmpfs 40 80 160 320 640

`--tmpfs` runs on file systems of so many KiB instead, which are then made larger; it needs the right to mount.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from faults import broken, fail
from kill_test import count_operations
from small_run import LIBRARIES, digest, train

from evollm import EvoLLMError
from evollm.checkpoints.steps import newest_population
from evollm.report import read_run

STEPS = 3
SHORT = {"population": 2, "max_steps": STEPS, "evo_steps": 1, "keep_last": 1, "num_sample_answers": 0}
# How a run may end: by itself, or refused in one line.
GOOD = ("ended", "refused")


def elsewhere(folder: Path) -> Path:
    """Where a run saves its best agent if there is no room for it."""
    return folder.parent.parent / f"elsewhere-{folder.parent.name}"


def attempt(folder: Path, number: int | None, last: int | None, said: Any) -> None:
    """A run in which operations fail; says how it ended."""
    elsewhere(folder).mkdir(exist_ok=True)
    tempfile.tempdir = str(elsewhere(folder))
    room = nullcontext() if number is None else broken(number, fail, last=last, below=folder.parent)
    try:
        train(folder, room, **SHORT)
        said.put("ended")
    except EvoLLMError as error:
        said.put("refused" if "\n" not in str(error) else f"refused in several lines: {error}")
    except Exception as error:  # What a user would see as a traceback.
        said.put(f"{type(error).__name__}: {error}")


class Trials:
    """Runs, each in a process of its own, and how they ended."""

    def __init__(self, folder: Path) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LIBRARIES)
        total = self.context.Value("i", 0)
        process = self.context.Process(target=count_operations, args=(folder / "counted" / "run", total), kwargs=SHORT)
        process.start()
        process.join()
        self.total = int(total.value)
        self.expected = digest(folder / "counted" / "run", STEPS)
        self.ends: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self, folder: Path, number: int | None = None, last: int | None = None) -> str:
        """One attempt."""
        said = self.context.Queue()
        process = self.context.Process(target=attempt, args=(folder, number, last, said))
        process.start()
        end = str(said.get())
        process.join()
        return end

    def judge(self, folder: Path, what: str, first: str) -> None:
        """Go on with a run that ended like this, now that there is room, and look at what it ends with."""
        self.ends[first] += 1
        again = self.run(folder)
        fault = "" if first in GOOD else first
        if (first, again) == ("ended", "refused") and newest_population(folder / "checkpoints") is None:
            found = [*elsewhere(folder).glob("*/attributes.pt"), *folder.glob("elite/attributes.pt")]
            fault += "" if len(found) == 1 and read_run(folder).ended is not None else " no best agent"
        elif again != "ended":
            fault += f" then {again}"
        elif digest(folder, STEPS) != self.expected:
            fault += " other bits"
        elif read_run(folder).ended is None or not (folder / "elite" / "attributes.pt").is_file():
            fault += " no end"
        if fault:
            self.faults.append(f"{what}: {fault}")


def fail_every(trials: Trials, folder: Path, start: int, every: int) -> None:
    """Each operation once, and from each on for good."""
    for number in range(start, trials.total, every):
        for mode, last in (("once", None), ("for good", -1)):
            run = folder / f"{mode}-{number}" / "run"
            trials.judge(run, f"operation {number} {mode}", trials.run(run, number, last))


def fill(trials: Trials, folder: Path, sizes: Iterable[int]) -> None:
    """On file systems of these sizes, in KiB."""
    for size in sizes:
        place = folder / f"tmpfs-{size}"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], check=True)
        try:
            first = trials.run(place / "run")
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            trials.judge(place / "run", f"{size} KiB", first)
        finally:
            subprocess.run(["umount", place], check=True)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try every n-th operation")
    parser.add_argument("--start", type=int, default=0, help="begin with this operation")
    parser.add_argument("--tmpfs", type=int, nargs="+", metavar="KIB", help="sizes of file systems")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        trials = Trials(Path(name))
        if options.tmpfs:
            fill(trials, Path(name), options.tmpfs)
        else:
            fail_every(trials, Path(name), options.start, options.every)
    ends = ", ".join(f"{count} {end}" for end, count in trials.ends.most_common())
    print(f"{trials.total} operations in a whole run; {trials.ends.total()} runs without room: {ends}")
    print(f"{len(trials.faults)} of them went wrong", *trials.faults, sep="\n")
    sys.exit(bool(trials.faults))


if __name__ == "__main__":
    main()
