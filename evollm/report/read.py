"""From a run folder to a `RunRecord`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo import AnyEvaluation
from evollm.own_files import inside, read_bytes
from evollm.report.record import Ended, Evolution, Lap, RunRecord, Sample, Scored, StepLine
from evollm.runs import read_lineage, read_lines
from evollm.runs.evaluations import read_evaluations
from evollm.runs.folder import CONFIG, EVALUATIONS, FINAL, METRICS, TIMING, no_run

T = TypeVar("T")

SCORES = ("accuracy", "mean_margin", "loss", "perplexity")
ALGORITHMS = ("DPO", "SFT")
_ROLES = ("before", "after", "runner_up")
_NOT_METRICS = {"kind", "step", "epoch", "agent"}


def read_run(run_dir: str | Path) -> RunRecord:
    """Read everything that a run folder says of its run; the run may still be going on, or have died.

    Damaged records are left out with a warning, and what the lineage has lost is taken from the newest checkpoint. A
    last line that was cut short, as a kill leaves it, is left out. Results pair by pair and times that are not there,
    as in folders of earlier versions, are left empty.

    Raises:
        ConfigurationError: No path, or no run folder.
        CheckpointError: A file is missing, or nothing in it can be read, or no step is done yet; the message names it.
    """
    folder = usable_path("run_dir", run_dir)
    if not (folder / CONFIG).is_file():
        raise ConfigurationError("run_dir", str(run_dir), no_run(folder))
    config = _read_config(inside(folder, CONFIG))
    metrics = read_lines(inside(folder, METRICS))
    timing = inside(folder, TIMING)
    lineage = read_lineage(folder)
    try:
        record = RunRecord(
            path=folder,
            config=config,
            founders=lineage.founders,
            evolutions=[Evolution(step, plan) for step, plan in lineage.evolutions],
            steps=_read(metrics, "step", _step),
            evaluations=_evaluations(folder, metrics),
            ended=_ended(folder, metrics),
            laps=[lap for lap in map(_or_none(_lap), read_lines(timing)) if lap] if timing.exists() else [],
        )
        _check_agents(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise CheckpointError(f"{folder} holds lines that are not of a run: {error!r}") from error
    if not record.steps:
        raise CheckpointError(f"{folder} has nothing to report: its run has not done a step yet")
    if record.ended is not None and record.ended.best not in record.lives:
        raise CheckpointError(f"{folder / 'lineage.jsonl'} does not know agent {record.ended.best}, the winner")
    return record


def _check_agents(record: RunRecord) -> None:
    """Find agents that are not agents while the folder can still be named.

    Raises:
        ValueError: They do not have the same hyperparameters, or descend from nobody.
    """
    names = [set(life.birth.hyperparameters) for life in record.lives.values()]
    if any(one != names[0] for one in names):
        raise ValueError("agents of one run have different hyperparameters")
    known = {None, *record.lives}
    strangers = {life.birth.parent for life in record.lives.values()} - known
    strangers |= {line.agent for line in record.steps} - known
    strangers |= {scored.agent for scored in record.evaluations} - known
    if strangers and record.founders:
        raise ValueError(f"nobody knows where agents {strangers} come from")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_bytes(path))
        sections = [config["schedule"], config["data"], config.get("versions", {}), config.get("hp_config") or {}]
        if not all(isinstance(one, dict) for one in sections) or not isinstance(config["data"]["reports"], list):
            raise TypeError("its sections are something else")
        if config["schedule"]["total"] < 1 or config["algorithm"] not in ALGORITHMS:
            raise ValueError("it is of no run")
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return dict(config)


def _read(lines: list[dict[str, Any]], kind: str, convert: Callable[[dict[str, Any]], T]) -> list[T]:
    """The records of a kind; those that lack something are left out, and a warning says how many."""
    found = [_or_none(convert)(line) for line in lines if line["kind"] == kind]
    whole = [one for one in found if one is not None]
    lost = len(found) - len(whole)
    if lost:
        warnings.warn(f"{lost} records of kind {kind!r} are damaged: left out", UserWarning, stacklevel=4)
    return whole


def _or_none(convert: Callable[[dict[str, Any]], T]) -> Callable[[dict[str, Any]], T | None]:
    """The conversion of a record, None of one that is damaged."""

    def converted(line: dict[str, Any]) -> T | None:
        try:
            return convert(line)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None

    return converted


def _step(line: Mapping[str, Any]) -> StepLine:
    metrics = {name: float(value) for name, value in line.items() if name not in _NOT_METRICS}
    return StepLine(int(line["step"]), int(line["agent"]), metrics)


def _evaluations(folder: Path, lines: list[dict[str, Any]]) -> list[Scored]:
    scored = _read(lines, "evaluation", _scored)
    pairs = {
        step: _pairs(folder, f"{EVALUATIONS}/step-{step:06d}.safetensors") for step in {one.step for one in scored}
    }
    return [replace(one, pairs=pairs[one.step].get(f"agent-{one.agent}")) for one in scored]


def _pairs(folder: Path, name: str) -> dict[str, AnyEvaluation]:
    """Results pair by pair; none where they were not kept, or are damaged."""
    path = inside(folder, name)
    try:
        return read_evaluations(path) if path.exists() else {}
    except CheckpointError as error:
        warnings.warn(f"{error}: left out", UserWarning, stacklevel=4)
        return {}


def _scored(line: Mapping[str, Any]) -> Scored:
    return Scored(
        step=int(line["step"]),
        generation=int(line["generation"]),
        agent=int(line["agent"]),
        scores={name: float(line[name]) for name in SCORES if name in line},
        fitness=tuple(float(part) for part in line["fitness"]),
    )


def _ended(folder: Path, lines: list[dict[str, Any]]) -> Ended | None:
    found = _read(lines, "end", _end)
    return replace(found[-1], pairs=_pairs(folder, FINAL)) if found else None


def _end(line: Mapping[str, Any]) -> Ended:
    scores = {
        role: {name: float(line[f"{role}_{name}"]) for name in SCORES if f"{role}_{name}" in line} for role in _ROLES
    }
    return Ended(
        step=int(line["step"]),
        best=int(line["best"]),
        runner_up=None if line.get("runner_up") is None else int(line["runner_up"]),
        split=str(line["split"]),
        scores={role: found for role, found in scores.items() if found},
        pairs={},
        samples=[_sample(one) for one in line["samples"]],
    )


def _sample(one: Mapping[str, Any]) -> Sample:
    # Folders of earlier versions have no turns.
    turns = tuple((str(role), str(text)) for role, text in one.get("turns", ()))
    return Sample(str(one["prompt"]), str(one["before"]), str(one["after"]), turns)


def _lap(line: Mapping[str, Any]) -> Lap:
    peak = line.get("cuda_peak_bytes")
    return Lap(
        str(line["kind"]), int(line["step"]), float(line["seconds"]), int(line["resident_bytes"]), peak and int(peak)
    )
