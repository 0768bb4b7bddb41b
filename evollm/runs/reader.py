"""Readers of run folders: the settings alone, whether a run has ended, or everything as a `RunRecord`."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError, EvoLLMError
from evollm.hpo import AnyEvaluation
from evollm.own_files import inside, read_bytes
from evollm.runs.evaluations import read_evaluations
from evollm.runs.events import Candidate, Placed, SampleAnswer, WorkerHome, WorkerLoss
from evollm.runs.folder import CONFIG, EVALUATIONS, FINAL, METRICS, SPENT, TIMING, WORKERS, no_run
from evollm.runs.lineage import read_lineage
from evollm.runs.lines import read_lines
from evollm.runs.record import Ended, RunRecord, Scored, StepLine, Timing
from evollm.runs.spent import Spent
from evollm.runs.words import Words

T = TypeVar("T")

_ROLES = ("before", "after", "runner_up")
_NOT_METRICS = {"kind", "step", "epoch", "agent"}
# The sections of `config.json`, and the entries that other modules read, with their types.
_SECTIONS = ("schedule", "data", "options", "settings", "lora")
_ENTRIES: tuple[tuple[str, str, type], ...] = (
    *(("schedule", "total", int), ("schedule", "epoch", int)),
    *(("data", "reports", list), ("data", "fingerprint", str), ("data", "position", dict), ("data", "batch_size", int)),
    *(("options", "update_reference_each_epoch", bool), ("options", "save_elite", bool)),
)


def read_config(run_dir: str | os.PathLike[str], field: str = "run_dir") -> dict[str, Any]:
    """Read and check the settings of a run, `config.json`.

    Args:
        run_dir: The run folder.
        field: The name of the user's argument, for error messages.

    Raises:
        ConfigurationError: `run_dir` is not a path, or not a run folder.
        CheckpointError: The settings are damaged.
    """
    folder = usable_path(field, run_dir)
    if not (folder / CONFIG).is_file():
        raise ConfigurationError(field, str(run_dir), no_run(folder))
    path = inside(folder, CONFIG)
    try:
        config = json.loads(read_bytes(path))
        if isinstance(config, dict) and "schedule" not in config:
            raise ConfigurationError(field, str(run_dir), f"is no run folder: its {CONFIG} is that of something else")
        if isinstance(config, dict) and "words" not in config:
            raise CheckpointError(f"{path} lacks the words of its algorithm: an earlier evollm wrote it; use that one")
        if not isinstance(config["base"], str) or not isinstance(config["algorithm"], str):
            raise TypeError("base or algorithm is no string")
        Words.from_dict(config["words"])
        optional = [config.get("versions", {}), config.get("hp_config") or {}]
        if not all(isinstance(one, dict) for one in [*(config[name] for name in _SECTIONS), *optional]):
            raise TypeError("a section is no mapping")
        for section, name, kind in _ENTRIES:
            value = config[section][name]
            if not isinstance(value, kind) or (isinstance(value, int) and kind is int and value < 1):
                raise TypeError(f"{section}.{name} is {value!r}")
    except EvoLLMError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return dict(config)


def has_ended(run_dir: Path) -> bool:
    """Whether the records of a run have an `end` line.

    Raises:
        CheckpointError: The records cannot be read.
    """
    path = inside(run_dir, METRICS)
    return path.exists() and any(line["kind"] == "end" for line in read_lines(path))


def read_run(run_dir: str | os.PathLike[str], *, rows: bool = True) -> RunRecord:
    """Read a run folder; the run may have ended, be in progress, or have been killed.

    Damaged records are left out with a warning; evolutions that `lineage.jsonl` lacks are taken from a checkpoint. The
    evaluations row by row and the timings, which older versions did not write, may be missing.

    Args:
        run_dir: The run folder.
        rows: Whether to read the evaluations row by row, too.

    Raises:
        ConfigurationError: `run_dir` is not a path, or not a run folder.
        CheckpointError: A file is missing or cannot be read, or no step is done yet; the message names the file.
    """
    config = read_config(run_dir)
    folder = usable_path("run_dir", run_dir)
    metrics, words = read_lines(inside(folder, METRICS)), Words.from_dict(config["words"])
    timing, spent, workers = (inside(folder, name) for name in (TIMING, SPENT, WORKERS))
    try:
        evaluations = _read(metrics, "evaluation", partial(_evaluation, words))
        ended = _read(metrics, "end", partial(_end, words))[-1:]
        if rows:
            files = {one.step: f"{EVALUATIONS}/step-{one.step:06d}.safetensors" for one in evaluations}
            by_step = {step: _read_rows(folder, name) for step, name in files.items()}
            evaluations = [replace(one, pairs=_rows_of(one, by_step[one.step])) for one in evaluations]
            ended = [replace(one, pairs=_read_rows(folder, FINAL)) for one in ended]
        record = RunRecord(
            path=folder,
            config=config,
            words=words,
            lineage=read_lineage(folder),
            steps=_read(metrics, "step", _step),
            evaluations=evaluations,
            ended=ended[0] if ended else None,
            timings=_convert(read_lines(timing), _timing) if timing.exists() else [],
            spent=_convert(read_lines(spent), lambda line: (int(line["step"]), Spent.from_dict(line)))
            if spent.exists()
            else [],
            **(_workers(read_lines(workers)) if workers.exists() else {}),
        )
        _check_agents(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise CheckpointError(f"{folder} holds lines that are not of a run: {error!r}") from error
    if not record.steps:
        raise CheckpointError(f"{folder}: the run has not done a step yet, so nothing is known of it")
    if record.ended is not None and record.ended.best not in record.lives:
        raise CheckpointError(f"{folder / 'lineage.jsonl'} does not know agent {record.ended.best}, the winner")
    return record


def _check_agents(record: RunRecord) -> None:
    """Check that the records of steps, evaluations and lineage are about the same agents.

    Raises:
        ValueError: Agents have different hyperparameters, or an agent is not in the lineage.
    """
    names = [set(life.birth.hyperparameters) for life in record.lives.values()]
    if any(one != names[0] for one in names):
        raise ValueError("agents of one run have different hyperparameters")
    mentioned = {parent for life in record.lives.values() for parent in life.birth.parents}
    mentioned |= {line.agent for line in record.steps} | {scored.agent for scored in record.evaluations}
    unknown = mentioned - record.lives.keys()
    if unknown and record.founders:
        raise ValueError(f"agents {unknown} are not in the lineage")


def _read(lines: list[dict[str, Any]], kind: str, convert: Callable[[dict[str, Any]], T]) -> list[T]:
    """Convert the records of a kind; a warning gives the number of damaged ones, which are left out."""
    lines = [line for line in lines if line["kind"] == kind]
    found = _convert(lines, convert)
    if len(found) < len(lines):
        lost = len(lines) - len(found)
        warnings.warn(f"{lost} records of kind {kind!r} are damaged: left out", UserWarning, stacklevel=3)
    return found


def _convert(lines: list[dict[str, Any]], convert: Callable[[dict[str, Any]], T]) -> list[T]:
    """Convert records; damaged ones are left out."""
    found = []
    for line in lines:
        with suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
            found.append(convert(line))
    return found


def _read_rows(folder: Path, name: str) -> dict[str, AnyEvaluation]:
    """Read evaluations row by row; empty if the file is missing, or, with a warning, damaged."""
    path = inside(folder, name)
    try:
        return read_evaluations(path) if path.exists() else {}
    except CheckpointError as error:
        warnings.warn(f"{error}: left out", UserWarning, stacklevel=3)
        return {}


def _rows_of(scored: Scored, found: Mapping[str, AnyEvaluation]) -> AnyEvaluation | None:
    """The rows of an evaluation; None if they were not recorded, or one on more rows at the same step replaced them."""
    rows = found.get(f"agent-{scored.agent}")
    return None if rows is None or (scored.rows is not None and len(rows) > scored.rows) else rows


def _step(line: Mapping[str, Any]) -> StepLine:
    metrics = {name: float(value) for name, value in line.items() if name not in _NOT_METRICS}
    return StepLine(int(line["step"]), int(line["agent"]), metrics)


def _evaluation(words: Words, line: Mapping[str, Any]) -> Scored:
    return Scored(
        step=int(line["step"]),
        generation=int(line["generation"]),
        agent=int(line["agent"]),
        scores=_scores(words, line),
        fitness=tuple(float(part) for part in line["fitness"]),
        rows=None if line.get("rows") is None else int(line["rows"]),
    )


def _scores(words: Words, line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The algorithm's scores that a record has, in the algorithm's order."""
    names = [score.name for score in words.scores if f"{prefix}{score.name}" in line]
    return {name: float(line[f"{prefix}{name}"]) for name in names}


