"""The limits of a run: compute (`budget`), steps of all members (`max_member_steps`) and `max_hours`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from evollm.execution.executor import Agreement
from evollm.hpo.hyperparameters import Value
from evollm.training.options import RunOptions
from evollm.training.spending import Account, Prices


class Limits:
    """Says whether another step fits.

    Args:
        options: The limits, None for one that is not set.
        prices: What steps and evaluations cost.
        processes: All processes take the main process's clock.
    """

    def __init__(self, options: RunOptions, prices: Prices, processes: Agreement) -> None:
        self._options = options
        self._prices = prices
        self._processes = processes
        self._began = time.monotonic()

    def start_clock(self, account: Account) -> None:
        """Count hours from now on, after those of an account."""
        self._began = time.monotonic() - account.seconds

    def hit(self, account: Account, step: int, learners: Sequence[Mapping[str, Value]], evaluations: float) -> str:
        """Name of the limit within which no further step fits; "" if a step fits.

        It depends on what the run has done alone, so that a resumed run ends where it would have ended anyway.

        Args:
            account: What has been spent.
            step: Steps done.
            learners: The hyperparameters of each member that learns on.
            evaluations: Of one member on all rows, that follow the step if the run ends with it.
        """
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
