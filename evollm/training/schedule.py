"""When a run evolves, evaluates and saves, and on how many rows it evaluates."""

from __future__ import annotations

from dataclasses import dataclass

from evollm.hpo import SearchPlan
from evollm.training.options import RunOptions


@dataclass(frozen=True)
class Decision:
    """The next decision of a search.

    Attributes:
        step: The step after which the search decides, None: never.
        rows: Rows that the members are compared on then, None: all.
    """

    step: int | None = None
    rows: int | None = None

    @classmethod
    def of(cls, plan: SearchPlan, step: int) -> Decision:
        """The decision after a plan that is carried out at this step."""
        return cls(None if plan.steps is None else step + plan.steps, plan.rows)


@dataclass(frozen=True)
class Schedule:
    """When a run evolves, evaluates and saves, in steps; a step is one batch for every agent.

    Attributes:
        total: Steps of the run.
        epoch: Steps of an epoch.
        evolve_every: Steps between two decisions of the search: `evo_steps`, by default an epoch; None: no search.
        evaluate_every: Steps between two evaluations; 0: evaluate for decisions and at the end alone; None: never.
        checkpoint_every: Steps between two checkpoints, 0: never.
    """

    total: int
    epoch: int
    evolve_every: int | None
    evaluate_every: int | None
    checkpoint_every: int

    @classmethod
    def of(cls, options: RunOptions, epoch: int, *, held_out: bool) -> Schedule:
        """Fill in the defaults: a run of one epoch; evolution, evaluation and a checkpoint after each epoch.

        Args:
            options: Options of the run.
            epoch: Batches of an epoch.
            held_out: Whether there are rows to evaluate on.
        """
        limits = [options.max_steps, options.num_epochs and options.num_epochs * epoch]
        evolve_every = (options.evo_steps or epoch) if options.evolves else None
        evaluate_every = options.evaluation_interval or evolve_every or epoch
        # Patience needs evaluations on all rows.
        asked = options.evaluation_interval is not None or options.early_stopping_patience is not None
        if not asked and getattr(options.search, "plans_evaluations", False):
            evaluate_every = 0
        return cls(
            total=min([limit for limit in limits if limit is not None], default=epoch),
            epoch=epoch,
            evolve_every=evolve_every,
            evaluate_every=evaluate_every if held_out else None,
            checkpoint_every=options.checkpoint_steps
            if options.checkpoint_steps is not None
            else evolve_every or epoch,
        )

    def decides_at(self, step: int, due: Decision) -> bool:
        """Whether the search decides after this step; never after the last step, since no learning would follow."""
        return step == due.step and step < self.total

    def evaluates_at(self, step: int, *, decides: bool) -> bool:
        """Whether to evaluate the population at this step; always before a decision (`decides`) and at the end."""
        if self.evaluate_every is None:
            return False
        return _due(self.evaluate_every, step) or decides or step == self.total

    def checkpoints_at(self, step: int) -> bool:
        """Whether to save a checkpoint at this step; always at the end, unless `checkpoint_every` is 0."""
        return bool(self.checkpoint_every) and (_due(self.checkpoint_every, step) or step == self.total)

    def next_pause(self, step: int, due: Decision) -> int:
        """The next step with a decision, an evaluation or a checkpoint after it, or the last step."""
        return next(later for later in range(step + 1, self.total + 1) if self._pauses_at(later, due))

    def _pauses_at(self, step: int, due: Decision) -> bool:
        decides = self.decides_at(step, due)
        evaluates = self.evaluates_at(step, decides=decides)
        return decides or evaluates or self.checkpoints_at(step) or step == self.total


@dataclass(frozen=True)
class SelectionRows:
    """On how many rows of the split `test` members are evaluated.

    Attributes:
        total: Rows of the split.
        takes_fewer: Whether algorithm and executor can evaluate on fewer.
        interval: Steps between two evaluations that the user asked for, which are on all rows; None: none are.
    """

    total: int
    takes_fewer: bool
    interval: int | None

    def at(self, step: int, schedule: Schedule, due: Decision, *, limited: bool = False) -> int | None:
        """Rows of the evaluation of all members at a step, None: all.

        Fewer are enough for a decision, and to find the best member where a limit ends the run before one (`limited`).
        """
        if due.step is None or due.rows is None or due.rows >= self.total or not self.takes_fewer:
            return None
        if _due(self.interval, step) or (step == schedule.total and not limited):
            return None
        enough = step == due.step or (limited and not _due(schedule.evaluate_every, step))
        return due.rows if enough else None


def _due(interval: int | None, step: int) -> bool:
    return step % interval == 0 if interval else False
