"""What `validate` says of a search: whether and when it decides, and how many members it lets go on."""

from __future__ import annotations

import pytest
from conftest import make_rows

from evollm import ConfigurationError, tune
from evollm.tuning import rehearsal
from evollm.tuning.request import request_of
from evollm.tuning.setup import set_up
from evollm.tuning.tune import validate


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"max_steps": 1}, "max_steps=1: the run ends after 1 step, before it could evolve: raise it$"),
        ({"num_epochs": 1, "data_batch_size_per_gpu": 60}, "num_epochs=1: the run ends after 1 step, .*: raise it$"),
        (
            {"max_steps": 2, "evo_steps": 3},
            "evo_steps=3: the run ends after 2 steps, .* raise max_steps$",
        ),
        ({"num_epochs": 1, "evo_steps": 30}, "evo_steps=30: the run ends after .*: lower it, or raise num_epochs$"),
    ],
)
def test_a_run_that_is_too_short_to_evolve_is_refused_by_what_was_given(make_model, tokenizer, length, message) -> None:
    for search in ("racing", "tournament"):
        with pytest.raises(ConfigurationError, match=message):
            tune(make_model(), make_rows(60), tokenizer=tokenizer, population=2, search=search, verbose=False, **length)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search": "random"}, "RandomSearch, which never decides"),
        ({"search": "grid"}, "GridSearch, which never decides"),
        ({}, "Racing, which first decides after 3 steps"),
        ({"search": "mf_pbt", "evo_steps": 4}, "MultiFrequencyPBT, which first decides after 4 steps"),
        ({"budget": 1.05}, "Racing, with 1 of the agents, which never decides"),
    ],
)
def test_a_rehearsal_says_when_a_search_decides(make_model, tokenizer, settings, said) -> None:
    arguments = {"tokenizer": tokenizer, "population": 4, "max_steps": 12, "verbose": False, **settings}
    text = validate(make_model(), make_rows(30), data_batch_size_per_gpu=4, **arguments)
    assert f"search: {said}\n" in text


@pytest.mark.parametrize(
    ("settings", "learnt"),
    [
        ({}, 4 * 3 + 2 * 3 + 1 * 6),
        ({"search": "successive_halving", "evo_steps": 3}, 4 * 3 + 2 * 3 + 1 * 6),
        ({"search": "random"}, 4 * 12),
        ({"search": "pbt", "evo_steps": 3}, 4 * 12),
        ({"search": "asha", "evo_steps": 3}, 4 * 12),
        ({"search": "pbt", "evo_steps": 3, "max_member_steps": 25}, 4 * 6),
    ],
)
def test_a_rehearsal_counts_the_members_that_a_search_lets_go_on(make_model, tokenizer, settings, learnt) -> None:
    arguments = {"tokenizer": tokenizer, "population": 4, "max_steps": 12, "verbose": False, **settings}
    setup = set_up(request_of(make_model(), make_rows(30), data_batch_size_per_gpu=4, **arguments))
    setup.run.begin()
    members = setup.run.executor.members()
    learners = [member.hyperparameters for member in members]
    fitting = len(members) * setup.run.limits.steps_that_fit(setup.run.progress.account, 0, learners, 48)
    assert sum(span.members * span.steps for span in rehearsal._cut(rehearsal._spans(setup.run), fitting)) == learnt
