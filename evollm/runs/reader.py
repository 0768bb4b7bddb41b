"""The one reader of run folders: settings alone, whether a run has ended, or everything as a `RunRecord`."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError, EvoLLMError
from evollm.hpo import AnyEvaluation
from evollm.own_files import inside, read_bytes
from evollm.runs.evaluations import read_evaluations
from evollm.runs.events import SampleAnswer
from evollm.runs.folder import CONFIG, EVALUATIONS, FINAL, METRICS, TIMING, no_run
from evollm.runs.lineage import read_lineage
from evollm.runs.lines import read_lines
from evollm.runs.record import Ended, RunRecord, Scored, StepLine, Timing
from evollm.runs.words import Words

T = TypeVar("T")

_ROLES = ("before", "after", "runner_up")
_NOT_METRICS = {"kind", "step", "epoch", "agent"}
# Of `config.json`, what somebody relies on.
_SECTIONS = ("schedule", "data", "options", "settings", "lora")
_USED: tuple[tuple[str, str, type], ...] = (
    *(("schedule", "total", int), ("schedule", "epoch", int)),
    *(("data", "reports", list), ("data", "fingerprint", str), ("data", "position", dict), ("data", "batch_size", int)),
    *(("options", "update_reference_each_epoch", bool), ("options", "save_elite", bool)),
)


def read_config(run_dir: str | os.PathLike[str], field: str = "run_dir") -> dict[str, Any]:
    """Read the settings of a run, and nothing else of its folder.

    Args:
        run_dir: The run folder.
        field: What the user calls it, for messages.

    Raises:
        ConfigurationError: No path, or no run folder.
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
            raise ValueError("it is of no run")
        Words.from_dict(config["words"])
        optional = [config.get("versions", {}), config.get("hp_config") or {}]
        if not all(isinstance(one, dict) for one in [*(config[name] for name in _SECTIONS), *optional]):
            raise TypeError("its sections are something else")
        for section, name, kind in _USED:
            value = config[section][name]
            if not isinstance(value, kind) or (isinstance(value, int) and kind is int and value < 1):
                raise TypeError(f"{section}.{name} is {value!r}")
    except EvoLLMError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return dict(config)


def has_ended(run_dir: Path) -> bool:
    """Whether a run has come to its end.

    Raises:
        CheckpointError: Its records cannot be read.
    """
    path = inside(run_dir, METRICS)
    return path.exists() and any(line["kind"] == "end" for line in read_lines(path))


def read_run(run_dir: str | os.PathLike[str], *, rows: bool = True) -> RunRecord:
    """Read what a run folder says of its run; the run may still be going on, or have died.

    Damaged records are left out with a warning, and what the lineage has lost is taken from the newest checkpoint. A
    last line that was cut short, as a kill leaves it, is left out. Results pair by pair and times that are not there,
    as in folders of earlier versions, are left empty.

    Args:
        run_dir: The run folder.
        rows: Whether to read what the scores are made of, row by row, too.

    Raises:
        ConfigurationError: No path, or no run folder.
        CheckpointError: A file is missing, or nothing in it can be read, or no step is done yet; the message names it.
    """
    config = read_config(run_dir)
    folder = usable_path("run_dir", run_dir)
    metrics, words = read_lines(inside(folder, METRICS)), Words.from_dict(config["words"])
    timing = inside(folder, TIMING)
    try:
        record = RunRecord(
            path=folder,
            config=config,
            words=words,
            lineage=read_lineage(folder),
            steps=_read(metrics, "step", _step),
            evaluations=_evaluations(folder, metrics, words, rows),
            ended=_ended(folder, metrics, words, rows),
            timings=[timing for timing in map(_or_none(_lap), read_lines(timing)) if timing] if timing.exists() else [],
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


def _evaluations(folder: Path, lines: list[dict[str, Any]], words: Words, rows: bool) -> list[Scored]:
    scored = _read(lines, "evaluation", partial(_scored, words))
    if not rows:
        return scored
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


def _scored(words: Words, line: Mapping[str, Any]) -> Scored:
    return Scored(
        step=int(line["step"]),
        generation=int(line["generation"]),
        agent=int(line["agent"]),
        scores=_scores(words, line),
        fitness=tuple(float(part) for part in line["fitness"]),
    )


def _scores(words: Words, line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Those of the algorithm's scores that a record holds, in the algorithm's order."""
    names = [score.name for score in words.scores if f"{prefix}{score.name}" in line]
    return {name: float(line[f"{prefix}{name}"]) for name in names}


def _ended(folder: Path, lines: list[dict[str, Any]], words: Words, rows: bool) -> Ended | None:
    found = _read(lines, "end", partial(_end, words))
    return replace(found[-1], pairs=_pairs(folder, FINAL) if rows else {}) if found else None


def _end(words: Words, line: Mapping[str, Any]) -> Ended:
    scores = {role: _scores(words, line, f"{role}_") for role in _ROLES}
    return Ended(
        step=int(line["step"]),
        best=int(line["best"]),
        runner_up=None if line.get("runner_up") is None else int(line["runner_up"]),
        split=str(line["split"]),
        scores={role: found for role, found in scores.items() if found},
        pairs={},
        samples=[_sample(one) for one in line["samples"]],
    )


def _sample(one: Mapping[str, Any]) -> SampleAnswer:
    # Folders of earlier versions have no turns.
    turns = tuple((str(role), str(text)) for role, text in one.get("turns", ()))
    return SampleAnswer(str(one["prompt"]), str(one["before"]), str(one["after"]), turns)


def _lap(line: Mapping[str, Any]) -> Timing:
    peak = line.get("cuda_peak_bytes")
    return Timing(
        str(line["kind"]), int(line["step"]), float(line["seconds"]), int(line["resident_bytes"]), peak and int(peak)
    )
