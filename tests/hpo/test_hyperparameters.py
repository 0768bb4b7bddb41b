from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping

import numpy as np
import pytest

from evollm.errors import ConfigurationError
from evollm.hpo import HyperparameterConfig, RLParameter


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "parameter",
    [
        RLParameter(min=1e-6, max=1e-5),
        RLParameter(min=0.01, max=1.0, shrink_factor=0.1, grow_factor=30.0),
        RLParameter(min=1, max=7, dtype=int),
    ],
)
def test_a_thousand_mutations_never_leave_the_bounds_and_reach_both(parameter: RLParameter) -> None:
    generator, value, seen = rng(), parameter.min, []
    for _ in range(1000):
        value, _ = parameter.mutate(value, generator)
        seen.append(value)
    assert all(parameter.min <= value <= parameter.max for value in seen)
    assert parameter.max in seen
    assert parameter.min in seen


def test_every_mutation_changes_the_value_by_the_factor_that_it_reports() -> None:
    parameter, generator, value = RLParameter(min=1e-3, max=1e-1), rng(), 1e-2
    for _ in range(200):
        after, factor = parameter.mutate(value, generator)
        assert after != value
        assert after / value == pytest.approx(factor, rel=5e-3)
        value = after


def test_inside_the_bounds_growing_and_shrinking_are_equally_likely() -> None:
    parameter, generator = RLParameter(min=0.01, max=1.0), rng()
    factors = [parameter.mutate(0.1, generator)[1] for _ in range(2000)]
    assert set(factors) == {0.8, 1.2}
    assert factors.count(1.2) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize("dtype", [float, int])
def test_at_the_upper_bound_a_value_shrinks_and_at_the_lower_bound_it_grows(dtype: type[float]) -> None:
    parameter = RLParameter(min=2, max=64, dtype=dtype)
    for seed in range(20):
        assert parameter.mutate(64, rng(seed))[0] < 64
        assert parameter.mutate(2, rng(seed))[0] > 2


def test_a_clipped_mutation_reports_the_real_factor_to_three_digits() -> None:
    grown = [RLParameter(min=0.01, max=0.107).mutate(0.1, rng(seed)) for seed in range(20)]
    assert (0.107, 1.07) in grown
    thirds = [RLParameter(min=0.1, max=1.0, grow_factor=9.0).mutate(0.3, rng(seed)) for seed in range(20)]
    assert (1.0, 3.33) in thirds


def test_an_integer_stays_an_integer_and_moves_by_at_least_one() -> None:
    parameter, generator = RLParameter(min=1, max=9, dtype=int), rng()
    for value in [*range(1, 10)] * 20:
        after, _ = parameter.mutate(value, generator)
        assert type(after) is int
        assert abs(after - value) >= 1


def test_a_mutation_takes_one_draw_whatever_the_value() -> None:
    parameter = RLParameter(min=0.01, max=1.0)
    states = []
    for value in (0.01, 0.1, 1.0):
        generator = rng()
        parameter.mutate(value, generator)
        states.append(generator.bit_generator.state)
    assert states[0] == states[1] == states[2]


def test_start_values_spread_evenly_over_the_decades() -> None:
    parameter, generator = RLParameter(min=1e-7, max=1e-4), rng()
    drawn = np.array([parameter.sample(generator) for _ in range(3000)])
    counts, _ = np.histogram(np.log10(drawn), bins=[-7, -6, -5, -4])
    assert counts.sum() == 3000
    assert counts == pytest.approx(1000, abs=120)


def test_start_values_of_an_integer_are_integers_within_the_bounds() -> None:
    parameter, generator = RLParameter(min=1, max=4, dtype=int), rng()
    drawn = [parameter.sample(generator) for _ in range(300)]
    assert {type(value) for value in drawn} == {int}
    assert set(drawn) == {1, 2, 3, 4}


