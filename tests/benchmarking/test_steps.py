"""What the GPU benchmarks compute from what they time, on a CPU and on traces written by hand."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch
from floor import Costs
from gpu import LORA, TOY, random_model
from result_lines import append, read
from steps import REPEATS, WARM, Kernels, StepClock, StepTimes
from synthetic import make_population

CPU = torch.device("cpu")


def event(start: float, duration: float, category: str = "kernel") -> dict[str, object]:
    return {"cat": category, "ts": start, "dur": duration}


def test_kernels_that_overlap_count_once_and_what_is_no_kernel_not_at_all() -> None:
    # Two that overlap, one inside another, one apart; an annotation and a copy over all of it.
    trace = [event(0, 10), event(5, 10), event(6, 2), event(100, 5)]
    trace += [event(0, 1000, "gpu_user_annotation"), event(200, 50, "gpu_memcpy"), {"name": "metadata"}]
    assert Kernels.of_trace(trace) == Kernels(count=4, seconds=20e-6)
    assert Kernels.of_trace([]) == Kernels(count=0, seconds=0.0)


def test_the_busy_share_is_that_of_the_same_step_without_the_profiler() -> None:
    times = StepTimes(CPU, seconds=[9.0], repeated=[0.4, 0.5, 7.0], kernels=Kernels(3, 0.25))
    assert times.busy == 0.5
    assert math.isnan(StepTimes(CPU, repeated=[0.4]).busy), "no kernels were counted"


def test_steps_are_timed_after_those_that_warm_up() -> None:
    gone: list[int] = []
    times = StepTimes(CPU, timed=3)
    times.run(gone.append, range(WARM + 3))
    assert (gone, len(times.seconds)) == (list(range(WARM + 3)), 3)


def test_no_step_is_timed_after_the_limit() -> None:
    gone: list[int] = []

    def step(number: int) -> None:
        gone.append(number)
        time.sleep(0.02)

    times = StepTimes(CPU, timed=50, limit=0.03)
    times.run(step, range(WARM + 50))
    assert len(times.seconds) < 5
    assert gone == list(range(WARM + len(times.seconds)))


def drive(clock: StepClock, steps: int, seconds: float = 0.0) -> int:
    """Call it as a trainer would; how many steps were taken."""
    control = SimpleNamespace(should_training_stop=False)
    for number in range(steps):
        clock.on_step_begin(None, None, control)
        time.sleep(seconds)
        clock.on_step_end(None, None, control)
        # As between the steps of a trainer: this must not count.
        time.sleep(0.05 if seconds else 0)
        if control.should_training_stop:
            return number + 1
    return steps


def test_a_trainer_is_timed_by_its_steps_and_not_by_what_lies_between_them() -> None:
    said: list[str] = []
    times = StepTimes(CPU, timed=2)
    clock = StepClock(times, warmed=lambda: said.append("warmed"), timed=lambda: said.append("timed"))
    steps = WARM + 2 + REPEATS + 1
    assert drive(clock, steps, 0.001) == steps
    assert said == ["warmed", "timed"]
    assert (len(times.seconds), len(times.repeated)) == (2, REPEATS)
    assert max(times.seconds) < 0.05


def test_a_trainer_stops_at_the_limit() -> None:
    said: list[str] = []
    times = StepTimes(CPU, timed=20, limit=0.001)
    clock = StepClock(times, warmed=lambda: None, timed=lambda: said.append("timed"))
    assert drive(clock, 100, 0.002) == WARM + 1
    assert (len(times.seconds), said) == (1, ["timed"])


def test_the_floor_counts_the_same_with_and_without_an_agent() -> None:
    model = random_model(TOY["toy"], 512, CPU, torch.float32)
    before = Costs.of_network(model, LORA.r)
    (agent,) = make_population(model, 1, gradient_checkpointing=False)
    assert before == Costs.of(agent)
    assert before == Costs.of_network(random_model(TOY["toy"], 512, torch.device("meta"), torch.float32), LORA.r)


def test_results_outlast_a_line_that_was_cut_off(tmp_path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    append(path, {"rate": 1.5, "busy": float("nan"), "errors": {"dq": float("inf")}})
    append(path, {"rate": 2})
    with path.open("a") as file:
        file.write('{"rate": 3')
    assert read(path) == [{"rate": 1.5, "busy": None, "errors": {"dq": None}}, {"rate": 2}]
    assert read(tmp_path / "other.jsonl") == []


def test_a_step_that_fails_is_not_timed() -> None:
    times = StepTimes(CPU)
    with pytest.raises(ValueError, match="no"), times.clock(times.seconds):
        raise ValueError("no")
    assert times.seconds == []
