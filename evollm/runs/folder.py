"""What lies where in a run folder."""

from __future__ import annotations

import json
from pathlib import Path

from evollm.own_files import read_bytes

CONFIG = "config.json"
METRICS = "metrics.jsonl"
LINEAGE = "lineage.jsonl"
TIMING = "timing.jsonl"
EVALUATIONS = "evaluations"
FINAL = "final.safetensors"
CHECKPOINTS = "checkpoints"
ELITE = "elite"
# The keyword arguments of `tune`.
TUNE_ARGUMENTS = "tune.json"

# What a run writes from its beginning to its end.
RUN_FILES = (CONFIG, METRICS, LINEAGE, TIMING, EVALUATIONS, FINAL, CHECKPOINTS, ELITE, TUNE_ARGUMENTS)

# From the adapter of an agent in a checkpoint to its run: actor, agent-0, step-000003, checkpoints.
_DEPTH = 4


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run; a model has a config.json, too."""
    try:
        config = json.loads(read_bytes(folder / CONFIG))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "schedule" in config


def is_resumed_by_command(folder: Path) -> bool:
    """Whether `evollm resume` takes a run: it was begun by a command, or by `tune` from files."""
    try:
        return not json.loads(read_bytes(folder / TUNE_ARGUMENTS))["objects"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def run_above(folder: Path) -> Path | None:
    """The run folder that a folder is a part of; None where it is none of a run, or a run folder itself."""
    inner = folder.absolute()
    if is_run(folder):
        return None
    for levels, above in enumerate(list(inner.parents)[:_DEPTH], start=1):
        if is_run(above):
            # As the user wrote it, as far as that reaches.
            return folder.parents[levels - 1] if len(folder.parents) >= levels else above
    return None


def no_run(folder: Path) -> str:
    """What is wrong with a folder that has no `config.json`, and which one is perhaps meant."""
    above = run_above(folder)
    if above is not None:
        return f"is no run folder but a part of one: give {above}"
    return f"is no run folder: {f'no {CONFIG} in it' if folder.is_dir() else 'there is no such folder'}"
