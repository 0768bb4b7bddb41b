"""Where an interrupted run goes on, and how somebody is told that it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evollm.checkpoints.atomic import remove_unfinished
from evollm.checkpoints.steps import STEP_FOLDER, has_populations, newest_population, read_arrays, read_state
from evollm.errors import CheckpointError, ConfigurationError
from evollm.execution.executor import Agreement
from evollm.runs import has_ended, read_config
from evollm.runs.folder import is_resumed_by_command, is_run
from evollm.training.paths import RunPaths
from evollm.training.state import Progress, check_same_run

ChangedText = Callable[[Mapping[str, Any]], str]


def find_checkpoint(paths: RunPaths, processes: Agreement) -> Path | None:
    """The newest whole checkpoint of a run, None if there is none; the main process is told of damaged ones.

    Raises:
        CheckpointError: Every checkpoint is damaged.
    """
    found = ""
    if processes.is_main:
        if paths.checkpoints.is_dir():
            remove_unfinished(paths.checkpoints, STEP_FOLDER)
        found = str(newest_population(paths.checkpoints) or "")
    found = processes.from_main(found)
    return Path(found) if found else None


def read_checkpoint(
    path: Path, config: Mapping[str, Any], changed_text: ChangedText
) -> tuple[Mapping[str, Any], Progress]:
    """The run's part of a checkpoint: its state, and how far it had come.

    Args:
        path: The checkpoint.
        config: What the run is made of now.
        changed_text: Says which of its texts have changed.

    Raises:
        CheckpointError: It lacks what a run goes on with.
        ConfigurationError: The run began with other settings.
    """
    state = read_state(path)
    missing = {"config", "search"} - state.keys()
    if missing or not isinstance(state["config"], Mapping):
        reason = f"lacks {sorted(missing)}" if missing else "has no settings"
        raise CheckpointError(f"{path} is no checkpoint of this run: it {reason}")
    check_same_run(state["config"], config, changed_text)
    progress = Progress.from_dict(state, read_arrays(path))
    total = config["schedule"]["total"]
    if progress.step > total:
        fix = f"the checkpoint has {progress.step} steps already: give a larger num_epochs or max_steps"
        raise ConfigurationError("max_steps", total, fix)
    return state, progress


def check_nothing_to_lose(paths: RunPaths, config: Mapping[str, Any], changed_text: ChangedText) -> None:
    """Refuse to begin a run anew that has ended, or that began with other settings.

    Raises:
        CheckpointError: Its records cannot be read.
        ConfigurationError: It has ended, and its checkpoints are gone, or its settings were others.
    """
    if has_ended(paths.run_dir):
        fix = "the run has ended, and its checkpoints are gone: there is nothing to go on from; begin a new run"
        raise ConfigurationError("resume_from_checkpoint", str(paths.run_dir), fix)
    check_same_run(read_config(paths.run_dir), config, changed_text)


def how_to_go_on(paths: RunPaths, *, trust_remote_code: bool) -> str:
    """How somebody who interrupts the run goes on with it; "" where there is no run folder yet."""
    folder = paths.run_dir
    if not is_run(folder):
        return ""
    saved = has_populations(paths.checkpoints)
    if not is_resumed_by_command(folder):
        fix = f"go on with resume_from_checkpoint={str(folder)!r}"
        return fix if saved else f"no checkpoint has been saved: {fix} begins anew"
    how = paths.resume(*(["model_config.trust_remote_code=true"] if trust_remote_code else []))
    return f"go on with: {how}" if saved else f"no checkpoint has been saved: begin it anew with: {how}"
