"""Guards: bounds on how far an agent may drift from the reference, which come before the fitness.

Agents are compared as in Deb (2000), "An efficient constraint handling method for genetic algorithms": an agent that
holds all bounds beats one that does not, of two that do not the one nearer to its bounds is better, and among those
that hold them the fitness decides. A bound therefore never trades off against the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from evollm.checks import finite_number, positive_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.fitness import AnyEvaluation, Fitness, FloatArray
from evollm.names import check_known

# The first component of the fitness of an agent that breaks a guard: below every score, and finite, since a fitness
# that is not finite means that the agent has diverged.
BROKEN = -1e9
_SAMPLING = ("answer_prompts", "answer_tokens")
_OF_PAIRS = ("min_chosen_logratio", "max_kl", "max_answer_length_ratio")


@dataclass(frozen=True)
class AnswerSampling:
    """Which answers an evaluation generates.

    Attributes:
        prompts: The first so many prompts of the evaluated rows are answered.
        max_new_tokens: Answers are cut at this many tokens.
        temperature: Divides the logits before a token is sampled; 0: greedy decoding.
        top_p: Sampled tokens are the most probable ones with at least this probability together.
        seed: Seeds the random numbers of sampled answers, together with the position of the row.
    """

    prompts: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class Guards:
    """Bounds on how far an agent may be from the reference, on the held-out pairs; None: no such bound.

    Attributes:
        min_chosen_logratio: Smallest mean over the pairs of log pi(chosen) - log ref(chosen), in nats per completion.
            Its negative is what the chosen completions have become more expensive by, in cross-entropy.
        max_kl: Largest mean over the pairs of `Evaluation.kl`, the exact KL(pi || ref) along the held-out completions,
            in nats per completion. Measuring it makes an evaluation two to three times as expensive.
        max_answer_length_ratio: Largest mean length of an agent's greedy answers, divided by that of the reference's
            answers to the same prompts. Preference tuning exploits length (Park et al. 2024, arXiv 2403.19159), which
            log-probs of given completions do not show. Every evaluation generates the answers.
        min_win_rate: Smallest `win_rate`, the share of prompts at which a judge prefers the agent's answer to the
            reference's. It needs a `judge`, whose settings say which prompts are answered.
        answer_prompts: The first so many prompts of the evaluated rows are answered for this.
        answer_tokens: Answers, also the reference's, are cut at this many tokens.

    Raises:
        ConfigurationError: A bound is no finite number, `max_answer_length_ratio` is not above 0, `min_win_rate` not in
            (0, 1], or one of the last two is not a whole number above 0 or has no effect.
    """

    min_chosen_logratio: float | None = None
    max_kl: float | None = None
    max_answer_length_ratio: float | None = None
    min_win_rate: float | None = None
    answer_prompts: int = 16
    answer_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("min_chosen_logratio", "max_kl", "max_answer_length_ratio", "min_win_rate"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, finite_number(f"guards.{name}", getattr(self, name)))
        if self.max_answer_length_ratio is not None:
            positive_number("guards.max_answer_length_ratio", self.max_answer_length_ratio)
        if self.min_win_rate is not None and not 0 < self.min_win_rate <= 1:
            raise ConfigurationError("guards.min_win_rate", self.min_win_rate, "must be above 0, and at most 1")
        for field in fields(self):
            if field.name in _SAMPLING:
                value = whole_number(f"guards.{field.name}", getattr(self, field.name), 1)
                object.__setattr__(self, field.name, value)
                if value != field.default and self.max_answer_length_ratio is None:
                    fix = "has an effect only with max_answer_length_ratio: give that too, or leave this out"
                    raise ConfigurationError(f"guards.{field.name}", value, fix)

    @property
    def of_pairs(self) -> tuple[str, ...]:
        """Names of the bounds that are set and need the `Evaluation` of pairs; a win rate every evaluation can have."""
        return tuple(name for name in _OF_PAIRS if getattr(self, name) is not None)

    @property
    def measurements(self) -> dict[str, Any]:
        """Keyword arguments of `Executor.evaluate` that the bounds need; often none, so that any executor will do."""
        found: dict[str, Any] = {} if self.max_kl is None else {"kl": True}
        if self.max_answer_length_ratio is not None:
            found["answers"] = AnswerSampling(self.answer_prompts, self.answer_tokens)
        return found

    def remark(self, evaluation: AnyEvaluation) -> str:
        """Why no agent can break the bound on answers, since all answers are cut; "" if one can."""
        lengths = getattr(evaluation, "reference_lengths", None)
        if self.max_answer_length_ratio is None or lengths is None:
            return ""
        reference = float(np.nanmean(lengths))
        if self.max_answer_length_ratio * reference < self.answer_tokens:
            return ""
        return (
            f"guards.max_answer_length_ratio={self.max_answer_length_ratio} cannot be broken: the reference's answers "
            f"have {reference:.0f} tokens, and all are cut at guards.answer_tokens={self.answer_tokens}; raise that"
        )

    def excess(self, evaluation: AnyEvaluation) -> float:
        """How far an agent is beyond its bounds: the sum of its excesses, each divided by the size of the bound.

        Returns:
            0 if all bounds hold, NaN if a measurement is not finite.
        """
        total = 0.0
        for bound, drift in self._measured(evaluation):
            total += math.nan if math.isnan(drift) else max(0.0, drift - bound) / (abs(bound) or 1.0)
        return total

    def _measured(self, evaluation: Any) -> list[tuple[float, float]]:
        """Upper bounds that are set, each with what must not exceed it."""
        found = []
        if self.min_chosen_logratio is not None:
            found.append((-self.min_chosen_logratio, -_mean(evaluation.chosen_logratios)))
        if self.max_kl is not None:
            found.append((self.max_kl, math.nan if evaluation.kl is None else _mean(evaluation.kl)))
        if self.max_answer_length_ratio is not None:
            found.append((self.max_answer_length_ratio, evaluation.answer_length_ratio))
        if self.min_win_rate is not None:
            found.append((-self.min_win_rate, -evaluation.win_rate))
        return found

    def guarded(self, fitness: Fitness, evaluation: AnyEvaluation) -> Fitness:
        """Return the fitness itself if all bounds hold, else one below it: (-1e9, minus the excess, *fitness)."""
        excess = self.excess(evaluation)
        return fitness if excess == 0 else (BROKEN, -excess, *fitness)

    def to_dict(self) -> dict[str, float]:
        """Return the bounds that are set, by name, and what a bound on the length of answers depends on."""
        left_out = _SAMPLING if self.max_answer_length_ratio is None else ()
        return {name: bound for name, bound in asdict(self).items() if bound is not None and name not in left_out}


def _mean(values: FloatArray) -> float:
    """The mean, NaN if a value is not finite."""
    return float(values.mean()) if np.isfinite(values).all() else math.nan


def guards_of(value: object) -> Guards:
    """Return `value`, or the guards of a mapping such as `{"min_chosen_logratio": -3.0}`.

    Raises:
        ConfigurationError: It is something else; an unknown name gets the nearest.
    """
    if isinstance(value, Guards):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError("guards", value, "must be a mapping such as {'min_chosen_logratio': -3.0}")
    bounds: Mapping[str, Any] = value
    check_known(bounds, [field.name for field in fields(Guards)], {}, "guards")
    return Guards(**bounds)
