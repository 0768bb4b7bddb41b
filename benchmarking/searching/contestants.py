"""Strategies without inheritance, computed from a recorded sweep: what they choose, and what it costs.

Compute is counted in floating-point operations by the formula of `evollm.models.flops` and given in runs. A run is what
one agent by itself needs: all steps, the reference's log-probs of all training and selection pairs, one evaluation at
the end. The members of a search share the reference's log-probs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np

from evollm.hpo import PREFERENCE_FITNESSES, Evaluation, Fitness, growing_subsets, survivors
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
    """The best by a score of at most `count` founders, each a run by itself."""
    return Choice(ranked(record, order[:count], -1, score)[0], float(len(order[:count])))


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
        score: By which they are compared.
    """

    part: float
    kept: int
    pairs: int | None = None
    score: str = "margin_over_std"


def halving(
    record: Record,
    order: Sequence[int],
    count: int,
    rungs: Sequence[Rung],
    least: float = -np.inf,
    error_rate: float = 0.0,
) -> Choice:
    """Successive halving: at each rung the best go on; the best of the last ones, trained to the end, is chosen.

    Args:
        record: The sweep.
        order: Founders in the order in which they are drawn.
        count: How many of them begin.
        rungs: The decisions before the last one, which is by the last rung's score on all pairs.
        least: Guard: members whose mean chosen log-ratio is below so many nats come last.
        error_rate: Above 0 a rung looks at growing subsets of its pairs, and drops whoever is clearly worse than
            another with `evollm.hpo.survivors`.
    """
    members, done = list(order[:count]), dict.fromkeys(order[:count], 0)
    all_pairs = record.selection.shape[-1]
    evaluated: list[int] = []
    for rung in [*rungs, Rung(1.0, 1, score=rungs[-1].score)]:
        number = record.about["sizes"]["rungs"].index(rung.part)
        pairs = min(rung.pairs or all_pairs, all_pairs)
        done |= dict.fromkeys(members, round(rung.part * len(record.step_operations)))
        if error_rate and len(members) > 1:
            members, seen = race(record, members, number, rung.score, pairs, error_rate)
        else:
            seen = [pairs] * len(members)
        evaluated += seen
        members = ranked(record, members, number, rung.score, least, max(seen))[: rung.kept]
    return Choice(members[0], Prices.of(record).runs(list(done.values()), evaluated))


def race(
    record: Record, members: Sequence[int], rung: int, score: str, rows: int, error_rate: float
) -> tuple[list[int], list[int]]:
    """Those that are not clearly worse than another, and on how many pairs each member was evaluated to see that."""
    going, seen, before = list(members), dict.fromkeys(members, 0), 0
    for pairs in growing_subsets(rows):
        seen |= dict.fromkeys(going, pairs)
        terms = np.stack([selection_terms(record, member, rung, score, pairs) for member in going])
        kept = survivors(terms, rows=rows, rows_before=before, error_rate=error_rate, members=len(members))
        going, before = [member for member, stays in zip(going, kept, strict=True) if stays], pairs
        if len(going) == 1:
            break
    return going, list(seen.values())


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
def selection_terms(record: Record, founder: int, rung: int, score: str, pairs: int) -> Array:
    """(pairs,) contributions to a member's score on the first `pairs` selection pairs of a rung."""
    return PREFERENCE_FITNESSES[score].terms(Evaluation(*record.selection[founder, rung, :, :pairs]))


@cache
def final_terms(record: Record, founder: int, score: str) -> Array:
    """(final pairs,) contributions to a member's final score."""
    return PREFERENCE_FITNESSES[score].terms(Evaluation(*record.final[founder]))


@dataclass(frozen=True)
class Halving:
    """Successive halving as data.

    Attributes:
        count: Configurations that begin.
        rungs: The decisions before the last one.
        note: What is unusual about it, for its name.
        options: Further arguments of `halving`.
        spreads: Whether those that begin are spread over the learning rates.
    """

    count: int
    rungs: Sequence[Rung]
    note: str = ""
    options: Mapping[str, float] = field(default_factory=dict)
    spreads: bool = False

    @property
    def name(self) -> str:
        """Such as "8-2-1 at 1/8, 1/2 on 64, 128 pairs, mean_margin"."""
        members = "-".join(map(str, (self.count, *(rung.kept for rung in self.rungs))))
        parts = ", ".join(f"1/{1 / rung.part:.0f}" for rung in self.rungs)
        pairs = ", ".join(str(rung.pairs or "all") for rung in self.rungs)
        scores = " then ".join(dict.fromkeys(rung.score for rung in self.rungs))
        members = f"spread {members}" if self.spreads else members
        return f"{members} at {parts} on {pairs} pairs, {scores}{self.note}"

    def __call__(self, record: Record, order: Sequence[int]) -> Choice:
        """Replay it."""
        founders = spread(record, order, self.count) if self.spreads else order
        return halving(record, founders, self.count, self.rungs, **self.options)


