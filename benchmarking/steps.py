"""Training steps timed one by one, and how much of a step a GPU's kernels fill.

The busy share is the time in which at least one kernel runs in a step, read off torch's profiler, over the time that
the same step takes without the profiler, which slows the host and not the kernels.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from floor import synchronise
from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Iterator

# Steps before the clock starts, and repetitions of one step beside the profiled one.
WARM, REPEATS = 2, 3


@dataclass(frozen=True)
class Kernels:
    """What a GPU ran.

    Attributes:
        count: Kernels launched.
        seconds: Time in which at least one of them ran.
    """

    count: int
    seconds: float

    @classmethod
    def of_trace(cls, events: Sequence[dict[str, Any]]) -> Kernels:
        """Read the events of a Chrome trace, times in microseconds; kernels that overlap count once."""
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel")
        covered, until = 0.0, float("-inf")
        for start, end in spans:
            covered += max(0.0, end - max(start, until))
            until = max(until, end)
        return cls(len(spans), covered / 1e6)


@dataclass
class StepTimes:
    """Seconds of a training's steps, each between two moments at which the device has nothing left to do.

    The first steps warm up; the clock runs for `timed` steps, or fewer once `limit` seconds are over. Then follow
    `REPEATS` repetitions of one step, without the profiler, and a last one with it.

    Attributes:
        device: Where the steps run.
        timed: Steps to time.
        limit: Seconds after which no further step is timed.
        seconds: Of each timed step.
        repeated: Of each repetition.
        kernels: Of the last step; None on a CPU, or if the profiler does not work.
    """

    device: torch.device
    timed: int = 20
    limit: float = float("inf")
    seconds: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    kernels: Kernels | None = None

    @property
    def is_over(self) -> bool:
        """Whether enough steps have been timed."""
        return len(self.seconds) >= self.timed or sum(self.seconds) >= self.limit

    @property
    def busy(self) -> float:
        """Share of a step in which a kernel runs; nan if unknown."""
        if self.kernels is None or not self.repeated:
            return float("nan")
        return self.kernels.seconds / statistics.median(self.repeated)

    @contextmanager
    def clock(self, seconds: list[float]) -> Iterator[None]:
        """Add to `seconds` what the block takes."""
        synchronise(self.device)
        started = time.perf_counter()
        yield
        synchronise(self.device)
        seconds.append(time.perf_counter() - started)

    @contextmanager
    def count(self) -> Iterator[None]:
        """Count the kernels of the block."""
        if self.device.type != "cuda":
            yield
            return
        synchronise(self.device)
        # Without the events of the CPU, which would cost more than the step.
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            yield
            synchronise(self.device)
        try:
            self.kernels = read_kernels(profiler)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            print(f"no busy share: {type(error).__name__}: {error}", flush=True)

    def run(self, step: Callable[[Any], object], batches: Sequence[Any], *, warm_up: bool = True) -> None:
        """Warm up on the first batches, then time the others."""
        for batch in batches[:WARM] if warm_up else ():
            step(batch)
        for batch in batches[WARM:]:
            if self.is_over:
                break
            with self.clock(self.seconds):
                step(batch)

    def fill(self, step: Callable[[Any], object], batch: Any) -> None:
        """Repeat a step without and with the profiler."""
        for _ in range(REPEATS):
            with self.clock(self.repeated):
                step(batch)
        with self.count():
            step(batch)


class StepClock(TrainerCallback):
    """Times a training's steps: some to warm up, the timed ones, then repetitions of a step, the last with a profiler.

    Args:
        times: Where the times go.
        warmed: Called before the first timed step.
        timed: Called after the last one.
    """

    def __init__(self, times: StepTimes, warmed: Callable[[], None], timed: Callable[[], None]) -> None:
        self._times, self._warmed, self._timed = times, warmed, timed
        self._number = 0
        self._block: AbstractContextManager[None] | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        repeated = self._number - WARM - self._times.timed
        if self._number < WARM:
            return
        if self._number == WARM:
            self._warmed()
        if repeated < 0:
            self._block = self._times.clock(self._times.seconds)
        elif repeated < REPEATS:
            self._block = self._times.clock(self._times.repeated)
        else:
            self._block = self._times.count()
        self._block.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        if self._block is not None:
            self._block.__exit__(None, None, None)
            self._block = None
        self._number += 1
        if self._number == WARM + len(self._times.seconds) and self._times.is_over:
            self._timed()
            # Over before all steps: the dataset leaves no way to the repetitions but the steps between.
            control.should_training_stop = len(self._times.seconds) < self._times.timed


def read_kernels(profiler: torch.profiler.profile) -> Kernels:
    """The kernels that a profiler saw."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return Kernels.of_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
