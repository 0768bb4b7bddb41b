"""From a run folder to a `RunRecord`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo import AnyEvaluation, Birth, EvolutionPlan, read_evaluations
from evollm.report.record import Ended, Evolution, Lap, RunRecord, Sample, Scored, StepLine

SCORES = ("accuracy", "mean_margin", "loss", "perplexity")
ALGORITHMS = ("DPO", "SFT")
_ROLES = ("before", "after", "runner_up")
_NOT_METRICS = {"kind", "step", "epoch", "agent"}


def read_run(run_dir: str | Path) -> RunRecord:
    """Read everything that a run folder says of its run; the run may still be going on, or have died.

    A last line that was cut short, as a kill leaves it, is left out. Results pair by pair and times that are not there,
    as in folders of earlier versions, are left empty.

    Raises:
        ConfigurationError: No path, or no run folder.
        CheckpointError: A file is missing, damaged or cut short elsewhere than at its end, or no step is done yet; the
            message names it.
    """
    if not isinstance(run_dir, str | os.PathLike):
        raise ConfigurationError("run_dir", run_dir, "must be a path")
    folder = Path(run_dir)
    if not (folder / "config.json").is_file():
        raise ConfigurationError("run_dir", str(run_dir), "is no run folder: no config.json in it")
    config = _read_config(folder / "config.json")
    metrics = _lines(folder / "metrics.jsonl")
    lineage = _lines(folder / "lineage.jsonl")
    timing = _lines(folder / "timing.jsonl") if (folder / "timing.jsonl").exists() else []
    try:
        record = RunRecord(
            path=folder,
            config=config,
            founders=[Birth.from_dict(birth) for line in _of(lineage, "founders") for birth in line["births"]],
            evolutions=[
                Evolution(int(line["step"]), EvolutionPlan.from_dict(line)) for line in _of(lineage, "evolution")
            ],
            steps=[_step(line) for line in _of(metrics, "step")],
            evaluations=_evaluations(folder, _of(metrics, "evaluation")),
            ended=_ended(folder, _of(metrics, "end")),
            laps=[_lap(line) for line in timing],
        )
        _check_agents(record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise CheckpointError(f"{folder} holds lines that are not of a run: {error!r}") from error
    if not record.founders:
        raise CheckpointError(f"{folder / 'lineage.jsonl'} does not say which agents the run began with")
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
        config = json.loads(path.read_text(encoding="utf-8"))
        sections = [config["schedule"], config["data"], config.get("versions", {}), config.get("hp_config") or {}]
        if not all(isinstance(one, dict) for one in sections) or not isinstance(config["data"]["reports"], list):
            raise TypeError("its sections are something else")
        if config["schedule"]["total"] < 1 or config["algorithm"] not in ALGORITHMS:
            raise ValueError("it is of no run")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return dict(config)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found = []
    for number, text in enumerate(texts, 1):
        try:
            found.append({"kind": None, **json.loads(text)})
        except (ValueError, TypeError) as error:
            if number == len(texts) and not text.endswith("\n"):
                break
            raise CheckpointError(f"{path}, line {number} is damaged: {error}") from error
    return found


def _of(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["kind"] == kind]


def _step(line: Mapping[str, Any]) -> StepLine:
    metrics = {name: float(value) for name, value in line.items() if name not in _NOT_METRICS}
    return StepLine(int(line["step"]), int(line["agent"]), metrics)


def _evaluations(folder: Path, lines: list[dict[str, Any]]) -> list[Scored]:
    pairs: dict[int, dict[str, AnyEvaluation]] = {}
    for step in {int(line["step"]) for line in lines}:
        path = folder / "evaluations" / f"step-{step:06d}.safetensors"
        pairs[step] = read_evaluations(path) if path.exists() else {}
    return [
        Scored(
            step=int(line["step"]),
            generation=int(line["generation"]),
            agent=int(line["agent"]),
            scores={name: float(line[name]) for name in SCORES if name in line},
            fitness=tuple(float(part) for part in line["fitness"]),
            pairs=pairs[int(line["step"])].get(f"agent-{line['agent']}"),
        )
        for line in lines
    ]


def _ended(folder: Path, lines: list[dict[str, Any]]) -> Ended | None:
    if not lines:
        return None
    line, path = lines[-1], folder / "final.safetensors"
    scores = {
        role: {name: float(line[f"{role}_{name}"]) for name in SCORES if f"{role}_{name}" in line} for role in _ROLES
    }
    return Ended(
        step=int(line["step"]),
        best=int(line["best"]),
        runner_up=None if line.get("runner_up") is None else int(line["runner_up"]),
        split=str(line["split"]),
        scores={role: found for role, found in scores.items() if found},
        pairs=read_evaluations(path) if path.exists() else {},
        samples=[Sample(str(one["prompt"]), str(one["before"]), str(one["after"])) for one in line["samples"]],
    )


def _lap(line: Mapping[str, Any]) -> Lap:
    peak = line.get("cuda_peak_bytes")
    return Lap(
        str(line["kind"]), int(line["step"]), float(line["seconds"]), int(line["resident_bytes"]), peak and int(peak)
    )
