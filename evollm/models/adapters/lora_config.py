"""LoRA configurations: checked for a shared base, read from and written to `adapter_config.json`.

A saved configuration may come from an untrusted source. Only the fields in `_FIELDS`, which decide what an adapter
computes, are read from it; fields that name modules to import, files or other initialisations are not.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from evollm.checks import finite_number, positive_number, whole_number
from evollm.errors import ConfigurationError, brief

# All other initialisations rewrite the base's own weights, which all adapters share, or need data.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Most module names in an error message.
_NAMED_AT_MOST = 10
# Options that train or change the base's own modules, need hooks that run only when PEFT calls the base, or change an
# adapter's weights in a forward pass.
_UNSUPPORTED = (
    "kasa_config",
    "megatron_config",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "velora_config",
)
# The unsupported options that people use to train the embeddings of new tokens.
_TRAIN_WEIGHTS = ("modules_to_save", "trainable_token_indices")
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
    """Whether it is a name, or a pattern that `re` matches fast.

    Patterns with repeated groups or many repeats may take exponential time.
    """
    if not isinstance(value, str):
        return False
    repeats = re.findall(r"(?<!\\)[*+{]", value)
    return len(value) <= _LONGEST_PATTERN and len(repeats) <= _MOST_REPEATS and not re.search(r"\)[*+{]", value)


# The fields that are read from a file, each with a check of its value; null is allowed, too.
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
# Fields of PEFT that are neither read nor refused, since nothing here depends on them.
_IGNORED = frozenset({"peft_type", "peft_version", "auto_mapping", "runtime_config"})


def check_lora_config(config: LoraConfig) -> None:
    """Refuse a configuration with which one adapter would change the base or another adapter.

    Raises:
        ConfigurationError: The message names the field.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigurationError("lora_config", type(config).__name__, "must be a peft.LoraConfig")
    whole_number("lora_config.r", config.r, 1)
    # With lora_alpha=0 an adapter has no effect and gets no gradient.
    positive_number("lora_config.lora_alpha", config.lora_alpha)
    _check_pattern("rank_pattern", config.rank_pattern, lambda field, value: whole_number(field, value, 1))
    _check_pattern("alpha_pattern", config.alpha_pattern, positive_number)
    dropout = finite_number("lora_config.lora_dropout", config.lora_dropout)
    if not 0 <= dropout < 1:
        raise ConfigurationError("lora_config.lora_dropout", dropout, "must be from 0 to below 1")
    _check_modules(config)
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ConfigurationError(
            "lora_config.init_lora_weights",
            config.init_lora_weights,
            f"rewrites the base or needs data; use one of {_INITIALISATIONS}",
        )
    for option in _UNSUPPORTED:
        if getattr(config, option, None):
            fix = "does not work on a shared base"
            if option in _TRAIN_WEIGHTS:
                fix += ": name embed_tokens or lm_head in target_modules, which gives them adapters"
            raise ConfigurationError(f"lora_config.{option}", getattr(config, option), fix)
    if config.bias != "none":
        raise ConfigurationError("lora_config.bias", config.bias, "trains the shared base's own biases; use 'none'")
    _check_readable(config)


def _check_modules(config: LoraConfig) -> None:
    for option in ("target_modules", "exclude_modules"):
        names = getattr(config, option)
        named = isinstance(names, list | tuple | set) and all(isinstance(name, str) for name in names)
        if named and not names and config.target_parameters:
            # PEFT leaves the list empty for a model of which only stacked experts are adapted.
            continue
        if names is not None and not (names and (isinstance(names, str) or named)):
            raise ConfigurationError(f"lora_config.{option}", names, "must be names of modules, or a pattern of them")
    layers = config.layers_to_transform
    if layers is not None:
        for layer in layers if isinstance(layers, list | tuple) and layers else [layers]:
            whole_number("lora_config.layers_to_transform", layer, 0)


def _check_pattern(option: str, pattern: object, check: Callable[[str, object], object]) -> None:
    """Refuse anything but a mapping from module names to values that pass the check."""
    if not isinstance(pattern, Mapping):
        raise ConfigurationError(f"lora_config.{option}", pattern, "must be a mapping from names of modules to numbers")
    for name, value in pattern.items():
        check(f"lora_config.{option}[{name!r}]", value)


def _check_readable(config: LoraConfig) -> None:
    """Refuse a configuration that could not be read from a checkpoint.

    Raises:
        ConfigurationError: A field that is not read from checkpoints has another value than its default, or a pattern
            may take exponential time.
    """
    default = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in {*_FIELDS, *_IGNORED} and value and value != getattr(default, field.name, None):
            raise ConfigurationError(f"lora_config.{field.name}", value, "does not work on a shared base: leave it out")
        patterns = value if isinstance(value, Mapping) else [value] if field.name in _PATTERNS else ()
        for pattern in patterns:
            if isinstance(pattern, str) and not _is_pattern(pattern):
                fix = "has more than three repeats, or repeats a group: name the modules, or write a simpler pattern"
                raise ConfigurationError(f"lora_config.{field.name}", pattern, fix)


def refusal(config: LoraConfig, model: nn.Module, error: Exception) -> ConfigurationError:
    """PEFT's reason for refusing a configuration, in one line.

    Args:
        config: The configuration.
        model: The base.
        error: What PEFT raised.
    """
    # PEFT's messages print whole modules; their multi-line parts are left out.
    reason = brief(re.sub(r"\(\n.*\n\)", "", str(error), flags=re.DOTALL)) or type(error).__name__
    hint = ""
    if "module" in reason:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        own = (name.removesuffix(".base_layer") for name in linear if ".lora_" not in name)
        names = dict.fromkeys(name.rpartition(".")[2] for name in own)
        hint = f"; linear modules of {type(model).__name__} are {', '.join(list(names)[:_NAMED_AT_MOST])}"
    modules = config.target_modules
    listed = [part for part in re.split(r"[\s,]+", modules) if part] if isinstance(modules, str) else []
    if len(listed) > 1:
        hint += f"; a text is one pattern, so give target_modules a list: [{', '.join(listed)}]"
    default = LoraConfig()
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(LoraConfig)}
    changed = {name: value for name, value in values.items() if value != getattr(default, name)}
    return ConfigurationError("lora_config", changed, f"PEFT cannot apply it: {reason}{hint}")


def lora_config_from(data: object) -> LoraConfig:
    """A configuration from the values of an `adapter_config.json`.

    Raises:
        ConfigurationError: It is not a configuration of LoRA, a field has a value of another type, or a field that is
            not read has another value than its default.
    """
    if not isinstance(data, Mapping) or data.get("peft_type") != _TYPE:
        found = data.get("peft_type") if isinstance(data, Mapping) else data
        raise ConfigurationError("peft_type", found, f"must be {_TYPE!r}")
    defaults = cast(Any, LoraConfig()).to_dict()
    fields = {name: value for name, value in data.items() if name not in _IGNORED}
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
    """Write `adapter_config.json` as PEFT reads it, with sets as sorted lists so that equal ones give equal files."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if isinstance(value, set | frozenset):
            setattr(config, field.name, sorted(value))
    config.save_pretrained(str(folder))