def _end(words: Words, line: Mapping[str, Any]) -> Ended:
    scores = {role: _scores(words, line, f"{role}_") for role in _ROLES}
    return Ended(
        step=int(line["step"]),
        best=int(line["best"]),
        best_step=int(line.get("best_step", line["step"])),
        stopped=str(line.get("stopped", "")),
        candidates=tuple(Candidate.from_dict(one) for one in line.get("candidates", ())),
        runner_up=None if line.get("runner_up") is None else int(line["runner_up"]),
        split=str(line["split"]),
        scores={role: found for role, found in scores.items() if found},
        pairs={},
        samples=[
            SampleAnswer(
                str(one["prompt"]),
                str(one["before"]),
                str(one["after"]),
                # Older versions have written no turns.
                tuple((str(role), str(text)) for role, text in one.get("turns", ())),
            )
            for one in line["samples"]
        ],
    )


def _timing(line: Mapping[str, Any]) -> Timing:
    peak = line.get("cuda_peak_bytes")
    return Timing(
        str(line["kind"]), int(line["step"]), float(line["seconds"]), int(line["resident_bytes"]), peak and int(peak)
    )


def _workers(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of a `RunRecord` on workers."""
    placed = _convert([line for line in lines if line["kind"] == "members"], _placed)
    return {"placements": placed, "losses": _convert([line for line in lines if line["kind"] == "loss"], _loss)}


def _home(line: Mapping[str, Any]) -> WorkerHome:
    return WorkerHome(int(line["worker"]), str(line["machine"]), int(line["process"]))


def _placed(line: Mapping[str, Any]) -> Placed:
    workers = line["workers"]
    return Placed(int(line["step"]), list(map(_home, workers)), [list(map(int, one["members"])) for one in workers])


def _loss(line: Mapping[str, Any]) -> WorkerLoss:
    replaced, seconds = bool(line["replaced"]), float(line["seconds"])
    if not math.isfinite(seconds):
        raise ValueError("no number of seconds")
    return WorkerLoss(int(line["step"]), _home(line), seconds, str(line["why"]), replaced)
