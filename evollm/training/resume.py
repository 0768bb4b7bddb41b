"""The checkpoint from which an interrupted run resumes, and the text that tells users how to resume."""

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
    """The newest undamaged checkpoint of a run, None if there is none; the main process warns of damaged ones.

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
    """Read the run's own part of a checkpoint: its state and its progress.

    Args:
        path: The checkpoint.
        config: `Run.config` of the resuming run.
        changed_text: From `config["data"]` of the checkpoint to the first changed text, in words.

    Raises:
        CheckpointError: The checkpoint lacks state that a run needs to resume.
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
    """Refuse to restart a run without checkpoints that has ended or that began with other settings.

    Raises:
        CheckpointError: The run's records cannot be read.
        ConfigurationError: The run has ended and its checkpoints are gone, or the run began with other settings.
    """
    if has_ended(paths.run_dir):
        fix = "the run has ended, and its checkpoints are gone: there is nothing to go on from; begin a new run"
        raise ConfigurationError("resume_from_checkpoint", str(paths.run_dir), fix)
    check_same_run(read_config(paths.run_dir), config, changed_text)


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