def test_clipping_returns_the_nearest_value_within_the_bounds() -> None:
    parameter = RLParameter(min=0.1, max=0.5)
    assert [parameter.clip(value) for value in (-1, 0.3, 7, math.inf)] == [0.1, 0.3, 0.5, 0.5]
    assert RLParameter(min=1, max=8, dtype=int).clip(2.6) == 3
    with pytest.raises(ConfigurationError, match="nan"):
        parameter.clip(math.nan)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_value_that_cannot_be_multiplied_is_refused(value: float) -> None:
    with pytest.raises(ConfigurationError, match="value="):
        RLParameter(min=0.1, max=1.0).mutate(value, rng())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min": 1.0, "max": 0.1}, ["min=1.0", "max=0.1", "reversed"]),
        ({"min": 0.1, "max": 0.1}, ["min=0.1", "constant"]),
        ({"min": 0.0, "max": 1.0}, ["min=0.0", "above 0", "log-uniformly", "never leave 0"]),
        ({"min": -1.0, "max": 1.0}, ["min=-1.0", "above 0"]),
        ({"min": math.nan, "max": 1.0}, ["min=nan", "finite"]),
        ({"min": 0.1, "max": math.inf}, ["max=inf", "finite"]),
        ({"min": "1e-5", "max": 1.0}, ["min='1e-5'", "YAML"]),
        ({"min": True, "max": 3.0}, ["min=True", "number"]),
        ({"min": 0.1, "max": 1.0, "shrink_factor": 1.0}, ["shrink_factor=1.0"]),
        ({"min": 0.1, "max": 1.0, "shrink_factor": 0.0}, ["shrink_factor=0.0"]),
        ({"min": 0.1, "max": 1.0, "grow_factor": 1.0}, ["grow_factor=1.0", "above 1"]),
        ({"min": 0.1, "max": 1.0, "grow_factor": math.inf}, ["grow_factor=inf", "finite"]),
        ({"min": 0.1, "max": 1.0, "dtype": str}, ["dtype", "float or int"]),
        ({"min": 1.5, "max": 4, "dtype": int}, ["min=1.5", "whole number"]),
    ],
)
def test_a_parameter_that_cannot_work_is_refused_by_name(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RLParameter(**arguments)  # type: ignore[arg-type]
    assert [word for word in words if word not in str(caught.value)] == []


def config() -> HyperparameterConfig:
    return HyperparameterConfig(lr=RLParameter(min=1e-7, max=1e-4), beta=RLParameter(min=0.01, max=1.0))


def test_a_config_is_a_mapping_in_the_order_of_declaration() -> None:
    made = config()
    assert made.names() == ("lr", "beta")
    assert [name for name, _ in made.items()] == ["lr", "beta"]
    assert made["beta"].max == 1.0
    assert made == pickle.loads(pickle.dumps(made))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        config()["lr"] = RLParameter(min=1, max=2)  # type: ignore[index]
    with pytest.raises(AttributeError):
        config().lr = RLParameter(min=1, max=2)  # type: ignore[attr-defined]


def test_a_config_of_something_else_names_the_field() -> None:
    with pytest.raises(ConfigurationError, match=r"beta=\(0.1, 1.0\).*RLParameter"):
        HyperparameterConfig(lr=RLParameter(min=1e-7, max=1e-4), beta=(0.1, 1.0))  # type: ignore[arg-type]


def test_a_config_samples_every_name_and_equal_configs_sample_equally() -> None:
    reordered = HyperparameterConfig(beta=config()["beta"], lr=config()["lr"])
    drawn = config().sample(rng(3))
    assert list(drawn) == ["lr", "beta"]
    assert drawn == reordered.sample(rng(3))
    config().validate(drawn, known=("lr", "beta"))


def test_a_config_becomes_strict_json() -> None:
    written = json.loads(json.dumps(config().to_dict(), allow_nan=False))
    assert written["lr"] == {"min": 1e-7, "max": 1e-4, "shrink_factor": 0.8, "grow_factor": 1.2, "dtype": "float"}


def test_a_config_comes_back_from_json() -> None:
    settings = HyperparameterConfig(
        batch_size=RLParameter(min=2, max=8, dtype=int), lr=RLParameter(min=1e-7, max=1e-4, shrink_factor=0.5)
    )
    read = HyperparameterConfig.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert dict(read) == dict(settings)
    assert list(read) == list(settings)


def test_values_at_the_bounds_are_valid() -> None:
    config().validate({"lr": 1e-7, "beta": 1.0, "nll_alpha": 0.0}, known=("lr", "beta", "nll_alpha"))


def test_an_unknown_hyperparameter_names_the_nearest_known_one_and_all_known_ones() -> None:
    misspelt = HyperparameterConfig(betta=RLParameter(min=0.1, max=1.0))
    with pytest.raises(
        ConfigurationError, match=r"betta=RLParameter.*nearest known name is 'beta'.*beta, lr, nll_alpha"
    ):
        misspelt.validate({"beta": 0.1}, known=["lr", "beta", "nll_alpha"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": 1e-5}, ["beta=None", "no value"]),
        ({"lr": 1e-3, "beta": 0.1}, ["lr=0.001", "[1e-07, 0.0001]", "widen"]),
        ({"lr": 1e-5, "beta": 0.0}, ["beta=0.0", "[0.01, 1.0]"]),
        ({"lr": math.nan, "beta": 0.1}, ["lr=nan", "finite"]),
        ({"lr": "1e-5", "beta": 0.1}, ["lr='1e-5'", "number"]),
    ],
)
def test_a_start_value_that_cannot_work_is_refused_by_name(values: dict[str, float], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config().validate(values, known=("lr", "beta"))
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_fraction_is_no_start_value_of_an_integer() -> None:
    with pytest.raises(ConfigurationError, match=r"update_epochs=1.5.*whole number"):
        HyperparameterConfig(update_epochs=RLParameter(min=1, max=4, dtype=int)).validate(
            {"update_epochs": 1.5}, known=["update_epochs"]
        )


def test_values_that_do_not_go_together_are_named_and_no_others() -> None:
    ranges = {name: RLParameter(min=1, max=2) for name in ("lr", "beta", "nll_alpha")}

    def check(values: Mapping[str, float]) -> None:
        if values["lr"] > 1 and values["nll_alpha"] > 1:
            raise ConfigurationError("lr", values["lr"], "is too large")

    with pytest.raises(ConfigurationError) as caught:
        HyperparameterConfig(**ranges).validate(dict.fromkeys(ranges, 1.0), list(ranges), check)
    assert str(caught.value).startswith(
        "hp_config.lr=2.0: evolution can draw this value with nll_alpha=2.0, but lr=2.0: is too large;"
    )


def test_a_parameter_is_written_as_it_was_declared() -> None:
    for parameter in (
        RLParameter(min=1e-6, max=1e-4),
        RLParameter(min=1, max=8, grow_factor=2.0, dtype=int),
        RLParameter(choices=("sigmoid", "ipo")),
    ):
        assert eval(repr(parameter)) == parameter
    assert repr(RLParameter(min=1, max=8, dtype=int)) == "RLParameter(min=1, max=8, dtype=int)"
