"""The checkpoints from which an interrupted run resumes, and the text that tells users how to resume."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evollm.checkpoints.atomic import remove_unfinished
from evollm.checkpoints.steps import (
    STEP_FOLDER,
    has_populations,
    newest_population,
    prune_populations,
    read_arrays,
    read_state,
)
from evollm.errors import CheckpointError, ConfigurationError, EvoLLMError
from evollm.execution.executor import Agreement, Arrays, Executor
from evollm.runs import has_ended, read_config
from evollm.runs.folder import is_resumed_by_command, is_run
from evollm.training.paths import RunPaths
from evollm.training.state import Progress, check_same_run


def load_checkpoint(paths: RunPaths, executor: Executor, config: Mapping[str, Any]) -> tuple[Progress, Any] | None:
    """Load the newest undamaged checkpoint of a run with this `Run.config` into the executor.

    Returns:
        The progress of the run and the state of its search; None, with a warning, without any checkpoint.

    Raises:
        CheckpointError: Every checkpoint is damaged, or lacks state that a run needs to resume.
        ConfigurationError: The run began with other settings.
    """
    folder = _newest_checkpoint(paths, executor.processes)
    if folder is None:
        _check_nothing_to_lose(paths, executor, config)
        warnings.warn(f"{paths.run_dir} holds no checkpoint: it starts anew", UserWarning, stacklevel=4)
        return None
    state = read_state(folder)
    missing = {"config", "search"} - state.keys()
    if missing or not isinstance(state["config"], Mapping):
        reason = f"lacks {sorted(missing)}" if missing else "has no settings"
        raise CheckpointError(f"{folder} is no checkpoint of this run: it {reason}")
    check_same_run(state["config"], config, executor.changed_text)
    progress, total = Progress.from_dict(state, read_arrays(folder)), config["schedule"]["total"]
    if progress.step > total:
        fix = f"the checkpoint has {progress.step} steps already: give a larger num_epochs or max_steps"
        raise ConfigurationError("max_steps", total, fix)
    executor.load(folder)
    found, born = ([one.index for one in those] for those in (executor.members(), progress.births))
    if found != born:
        raise CheckpointError(f"{folder} is no checkpoint of this run: it holds the agents {found}, not {born}")
    return progress, state["search"]


def _newest_checkpoint(paths: RunPaths, processes: Agreement) -> Path | None:
    """The newest undamaged checkpoint of a run, None if there is none; the main process warns of damaged ones."""
    found = ""
    if processes.is_main:
        if paths.checkpoints.is_dir():
            remove_unfinished(paths.checkpoints, STEP_FOLDER)
        found = str(newest_population(paths.checkpoints) or "")
    found = processes.from_main(found)
    return Path(found) if found else None


def _check_nothing_to_lose(paths: RunPaths, executor: Executor, config: Mapping[str, Any]) -> None:
    """Refuse to restart a run without checkpoints that has ended or that began with other settings.

    Raises:
        CheckpointError: The run's records cannot be read.
        ConfigurationError: The run has ended and its checkpoints are gone, or the run began with other settings.
    """
    if has_ended(paths.run_dir):
        fix = "the run has ended, and its checkpoints are gone: there is nothing to go on from; begin a new run"
        raise ConfigurationError("resume_from_checkpoint", str(paths.run_dir), fix)
    check_same_run(read_config(paths.run_dir), config, executor.changed_text)


def save_checkpoint(
    executor: Executor, folder: Path, state: Mapping[str, Any], arrays: Arrays, keep_last: int | None
) -> bool:
    """Save a checkpoint in its step's folder, and keep so many of the last; False, with a warning, if that fails."""
    try:
        executor.save(folder, state, arrays)
        if executor.processes.is_main and keep_last is not None:
            prune_populations(folder.parent, keep_last, newest=folder)
    except (OSError, EvoLLMError) as error:
        fix = "the run goes on, and earlier checkpoints are intact"
        warnings.warn(f"step {state['step']} could not be saved: {error}; {fix}", UserWarning, stacklevel=3)
        return False
    return True


def how_to_go_on(paths: RunPaths, *, trust_remote_code: bool) -> str:
    """The text that tells users how to resume an interrupted run; "" if there is no run folder yet."""
    folder = paths.run_dir
    if not is_run(folder):
        return ""
    saved = has_populations(paths.checkpoints)
    if not is_resumed_by_command(folder):
        fix = f"go on with resume_from_checkpoint={str(folder)!r}"
        return fix if saved else f"no checkpoint has been saved: {fix} begins anew"
    how = paths.resume(*(["model_config.trust_remote_code=true"] if trust_remote_code else []))
    return f"go on with: {how}" if saved else f"no checkpoint has been saved: begin it anew with: {how}"
