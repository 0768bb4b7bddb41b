"""Load a language model by name: a hub name, a folder, a GGUF file, or the folder of a PEFT adapter."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from evollm.checks import expanded, hub_name_in, is_lfs_pointer, nearest_name, usable_path
from evollm.errors import ConfigurationError, EvoLLMError, MissingExtraError
from evollm.hub import hub_or_cache, is_absence
from evollm.models.adapter_layers import adapted_layers, own_name
from evollm.models.encoder_decoder import is_encoder_decoder
from evollm.models.merging import all_logprobs, check_same
from evollm.quiet import quiet

_RELOADABLE = frozenset(
    {"attn_implementation", "dtype", "gguf_file", "revision", "subfolder", "torch_dtype", "variant"}
)
_ATTENTION = frozenset({"eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"})
_NAMED_AT_MOST = 5
# Of a folder that PEFT saves.
_ADAPTER_CONFIG, _ADAPTER_WEIGHTS, _PEFT_PREFIX = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "base_model.model.",
)
# One of them a folder with a tokenizer has.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Of a run folder.
_LINEAGE = "lineage.jsonl"
# In bytes; a pointer of Git LFS has some 130.
_LARGEST_POINTER = 1024
_NOT_MERGED = "a weight may be tied to another one; untie the base's embeddings and train the adapter on that"
# Where a model's files are looked for; the other arguments of `from_pretrained` are about its weights.
_ABOUT_FILES = frozenset(
    {
        *{"cache_dir", "code_revision", "force_download", "gguf_file", "local_files_only", "proxies", "revision"},
        *{"subfolder", "token", "trust_remote_code"},
    }
)
_ABOUT_WEIGHTS = frozenset({"device_map", "low_cpu_mem_usage", "max_memory", "quantization_config", "use_safetensors"})


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# The settings of bitsandbytes that a checkpoint may hold, and what each must be.
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
    "llm_int8_skip_modules": _is_names,
}
# What a checkpoint may say of the loss of routers.
_ROUTERS: Mapping[str, Callable[[object], bool]] = {
    "output_router_logits": lambda value: isinstance(value, bool),
    "router_aux_loss_coef": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


def reloadable(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `model_config` that a checkpoint keeps, and that is taken from it, so that its base loads alike.

    Only what chooses among the weights of a name, their type, how bitsandbytes rounds them, and whether routers have a
    loss: a checkpoint must not be able to ask for code of somebody else's (`trust_remote_code`, kernels or quantisers
    by name), and must not hold a password (`token`).
    """
    kept: dict[str, Any] = {}
    if not isinstance(model_config, Mapping):
        return kept
    for name in _RELOADABLE & model_config.keys():
        value = _plain(model_config[name])
        if isinstance(value, str) and (name != "attn_implementation" or value in _ATTENTION):
            kept[name] = value
    for name, is_right in _ROUTERS.items():
        if is_right(model_config.get(name)):
            kept[name] = model_config[name]
    quantisation = _quantisation(model_config.get("quantization_config"))
    return kept | ({"quantization_config": quantisation} if quantisation else {})


def _quantisation(config: object) -> dict[str, Any]:
    """The settings of a bitsandbytes configuration as plain data; {} of any other one."""
    settings = config.to_dict() if isinstance(config, BitsAndBytesConfig) else config
    if not isinstance(settings, Mapping) or settings.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return {}
    plain = {name: _plain(value) for name, value in settings.items() if name in _QUANTISATION}
    kept = {name: value for name, value in plain.items() if _QUANTISATION[name](value)}
    return kept if kept.get("load_in_4bit") or kept.get("load_in_8bit") else {}


