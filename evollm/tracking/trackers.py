"""Callbacks for TensorBoard, Weights & Biases and trackio, which are optional dependencies."""

from __future__ import annotations

import importlib
import os
import re
import secrets
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from evollm.checks import boolean, nearest_name
from evollm.errors import ConfigurationError, MissingExtraError
from evollm.hpo import AnyEvaluation
from evollm.own_files import inside, read_bytes, replace_bytes
from evollm.runs.events import Callback, Evaluated, Evolved, RunEnded, RunStarted, StepDone

# The file with the run's id in Weights & Biases and trackio, by which a resumed run continues there.
ID_FILE = "tracking-id"
_ID = re.compile(r"[0-9a-f]{8}")
PROJECT = "evollm"
NONE = "none"


class Tracker(Callback):
    """Writes a run as scalars such as `agent_3/rewards/margins`, and evolutions as text, too.

    Raises:
        MissingExtraError: The tracker's package is not installed.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        try:
            self.module = importlib.import_module(self.name)
        except ImportError as error:
            raise MissingExtraError(self.name, self.name, f'report_to="{self.name}"') from error

    def on_step(self, event: StepDone) -> None:
        """Write the metrics of every agent."""
        self.write(_by_agent(event.metrics), event.step)

    def on_evaluation(self, event: Evaluated) -> None:
        """Write the held-out scores and the hyperparameters of every agent."""
        self.write(_by_agent(event.agents), event.step)
        scores = {index: _scores("eval_", evaluation) for index, evaluation in event.evaluations.items()}
        self.write(_by_agent(scores) | {"best_agent": event.best, "generation": event.generation}, event.step)

    def on_evolution(self, event: Evolved) -> None:
        """Write the parent and the hyperparameters of every agent."""
        births = event.plan.births
        lineage = {birth.index: {"parent": birth.parent, **birth.hyperparameters} for birth in births}
        self.write(_by_agent(lineage) | {"generation": event.plan.generation + 1}, event.step)
        parents = ["" if birth.parent is None else f" <- agent {birth.parent}" for birth in births]
        lines = [f"agent {one.index}{parent}: {one.origin}" for one, parent in zip(births, parents, strict=True)]
        self.write_text("evolution", "\n".join(lines), event.step)

    def on_end(self, event: RunEnded) -> None:
        """Write the scores of the first agent before training and of the best agent after it."""
        scores: dict[str, float] = {"best_agent": event.best, "best_step": event.best_step}
        for when, evaluation in (("before", event.before), ("after", event.after)):
            if evaluation is not None:
                scores |= {f"{when}/{name}": value for name, value in _scores("", evaluation).items()}
        self.write(scores, event.step)

    @abstractmethod
    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars; there may be several calls for one step."""

    @abstractmethod
    def write_text(self, name: str, text: str, step: int) -> None:
        """Write lines of text."""


