"""`hp_config`, `lora_config`, `model_config` and others from plain data, such as a YAML file holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from evollm.algorithms.agent import DEFAULT_LORA
from evollm.checks import is_number_as_text
from evollm.errors import ConfigurationError, brief
from evollm.hpo import HyperparameterConfig, RLParameter
from evollm.models.loading.precision import SHORT_TYPES
from evollm.names import BOUND_ALIASES, LORA_ALIASES, check_known
from evollm.tuning.parameters import Settings, check_types
from evollm.tuning.reward_models import judge_of, reward_functions_of

T = TypeVar("T")

_KINDS = {"int": int, "float": float}


def as_objects(settings: Mapping[str, Any]) -> Settings:
    """The settings with mappings of `hp_config` and the like, and names of reward models, turned into objects.

    Raises:
        ConfigurationError: A mapping has an unknown or an impossible entry.
    """
    found = dict(settings)
    for name, convert in _CONVERTERS.items():
        if name in found:
            found[name] = convert(found[name])
    return found


def hp_config_of(value: object) -> HyperparameterConfig | None:
    """A config from `{lr: [1.0e-6, 1.0e-4], beta: {min: 0.01, max: 1.0}, loss_type: [sigmoid, ipo]}`.

    Raises:
        ConfigurationError: It is something else; the message names the entry.
    """
    if value is None or isinstance(value, HyperparameterConfig):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError("hp_config", value, "must be a mapping such as lr: {min: 1.0e-6, max: 1.0e-4}")
    return HyperparameterConfig(**{str(name): _parameter(f"hp_config.{name}", entry) for name, entry in value.items()})


def _parameter(field: str, entry: object) -> RLParameter:
    if isinstance(entry, RLParameter):
        return entry
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        if entry and all(_is_name(one) for one in entry):
            entry = {"choices": entry}
        elif len(entry) == 2:  # noqa: PLR2004
            entry = {"min": entry[0], "max": entry[1]}
    if not isinstance(entry, Mapping):
        raise ConfigurationError(field, entry, "must be [smallest, largest], names, or a mapping with min and max")
    check_known(entry, [one.name for one in dataclasses.fields(RLParameter)], BOUND_ALIASES, field)
    fields = dict(entry)
    if fields.get("dtype") in _KINDS:
        fields["dtype"] = _KINDS[fields["dtype"]]
    return _made(field, RLParameter, fields)


def _is_name(value: object) -> bool:
    """Whether it is text and no number such as 1e-5, which PyYAML by itself reads as text."""
    return isinstance(value, str) and not is_number_as_text(value)


def lora_config_of(value: object) -> LoraConfig | None:
    """A `peft.LoraConfig` from a mapping of its fields; those that are left out are an agent's default, not PEFT's.

    Raises:
        ConfigurationError: An unknown field, or a value that PEFT refuses.
    """
    if value is None or isinstance(value, LoraConfig):
        return value
    if not isinstance(value, Mapping):
        raise ConfigurationError("lora_config", value, "must be a mapping of fields of peft.LoraConfig, such as r: 8")
    types = {field.name: str(field.type) for field in dataclasses.fields(LoraConfig) if field.init}
    check_known(value, types, LORA_ALIASES, "lora_config")
    named = {f"lora_config.{name}": entry for name, entry in value.items()}
    check_types(named, {f"lora_config.{name}": annotation for name, annotation in types.items()})
    modules = value.get("target_modules", "")
    if not isinstance(modules, str | None) and not (
        isinstance(modules, Sequence) and all(isinstance(name, str) for name in modules)
    ):
        raise ConfigurationError("lora_config.target_modules", modules, "must be names of modules, or all-linear")
    return _made("lora_config", LoraConfig, {**DEFAULT_LORA, **value}, value)


def model_config_of(value: object) -> Settings | None:
    """Keyword arguments for `from_pretrained`, with types by their names and `quantization_config` as a mapping.

    Raises:
        ConfigurationError: It is no mapping, or no such type or quantisation.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ConfigurationError("model_config", value, "must be a mapping such as dtype: bfloat16")
    found = dict(value)
    for name in ("dtype", "torch_dtype"):
        if name in found and found[name] != "auto":
            found[name] = _dtype(f"model_config.{name}", found[name])
    quantization = found.get("quantization_config")
    if isinstance(quantization, Mapping):
        found["quantization_config"] = _quantization(quantization)
    elif quantization is not None and not isinstance(quantization, QuantizationConfigMixin):
        fix = "must be a mapping such as load_in_4bit: true"
        raise ConfigurationError("model_config.quantization_config", quantization, fix)
    return found


def _quantization(fields: Mapping[str, Any]) -> BitsAndBytesConfig:
    field = "model_config.quantization_config"
    fields = dict(fields)
    known = set(BitsAndBytesConfig(load_in_8bit=True).to_dict()) - {"quant_method"}
    check_known(fields, sorted(name for name in known if not name.startswith("_")), {}, field)
    if fields.get("bnb_4bit_quant_type", "nf4") not in ("nf4", "fp4"):
        raise ConfigurationError(f"{field}.bnb_4bit_quant_type", fields["bnb_4bit_quant_type"], "must be nf4 or fp4")
    for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if name in fields:
            fields[name] = _dtype(f"{field}.{name}", fields[name])
    return _made(field, BitsAndBytesConfig, fields)


def _dtype(field: str, value: object) -> torch.dtype:
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        meant = SHORT_TYPES.get(str(value).lower())
        hint = f"; write {meant}" if meant else ""
        raise ConfigurationError(field, value, f"must be a torch type such as float32 or bfloat16{hint}")
    return found


def _made(field: str, make: Callable[..., T], fields: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> T:
    """Call a constructor; whatever it raises becomes a `ConfigurationError` that shows `given` (None: `fields`)."""
    try:
        return make(**copy.deepcopy(dict(fields)))
    except ConfigurationError as error:
        raise ConfigurationError(f"{field}.{error.field}", error.value, error.fix) from None
    except Exception as error:  # Whatever another library raises for a value that it does not take.
        shown = dict(fields if given is None else given)
        raise ConfigurationError(field, shown, f"cannot be used: {brief(str(error))}") from error


_CONVERTERS: dict[str, Callable[[object], Any]] = {
    "hp_config": hp_config_of,
    "lora_config": lora_config_of,
    "model_config": model_config_of,
    "judge": judge_of,
    "reward_functions": reward_functions_of,
}
