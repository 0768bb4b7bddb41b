"""The run folder: settings, metrics, lineage and times as text, results pair by pair as tensors."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evollm.hpo import AnyEvaluation, evaluations_to_bytes
from evollm.tracking.timing import Stopwatch
from evollm.training.callbacks import (
    BaselineScored,
    Callback,
    Checkpointed,
    Evaluated,
    Evolved,
    RunEnded,
    RunStarted,
    StepDone,
)

EVALUATIONS = "evaluations"
FINAL = "final.safetensors"


class RunFolder(Callback):
    """Writes what happens as strict JSON, one line for each event and agent, and evaluations as safetensors.

    `metrics.jsonl` holds `step`, `evaluation` and `end` lines, `lineage.jsonl` one `founders` line and one `evolution`
    line for each generation. Numbers that are not finite are written as the texts "nan", "inf" and "-inf". Each
    evaluation has a file `evaluations/step-000003.safetensors` with what every agent makes of every held-out pair, and
    `final.safetensors` has the same of the final score: `before`, `after` and `runner_up`. `timing.jsonl` holds what
    differs from one run to an equal one: for each event the seconds since the one before, and memory.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._stopwatch: Stopwatch | None = None

    def on_start(self, event: RunStarted) -> None:
        """Create the folder and write the settings; of a resumed run keep what happened up to its checkpoint."""
        (event.run_dir / EVALUATIONS).mkdir(parents=True, exist_ok=True)
        self._folder = event.run_dir
        _replace(event.run_dir / "config.json", (json.dumps(_strict(event.config), indent=2) + "\n").encode())
        for name in ("metrics.jsonl", "lineage.jsonl", "timing.jsonl"):
            self._keep_until(event.step, name)
        self._keep_evaluations_until(event.step)
        if event.step == 0:
            self._append("lineage.jsonl", kind="founders", births=[birth.to_dict() for birth in event.founders])
        self._stopwatch = Stopwatch(on_cuda=str(event.config["device"]).startswith("cuda"))
        self._time("start", event.step)

    def on_baseline(self, event: BaselineScored) -> None:
        """Note the time; the score itself is written at the end."""
        self._time("baseline", 0)

    def on_step(self, event: StepDone) -> None:
        """Write one line for each agent."""
        for index, metrics in event.metrics.items():
            self._append("metrics.jsonl", kind="step", step=event.step, epoch=event.epoch, agent=index, **metrics)
        self._time("step", event.step)

    def on_evaluation(self, event: Evaluated) -> None:
        """Write one line for each agent, and what each makes of each pair."""
        for index, fitness in event.fitnesses.items():
            line: dict[str, Any] = {"step": event.step, "generation": event.generation, "agent": index}
            if index in event.evaluations:
                line |= event.evaluations[index].scores
            self._append("metrics.jsonl", kind="evaluation", **line, fitness=list(fitness), **event.agents[index])
        scored = {f"agent-{index}": evaluation for index, evaluation in event.evaluations.items()}
        self._save(f"{EVALUATIONS}/step-{event.step:06d}.safetensors", scored)
        self._time("evaluation", event.step)

    def on_evolution(self, event: Evolved) -> None:
        """Write the plan."""
        self._append("lineage.jsonl", kind="evolution", step=event.step, **event.plan.to_dict())
        self._time("evolution", event.step)

    def on_checkpoint(self, event: Checkpointed) -> None:
        """Note the time."""
        self._time("checkpoint", event.step)

    def on_end(self, event: RunEnded) -> None:
        """Write the scores, with what they are made of, and the sample answers."""
        found = {"before": event.before, "after": event.after, "runner_up": event.runner_up_score}
        scored = {name: score for name, score in found.items() if score is not None}
        scores = {f"{name}_{key}": value for name, score in scored.items() for key, value in score.scores.items()}
        self._save(FINAL, scored)
        self._append(
            "metrics.jsonl",
            kind="end",
            step=event.step,
            best=event.best.index,
            runner_up=None if event.runner_up is None else event.runner_up.index,
            split=event.split,
            **scores,
            samples=[vars(sample) for sample in event.samples],
        )
        self._time("end", event.step)

    def _time(self, kind: str, step: int) -> None:
        assert self._stopwatch is not None
        self._append("timing.jsonl", kind=kind, step=step, **self._stopwatch.lap())

    def _append(self, name: str, **values: Any) -> None:
        assert self._folder is not None
        try:
            with (self._folder / name).open("a") as file:
                file.write(json.dumps(_strict(values), allow_nan=False) + "\n")
        except OSError as error:
            warnings.warn(f"a line of {name} is lost: {error}; the run goes on", UserWarning, stacklevel=2)

    def _save(self, name: str, evaluations: Mapping[str, AnyEvaluation]) -> None:
        assert self._folder is not None
        if not evaluations:
            return
        try:
            _replace(self._folder / name, evaluations_to_bytes(evaluations))
        except OSError as error:
            warnings.warn(f"{name} is lost: {error}; the run goes on", UserWarning, stacklevel=2)

    def _keep_until(self, step: int, name: str) -> None:
        """Drop lines of later steps, the end of a run that goes on, and a line that was cut short."""
        assert self._folder is not None
        path = self._folder / name
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines(keepends=True):
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if step > 0 and values.get("step", 0) <= step and values["kind"] != "end":
                kept.append(line)
        _replace(path, "".join(kept).encode())

    def _keep_evaluations_until(self, step: int) -> None:
        """Drop files of later steps, the final score of a run that goes on, and files that were cut short."""
        assert self._folder is not None
        (self._folder / FINAL).unlink(missing_ok=True)
        for path in (self._folder / EVALUATIONS).glob("step-*"):
            number = path.stem.removeprefix("step-")
            if path.suffix == ".new" or step == 0 or (number.isdecimal() and int(number) > step):
                path.unlink()


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


def _strict(value: Any) -> Any:
    """The value with every float that JSON has no number for turned into text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