class TensorBoard(Tracker):
    """Writes TensorBoard event files into the folder `tensorboard` of the run."""

    name = "tensorboard"
    _writer: Any = None

    def on_start(self, event: RunStarted) -> None:
        """Open the event file."""
        module = importlib.import_module("torch.utils.tensorboard")
        # A resumed run repeats the steps after its checkpoint, so their first records are dropped.
        purge = event.step + 1 if event.step else None
        folder = str(inside(event.run_dir, "tensorboard"))
        self._writer = _started(self.name, lambda: module.SummaryWriter(folder, purge_step=purge))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def write_text(self, name: str, text: str, step: int) -> None:
        """Write lines of text; TensorBoard shows them as Markdown, in which two spaces end a line."""
        self._writer.add_text(name, text.replace("\n", "  \n"), step)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Tracker):
    """Logs to a Weights & Biases run; a resumed run continues it.

    The project is `evollm` or `WANDB_PROJECT`; wandb reads its other variables itself, such as `WANDB_MODE=offline`.
    """

    name = "wandb"
    _run: Any = None

    def on_start(self, event: RunStarted) -> None:
        """Open the run, or open it again."""
        arguments = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": event.run_dir.name,
            "id": _tracking_id(event.run_dir),
            "resume": "allow",
            "config": dict(event.config),
        }
        self._run = _started(self.name, lambda: self.module.init(**arguments))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars; wandb joins the calls of one step to one row."""
        self._log(values, step)

    def write_text(self, name: str, text: str, step: int) -> None:
        """Log lines of text."""
        self._log({name: text}, step)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        # wandb refuses a smaller step than the last; the steps that a resumed run repeats have the same values.
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


class Trackio(Tracker):
    """Logs to a trackio run; a resumed run continues it.

    The run is local unless trackio's variables are set (`TRACKIO_SPACE_ID`, `TRACKIO_DIR`). The project is `evollm` or
    `TRACKIO_PROJECT`.
    """

    name = "trackio"
    _run: Any = None

    def on_start(self, event: RunStarted) -> None:
        """Open the run, or open it again."""
        arguments = {
            "project": os.environ.get("TRACKIO_PROJECT", PROJECT),
            # trackio identifies runs by name, and two run folders may have the same one.
            "name": f"{event.run_dir.name}-{_tracking_id(event.run_dir)}",
            "resume": "allow",
            "config": dict(event.config),
            "embed": False,
        }
        self._run = _started(self.name, lambda: self.module.init(**arguments))

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars."""
        self._run.log(dict(values), step=step)

    def write_text(self, name: str, text: str, step: int) -> None:
        """Log lines of text."""
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


TRACKERS: Mapping[str, type[Tracker]] = {tracker.name: tracker for tracker in (TensorBoard, WeightsAndBiases, Trackio)}


def tracker_names(report_to: str | Sequence[str] | None, *, wb: bool = False, tensorboard: bool = False) -> list[str]:
    """Return the names of the requested trackers, each once.

    Args:
        report_to: A name of `TRACKERS` or a list of names; "none" or None: none.
        wb: The same as the name `wandb`.
        tensorboard: The same as the name `tensorboard`.

    Raises:
        ConfigurationError: A name is not known, or the list has "none" and others.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    if names is None:
        names = []
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError("report_to", report_to, f"must be a name or a list of names: {', '.join(TRACKERS)}")
    for name in names:
        if name not in (*TRACKERS, NONE):
            nearest = nearest_name(name, [*TRACKERS, NONE])
            fix = f"{name!r} is no tracker; the nearest is {nearest!r}, known are {', '.join((*TRACKERS, NONE))}"
            raise ConfigurationError("report_to", report_to, fix)
    if NONE in names and len(names) > 1:
        raise ConfigurationError("report_to", report_to, f"{NONE!r} stands alone")
    switched = {"wandb": boolean("wb", wb), "tensorboard": boolean("tensorboard", tensorboard)}
    return [name for name in TRACKERS if name in names or switched.get(name)]


def _started(name: str, start: Callable[[], Any]) -> Any:
    """Call `start` and return its result; an exception becomes a ConfigurationError."""
    try:
        return start()
    except Exception as error:
        fix = (
            f"could not start: {error}; correct that (without a network or login: WANDB_MODE=offline), or leave it out"
        )
        raise ConfigurationError("report_to", name, fix) from error


def _tracking_id(run_dir: Path) -> str:
    """Return the run's id for trackers, which is random and stored in the run folder."""
    path = inside(run_dir, ID_FILE)
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, f"{secrets.token_hex(4)}\n".encode())
    found = read_bytes(path).decode(errors="replace").strip()
    if not _ID.fullmatch(found):
        raise ConfigurationError("report_to", str(path), "holds no name of a run: remove the file")
    return found


def _by_agent(values: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Return the numbers of every agent by names such as `agent_3/lr`, which trackers group by their first part."""
    return {
        f"agent_{index}/{name}": value
        for index, named in values.items()
        for name, value in named.items()
        if isinstance(value, int | float)
    }


def _scores(prefix: str, evaluation: AnyEvaluation) -> dict[str, float]:
    return {f"{prefix}{name.removeprefix('mean_')}": value for name, value in evaluation.scores.items()}
