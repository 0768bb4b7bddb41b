"""Candidates that are made of the best agents of a run without training, and the test by which one of them may win."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np

from evollm.checks import boolean, finite_number, nearest_name, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import FloatArray
from evollm.hpo.racing import paired_z
from evollm.names import check_known

# As in `evollm.models.adapters.combining`, which this package does not import.
COMBINATIONS = ("cat", "svd", "linear", "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class Recipe:
    """How a candidate is made.

    Attributes:
        agents: Indices of the agents whose actors are combined with equal weights; of a scaled actor its agent alone.
            -1: the agent of the best evaluation, as it was then.
        combination: One of `COMBINATIONS`; "" for a scaled actor.
        factor: The actor becomes reference + factor x (actor - reference); 1 for a combination.
        density: Share of the entries that TIES and DARE keep.
        seed: Seed of DARE.
    """

    agents: tuple[int, ...]
    combination: str = ""
    factor: float = 1.0
    density: float = 0.5
    seed: int = 0

    def __str__(self) -> str:
        names = ["the best of earlier steps" if index < 0 else f"agent {index}" for index in self.agents]
        return f"{self.combination} of {', '.join(names)}" if self.combination else f"{names[0]} x {self.factor:g}"


@dataclass(frozen=True)
class FinalCandidates:
    """The candidates that are evaluated after the last step, beside the best agent.

    Attributes:
        finalists: Number of the fittest agents that are combined.
        combinations: Combinations of all finalists, with equal weights: names of `COMBINATIONS`. `cat` is the exact
            mean of their weight changes, the uniform soup of arXiv 2203.05482.
        greedy: Whether to add a greedy soup (arXiv 2203.05482): from the best agent on, each finalist joins whose
            addition does not lower the score.
        factors: Factors by which the best agent's change of the reference is multiplied: above 1 extrapolates (ExPO,
            arXiv 2404.16792), below 1 shrinks.
        score: Name of a fitness of the algorithm by which candidates are compared, such as "log_loss"; None: the
            algorithm's smooth one, `log_loss` for pairs and `loss` for examples.
        level: Probability, above 0 and below 0.5, with which some candidate may win although none is better.
        density: Share of the entries that TIES and DARE keep.
        seed: Seed of DARE.

    Raises:
        ConfigurationError: A value is out of its range, or no combination or factor is asked for.
    """

    finalists: int = 3
    combinations: Sequence[str] = ("cat",)
    greedy: bool = True
    factors: Sequence[float] = (0.5, 1.25, 1.5)
    score: str | None = None
    level: float = 0.05
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("merge.finalists", self.finalists, 1)
        whole_number("merge.seed", self.seed, 0)
        boolean("merge.greedy", self.greedy)
        for name in ("combinations", "factors"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ConfigurationError(f"merge.{name}", value, "must be a list")
            object.__setattr__(self, name, tuple(value))
        for name in self.combinations:
            if name not in COMBINATIONS:
                fix = f"must be of {', '.join(COMBINATIONS)}: did you mean {nearest_name(str(name), COMBINATIONS)!r}?"
                raise ConfigurationError("merge.combinations", name, fix)
        factors = tuple(float(finite_number("merge.factors", factor)) for factor in self.factors)
        object.__setattr__(self, "factors", factors)
        if not 0 < finite_number("merge.level", self.level) < 0.5:  # noqa: PLR2004
            raise ConfigurationError("merge.level", self.level, "must be above 0 and below 0.5")
        if not 0 < finite_number("merge.density", self.density) <= 1:
            raise ConfigurationError("merge.density", self.density, "must be above 0 and at most 1")
        if not (self.combinations or self.greedy or self.factors):
            raise ConfigurationError("merge", self, "asks for no candidate: leave merge out, or give combinations")

    def recipes(self, finalists: Sequence[int]) -> list[Recipe]:
        """The candidates of these agents, the best agent first, without the greedy soup."""
        several = tuple(finalists[: self.finalists])
        combined = [self.combined(several, name) for name in self.combinations if len(several) > 1]
        return combined + [Recipe(several[:1], factor=factor) for factor in self.factors if factor != 1]

    def most_evaluations(self, finalists: int) -> int:
        """Evaluations that candidates of so many agents need at most, that of the best agent by itself included."""
        joining = finalists - 1 if self.greedy else 0
        return 1 + len(self.recipes(range(finalists))) + joining

    def combined(self, agents: Sequence[int], combination: str = "cat") -> Recipe:
        """The recipe of a combination of these agents."""
        return Recipe(tuple(agents), combination, density=self.density, seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def final_candidates_of(value: object) -> FinalCandidates | None:
    """Return `value`, or the candidates of True (the default ones), of False or None (none) or of a mapping.

    Raises:
        ConfigurationError: It is something else; an unknown name gets the nearest.
    """
    if value is None or value is False:
        return None
    if value is True:
        return FinalCandidates()
    if isinstance(value, FinalCandidates):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError("merge", value, "must be true, or a mapping such as {'finalists': 3}")
    check_known(value, [field.name for field in fields(FinalCandidates)], {}, "merge")
    return FinalCandidates(**value)


@dataclass(frozen=True)
class Comparison:
    """A candidate against the best agent, on the same held-out rows.

    Attributes:
        difference: Mean difference of their terms; above 0: the candidate is better.
        p_value: One-sided p-value of a paired t-test, of this candidate alone; NaN where a term is not finite.
    """

    difference: float
    p_value: float


def compare_pairwise(candidate: FloatArray, best: FloatArray) -> Comparison:
    """Compare the terms, (n,) each, of a candidate and of the best agent on the same n rows; larger is better."""
    differences = candidate - best
    if not np.isfinite(differences).all():
        return Comparison(float("nan"), float("nan"))
    return Comparison(float(differences.mean()), NormalDist().cdf(-paired_z(differences)))


def winning_candidate(comparisons: Sequence[Comparison], level: float) -> int | None:
    """Position of the candidate with the largest difference among those that are better than the best agent.

    A candidate is better if its p-value is below the level divided by the number of candidates (Bonferroni), so that
    with a probability of at most `level` some candidate wins although none is better.

    Returns:
        None: no candidate is better.
    """
    better = [place for place, one in enumerate(comparisons) if one.p_value < level / len(comparisons)]
    return max(better, key=lambda place: comparisons[place].difference, default=None)