def spread(record: Record, order: Sequence[int], count: int) -> list[int]:
    """At most so many founders, spread over the learning rates as a Latin hypercube spreads them.

    The range of the rates is divided into `count` equal parts on a logarithmic scale, a place is drawn in each, and the
    founder that is nearest to it is taken. `order` is a random one, and seeds the draws.
    """
    left = {founder: math.log(record.about["founders"][founder]["hyperparameters"]["lr"]) for founder in order}
    low, high, count = min(left.values()), max(left.values()), min(count, len(left))
    rng = np.random.default_rng(list(order))
    places = low + (rng.permutation(count) + rng.random(count)) / count * (high - low)
    chosen = []
    for place in places:
        nearest = min(left, key=lambda founder: abs(left[founder] - place))
        chosen.append(nearest)
        left.pop(nearest)
    return chosen


def _rungs(*decisions: tuple[float, int, int | None], score: str = "margin_over_std") -> list[Rung]:
    return [Rung(*decision, score) for decision in decisions]


_TWO = ((1 / 8, 2, 64), (1 / 2, 1, 128))
_THREE = ((1 / 8, 4, 64), (1 / 4, 2, 128), (1 / 2, 1, None))
_EVERYBODY = ((1 / 16, 8, None), (1 / 8, 8, None), (1 / 4, 8, None), (1 / 2, 8, None))
_LATE = ((1 / 4, 2, 64), (1 / 2, 1, 128))
_EARLY = "mean_margin"
# From the cheapest to the dearest.
HALVINGS = (
    Halving(8, _rungs((1 / 16, 2, 32), (1 / 4, 1, 64), score=_EARLY)),
    Halving(8, _rungs((1 / 8, 1, 32), score=_EARLY)),
    Halving(8, [Rung(1 / 8, 2, 32, _EARLY), Rung(1 / 2, 1, 64)]),
    Halving(8, [Rung(1 / 8, 2, 64, _EARLY), Rung(1 / 2, 1, 128)]),
    Halving(8, [Rung(1 / 8, 2, 64, _EARLY), Rung(1 / 2, 1, 128)], ", guard -3 nats", {"least": -3.0}),
    *(Halving(8, _rungs(*_TWO, score=score)) for score in PREFERENCE_FITNESSES if score != "accuracy"),
    Halving(12, _rungs((1 / 8, 2, 32), (1 / 4, 1, 64), score=_EARLY)),
    Halving(8, [*_rungs((1 / 8, 4, 32), (1 / 4, 2, 64), score=_EARLY), Rung(1 / 2, 1, 128)]),
    Halving(8, [Rung(1 / 4, 2, 64, _EARLY), Rung(1 / 2, 1, 128)]),
    Halving(8, [*_rungs((1 / 8, 4, 32), (1 / 4, 2, 64), score=_EARLY), Rung(1 / 2, 2, 32)]),
    # As `tune` does it with populations of four, five and eight.
    *(Halving(count, _rungs(*_LATE), spreads=True) for count in (4, 5)),
    Halving(4, _rungs(*_LATE)),
    Halving(8, _rungs((1 / 4, 3, 64), (1 / 2, 1, 128)), spreads=True),
    Halving(4, _rungs((1 / 2, 1, 128)), spreads=True),
    Halving(8, _rungs(*_THREE), ", raced", {"error_rate": 0.2}),
    Halving(8, _rungs(*_THREE)),
    Halving(16, _rungs((1 / 16, 4, 64), (1 / 4, 2, 128), (1 / 2, 1, None))),
    Halving(8, _rungs(*_EVERYBODY), ", raced without cap", {"error_rate": 0.05}),
)
STRATEGIES: Mapping[str, Strategy] = {
    "default settings": single,
    "grid, 8": grid_search,
    **{f"random, {count}": partial(random_search, count=count) for count in (1, 2, 4, 8)},
    "random, 8, margin_over_std": partial(random_search, count=8, score="margin_over_std"),
    "spread, 8, margin_over_std": lambda record, order: random_search(
        record, spread(record, order, 8), 8, "margin_over_std"
    ),
    **{one.name: one for one in HALVINGS},
}
