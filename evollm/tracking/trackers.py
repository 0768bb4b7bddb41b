"""TensorBoard and Weights & Biases, which are optional."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from evollm.errors import MissingExtraError
from evollm.training.callbacks import Callback, Evaluated, RunStarted, StepDone


def _require(module: str, package: str, extra: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, extra, purpose) from error


class _Scalars(Callback):
    """Turns steps and evaluations into scalars named `agent_3/rewards/margins`."""

    def on_step(self, event: StepDone) -> None:
        """Write the metrics of every agent."""
        for index, metrics in event.metrics.items():
            self.write(f"agent_{index}", metrics, event.step)

    def on_evaluation(self, event: Evaluated) -> None:
        """Write the held-out scores and the hyperparameters of every agent."""
        for index, evaluation in event.evaluations.items():
            scores = {f"eval_{name.removeprefix('mean_')}": value for name, value in evaluation.scores.items()}
            numbers = {name: value for name, value in event.agents[index].items() if isinstance(value, int | float)}
            self.write(f"agent_{index}", scores | numbers, event.step)

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        raise NotImplementedError


class TensorBoard(_Scalars):
    """Writes TensorBoard event files into the run folder.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        _require("tensorboard", "tensorboard", "tensorboard", "tensorboard=True")
        self._writer: Any = None

    def on_start(self, event: RunStarted) -> None:
        """Open the event file."""
        module = importlib.import_module("torch.utils.tensorboard")
        # What a resumed run had written after its checkpoint comes again.
        purge = event.step + 1 if event.step else None
        self._writer = module.SummaryWriter(str(event.run_dir / "tensorboard"), purge_step=purge)

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(_Scalars):
    """Logs to a Weights & Biases run.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self) -> None:
        self._wandb = _require("wandb", "wandb", "wandb", "wb=True")
        self._run: Any = None

    def on_start(self, event: RunStarted) -> None:
        """Open the run."""
        self._run = self._wandb.init(project="evollm", name=event.run_dir.name, config=dict(event.config))

    def write(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Log scalars."""
        self._run.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
