from __future__ import annotations

import math

import numpy as np
import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import AnswerSampling, Evaluation, Guards, guards_of, is_finite, preference_fitness, rank

NAN = math.nan


def evaluation(chosen: list[float], rejected: list[float]) -> Evaluation:
    return Evaluation(np.array(chosen), np.array(rejected))


RIGHT = evaluation([-1.0, -2.0], [-5.0, 0.0])  # mean chosen log-ratio -1.5, accuracy 0.5
DRIFTED = evaluation([-8.0, -10.0], [-20.0, -30.0])  # -9, accuracy 1
FAR = evaluation([-80.0, -100.0], [-200.0, -300.0])  # -90, accuracy 1


def test_an_agent_that_breaks_a_guard_loses_to_every_agent_that_holds_it() -> None:
    guards = Guards(min_chosen_logratio=-3.0)
    guarded = [guards.guarded(preference_fitness(one), one) for one in (FAR, DRIFTED, RIGHT)]
    assert rank([preference_fitness(one) for one in (FAR, DRIFTED, RIGHT)]) == [0, 1, 2]
    # Of those that break it, the one nearer to the bound is better.
    assert rank(guarded) == [2, 1, 0]
    assert all(map(is_finite, guarded))


def test_no_score_makes_up_for_the_smallest_breach() -> None:
    guards = Guards(min_chosen_logratio=-3.0)
    breaks = evaluation([-3.001, -3.001], [-9.0, -9.0])
    assert rank([guards.guarded((1e6,), breaks), guards.guarded((-1e6,), RIGHT)]) == [1, 0]


def test_the_fitness_of_an_agent_within_its_bounds_is_left_alone() -> None:
    for bound in (-1.5, -100.0):
        assert Guards(min_chosen_logratio=bound).guarded((0.5, 1.0), RIGHT) == (0.5, 1.0)
    assert Guards().guarded((0.5,), FAR) == (0.5,)


def test_the_excess_is_in_units_of_the_bound() -> None:
    """Mean log-ratio -9, bound -3: 6 nats too far, twice the bound. Bound 0: 9 nats. Bound 0.5: 9.5 nats, 19 bounds."""
    for bound, excess in {-3.0: 2.0, 0.0: 9.0, 0.5: 19.0}.items():
        assert Guards(min_chosen_logratio=bound).excess(DRIFTED) == excess
    assert Guards(min_chosen_logratio=-3.0).guarded((1.0,), DRIFTED) == (-1e9, -2.0, 1.0)


@pytest.mark.filterwarnings("error")
def test_a_diverged_agent_is_behind_those_that_break_a_guard() -> None:
    guards = Guards(min_chosen_logratio=-3.0)
    for chosen in ([NAN, 0.0], [-math.inf, 0.0], [math.inf, 0.0], [math.inf, -math.inf]):
        fitness = guards.guarded((0.5,), evaluation(chosen, [0.0, 0.0]))
        assert not is_finite(fitness)
        assert rank([fitness, guards.guarded((0.5,), FAR)]) == [1, 0]


def test_guards_are_read_from_a_mapping_and_unknown_names_get_the_nearest() -> None:
    assert guards_of({"min_chosen_logratio": -3}) == Guards(min_chosen_logratio=-3)
    assert guards_of(Guards()) == Guards()
    assert Guards(min_chosen_logratio=-3.0).to_dict() == {"min_chosen_logratio": -3.0}
    with pytest.raises(
        ConfigurationError, match=r"guards\.min_logratio=-3: .*nearest known one is .min_chosen_logratio"
    ):
        guards_of({"min_logratio": -3})
    with pytest.raises(ConfigurationError, match=r"guards\.min_chosen_logratio='-3'"):
        guards_of({"min_chosen_logratio": "-3"})
    with pytest.raises(ConfigurationError, match="guards=-3: must be a mapping"):
        guards_of(-3)


def test_answers_may_be_longer_than_the_references_by_the_bound() -> None:
    lengths = {"answer_lengths": [9.0, 3.0, NAN], "reference_lengths": [2.0, 2.0, NAN]}
    longer = Evaluation(np.zeros(3), np.zeros(3), **lengths)
    assert longer.answer_length_ratio == 3.0
    assert Guards(max_answer_length_ratio=3.0).guarded((0.5,), longer) == (0.5,)
    assert Guards(max_answer_length_ratio=1.5).guarded((0.5,), longer) == (-1e9, -1.0, 0.5)
    # Where answers are cut at the bound, none can break it.
    assert Guards(max_answer_length_ratio=3.0, answer_tokens=7).remark(longer) == ""
    assert "have 2 tokens, and all are cut at guards.answer_tokens=6" in Guards(
        max_answer_length_ratio=3.0, answer_tokens=6
    ).remark(longer)
    # An evaluation without answers holds no such bound.
    assert not is_finite(Guards(max_answer_length_ratio=1.5).guarded((0.5,), RIGHT))


def test_answers_are_asked_for_only_where_a_bound_needs_them() -> None:
    assert Guards(min_chosen_logratio=-3.0).measurements == {}
    bound = guards_of({"max_answer_length_ratio": 1.5, "answer_prompts": 4})
    assert bound.measurements == {"answers": AnswerSampling(4, 256)}
    assert bound.to_dict() == {"max_answer_length_ratio": 1.5, "answer_prompts": 4, "answer_tokens": 256}
    assert Guards(max_kl=1.0).to_dict() == {"max_kl": 1.0}
    with pytest.raises(ConfigurationError, match=r"guards\.max_answer_length_ratio=0"):
        Guards(max_answer_length_ratio=0)
    with pytest.raises(ConfigurationError, match=r"guards\.answer_prompts=4: has an effect only with"):
        Guards(answer_prompts=4)
    with pytest.raises(ConfigurationError, match=r"guards\.answer_tokens=0"):
        Guards(max_answer_length_ratio=1.5, answer_tokens=0)
