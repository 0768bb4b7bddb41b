"""Where a run writes."""

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
    """Where a run writes.

    Attributes:
        run_dir: The run folder.
        checkpoints: Folder for checkpoints of the population.
        elite: Folder for the fittest agent.
        resumes: Whether the folder holds a run to go on with.
    """

    run_dir: Path
    checkpoints: Path
    elite: Path
    resumes: bool = False

    @classmethod
    def of(cls, run_dir: object, checkpoints: object, elite: object, resume: object = None) -> RunPaths:
        """Fill in the defaults and refuse folders that hold something else.

        Raises:
            ConfigurationError: No path, a folder with another run, a folder to resume that holds none, or one in which
                nothing but an agent may lie.
            CheckpointError: The settings of the run to resume are damaged.
        """
        if resume is not None:
            folder = usable_path("resume_from_checkpoint", resume)
            if run_dir is not None and usable_path("run_dir", run_dir).resolve() != folder.resolve():
                raise ConfigurationError("run_dir", str(run_dir), "is not the run to resume: leave it out")
            if not (folder / CONFIG).is_file():
                fix = f"{no_run(folder)}. A run that ended before it had one is begun anew, as run_dir"
                raise ConfigurationError("resume_from_checkpoint", str(folder), fix)
            # Files of something else would be written over: a model has a config.json, too.
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
        """The command that goes on with the run, if a command began it; places outside its folder are named anew.

        Args:
            *settings: What it must be told besides.
        """
        own = self.run_dir.resolve()
        apart = {"checkpoint_path": self.checkpoints.absolute(), "elite_path": self.elite.absolute()}
        outside = [setting(name, path) for name, path in apart.items() if own not in path.resolve().parents]
        return command("resume", place(self.run_dir), *outside, *settings)

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Have the run folder, and a folder of checkpoints apart from it, for this run alone.

        Raises:
            CheckpointError: Another process writes to one of them.
            ConfigurationError: One cannot be written.
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
        """Refuse places of which one would be replaced with the other.

        Raises:
            ConfigurationError: The best agent's folder holds the run or its checkpoints, or lies among these, or the
                checkpoints have no folder of their own.
        """
        elite, run_dir, checkpoints = (path.resolve() for path in (self.elite, self.run_dir, self.checkpoints))
        if checkpoints == run_dir:
            raise ConfigurationError("checkpoint_path", str(self.checkpoints), "must be a folder of its own")
        if elite in (run_dir, *run_dir.parents, checkpoints, *checkpoints.parents) or checkpoints in elite.parents:
            raise ConfigurationError("elite_path", str(self.elite), "must be a folder of its own")

    def check_new(self) -> None:
        """Refuse to begin a run where there is one, or among files of somebody else's.

        A run that did not get to its first step leaves nothing to lose: its folder may be used again.

        Raises:
            ConfigurationError: Something lies there that would be lost.
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
    """A folder name in `evollm-runs` that says when the run began."""
    return Path("evollm-runs") / datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
