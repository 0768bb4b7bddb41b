from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import HyperparameterConfig, Mutation, Mutations, RLParameter, format_value, mutate

CONFIG = HyperparameterConfig(
    lr=RLParameter(min=1e-7, max=1e-4), beta=RLParameter(min=0.01, max=1.0), nll_alpha=RLParameter(min=0.01, max=2.0)
)
VALUES = {"lr": 5e-6, "beta": 0.1, "nll_alpha": 1.0, "max_grad_norm": 0.1}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_weights_say_how_often_nothing_mutates() -> None:
    generator = rng()
    settings = Mutations(no_mutation=1.0, rl_hp=3.0)
    drawn = [mutate(VALUES, CONFIG, settings, generator) for _ in range(2000)]
    assert sum(not mutations for mutations in drawn) / 2000 == pytest.approx(0.25, abs=0.03)
    assert max(len(mutations) for mutations in drawn) == 1


@pytest.mark.parametrize(("settings", "count"), [(Mutations(1.0, 0.0), 0), (Mutations(0.0, 1.0), 200)])
def test_a_weight_of_zero_never_happens(settings: Mutations, count: int) -> None:
    generator = rng()
    assert sum(bool(mutate(VALUES, CONFIG, settings, generator)) for _ in range(200)) == count


def test_every_hyperparameter_of_the_config_is_equally_likely_and_no_other_changes() -> None:
    generator = rng()
    names = [mutate(VALUES, CONFIG, Mutations(0.0, 1.0), generator)[0].name for _ in range(3000)]
    assert {name: names.count(name) for name in set(names)} == pytest.approx(
        {"lr": 1000, "beta": 1000, "nll_alpha": 1000}, abs=120
    )


def test_a_mutation_says_what_was_and_what_is() -> None:
    (mutation,) = mutate(VALUES, CONFIG, Mutations(0.0, 1.0), rng(1))
    assert mutation.before == VALUES[mutation.name]
    assert mutation.after == mutation.before * mutation.factor
    assert mutation.factor in (0.8, 1.2)


def test_equal_seeds_draw_equal_mutations_whatever_the_global_state() -> None:
    def lineup(global_seed: int) -> list[tuple[Mutation, ...]]:
        random.seed(global_seed)
        np.random.seed(global_seed)
        generator = rng(7)
        before = random.getstate(), np.random.get_state()[1].tolist()
        drawn = [mutate(VALUES, CONFIG, Mutations(), generator) for _ in range(50)]
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        return drawn

    assert lineup(0) == lineup(1)


def test_one_childs_luck_does_not_shift_the_draws_of_the_next() -> None:
    states = []
    for settings in (Mutations(1.0, 0.0), Mutations(0.0, 1.0)):
        generator = rng(5)
        mutate(VALUES, CONFIG, settings, generator)
        states.append(generator.bit_generator.state)
    assert states[0] == states[1]


def test_equal_configs_mutate_equally_in_whatever_order_they_were_written() -> None:
    reordered = HyperparameterConfig(**dict(reversed(list(CONFIG.items()))))
    for seed in range(20):
        assert mutate(VALUES, CONFIG, Mutations(), rng(seed)) == mutate(VALUES, reordered, Mutations(), rng(seed))


def test_an_empty_config_mutates_nothing() -> None:
    assert mutate(VALUES, HyperparameterConfig(), Mutations(0.0, 1.0), rng()) == ()


def test_a_value_that_the_agent_lacks_is_named() -> None:
    with pytest.raises(ConfigurationError, match="gamma=None"):
        mutate(VALUES, HyperparameterConfig(gamma=RLParameter(min=0.1, max=1.0)), Mutations(0.0, 1.0), rng())


@pytest.mark.parametrize(
    ("mutation", "text"),
    [
        (Mutation("lr", 5e-6, 5e-6 * 1.2, 1.2), "lr: 5.0e-6 -(x1.2)-> 6.0e-6"),
        (Mutation("beta", 0.1, 0.1 * 1.2, 1.2), "beta: 0.1 -(x1.2)-> 0.12"),
        (Mutation("beta", 0.3, 1.0, 3.33), "beta: 0.3 -(x3.33)-> 1"),
        (Mutation("batch", 4, 5, 1.25), "batch: 4 -(x1.25)-> 5"),
    ],
)
def test_a_mutation_reads_as_before_factor_after(mutation: Mutation, text: str) -> None:
    assert str(mutation) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5e-6, "5.0e-6"),
        (1.25e-12, "1.2e-12"),
        (9.99e-6, "1.0e-5"),
        (0.000999, "1.0e-3"),
        (0.00099999, "0.001"),
        (0.001, "0.001"),
        (0.1728, "0.1728"),
        (1.0, "1"),
        (0, "0"),
        (1234, "1234"),
        (9999.6, "1.0e4"),
        (10000, "1.0e4"),
        (-5e-6, "-5.0e-6"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_value_is_written_for_a_person(value: float, text: str) -> None:
    assert format_value(value) == text


def test_the_keywords_of_other_libraries_are_accepted_and_the_unused_not_kept() -> None:
    settings = Mutations(
        no_mutation=0.4,
        architecture=0,
        new_layer_prob=0.2,
        parameters=0,
        activation=0,
        rl_hp=0.6,
        mutation_sd=0.1,
        mutate_elite=False,
        rand_seed=1,
        device="cpu",
        accelerator=object(),
    )
    assert settings == Mutations(0.4, 0.6, rand_seed=1)
    assert not {"device", "accelerator"} & set(dataclasses.asdict(settings))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": 0.2}, "architecture=0.2.*hyperparameters only"),
        ({"parameters": 0.2}, "parameters=0.2.*hyperparameters only"),
        ({"activation": 0.2}, "activation=0.2.*hyperparameters only"),
        ({"mutate_elite": True}, "mutate_elite=True.*unmutated"),
        ({"no_mutation": -0.1}, "no_mutation=-0.1.*at least 0"),
        ({"rl_hp": math.nan}, "rl_hp=nan.*finite"),
        ({"rl_hp": "0.7"}, "rl_hp='0.7'.*number"),
        ({"no_mutation": 0, "rl_hp": 0}, "no_mutation=0.*rl_hp are both 0"),
        ({"rand_seed": 1.5}, "rand_seed=1.5.*whole number"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Mutations(**arguments)  # type: ignore[arg-type]
