"""The run folder: `config.json`, `metrics.jsonl`, `lineage.jsonl`."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from evollm.training.callbacks import Callback, Evaluated, Evolved, RunEnded, RunStarted, StepDone


class RunFolder(Callback):
    """Writes what happens as strict JSON, one line for each event and agent.

    `metrics.jsonl` holds `step`, `evaluation` and `end` lines, `lineage.jsonl` one `founders` line and one `evolution`
    line for each generation. Numbers that are not finite are written as the texts "nan", "inf" and "-inf".
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def on_start(self, event: RunStarted) -> None:
        """Create the folder and write the settings; of a resumed run keep what happened up to its checkpoint."""
        event.run_dir.mkdir(parents=True, exist_ok=True)
        self._folder = event.run_dir
        _replace(event.run_dir / "config.json", json.dumps(_strict(event.config), indent=2) + "\n")
        for name in ("metrics.jsonl", "lineage.jsonl"):
            self._keep_until(event.step, name)
        if event.step == 0:
            self._append("lineage.jsonl", kind="founders", births=[birth.to_dict() for birth in event.founders])

    def on_step(self, event: StepDone) -> None:
        """Write one line for each agent."""
        for index, metrics in event.metrics.items():
            self._append("metrics.jsonl", kind="step", step=event.step, epoch=event.epoch, agent=index, **metrics)

    def on_evaluation(self, event: Evaluated) -> None:
        """Write one line for each agent."""
        for index, fitness in event.fitnesses.items():
            line: dict[str, Any] = {"step": event.step, "generation": event.generation, "agent": index}
            if index in event.evaluations:
                line |= event.evaluations[index].scores
            self._append("metrics.jsonl", kind="evaluation", **line, fitness=list(fitness), **event.agents[index])

    def on_evolution(self, event: Evolved) -> None:
        """Write the plan."""
        self._append("lineage.jsonl", kind="evolution", step=event.step, **event.plan.to_dict())

    def on_end(self, event: RunEnded) -> None:
        """Write the two scores and the sample answers."""
        scores = {
            f"{name}_{key}": value
            for name, score in (("before", event.before), ("after", event.after))
            if score is not None
            for key, value in score.scores.items()
        }
        samples = [vars(sample) for sample in event.samples]
        self._append(
            "metrics.jsonl",
            kind="end",
            step=event.step,
            best=event.best.index,
            split=event.split,
            **scores,
            samples=samples,
        )

    def _append(self, name: str, **values: Any) -> None:
        assert self._folder is not None
        try:
            with (self._folder / name).open("a") as file:
                file.write(json.dumps(_strict(values), allow_nan=False) + "\n")
        except OSError as error:
            warnings.warn(f"a line of {name} is lost: {error}; the run goes on", UserWarning, stacklevel=2)

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
        _replace(path, "".join(kept))


def _replace(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def _strict(value: Any) -> Any:
    """The value with every float that JSON has no number for turned into text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
