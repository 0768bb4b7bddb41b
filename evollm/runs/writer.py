"""The callback that writes the run folder: settings, metrics, lineage and timings as JSON, evaluations as tensors."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from evollm.errors import CheckpointError
from evollm.hpo import AnyEvaluation
from evollm.own_files import inside, remove_leftovers, replace_bytes
from evollm.runs.evaluations import evaluations_to_bytes, read_evaluations
from evollm.runs.events import (
    BaselineScored,
    Callback,
    Checkpointed,
    Evaluated,
    Evolved,
    Placed,
    RunEnded,
    RunStarted,
    StepDone,
    WorkerLoss,
)
from evollm.runs.folder import CONFIG, EVALUATIONS, FINAL, LINEAGE, METRICS, SPENT, TIMING, WORKERS
from evollm.runs.lines import RecordFiles, read_lines, strict

_EVALUATION_FILE = re.compile(r"step-(\d{6,})\.safetensors")


class RunFolder(Callback):
    """Writes the events of a run as strict JSON, one line for each event and agent, and evaluations as safetensors.

    `metrics.jsonl` has `step`, `evaluation` and `end` lines, `lineage.jsonl` one `founders` line and one `evolution`
    line for each generation. NaN and infinities are written as the strings "nan", "inf" and "-inf". Each evaluation has
    a file `evaluations/step-000003.safetensors` with the numbers of every agent and held-out row, and
    `final.safetensors` has those of the final scores: `before`, `after` and `runner_up`. `timing.jsonl` has, for each
    event, the seconds since the event before and the memory; only this file differs between two equal runs, and
    `workers.jsonl`, which a run over several workers has: where these are, which members they hold from which step on
    (`members`), and which were lost at what cost (`loss`).
    `spent.jsonl` has, for each evaluation and for the end, what the run has spent so far; see `Spent`.

    Args:
        cuda_peak: Returns the peak of the allocated CUDA memory in bytes; called only in a run on CUDA.
    """

    def __init__(self, cuda_peak: Callable[[], int] | None = None) -> None:
        self._cuda_peak = cuda_peak
        self._records: RecordFiles | None = None
        self._last_event = time.perf_counter()
        # The evaluations of the last step that had some, since one step may have two.
        self._evaluated: tuple[int, dict[str, AnyEvaluation]] = (0, {})

    def on_start(self, event: RunStarted) -> None:
        """Create the folder and write the settings; for a resumed run keep the records up to its checkpoint.

        Raises:
            CheckpointError: A file of the run would replace a symbolic link.
            OSError: The folder cannot be written.
        """
        folder = event.run_dir
        self._records = RecordFiles(folder)
        inside(folder, EVALUATIONS).mkdir(parents=True, exist_ok=True)
        _remove_evaluations_after(folder, event.step)
        kept = {name: _lines_until(inside(folder, name), event.step) for name in (METRICS, SPENT, TIMING)}
        if event.evaluated_rows is not None and _is_on_all_rows(kept[METRICS], event.step):
            # The best agent alone, evaluated when the run ended here: no checkpoint has it, see `Run`.
            for lines in kept.values():
                del lines[-1:]
        for name, lines in kept.items():
            self._records.start(name, lines)
        if (workers := inside(folder, WORKERS)).exists():
            # Nobody is there any more. A run that goes on in one process says nothing of workers.
            none = {"kind": "members", "step": event.step + 1, "workers": []}
            self._records.start(WORKERS, [*_lines_until(workers, event.step), none])
        self._evaluated = event.step, _saved_evaluations(folder, event.step)
        founders = {"kind": "founders", "births": [birth.to_dict() for birth in event.founders]}
        self._records.start(LINEAGE, [founders, *map(_evolution_line, event.evolutions)])
        # Last, since a folder with this file is recognised as a run folder.
        config = json.dumps(strict(event.config), indent=2) + "\n"
        replace_bytes(inside(folder, CONFIG), config.encode())
        if not str(event.config["device"]).startswith("cuda"):
            self._cuda_peak = None
        self._last_event = time.perf_counter()
        self._time("start", event.step)

    def on_baseline(self, event: BaselineScored) -> None:
        """Write the timing; the score is written at the end of the run."""
        self._time("baseline", 0)

    def on_step(self, event: StepDone) -> None:
        """Write one line for each agent."""
        for index, metrics in event.metrics.items():
            self._files.append(METRICS, kind="step", step=event.step, epoch=event.epoch, agent=index, **metrics)
        self._time("step", event.step)

    def on_evaluation(self, event: Evaluated) -> None:
        """Write one line for each agent, and the evaluations row by row."""
        fewer = {} if event.rows is None else {"rows": event.rows}
        for index, fitness in event.fitnesses.items():
            line: dict[str, Any] = {"step": event.step, "generation": event.generation, "agent": index, **fewer}
            if index in event.evaluations:
                line |= event.evaluations[index].scores
            self._files.append(METRICS, kind="evaluation", **line, fitness=list(fitness), **event.agents[index])
        scored = {f"agent-{index}": evaluation for index, evaluation in event.evaluations.items()}
        step, before = self._evaluated
        self._evaluated = (event.step, {**before, **scored} if step == event.step else scored)
        self._save(_evaluation_file(event.step), self._evaluated[1])
        self._spent("evaluation", event)
        self._time("evaluation", event.step)

    def on_evolution(self, event: Evolved) -> None:
        """Write the plan."""
        self._files.append(LINEAGE, **_evolution_line(event))
        self._time("evolution", event.step)

    def on_placement(self, event: Placed) -> None:
        """Write which worker holds which members."""
        workers = [
            {**asdict(home), "members": list(members)} for home, members in zip(event.homes, event.members, strict=True)
        ]
        self._files.append(WORKERS, kind="members", step=event.step, workers=workers)

    def on_loss(self, event: WorkerLoss) -> None:
        """Write what has happened, and what it has cost."""
        cost = {"seconds": round(event.seconds, 6), "why": event.why, "replaced": event.replaced}
        self._files.append(WORKERS, kind="loss", step=event.step, **asdict(event.home), **cost)

    def on_checkpoint(self, event: Checkpointed) -> None:
        """Flush the records to disk, since a run that resumes from this checkpoint continues them."""
        self._time("checkpoint", event.step)
        self._files.flush()

    def on_end(self, event: RunEnded) -> None:
        """Write the final scores, the evaluations row by row, and the sample answers."""
        # Left out if it is the last step, as records of older versions have it.
        earlier = {"best_step": event.best_step} if event.best_step != event.step else {}
        stopped = {"stopped": event.stopped} if event.stopped else {}
        candidates = {"candidates": [one.to_dict() for one in event.candidates]} if event.candidates else {}
        found = {"before": event.before, "after": event.after, "runner_up": event.runner_up_score}
        scored = {name: score for name, score in found.items() if score is not None}
        scores = {f"{name}_{key}": value for name, score in scored.items() for key, value in score.scores.items()}
        self._save(FINAL, scored)
        self._files.append(
            METRICS,
            kind="end",
            step=event.step,
            best=event.best,
            **earlier,
            **stopped,
            **candidates,
            runner_up=event.runner_up,
            split=event.split,
            **scores,
            samples=[vars(sample) for sample in event.samples],
        )
        self._spent("end", event)
        self._time("end", event.step)
        self._files.flush()

    def close(self) -> None:
        """Write the records that are still in memory."""
        if self._records is not None:
            self._records.close()

    @property
    def _files(self) -> RecordFiles:
        assert self._records is not None
        return self._records

    def _spent(self, kind: str, event: Evaluated | RunEnded) -> None:
        if event.spent is not None:
            self._files.append(SPENT, kind=kind, step=event.step, **event.spent.to_dict())

    def _time(self, kind: str, step: int) -> None:
        """Write the seconds since the event before, and the present memory of the process."""
        before, self._last_event = self._last_event, time.perf_counter()
        peak = {} if self._cuda_peak is None else {"cuda_peak_bytes": self._cuda_peak()}
        memory = {"resident_bytes": psutil.Process().memory_info().rss, **peak}
        self._files.append(TIMING, kind=kind, step=step, seconds=round(self._last_event - before, 6), **memory)

    def _save(self, name: str, evaluations: Mapping[str, AnyEvaluation]) -> None:
        if evaluations:
            self._files.replace(name, evaluations_to_bytes(evaluations))


def _evolution_line(event: Evolved) -> dict[str, Any]:
    return {"kind": "evolution", "step": event.step, **event.plan.to_dict()}


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Read the records up to the checkpoint of a step, without the evolution after it and the end of the run."""
    if step == 0 or not path.exists():
        return []
    return [
        line
        for line in read_lines(path)
        if line["kind"] != "end"
        and isinstance(line.get("step"), int)
        and line["step"] <= step - (line["kind"] == "evolution")
    ]


def _is_on_all_rows(lines: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether the last line is of an evaluation on all rows at this step."""
    last = lines[-1] if lines else {}
    return last.get("kind") == "evaluation" and last["step"] == step and "rows" not in last


def _saved_evaluations(folder: Path, step: int) -> dict[str, AnyEvaluation]:
    """The evaluations of a step, to which a resumed run may add one; none if they cannot be read."""
    try:
        return read_evaluations(inside(folder, _evaluation_file(step)))
    except CheckpointError:
        return {}


def _evaluation_file(step: int) -> str:
    return f"{EVALUATIONS}/step-{step:06d}.safetensors"


def _remove_evaluations_after(folder: Path, step: int) -> None:
    """Remove the evaluations of later steps, the final scores, and incomplete files."""
    inside(folder, FINAL).unlink(missing_ok=True)
    remove_leftovers(folder)
    remove_leftovers(folder / EVALUATIONS)
    for path in (folder / EVALUATIONS).iterdir():
        name = _EVALUATION_FILE.fullmatch(path.name)
        if name and int(name[1]) > (step or -1):
            path.unlink()
