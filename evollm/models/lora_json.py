"""LoRA configurations as JSON: written the same every time, and read into plain values by a list of fields.

A configuration may come with an adapter from somebody else. Only what says how an adapter computes is taken from it,
never the name of a module to import, of a file, or of another initialisation.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig

from evollm.errors import ConfigurationError

_TYPE = "LORA"
_LONGEST_PATTERN, _MOST_REPEATS = 1000, 3


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _list_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(kind(item) for item in value)


def _either(*kinds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: any(kind(value) for kind in kinds)


def _by_name(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(_is_pattern, value)) and all(map(kind, value.values()))


def _is_pattern(value: object) -> bool:
    """Whether it is a name, or a pattern that is matched in no time: repeated groups and many repeats take forever."""
    if not isinstance(value, str):
        return False
    repeats = re.findall(r"(?<!\\)[*+{]", value)
    return len(value) <= _LONGEST_PATTERN and len(repeats) <= _MOST_REPEATS and not re.search(r"\)[*+{]", value)


# The fields that are read, and what each may hold besides null.
_FIELDS: dict[str, Callable[[object], bool]] = {
    "r": _is_whole,
    "lora_alpha": _is_number,
    "lora_dropout": _is_number,
    "target_modules": _either(_is_pattern, _list_of(_is_text)),
    "exclude_modules": _either(_is_pattern, _list_of(_is_text)),
    "target_parameters": _list_of(_is_text),
    "layers_to_transform": _either(_is_whole, _list_of(_is_whole)),
    "layers_pattern": _either(_is_pattern, _list_of(_is_pattern)),
    "rank_pattern": _by_name(_is_whole),
    "alpha_pattern": _by_name(_is_number),
    "fan_in_fan_out": _is_bool,
    "bias": _is_text,
    "use_rslora": _is_bool,
    "use_dora": _is_bool,
    "lora_bias": _is_bool,
    "use_qalora": _is_bool,
    "qalora_group_size": _is_whole,
    "ensure_weight_tying": _is_bool,
    "inference_mode": _is_bool,
    "init_lora_weights": _either(_is_bool, _is_text),
    "task_type": _is_text,
    "base_model_name_or_path": _is_text,
    "revision": _is_text,
}
_PATTERNS = frozenset({"target_modules", "exclude_modules", "layers_pattern"})
# What PEFT notes beside them and nothing here depends on.
_NOTES = frozenset({"peft_type", "peft_version", "auto_mapping", "runtime_config"})


def check_readable(config: LoraConfig) -> None:
    """Refuse a configuration that no checkpoint could be read with.

    Raises:
        ConfigurationError: A field that is not read from checkpoints holds more than its default.
    """
    default = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in {*_FIELDS, *_NOTES} and value and value != getattr(default, field.name, None):
            raise ConfigurationError(f"lora_config.{field.name}", value, "does not work on a shared base: leave it out")
        patterns = value if isinstance(value, Mapping) else [value] if field.name in _PATTERNS else ()
        for pattern in patterns:
            if isinstance(pattern, str) and not _is_pattern(pattern):
                fix = "has more than three repeats, or repeats a group: name the modules, or write a simpler pattern"
                raise ConfigurationError(f"lora_config.{field.name}", pattern, fix)


def lora_config_from(data: object) -> LoraConfig:
    """A configuration from the values of an `adapter_config.json`.

    Raises:
        ConfigurationError: It is none of LoRA, a field holds something of another kind, or one that is not read holds
            more than its default.
    """
    if not isinstance(data, Mapping) or data.get("peft_type") != _TYPE:
        found = data.get("peft_type") if isinstance(data, Mapping) else data
        raise ConfigurationError("peft_type", found, f"must be {_TYPE!r}")
    defaults = cast(Any, LoraConfig()).to_dict()
    fields = {name: value for name, value in data.items() if name not in _NOTES}
    for name, value in fields.items():
        if name not in _FIELDS and value and value != defaults.get(name):
            raise ConfigurationError(f"lora_config.{name}", value, "is not read from a checkpoint")
        if name in _FIELDS and value is not None and not _FIELDS[name](value):
            fix = (
                "is of another type than this field has, or a pattern with more than three repeats or a repeated group"
            )
            raise ConfigurationError(f"lora_config.{name}", value, fix)
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    return LoraConfig(**{name: value for name, value in fields.items() if name in _FIELDS and name in known})


def write_lora_config(config: LoraConfig, folder: Path, base_name: str | None) -> None:
    """Write `adapter_config.json` as PEFT reads it; names that PEFT keeps as sets have an order."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if isinstance(value, set | frozenset):
            setattr(config, field.name, sorted(value))
    config.save_pretrained(str(folder))
