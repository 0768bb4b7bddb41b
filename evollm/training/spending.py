"""The account of a run's compute: what has been spent, and what steps that are not done yet will cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evollm.execution.executor import Costs, Member
from evollm.hpo import FinalCandidates
from evollm.hpo.hyperparameters import Value
from evollm.hpo.search import SearchBudget
from evollm.runs.spent import Spent
from evollm.training.schedule import Schedule


@dataclass
class Account:
    """What a run has spent up to its last step; a part of its checkpoints.

    Attributes:
        operations: Floating-point operations by kind.
        member_steps: Steps, added up over the members.
        one_pass: Training operations of one agent that has learnt once from each batch so far.
        seconds: Seconds so far, of a run with `max_hours` alone: equal runs have equal checkpoints otherwise.
    """

    operations: dict[str, int] = field(default_factory=dict)
    member_steps: int = 0
    one_pass: float = 0.0
    seconds: float = 0.0

    def add(self, operations: Mapping[str, int], *, final: bool = False) -> None:
        """Add what an executor counted; `final`: in the evaluations before and after training."""
        for kind, count in operations.items():
            name = "final" if final and kind == "evaluation" else kind
            self.operations[name] = self.operations.get(name, 0) + count

    def add_step(self, operations: Mapping[str, int], learners: Sequence[Member]) -> None:
        """Add a step of these members."""
        self.add(operations)
        self.member_steps += len(learners)
        if learners:
            passes = sum(update_epochs(member.hyperparameters) for member in learners)
            self.one_pass += operations.get("training", 0) / passes

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Account:
        """Read the result of `to_dict`."""
        operations = {str(kind): int(count) for kind, count in data["operations"].items()}
        return cls(operations, int(data["member_steps"]), float(data["one_pass"]), float(data["seconds"]))


@dataclass(frozen=True)
class Prices:
    """What the steps and evaluations of a run cost; steps that are not done yet cost the mean over an epoch.

    Attributes:
        costs: What one agent needs for the rows of each split.
        schedule: When the run evaluates, and how long it is.
        split: The split of the evaluations before and after training, "" without any.
        update_epochs: Those of the first agent.
        moving: Whether references move, so that after the first epoch each agent computes its own.
        measures_kl: Whether a guard makes evaluations measure the KL.
        merge: The candidates after the last step; None: there are none.
    """

    costs: Costs
    schedule: Schedule
    split: str
    update_epochs: int
    moving: bool
    measures_kl: bool = False
    merge: FinalCandidates | None = None

    @property
    def evaluation(self) -> int:
        """Operations of the evaluation of one member on the selection rows."""
        return self.costs.evaluation["test"] + self.measures_kl * self.costs.kl

    def one_run(self, account: Account, step: int) -> dict[str, float]:
        """Operations of one agent by itself that makes all steps of the schedule, by kind.

        The steps done so far count as what they were, and the probe as what it was, so that one agent by itself spends
        exactly one run.
        """
        costs, schedule, references = self.costs, self.schedule, self.costs.references
        # Without an interval one agent by itself is evaluated at the end.
        interval = schedule.evaluate_every or schedule.total
        evaluations = 0 if schedule.evaluate_every is None else -(-schedule.total // interval)
        passes = account.one_pass + (schedule.total - step) * costs.training / schedule.epoch
        epochs = passes / costs.training if costs.training else 0.0
        computed = (epochs if self.moving else min(1, epochs)) * references["train"] + references["test"]
        computed += epochs * costs.mismatched
        return {
            "training": self.update_epochs * passes,
            "evaluation": evaluations * self.evaluation,
            "references": computed + (references["final"] if self.split == "final" else 0),
            "probe": account.operations.get("probe", 0),
            "final": 2 * costs.evaluation[self.split] if self.split else 0,
        }

    def fits_a_step(
        self,
        account: Account,
        step: int,
        learners: Sequence[Mapping[str, Value]],
        budget: float,
        evaluations: float,
    ) -> bool:
        """Whether at least half of another step fits, with the evaluations, candidates and final scores after it.

        Args:
            account: What has been spent.
            step: Steps done.
            learners: The hyperparameters of each member that learns on.
            budget: In runs of one agent.
            evaluations: Of one member on all rows, that follow the step if the run ends with it.
        """
        costs, references, members = self.costs, self.costs.references, len(learners)
        needed = self._a_step(step, learners) / 2 + evaluations * self.evaluation
        needed += self._candidates(members)
        # The score before the first step computes the references of its split.
        known = account.operations.get("evaluation") or (step > 0 and self.split == "test")
        needed += 0 if known else references["test"]
        if self.split:
            # The first agent is scored before the first step, the best two after the last.
            needed += (min(2, members) + (step == 0)) * costs.evaluation[self.split]
            needed += references["final"] if step == 0 and self.split == "final" else 0
        return needed <= self._left(account, step, budget)

    def steps_that_fit(
        self, account: Account, step: int, learners: Sequence[Mapping[str, Value]], budget: float
    ) -> float:
        """About how many further steps of the learners fit, with their evaluations, candidates and final scores."""
        evaluation = len(learners) * self.evaluation / (self.schedule.evaluate_every or math.inf)
        scores = (2 + (step == 0)) * self.costs.evaluation[self.split] if self.split else 0
        left = self._left(account, step, budget) - scores - self._candidates(len(learners))
        return left / (self._a_step(step, learners) + evaluation)

    def fits_two_scores(
        self, account: Account, step: int, learners: Sequence[Mapping[str, Value]], budget: float
    ) -> bool:
        """Whether the final scores of the best two agents exceed the budget by no more than a step of the learners.

        One agent by itself has two where its best evaluation is not the last one, and a step leaves room for one.
        """
        needed = 2 * self.costs.evaluation[self.split] if self.split else 0
        return needed <= self._left(account, step, budget) + self._a_step(step, learners)

    def _left(self, account: Account, step: int, budget: float) -> float:
        return budget * sum(self.one_run(account, step).values()) - sum(account.operations.values())

    def _a_step(self, step: int, learners: Sequence[Mapping[str, Value]]) -> float:
        """Operations of the step after `step`."""
        known = step >= self.schedule.epoch
        # References that move differ after the first epoch.
        differing = len(learners) if known and self.moving else 1
        passes = sum(map(update_epochs, learners)) * self.costs.training
        computed = (not known or self.moving) * self.costs.references["train"] + self.costs.mismatched
        return (passes + differing * computed) / self.schedule.epoch

    def _candidates(self, members: int) -> int:
        """Most operations of the evaluations of candidates; those of members and of the best one of earlier steps."""
        if self.merge is None:
            return 0
        finalists = min(self.merge.finalists, members + 1)
        # A combination has up to the rank of all its agents, an extrapolation that of actor and reference.
        larger = finalists * self.costs.adapter * (1 + self.measures_kl)
        return self.merge.most_evaluations(finalists) * (self.evaluation + larger)

    def search_budget(self, budget: float, members: int) -> SearchBudget:
        """What a search of so many founders may plan for, before anything is spent."""
        one_run = self.one_run(Account(), 0)
        step = one_run["training"] / self.schedule.total
        left = budget * sum(one_run.values()) - one_run["references"] - 1.5 * one_run["final"]
        left -= self._candidates(members)
        return SearchBudget(left / step, self.schedule.total, self.evaluation / step)

    def spent(self, account: Account, step: int) -> Spent:
        """What a run has spent up to a step."""
        return Spent(dict(account.operations), self.one_run(account, step), account.member_steps)


def update_epochs(hyperparameters: Mapping[str, Value]) -> int:
    """How often a member with these hyperparameters learns from a batch."""
    return int(hyperparameters.get("update_epochs", 1))
