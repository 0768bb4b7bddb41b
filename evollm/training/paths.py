"""The paths that a run writes to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from evollm.checkpoints.atomic import check_replaceable, is_locked_folder, only_writer
from evollm.checkpoints.steps import has_populations
from evollm.checks import usable_path
from evollm.command_line import command, place, setting
from evollm.errors import ConfigurationError
from evollm.own_files import check_can_be_made, inside
from evollm.runs.folder import CHECKPOINTS, CONFIG, ELITE, METRICS, RUN_FILES, no_run
from evollm.runs.reader import read_config


@dataclass(frozen=True)
class RunPaths:
    """The paths that a run writes to.

    Attributes:
        run_dir: The run folder.
        checkpoints: Folder for checkpoints of the population.
        elite: Folder for the fittest agent.
        resumes: Whether `run_dir` holds a run to resume.
    """

    run_dir: Path
    checkpoints: Path
    elite: Path
    resumes: bool = False

    @classmethod
    def of(cls, run_dir: object, checkpoints: object, elite: object, resume: object = None) -> RunPaths:
        """Fill in the defaults and refuse folders that hold other files.

        Raises:
            ConfigurationError: An argument is no path, a new run's folder holds another run, the folder to resume holds
                no run, or the elite folder holds something else than an agent.
            CheckpointError: The settings of the run to resume are damaged.
        """
        if resume is not None:
            folder = usable_path("resume_from_checkpoint", resume)
            if run_dir is not None and usable_path("run_dir", run_dir).resolve() != folder.resolve():
                raise ConfigurationError("run_dir", str(run_dir), "is not the run to resume: leave it out")
            if not (folder / CONFIG).is_file():
                fix = f"{no_run(folder)}. A run that ended before it had one is begun anew, as run_dir"
                raise ConfigurationError("resume_from_checkpoint", str(folder), fix)
            # Model folders have a config.json too; resuming in one would overwrite the model's files.
            read_config(folder, "resume_from_checkpoint")
        else:
            folder = new_run_dir() if run_dir is None else usable_path("run_dir", run_dir)
        check_can_be_made("run_dir", folder / "config.json")
        paths = cls(
            run_dir=folder,
            checkpoints=inside(folder, CHECKPOINTS)
            if checkpoints is None
            else usable_path("checkpoint_path", checkpoints),
            elite=inside(folder, ELITE) if elite is None else usable_path("elite_path", elite),
            resumes=resume is not None,
        )
        paths.check_apart()
        check_can_be_made("checkpoint_path", paths.checkpoints / CHECKPOINTS)
        check_replaceable("elite_path", paths.elite)
        if resume is None:
            paths.check_new()
        return paths

    def resume(self, *settings: str) -> str:
        """The shell command that resumes the run, if a command began the run; includes paths outside the run folder.

        Args:
            *settings: Further settings for the command.
        """
        own = self.run_dir.resolve()
        apart = {"checkpoint_path": self.checkpoints.absolute(), "elite_path": self.elite.absolute()}
        outside = [setting(name, path) for name, path in apart.items() if own not in path.resolve().parents]
        return command("resume", place(self.run_dir), *outside, *settings)

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Lock the run folder, and a checkpoint folder outside the run folder, against other processes.

        Raises:
            CheckpointError: Another process writes to one of the two folders.
            ConfigurationError: One of the two folders cannot be written.
        """
        with ExitStack() as stack:
            apart = self.run_dir not in self.checkpoints.parents
            for folder in [self.run_dir, *([self.checkpoints] if apart else [])]:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(only_writer(folder, what=folder))
                except OSError as error:
                    raise ConfigurationError("run_dir", str(folder), f"cannot be written: {error}") from error
            yield

    def check_apart(self) -> None:
        """Refuse paths with which saving the best agent or a checkpoint would replace other files of the run.

        Raises:
            ConfigurationError: The elite folder contains the run folder or the checkpoints, or lies in the checkpoint
                folder, or the checkpoint folder is the run folder.
        """
        elite, run_dir, checkpoints = (path.resolve() for path in (self.elite, self.run_dir, self.checkpoints))
        if checkpoints == run_dir:
            raise ConfigurationError("checkpoint_path", str(self.checkpoints), "must be a folder of its own")
        if elite in (run_dir, *run_dir.parents, checkpoints, *checkpoints.parents) or checkpoints in elite.parents:
            raise ConfigurationError("elite_path", str(self.elite), "must be a folder of its own")

    def check_new(self) -> None:
        """Refuse to begin a run in a folder that holds another run or files that evollm did not write.

        The folder of a run that stopped before its first step may be used again, since no training is lost.

        Raises:
            ConfigurationError: Files in one of the folders would be lost.
        """
        found = [name for name in RUN_FILES if os.path.lexists(self.run_dir / name)]
        if found and not is_locked_folder(self.run_dir):
            fix = f"holds {found[0]}, which evollm did not write and would replace: give a new folder"
            raise ConfigurationError("run_dir", str(self.run_dir), fix)
        metrics = self.run_dir / METRICS
        if (self.run_dir / ELITE).exists() or (metrics.exists() and metrics.stat().st_size > 0):
            fix = f"holds another run: resume it ({self.resume()}, or resume_from_checkpoint), or give a new folder"
            raise ConfigurationError("run_dir", str(self.run_dir), fix)
        if has_populations(self.checkpoints):
            fix = "holds checkpoints of another run, which would be taken for this one's: give another folder"
            field = "run_dir" if self.checkpoints == self.run_dir / CHECKPOINTS else "checkpoint_path"
            raise ConfigurationError(field, str(self.checkpoints), fix)


def new_run_dir() -> Path:
    """A path in `evollm-runs`, named after the present time."""
    return Path("evollm-runs") / datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
