"""Strategies without inheritance, computed from a recorded sweep: what they choose, and what it costs.

Compute is counted in floating-point operations by the formula of `evollm.models.flops` and given in runs. A run is what
one agent by itself needs: all steps, the reference's log-probs of all training and selection pairs, one evaluation at
the end. The members of a search share the reference's log-probs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation, Fitness
from searching.records import Array, Record


@dataclass(frozen=True)
class Choice:
    """What a strategy chose.

    Attributes:
        founder: Index of the configuration, trained to the end.
        runs: What it cost.
    """

    founder: int
    runs: float


# (record, the founders in the order in which they are drawn) -> the choice.
Strategy = Callable[[Record, Sequence[int]], Choice]


@dataclass(frozen=True)
class Prices:
    """Operations of a seed's work.

    Attributes:
        steps: (steps,) of training one member in each step.
        selection: (selection pairs,) of a member's forward pass.
        training_references: Of the reference's log-probs of all training pairs.
        without_adapter: Share of a member's forward pass that the reference's pass costs.
    """

    steps: Array
    selection: Array
    training_references: float
    without_adapter: float

    @classmethod
    def of(cls, record: Record) -> Prices:
        """From a record."""
        training, references = record.step_operations.T
        reference = float(references.sum())
        # T (4P + 6A) + 4EC and T 2P + 2EC operations: the adapter adds 2TA to a forward pass.
        adapter = (float(training.sum()) - 2 * reference) / 3
        return cls(training, record.pair_operations, reference, reference / (reference + adapter))

    @property
    def run(self) -> float:
        """Of one agent by itself."""
        return float(self.steps.sum() + self.training_references + (1 + self.without_adapter) * self.selection.sum())

    def runs(self, member_steps: Sequence[int], evaluated: Sequence[int]) -> float:
        """Of a search, in runs.

        Args:
            member_steps: Steps of each member.
            evaluated: For each evaluation of a member the number of selection pairs.
        """
        total = np.concatenate([[0.0], np.cumsum(self.steps)])
        pairs = np.concatenate([[0.0], np.cumsum(self.selection)])
        part = max(member_steps) / len(self.steps)
        work = total[list(member_steps)].sum() + pairs[list(evaluated)].sum()
        references = self.without_adapter * pairs[max(evaluated)] + part * self.training_references
        return float(work + references) / self.run


def of_kind(record: Record, kind: str) -> list[int]:
    """Indices of the founders of a kind."""
    return [number for number, founder in enumerate(record.about["founders"]) if founder["kind"] == kind]


def single(record: Record, order: Sequence[int]) -> Choice:
    """One run with the default settings."""
    del order
    return Choice(of_kind(record, "default")[0], 1.0)


def random_search(record: Record, order: Sequence[int], count: int, score: str = "accuracy_mean_margin") -> Choice:
    """The best by a score of `count` founders, each a run by itself."""
    return Choice(ranked(record, order[:count], -1, score)[0], float(count))


def grid_search(record: Record, order: Sequence[int], score: str = "accuracy_mean_margin") -> Choice:
    """The best of the grid."""
    del order
    members = of_kind(record, "grid")
    return Choice(ranked(record, members, -1, score)[0], float(len(members)))


@dataclass(frozen=True)
class Rung:
    """A decision of successive halving.

    Attributes:
        part: Of a run, after which it is made.
        kept: How many members go on.
        pairs: Selection pairs that members are compared on; None: all.
    """

    part: float
    kept: int
    pairs: int | None = None


def halving(
    record: Record,
    order: Sequence[int],
    count: int,
    rungs: Sequence[Rung],
    score: str = "margin_over_std",
    least: float = -np.inf,
) -> Choice:
    """Successive halving: at each rung the best go on; the best of the last ones, trained to the end, is chosen."""
    members, done = list(order[:count]), dict.fromkeys(order[:count], 0)
    total, all_pairs = len(record.step_operations), record.selection.shape[-1]
    evaluated: list[int] = []
    for rung in [*rungs, Rung(1.0, 1)]:
        number = record.about["sizes"]["rungs"].index(rung.part)
        pairs = all_pairs if rung.pairs is None else min(rung.pairs, all_pairs)
        done |= dict.fromkeys(members, round(rung.part * total))
        evaluated += [pairs] * len(members)
        members = ranked(record, members, number, score, least, pairs)[: rung.kept]
    return Choice(members[0], Prices.of(record).runs(list(done.values()), evaluated))


def ranked(
    record: Record, members: Sequence[int], rung: int, score: str, least: float = -np.inf, pairs: int | None = None
) -> list[int]:
    """Members from the best to the worst by a fitness on the first `pairs` selection pairs of a rung.

    Those whose mean chosen log-ratio is below `least` nats come last.
    """

    def key(founder: int) -> tuple[float, ...]:
        holds = float(record.selection[founder, rung, 0, :pairs].mean() >= least)
        return holds, *selection_fitness(record, founder, rung, score, pairs)

    return sorted(members, key=key, reverse=True)


@cache
def selection_fitness(record: Record, founder: int, rung: int, score: str, pairs: int | None = None) -> Fitness:
    """A member's fitness on the first `pairs` selection pairs of a rung."""
    return PREFERENCE_FITNESSES[score](Evaluation(*record.selection[founder, rung, :, :pairs]))


@cache
def final_terms(record: Record, founder: int, score: str) -> Array:
    """(final pairs,) contributions to a member's final score."""
    return PREFERENCE_FITNESSES[score].terms(Evaluation(*record.final[founder]))


STRATEGIES: Mapping[str, Strategy] = {
    "default settings": single,
    "grid, 8": grid_search,
    **{f"random, {count}": partial(random_search, count=count) for count in (1, 2, 4, 8)},
    **{
        f"random, {count}, margin / std": partial(random_search, count=count, score="margin_over_std")
        for count in (2, 4, 8)
    },
    "halving 8": partial(halving, count=8, rungs=[Rung(1 / 8, 4), Rung(1 / 4, 2), Rung(1 / 2, 1)]),
    "halving 8, 64 pairs": partial(halving, count=8, rungs=[Rung(1 / 8, 4, 64), Rung(1 / 4, 2, 128), Rung(1 / 2, 1)]),
    "halving 8 by 4": partial(halving, count=8, rungs=[Rung(1 / 8, 2, 64), Rung(1 / 2, 1)]),
    "halving 16": partial(
        halving, count=16, rungs=[Rung(1 / 16, 8, 64), Rung(1 / 8, 4, 64), Rung(1 / 4, 2, 128), Rung(1 / 2, 1)]
    ),
    "halving 8 by 4, log-loss": partial(halving, count=8, rungs=[Rung(1 / 8, 2, 64), Rung(1 / 2, 1)], score="log_loss"),
    "halving 16 by 4": partial(halving, count=16, rungs=[Rung(1 / 16, 4, 64), Rung(1 / 4, 1, 128)]),
}
