"""The names of the files in a run folder, and how a run folder is recognised."""

from __future__ import annotations

import json
from pathlib import Path

from evollm.own_files import read_bytes

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LINEAGE = "lineage.jsonl"
TIMING = "timing.jsonl"
SPENT = "spent.jsonl"
# Of a run over several workers: who was where.
WORKERS = "workers.jsonl"
EVALUATIONS = "evaluations"
FINAL = "final.safetensors"
CHECKPOINTS = "checkpoints"
ELITE = "elite"
# The keyword arguments of `tune`.
TUNE_ARGUMENTS = "tune.json"

# All files and folders that a run writes.
RUN_FILES = (CONFIG, METRICS, LINEAGE, TIMING, SPENT, WORKERS, EVALUATIONS, FINAL, CHECKPOINTS, ELITE, TUNE_ARGUMENTS)

# The deepest folder of a run is this many levels below it: checkpoints/step-000003/agent-0/actor.
_DEPTH = 4


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder; the config.json of a model is told apart by its keys."""
    try:
        config = json.loads(read_bytes(folder / CONFIG))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "schedule" in config


def is_resumed_by_command(folder: Path) -> bool:
    """Whether `evollm resume` can resume a run: all arguments of the run are in files, not in Python objects."""
    try:
        return not json.loads(read_bytes(folder / TUNE_ARGUMENTS))["objects"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def run_above(folder: Path) -> Path | None:
    """Return the run folder that contains a folder; None if there is none, or the folder is a run folder itself."""
    if is_run(folder):
        return None
    for levels, above in enumerate(list(folder.absolute().parents)[:_DEPTH], start=1):
        if is_run(above):
            # A relative path stays relative if it has enough parts.
            return folder.parents[levels - 1] if len(folder.parents) >= levels else above
    return None


def no_run(folder: Path) -> str:
    """Return an error message for a folder without `config.json`, with the run folder that contains it, if any."""
    above = run_above(folder)
    if above is not None:
        return f"is no run folder but a part of one: give {above}"
    return f"is no run folder: {f'no {CONFIG} in it' if folder.is_dir() else 'there is no such folder'}"
