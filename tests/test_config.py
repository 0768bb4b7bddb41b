from __future__ import annotations

import inspect

import pytest
import yaml

import evollm
from evollm import ConfigurationError
from evollm.algorithms import algorithm_named
from evollm.config import parse_config, read_config
from evollm.recipes import recipe_names, recipe_text
from evollm.tuning.parameters import parameters_of
from evollm.tuning.request import TUNE_PARAMETERS


@pytest.fixture
def read(tmp_path):
    def start(text: str, *overrides: str) -> dict[str, object]:
        (tmp_path / "run.yaml").write_text(text)
        return read_config(tmp_path / "run.yaml", overrides)

    return start


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("5E6", 5e6),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("010", 10),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-11-21", "2026-11-21"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ('"1e-5"', "1e-5"),
        (".inf", float("inf")),
        ("[1e-6, 1e-4]", [1e-6, 1e-4]),
        ("org/pairs:test", "org/pairs:test"),
    ],
)
def test_a_value_is_what_it_looks_like(read, text, value) -> None:
    found = read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr: 1\nlr: 2", "line 2, column 1: the key 'lr' comes twice"),
        ("a:\n  r: 1\n  r: 2", "line 3, column 3: the key 'r' comes twice"),
        ("lr: [1", "line 1"),
        ("1: 2", "the key 1 is no name"),
        ("a: &x [1]\nb: *x", "anchors are not read"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("- lr", "must hold a mapping"),
        ("lr", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("[" * 5000, "cannot be read|is not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_named(read, text, reason) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        read(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_config(path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_config(tmp_path / "bytes.yaml")


def test_overrides_come_before_the_file_and_reach_into_mappings(read) -> None:
    text = "lr: 1e-5\nlora_config: {r: 4, lora_alpha: 8}\nhp_config:\n  lr: {min: 1e-6, max: 1e-4}"
    found = read(text, "lr=2e-5", "lora_config.r=16", "hp_config.lr.max=1e-3", "model_config.dtype=bfloat16", "data=")
    assert found == {
        "lr": 2e-5,
        "lora_config": {"r": 16, "lora_alpha": 8},
        "hp_config": {"lr": {"min": 1e-6, "max": 1e-3}},
        "model_config": {"dtype": "bfloat16"},
        "data": None,
    }
    for wrong, reason in [("lr", "must be key=value"), ("lr.min=1", "lr is 1e-05 and no mapping"), ("=1", "key=value")]:
        with pytest.raises(ConfigurationError, match=reason):
            read(text, wrong)


def test_every_key_of_a_recipe_is_a_parameter_of_the_python_interface() -> None:
    assert len(recipe_names()) >= 3
    for name in recipe_names():
        config = parse_config(recipe_text(name), name)
        algorithm = config.get("algorithm", inspect.signature(evollm.tune).parameters["algorithm"].default)
        assert config.keys() <= {*TUNE_PARAMETERS, *parameters_of(algorithm_named(algorithm))}
        # Plain enough for every other reader of YAML.
        assert yaml.safe_load(recipe_text(name)).keys() == config.keys()
