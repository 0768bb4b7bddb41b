from __future__ import annotations

import math

import numpy as np
import pytest
from simulated import CONFIG, VALUES, begin

from evollm.errors import ConfigurationError
from evollm.hpo import GridSearch, HyperparameterConfig, RandomSearch, RLParameter

LR = RLParameter(1e-5, 1e-2)
BETA = RLParameter(0.01, 1.0)


def grid(size: int, points=None, **config: RLParameter) -> list[tuple]:
    plan = begin(GridSearch(points), size, HyperparameterConfig(**config))
    assert plan.steps is None
    assert [birth.index for birth in plan.births] == list(range(len(plan.births)))
    assert {birth.hyperparameters["max_grad_norm"] for birth in plan.births} == {1.0}
    return [tuple(birth.hyperparameters[name] for name in config) for birth in plan.births]


def test_one_number_has_a_value_for_each_agent_at_equal_distances_and_the_bounds() -> None:
    assert [lr for (lr,) in grid(4, lr=LR)] == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert grid(4, lr=LR)[0] == (1e-5,)
    assert grid(4, lr=LR)[-1] == (1e-2,)
    assert grid(1, lr=LR) == [(pytest.approx(10**-3.5),)]


def test_more_values_of_what_is_declared_first_and_as_many_agents_as_fit() -> None:
    assert len({lr for lr, _ in grid(8, lr=LR, beta=BETA)}) == 4
    assert len(grid(8, lr=LR, beta=BETA)) == 8
    assert len({lr for lr, _ in grid(7, lr=LR, beta=BETA)}) == 3
    # The seventh founder has no place.
    assert len(grid(7, lr=LR, beta=BETA)) == 6


def test_all_choices_and_whole_numbers_once() -> None:
    loss = RLParameter(choices=("sigmoid", "ipo"))
    assert grid(4, batch_size=RLParameter(2, 3, dtype=int), loss_type=loss) == [
        (2, "sigmoid"),
        (2, "ipo"),
        (3, "sigmoid"),
        (3, "ipo"),
    ]
    assert grid(9, batch_size=RLParameter(2, 3, dtype=int)) == [(2,), (3,)]


def test_points_by_name_or_for_all() -> None:
    assert len({beta for _, beta in grid(6, {"beta": 3, "lr": 2}, lr=LR, beta=BETA)}) == 3
    assert len(grid(9, 3, lr=LR, beta=BETA)) == 9
    assert len(grid(3, {"beta": 3}, lr=LR, beta=BETA)) == 3


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (3, r"population=8: is smaller than the grid of 27 points"),
        (
            {"label_smoothing": 2},
            r"points=.*names of hp_config with bounds: lr, batch_size; drop \['label_smoothing'\]",
        ),
        ({"loss_type": 2}, "drop"),
        (0, "points=0"),
        ({"lr": 1.5}, r"points\.lr=1\.5"),
    ],
)
def test_a_grid_that_cannot_be_laid_out_is_refused(points, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        begin(GridSearch(points))


def test_random_search_trains_the_founders_to_the_end() -> None:
    plan = begin(RandomSearch(), 4, config=None)
    assert ([birth.index for birth in plan.births], plan.steps) == ([0, 1, 2, 3], None)
    assert plan.births[0].hyperparameters == VALUES


def test_founders_are_spread_over_the_bounds() -> None:
    """Of eight draws each eighth of the logarithmic range has one, whatever the order of declaration."""

    config = HyperparameterConfig(lr=LR, beta=BETA, loss_type=CONFIG["loss_type"])
    drawn = config.sample_spread(8, np.random.default_rng(0))
    eighths = sorted(int(8 * (math.log10(one["lr"]) + 5) / 3) for one in drawn)
    assert eighths == list(range(8))
    assert sorted(int(8 * (math.log10(one["beta"]) + 2) / 2) for one in drawn) == list(range(8))
    counts = sorted([one["loss_type"] for one in drawn].count(choice) for choice in CONFIG["loss_type"].choices)
    assert counts == [2, 3, 3]
    again = HyperparameterConfig(beta=BETA, loss_type=CONFIG["loss_type"], lr=LR)
    assert again.sample_spread(8, np.random.default_rng(0)) == drawn
    assert config.sample_spread(8, np.random.default_rng(1)) != drawn
