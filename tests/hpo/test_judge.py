"""Judges are asked in both orders, and what they say is checked."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from evollm import ConfigurationError
from evollm.hpo import (
    WIN_RATE,
    AnswerPair,
    Evaluation,
    Guards,
    Judge,
    LikelihoodEvaluation,
    UnpairedEvaluation,
    judge_of,
)
from evollm.report.statistics import paired_difference, score_interval, wilson

PAIRS = [
    AnswerPair(0, "How long?", "long answer", "short"),
    AnswerPair(3, [{"role": "user", "content": "Which?"}], "a", "longer"),
    AnswerPair(5, "Same?", "same", "same"),
    AnswerPair(7, "Tie?", "abc", "cba"),
]


def by_length(prompts, completions):
    return [len(one) for one in completions]


def prefers_longer(prompts, first, second):
    return [float(np.heaviside(len(one) - len(two), 0.5)) for one, two in zip(first, second, strict=True)]


def always_first(prompts, first, second):
    return [1.0] * len(first)


def test_a_judge_that_always_prefers_the_first_answer_gives_one_half() -> None:
    assert Judge(always_first).win_rates(PAIRS).tolist() == [0.5] * 4
    # Of the two orders the mean: a judge that leans to the first answer by a fifth.
    lean = lambda prompts, first, second: [  # noqa: E731
        min(1.0, one + 0.2) for one in prefers_longer(prompts, first, second)
    ]
    assert Judge(lean).win_rates(PAIRS) == pytest.approx([0.9, 0.1, 0.5, 0.5])


def test_rewards_and_comparisons_give_the_same_win_rates_and_equal_answers_tie() -> None:
    asked = []

    def scores(completions, **columns):
        asked.append((columns["prompts"], completions))
        return [len(one) for one in completions]

    expected = [1.0, 0.0, 0.5, 0.5]
    assert Judge(prefers_longer).win_rates(PAIRS).tolist() == expected
    assert Judge(by_length).win_rates(PAIRS).tolist() == expected
    assert Judge(scores).win_rates(PAIRS).tolist() == expected
    # In one call, each answer once, and equal answers not at all.
    ((prompts, completions),) = asked
    assert sorted(completions) == sorted(text for pair in (*PAIRS[:2], PAIRS[3]) for text in (pair.own, pair.reference))
    assert [{"role": "user", "content": "Which?"}] in prompts
    again = [*PAIRS, AnswerPair(0, "How long?", "another answer", "short")]
    assert Judge(scores).win_rates(again).tolist() == [*expected, 1.0]
    assert len(asked[1][1]) == 7


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda prompts, first, second: [0.5], r"returned 1 values for 6 questions.*on row 0, 'How long\?'"),
        (lambda prompts, first, second: None, r"returned NoneType for 6 questions"),
        (lambda prompts, first, second: "yes", r"returned str for"),
        (lambda prompts, first, second: [0.5, math.nan, *[0.5] * 4], r"returned nan.*on row 3, 'Which\?': must return"),
        (lambda prompts, first, second: [0.5] * 5 + [1.5], r"returned 1\.5.*on row 7, 'Tie\?'.*from 0 to 1"),
        (lambda prompts, first, second: [0.5, "b", *[0.5] * 4], r"returned 'b'.*on row 3"),
        (lambda completions: [math.inf, *[0.0] * 5], r"returned inf.*on row 0.*that is finite"),
    ],
)
def test_wrong_values_are_refused_with_the_prompt_and_the_judge(function, words) -> None:
    function.__name__ = "my_judge"
    with pytest.raises(ConfigurationError, match=rf"my_judge {words}"):
        Judge(function).win_rates(PAIRS)


def test_an_error_of_a_judge_names_the_prompt_that_causes_it() -> None:
    def stumbles(prompts, first, second):
        return [{"long answer": 1.0, "short": 0.0, "a": 1.0, "longer": 0.0}[one] for one in first]

    def generates(prompts, first, second):
        yield from stumbles(prompts, first, second)

    for function in (stumbles, generates):
        with pytest.raises(ConfigurationError, match=rf"{function.__name__} raised KeyError: 'abc'.*on row 7, 'Tie\?'"):
            Judge(function).win_rates(PAIRS)


def test_what_is_no_judge_is_refused() -> None:
    for function in ("judge", None, lambda: [], lambda prompts, first: [], lambda prompts, completions, gold: [], max):
        with pytest.raises(ConfigurationError, match=r"judge=.*must be a function with the arguments prompts, first"):
            judge_of(function)
    for settings in ({"prompts": 0}, {"max_new_tokens": 0.5}, {"temperature": -1}, {"top_p": 0.5}, {"seed": -1}):
        (name,) = settings
        with pytest.raises(ConfigurationError, match=rf"judge\.{name}="):
            Judge(by_length, **settings)
    judge_of(functools.partial(prefers_longer))
    assert judge_of(by_length).to_dict() == {
        "function": "by_length",
        "prompts": 64,
        "max_new_tokens": 256,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 42,
    }


RATES = [1.0, 0.5, math.nan, 0.0, 1.0, math.nan]


@pytest.mark.parametrize("kind", [Evaluation, LikelihoodEvaluation, UnpairedEvaluation])
def test_a_win_rate_is_a_score_with_terms_and_an_interval_over_the_answered_prompts(kind) -> None:
    vectors = np.arange(6.0), np.array([1.0, 0, 1, 0, 1, 0])
    first, second = (
        kind(*vectors, win_rates=RATES),
        kind(*vectors, win_rates=np.full(6, 0.5) + 0 * np.array(RATES)),
    )
    assert first.win_rate == first.scores["win_rate"] == WIN_RATE(first)[0] == 0.625
    assert len(WIN_RATE(first)) == 2
    terms = WIN_RATE.terms(first)
    assert terms.mean() == pytest.approx(0.625)
    # The variance of the mean of all rows' terms is that of the mean over the answered ones.
    answered = np.array([1.0, 0.5, 0.0, 1.0])
    assert terms.var() / len(terms) == pytest.approx(answered.var() / len(answered) * len(terms) / 6)
    assert score_interval(first, "win_rate") == wilson(0.625, 4)
    assert score_interval(second, "win_rate").low == 0.5
    assert paired_difference(first, second, "win_rate").value == pytest.approx(0.125)
    without = kind(*vectors)
    assert "win_rate" not in without.scores
    assert "win_rate" not in without.ratios
    with pytest.raises(ConfigurationError, match="judge=None: a win rate is measured only with one"):
        WIN_RATE(without)


def test_a_bound_on_the_win_rate_comes_before_the_fitness() -> None:
    evaluation = Evaluation(np.ones(6), np.zeros(6), win_rates=RATES)
    assert Guards(min_win_rate=0.6).guarded((1.0,), evaluation) == (1.0,)
    assert Guards(min_win_rate=0.75).guarded((1.0,), evaluation) == (-1e9, pytest.approx(-0.125 / 0.75), 1.0)
    for bound in (0, 1.5, "half"):
        with pytest.raises(ConfigurationError, match=r"guards\.min_win_rate="):
            Guards(min_win_rate=bound)


def test_rows_of_several_sets_have_their_own_prompts_however_they_are_numbered() -> None:
    def echoes(prompts, completions):
        return [float(completion in prompt) for prompt, completion in zip(prompts, completions, strict=True)]

    pairs = [AnswerPair(0, "one", "one", "two", 0, "a"), AnswerPair(0, "two", "one", "two", 1, "b")]
    assert Judge(echoes).win_rates(pairs).tolist() == [1.0, 0.0]
    with pytest.raises(ConfigurationError, match="on row 0 of b, 'two'"):
        Judge(lambda completions: [0.0] * 2 + [math.nan] * (len(completions) - 2)).win_rates(pairs)


def test_a_judge_that_changes_its_prompts_changes_nothing() -> None:
    def grows(prompts, first, second):
        for prompt in prompts:
            prompt.append({"role": "assistant", "content": "more"})
        return [float(len(prompt) == 2) for prompt in prompts]

    prompt = [{"role": "user", "content": "Which?"}]
    pair = AnswerPair(0, prompt, "a", "b")
    assert Judge(grows).win_rates([pair, pair]).tolist() == Judge(grows).win_rates([pair]).tolist() * 2
    assert len(prompt) == 1
