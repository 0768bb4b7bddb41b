"""What a model and a LoRA configuration must be for many adapters to share one base."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from evollm.checks import finite_number, positive_number, whole_number
from evollm.errors import ConfigurationError, brief
from evollm.models.lora_json import check_readable

# The others rewrite the base's own weights, which every other adapter stands on, or need data.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
# Of a base's modules in a message.
_NAMED_AT_MOST = 10
# Options that work on the base itself, through hooks for which the base would have to be called by PEFT, or change an
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

# Of these, what people use to train the rows of new tokens.
_TRAIN_WEIGHTS = ("modules_to_save", "trainable_token_indices")


def check_plain_model(field: str, model: object) -> None:
    """Refuse what no agent can be built on.

    Raises:
        ConfigurationError: No model of transformers, or one that carries adapters.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ConfigurationError(
            field,
            model if isinstance(model, str) else type(model).__name__,
            "must be a language model of transformers, causal or encoder-decoder (or use model_name)",
        )
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigurationError(field, type(model).__name__, f"already carries adapters: {_instead(model)}")


def _instead(model: PreTrainedModel | PeftModel) -> str:
    """What to pass instead of a model that carries adapters, so that actor and reference start from what it computes.

    Of PEFT's, TRL trains the adapter on and makes a copy of it the reference.
    """
    if not isinstance(model, PeftModel):
        return "pass the plain base model, as it was before, and the LoRA settings as lora_config"
    settings = f"lora_config=model.peft_config[{model.active_adapter!r}]"
    ups = [weight for name, weight in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]
    if ups and not any(weight.any() for weight in ups):
        return f"they change nothing yet, so pass the base and their settings: model.unload(), {settings}"
    if getattr(model.get_base_model(), "is_quantized", False):
        return (
            "model.save_pretrained(folder), and model_name=folder, which merges them into the base in the type that it "
            "is stored in; actor and reference then start from them"
        )
    return (
        f"merge them into the base, from which actor and reference then start: model.merge_and_unload(), {settings} "
        "(or another one)"
    )


def refusal(config: LoraConfig, model: nn.Module, error: Exception) -> ConfigurationError:
    """What PEFT says of a configuration that it cannot apply, in one line.

    Args:
        config: The configuration.
        model: The base.
        error: What PEFT raised.
    """
    # A module in the message is printed with all that it holds.
    reason = brief(re.sub(r"\(\n.*\n\)", "", str(error), flags=re.DOTALL)) or type(error).__name__
    there = ""
    if "module" in reason:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        own = (name.removesuffix(".base_layer") for name in linear if ".lora_" not in name)
        names = dict.fromkeys(name.rpartition(".")[2] for name in own)
        there = f"; linear modules of {type(model).__name__} are {', '.join(list(names)[:_NAMED_AT_MOST])}"
    modules = config.target_modules
    listed = [part for part in re.split(r"[\s,]+", modules) if part] if isinstance(modules, str) else []
    if len(listed) > 1:
        there += f"; a text is one pattern, so give target_modules a list: [{', '.join(listed)}]"
    return ConfigurationError("lora_config", _changes(config), f"PEFT cannot apply it: {reason}{there}")


def _changes(config: LoraConfig) -> dict[str, Any]:
    """The fields that differ from PEFT's defaults."""
    default = LoraConfig()
    values = {field.name: getattr(config, field.name) for field in fields(LoraConfig)}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _check_modules(config: LoraConfig) -> None:
    for option in ("target_modules", "exclude_modules"):
        names = getattr(config, option)
        named = isinstance(names, list | tuple | set) and all(isinstance(name, str) for name in names)
        if named and not names and config.target_parameters:
            # So PEFT keeps it of a model whose experts are parameters.
            continue
        if names is not None and not (names and (isinstance(names, str) or named)):
            raise ConfigurationError(f"lora_config.{option}", names, "must be names of modules, or a pattern of them")
    layers = config.layers_to_transform
    if layers is not None:
        for layer in layers if isinstance(layers, list | tuple) and layers else [layers]:
            whole_number("lora_config.layers_to_transform", layer, 0)


def _check_pattern(option: str, pattern: object, check: Callable[[str, object], object]) -> None:
    """Refuse what is no mapping from names of modules to values that the check lets pass."""
    if not isinstance(pattern, Mapping):
        raise ConfigurationError(f"lora_config.{option}", pattern, "must be a mapping from names of modules to numbers")
    for name, value in pattern.items():
        check(f"lora_config.{option}[{name!r}]", value)


def check_lora_config(config: LoraConfig) -> None:
    """Refuse a configuration with which one adapter would change the base or another adapter.

    Raises:
        ConfigurationError: The message names the field.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigurationError("lora_config", type(config).__name__, "must be a peft.LoraConfig")
    whole_number("lora_config.r", config.r, 1)
    # With 0 an adapter has no effect and gets no gradient.
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
    check_readable(config)
