"""Keyword arguments of `from_pretrained`: which ones a checkpoint keeps, and what is wrong with unknown ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from evollm.checks import nearest_name
from evollm.errors import ConfigurationError

ATTENTION = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"})
# Arguments with a string or a dtype as value that a checkpoint keeps.
_RELOADABLE = frozenset(
    {"attn_implementation", "dtype", "gguf_file", "revision", "subfolder", "torch_dtype", "variant"}
)
# Arguments that say where a model's files are; the configuration and the tokenizer need these.
_FILE_ARGUMENTS = frozenset(
    {
        *{"cache_dir", "code_revision", "force_download", "gguf_file", "local_files_only", "proxies", "revision"},
        *{"subfolder", "token", "trust_remote_code"},
    }
)
# Other known arguments, which are about the weights.
_WEIGHT_ARGUMENTS = frozenset(
    {"device_map", "low_cpu_mem_usage", "max_memory", "quantization_config", "use_safetensors"}
)


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


# The settings of bitsandbytes that a checkpoint keeps, each with a check of its value.
_QUANTISATION: Mapping[str, Callable[[object], bool]] = {
    "load_in_4bit": lambda value: isinstance(value, bool),
    "load_in_8bit": lambda value: isinstance(value, bool),
    "bnb_4bit_quant_type": lambda value: value in ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": lambda value: isinstance(value, bool),
    "bnb_4bit_compute_dtype": _is_dtype,
    "bnb_4bit_quant_storage": _is_dtype,
    "llm_int8_threshold": lambda value: isinstance(value, float),
    "llm_int8_has_fp16_weight": lambda value: isinstance(value, bool),
    "llm_int8_enable_fp32_cpu_offload": lambda value: isinstance(value, bool),
    "llm_int8_skip_modules": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
# The settings of the load-balancing loss that a checkpoint keeps, each with a check of its value.
_ROUTERS: Mapping[str, Callable[[object], bool]] = {
    "output_router_logits": lambda value: isinstance(value, bool),
    "router_aux_loss_coef": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


def reloadable(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `model_config` that a checkpoint keeps, and with which its base is loaded again.

    It chooses the weights (file, revision, type), the quantisation of bitsandbytes and the load-balancing loss.
    Everything else is left out: a checkpoint must not make its reader run foreign code (`trust_remote_code`, kernels or
    quantisers by name) and must not hold credentials (`token`).
    """
    kept: dict[str, Any] = {}
    if not isinstance(model_config, Mapping):
        return kept
    for name in _RELOADABLE & model_config.keys():
        value = _plain(model_config[name])
        if isinstance(value, str) and (name != "attn_implementation" or value in ATTENTION):
            kept[name] = value
    for name, is_right in _ROUTERS.items():
        if is_right(model_config.get(name)):
            kept[name] = model_config[name]
    quantisation = _quantisation(model_config.get("quantization_config"))
    return kept | ({"quantization_config": quantisation} if quantisation else {})


def _quantisation(config: object) -> dict[str, Any]:
    """The settings of a bitsandbytes configuration as plain data; {} for any other quantisation."""
    settings = config.to_dict() if isinstance(config, BitsAndBytesConfig) else config
    if not isinstance(settings, Mapping) or settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return {}
    plain = {name: _plain(value) for name, value in settings.items() if name in _QUANTISATION}
    kept = {name: value for name, value in plain.items() if _QUANTISATION[name](value)}
    return kept if kept.get("load_in_4bit") or kept.get("load_in_8bit") else {}


def _plain(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def file_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments with which a model's configuration or tokenizer is loaded; custom code only if they ask for it."""
    found = {key: value for key, value in (arguments or {}).items() if key in _FILE_ARGUMENTS}
    return {"trust_remote_code": False, **found}


def check_arguments(arguments: Mapping[str, Any], error: Exception) -> None:
    """Raise a ConfigurationError if an error of `from_pretrained` is about one of its arguments; return otherwise."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None and unknown[1] in arguments:
        name, value = unknown[1], arguments[unknown[1]]
        if name in _QUANTISATION:
            fix = f"belongs one level down: model_config: {{quantization_config: {{{name}: {str(value).lower()}}}}}"
        else:
            known = sorted(_RELOADABLE | _FILE_ARGUMENTS | _WEIGHT_ARGUMENTS)
            fix = f"is no argument of from_pretrained; the nearest known one is {nearest_name(name, known)!r}"
        raise ConfigurationError(f"model_config.{name}", value, fix) from error
    attention = arguments.get("attn_implementation")
    if attention is not None and attention not in ATTENTION and "attn_implementation" in str(error):
        fix = f"is none of {', '.join(sorted(ATTENTION))}"
        raise ConfigurationError("model_config.attn_implementation", attention, fix) from error