def _plain(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _about_files(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a model's keyword arguments its configuration and its tokenizer need; custom code only if asked for."""
    found = {key: value for key, value in (arguments or {}).items() if key in _ABOUT_FILES}
    return {"trust_remote_code": False, **found}


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a language model of this configuration."""
    if is_encoder_decoder(config):
        return AutoModelForSeq2SeqLM
    # One that reads pictures too, and of which transformers has no part for text alone.
    reads_pictures = type(config) in AutoModelForImageTextToText._model_mapping
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if reads_pictures and not causal else AutoModelForCausalLM


def _check_folder(field: str, name: str | os.PathLike[str]) -> None:
    """Refuse a path that leads to no folder: transformers would take it for a name on the hub."""
    path, text = usable_path(field, name), str(name)
    if path.is_dir():
        _check_content(field, text, path)
        return
    if path.exists():
        fix = "is no folder: give that of a model, or its name on the hub"
        if (path.parent / "config.json").is_file():
            fix = f"is a file of a model: give its folder, {str(path.parent)!r}"
        raise ConfigurationError(field, text, fix)
    page = hub_name_in(text)
    if page is not None:
        raise ConfigurationError(field, text, f"is the address of a page: write {page}, its name on the hub")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        fix = "no such folder: give that of a model, or its name on the hub; of a base that was moved, where it is now"
        raise ConfigurationError(field, text, fix)


def _check_content(field: str, text: str, folder: Path) -> None:
    """Refuse a folder of something else, and files that have not been fetched."""
    if (folder / _LINEAGE).is_file():
        fix = f"is a run folder: evollm export {text} --to FOLDER writes its model, or go on from it with start_from"
        raise ConfigurationError(field, text, fix)
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size <= _LARGEST_POINTER and is_lfs_pointer(file):
            fix = f"its {file.name} is a pointer of Git LFS and not the file: run git lfs pull in its repository"
            raise ConfigurationError(field, text, fix)


def find_config(name: str | os.PathLike[str], model_config: Mapping[str, Any] | None = None) -> Any | None:
    """The configuration of a model by name or folder; None where there is none, as with a tokenizer's folder alone.

    Args:
        name: As for `load_base_model`.
        model_config: Likewise.
    """
    name = _described_by(expanded(name), "config.json")
    try:
        with quiet(), hub_or_cache(name):
            return AutoConfig.from_pretrained(name, **_about_files(model_config))
    except Exception:  # Loading the model itself says what is wrong.
        return None


def load_tokenizer(name: str | os.PathLike[str], model_config: Mapping[str, Any] | None = None) -> Any:
    """Load a model's tokenizer.

    Args:
        name: Hub name or folder.
        model_config: Keyword arguments that the model is loaded with.

    Raises:
        ConfigurationError: It cannot be found or loaded.
    """
    name = expanded(name)
    _check_folder("model", name)
    base = _described_by(name, *_TOKENIZER_FILES)
    if base != name:
        _check_folder("model", base)
        name = base
    with quiet(), hub_or_cache(name) as no_hub:
        return _tokenizer(name, model_config, no_hub)


def _described_by(name: str, *files: str) -> str:
    """The base that the folder of an adapter names, if the folder has none of these files; else the name itself."""
    folder = Path(name)
    if not (folder / _ADAPTER_CONFIG).is_file() or any((folder / file).is_file() for file in files):
        return name
    try:
        base = json.loads((folder / _ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):  # Loading the adapter says what is wrong with it.
        return name
    return expanded(base) if isinstance(base, str) and base else name


def _tokenizer(name: str, model_config: Mapping[str, Any] | None, no_hub: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, **_about_files(model_config))
    except Exception as error:  # Whatever the hub, the network, its files and the tokenizer's own code raise.
        if no_hub is not None and is_absence(error):
            raise ConfigurationError("model", name, _nowhere(no_hub)) from error
        if Path(name).is_dir() and not any(Path(name, file).is_file() for file in _TOKENIZER_FILES):
            raise ConfigurationError("model", name, _lacks_tokenizer(Path(name))) from error
        reason = str(error).strip().splitlines()[:1] or [""]
        fix = f"no tokenizer can be loaded from it ({type(error).__name__}: {reason[0]})"
        raise ConfigurationError("model", name, fix) from error


def _lacks_tokenizer(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return "is no folder of a model: it has no config.json; give that of a model, or its name on the hub"
    return "has no tokenizer (tokenizer.json): tokenizer.save_pretrained(folder), or pass tokenizer"


def _nowhere(no_hub: str) -> str:
    """What to do about a name that is neither a folder nor in the cache, while the hub is not asked."""
    return (
        f"is no folder here and not in the cache of the hub, and {no_hub}: give the folder of a model, or a network; "
        "a model that is in the cache loads without one"
    )


def load_base_model(name: str, model_config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a language model, causal or encoder-decoder, by hub name or folder.

    The folder of a PEFT adapter gives the base that it names with the adapter merged into it. Custom code that comes
    with a model is not run unless `model_config` has `trust_remote_code=True`.

    Args:
        name: What `from_pretrained` takes: a hub name or a folder.
        model_config: Keyword arguments for `from_pretrained` (`dtype`, `quantization_config`, `attn_implementation`,
            `device_map`, `gguf_file`, ...).

    Raises:
        ConfigurationError: The model cannot be found or loaded; the message holds the library's own reason.
        MissingExtraError: It needs a package that is not installed.
    """
    arguments = {"trust_remote_code": False, **(model_config or {})}
    name = expanded(name)
    folder = Path(name)
    if (folder / "config.json").is_file() or not folder.is_dir():
        return _load(name, arguments)
    if (folder / _ADAPTER_CONFIG).is_file():
        return _with_adapter(name, arguments)
    if (folder / "attributes.pt").is_file():
        fix = "is an agent's checkpoint: build the agent on its base and call load_checkpoint(path), or DPO.load(path)"
        raise ConfigurationError("model_name", name, fix)
    return _load(name, arguments)


def _load(name: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """The model as `from_pretrained` loads it."""
    _check_folder("model_name", name)
    with quiet(), hub_or_cache(name) as no_hub:
        return _loaded(name, arguments, no_hub)


def _loaded(name: str, arguments: Mapping[str, Any], no_hub: str | None) -> PreTrainedModel:
    try:
        config = arguments.get("config")
        if config is None:
            config = AutoConfig.from_pretrained(name, **_about_files(arguments))
        asked = getattr(config, "_attn_implementation", None)
        if "attn_implementation" not in arguments and not (asked is None or asked in _ATTENTION):
            # Its name may be that of a kernel on the hub, which is code.
            fix = f"asks for attn_implementation={asked!r}: read what that runs, then pass it in model_config"
            raise ConfigurationError("model_name", name, fix)
        model, loading = auto_class(config).from_pretrained(name, **arguments, output_loading_info=True)
    except pickle.UnpicklingError:
        # The library's own reason explains how to run what the file holds.
        fix = "its weights are a pickle that holds more than tensors, and was not run: take a model with safetensors"
        raise ConfigurationError("model_name", name, fix) from None
    except ImportError as error:
        raise _what_to_install(name, arguments, error) from error
    except Exception as error:
        # Anything: the files, the arguments and code that comes with a model may each fail in its own way.
        if no_hub is not None and is_absence(error):
            raise ConfigurationError("model_name", name, _nowhere(no_hub)) from error
        if "trust_remote_code" in str(error) and not arguments["trust_remote_code"]:
            fix = "comes with code of its own, which was not run: read it, then pass trust_remote_code=True"
            raise ConfigurationError("model_name", name, f"cannot be loaded: it {fix} in model_config") from error
        _check_arguments(arguments, error)
        reason = f"cannot be loaded as a language model: {type(error).__name__}: {error}"
        raise ConfigurationError("model_name", name, reason) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        # The library draws them at random.
        fix = (
            f"its files lack weights of {type(model).__name__}: {', '.join(missing[:_NAMED_AT_MOST])} ({len(missing)})"
        )
        raise ConfigurationError("model_name", name, f"cannot be loaded, {fix}")
    assert isinstance(model, PreTrainedModel)
    return model


def _check_arguments(arguments: Mapping[str, Any], error: Exception) -> None:
    """Raise what transformers says of one of the keyword arguments, with the argument's name."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is not None and unknown[1] in arguments:
        name, value = unknown[1], arguments[unknown[1]]
        if name in _QUANTISATION:
            fix = f"belongs one level down: model_config: {{quantization_config: {{{name}: {str(value).lower()}}}}}"
        else:
            known = sorted(_RELOADABLE | _ABOUT_FILES | _ABOUT_WEIGHTS)
            fix = f"is no argument of from_pretrained; the nearest known one is {nearest_name(name, known)!r}"
        raise ConfigurationError(f"model_config.{name}", value, fix) from error
    attention = arguments.get("attn_implementation")
    if attention is not None and attention not in _ATTENTION and "attn_implementation" in str(error):
        fix = f"is none of {', '.join(sorted(_ATTENTION))}"
        raise ConfigurationError("model_config.attn_implementation", attention, fix) from error


def _what_to_install(name: str, arguments: Mapping[str, Any], error: ImportError) -> EvoLLMError:
    """An error that says which package is missing, from transformers' own."""
    reason = str(error)
    if "bitsandbytes" in reason:
        return MissingExtraError("bitsandbytes", "quantization", f"{name!r} in 4 or 8 bits")
    if "gguf" in reason.lower():
        return MissingExtraError("gguf", "gguf", f"{name!r} as a GGUF file")
    attention = arguments.get("attn_implementation")
    if attention is not None and "flash" in str(attention):
        fix = (
            f"needs the package flash-attn and a GPU that it supports: pip install flash-attn, or take 'sdpa' ({error})"
        )
        return ConfigurationError("attn_implementation", attention, fix)
    return ConfigurationError("model_name", name, f"cannot be loaded, a package is missing: {error}")


def _with_adapter(name: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """The base that an adapter names, with the adapter merged into its weights."""
    try:
        config = PeftConfig.from_pretrained(name)
        base_name = config.base_model_name_or_path
    except Exception as error:
        reason = f"is a PEFT adapter that cannot be read: {type(error).__name__}: {error}"
        raise ConfigurationError("model_name", name, reason) from error
    if getattr(config, "megatron_config", None):
        # PEFT imports the module that it names.
        fix = "is a PEFT adapter that asks for Megatron, which does not work here: take another"
        raise ConfigurationError("model_name", name, fix)
    if not base_name:
        fix = "is a PEFT adapter that does not name its base: merge it into the base, and save and load that"
        raise ConfigurationError("model_name", name, fix)
    model = _load(expanded(base_name), arguments)
    if getattr(model, "is_quantized", False):
        fix = "is a PEFT adapter, which cannot be merged into quantised weights: merge it unquantised, and save that"
        raise ConfigurationError("model_name", name, fix)
    try:
        merged, fault = _merged(model, name)
    except Exception as error:
        reason = f"is a PEFT adapter that cannot be merged into {base_name!r}: {type(error).__name__}: {error}"
        raise ConfigurationError("model_name", name, reason) from error
    if fault is not None:
        fix = f"is a PEFT adapter that cannot be merged into {base_name!r} ({fault}): {_NOT_MERGED}"
        raise ConfigurationError("model_name", name, fix)
    assert isinstance(merged, PreTrainedModel)
    # By this name a checkpoint finds the same weights again.
    merged.config._name_or_path = name
    return merged


def _merged(model: PreTrainedModel, name: str) -> tuple[Any, str | None]:
    """The model with an adapter merged into it, and what is wrong if its log-probs are not the adapter's."""
    _make_room(model, name)
    adapted = cast(Any, PeftModel.from_pretrained(model, name)).eval()
    (adapter,) = adapted.peft_config
    new_tokens = getattr(adapted.peft_config[adapter], "trainable_token_indices", None) or []
    tokens = new_tokens if isinstance(new_tokens, list) else [token for part in new_tokens.values() for token in part]
    paths = [own_name(path) for path in adapted_layers(adapted.get_base_model(), adapter)]
    expected = all_logprobs(adapted.get_base_model(), tokens)
    merged = adapted.merge_and_unload().eval()
    modules = dict(merged.named_modules())
    layers = [modules[path] for path in paths if path in modules]
    return merged, check_same(expected, lambda: all_logprobs(merged, tokens), layers)


def _make_room(model: PreTrainedModel, name: str) -> None:
    """Resize a base's embeddings where an adapter was saved with its own, of another size: tokens were added."""
    path = Path(name, _ADAPTER_WEIGHTS)
    if not path.is_file():
        return
    embeddings = cast(nn.Embedding, model.get_input_embeddings())
    own = next(key for key, module in model.named_modules() if module is embeddings)
    with safe_open(path, framework="pt") as file:
        key = f"{_PEFT_PREFIX}{own}.weight"
        rows = file.get_slice(key).get_shape()[0] if key in file.keys() else len(embeddings.weight)  # noqa: SIM118
    if rows != len(embeddings.weight):
        model.resize_token_embeddings(rows, mean_resizing=False)
