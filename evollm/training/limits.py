"""The limits of a run: compute (`budget`), steps of all members (`max_member_steps`) and `max_hours`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from evollm.errors import ConfigurationError
from evollm.execution.executor import Agreement, Member
from evollm.hpo import SearchPlan
from evollm.hpo.hyperparameters import Value
from evollm.training.options import RunOptions
from evollm.training.schedule import Decision, Schedule, SelectionRows
from evollm.training.spending import Account, Prices
from evollm.training.state import Progress


class Limits:
    """Says whether another step fits.

    Args:
        options: The limits, None for one that is not set.
        prices: What steps and evaluations cost.
        processes: All processes take the main process's clock.
        selection: On how many rows members are evaluated.
    """

    def __init__(self, options: RunOptions, prices: Prices, processes: Agreement, selection: SelectionRows) -> None:
        self._options = options
        self._prices = prices
        self._processes = processes
        self._selection = selection
        self._began = time.monotonic()

    def start_clock(self, account: Account) -> None:
        """Count hours from now on, after those of an account."""
        self._began = time.monotonic() - account.seconds

    def reached(
        self, progress: Progress, schedule: Schedule, members: Sequence[Member], plan: SearchPlan | None = None
    ) -> str:
        """Why no further step fits, of the members of a plan or the present ones; "" if one fits or none is planned.

        It depends on what the run has done alone, so that a resumed run ends where it would have ended anyway.

        Raises:
            ConfigurationError: Not even the first step fits.
        """
        if progress.step >= schedule.total:
            return ""
        diverged = {member.index for member in members if member.diverged}
        births = members if plan is None else plan.births
        learners = [birth.hyperparameters for birth in births if birth.index not in diverged]
        due = progress.due if plan is None else Decision.of(plan, progress.step)
        after = progress.step + 1
        rows = self._selection.at(after, schedule, due, limited=after < schedule.total)
        # Of fewer rows, the best member is evaluated on all of them at the end.
        evaluations = len(learners) if rows is None else len(learners) * rows / self._selection.total + 1
        limit = self._hit(progress.account, progress.step, learners, evaluations)
        value = getattr(self._options, limit) if limit else 0
        if limit and progress.step == 0:
            fix = f"is too little for one step of {len(members)} agents, its evaluation and final scores"
            raise ConfigurationError(limit, value, fix)
        return f"no further step fits in {limit}={value:g}" if limit else ""

    def _hit(self, account: Account, step: int, learners: Sequence[Mapping[str, Value]], evaluations: float) -> str:
        """Name of the limit within which no further step of the learners and so many evaluations on all rows fit."""
        budget, most = self._options.budget, self._options.max_member_steps
        if budget is not None and not self._prices.fits_a_step(account, step, learners, budget, evaluations):
            return "budget"
        if most is not None and account.member_steps + len(learners) > most:
            return "max_member_steps"
        return "max_hours" if self._is_late(account) else ""

    def fits_runner_up(self, account: Account, step: int, learners: Sequence[Mapping[str, Value]]) -> bool:
        """Whether the final score of a second agent fits in the budget, too; see `Prices.fits_two_scores`."""
        budget = self._options.budget
        return budget is None or self._prices.fits_two_scores(account, step, learners, budget)

    def steps_that_fit(self, account: Account, step: int, learners: Sequence[Mapping[str, Value]], steps: int) -> int:
        """About how many of so many further steps fit if these members make all of them; hours play no part."""
        budget, most = self._options.budget, self._options.max_member_steps
        found: list[float] = [steps]
        if budget is not None:
            found.append(self._prices.steps_that_fit(account, step, learners, budget))
        if most is not None:
            found.append((most - account.member_steps) // len(learners))
        return max(0, int(min(found)))

    def seconds_left(self, account: Account) -> float:
        """What is left of `max_hours`."""
        hours = self._options.max_hours
        return math.inf if hours is None else max(0.0, 3600 * hours - account.seconds)

    def _is_late(self, account: Account) -> bool:
        """Whether `max_hours` are over; all processes make this call at the same step."""
        if self._options.max_hours is None:
            return False
        account.seconds = float(self._processes.from_main(time.monotonic() - self._began))
        return account.seconds >= 3600 * self._options.max_hours
