"""Load a language model by name: a hub name, a folder, a GGUF file, or the folder of a PEFT adapter."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from evollm.checks import expanded, hub_name_in, is_lfs_pointer, usable_path
from evollm.errors import ConfigurationError, EvoLLMError, MissingExtraError
from evollm.hub import hub_or_cache, is_absence
from evollm.models.encoder_decoder import is_encoder_decoder
from evollm.models.loading.merged_adapter import ADAPTER_CONFIG, base_of_adapter, merge_adapter
from evollm.models.loading.model_config import ATTENTION, check_arguments, file_arguments
from evollm.quiet import quiet

# Most names of missing weights in an error message.
_NAMED_AT_MOST = 5
# A folder with a tokenizer has at least one of these files.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Every run folder has this file.
_LINEAGE = "lineage.jsonl"
# Bytes; a pointer of Git LFS has about 130.
_LARGEST_POINTER = 1024


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a language model of this configuration."""
    if is_encoder_decoder(config):
        return AutoModelForSeq2SeqLM
    # transformers has no text-only class for some models that also read images.
    reads_images = type(config) in AutoModelForImageTextToText._model_mapping
    causal = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if reads_images and not causal else AutoModelForCausalLM


def _check_folder(field: str, name: str | os.PathLike[str]) -> None:
    """Refuse a path that is not a folder of a model (transformers would look it up on the hub), or an incomplete clone.

    Args:
        field: The parameter, for messages.
        name: A name on the hub, which passes, or a path.
    """
    path, text = usable_path(field, name), str(name)
    if path.is_dir():
        if (path / _LINEAGE).is_file():
            fix = (
                f"is a run folder: evollm export {text} --to FOLDER writes its model, or go on from it with start_from"
            )
            raise ConfigurationError(field, text, fix)
        for file in sorted(path.iterdir()):
            if file.is_file() and file.stat().st_size <= _LARGEST_POINTER and is_lfs_pointer(file):
                fix = f"its {file.name} is a pointer of Git LFS and not the file: run git lfs pull in its repository"
                raise ConfigurationError(field, text, fix)
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


def find_config(name: str | os.PathLike[str], model_config: Mapping[str, Any] | None = None) -> Any | None:
    """The configuration of a model; None if it cannot be loaded, as from a folder that holds a tokenizer only.

    Args:
        name: Hub name or folder.
        model_config: Keyword arguments that the model is loaded with.
    """
    name = _folder_with(expanded(name), "config.json")
    try:
        with quiet(), hub_or_cache(name):
            return AutoConfig.from_pretrained(name, **file_arguments(model_config))
    except Exception:  # `load_base_model` raises with the reason.
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
    base = _folder_with(name, *_TOKENIZER_FILES)
    if base != name:
        _check_folder("model", base)
        name = base
    with quiet(), hub_or_cache(name) as no_hub:
        try:
            return AutoTokenizer.from_pretrained(name, **file_arguments(model_config))
        except Exception as error:  # The hub, the network, the files and custom code raise many kinds of errors.
            if no_hub is not None and is_absence(error):
                raise ConfigurationError("model", name, _not_found(no_hub)) from error
            if Path(name).is_dir() and not any(Path(name, file).is_file() for file in _TOKENIZER_FILES):
                fix = "has no tokenizer (tokenizer.json): tokenizer.save_pretrained(folder), or pass tokenizer"
                if not Path(name, "config.json").is_file():
                    fix = "is no folder of a model: it has no config.json; give that of a model, or its name on the hub"
                raise ConfigurationError("model", name, fix) from error
            reason = str(error).strip().splitlines()[:1] or [""]
            fix = f"no tokenizer can be loaded from it ({type(error).__name__}: {reason[0]})"
            raise ConfigurationError("model", name, fix) from error


def _folder_with(name: str, *files: str) -> str:
    """Name of the base if `name` is a folder of an adapter that has none of these files; otherwise `name` itself."""
    folder = Path(name)
    if not (folder / ADAPTER_CONFIG).is_file() or any((folder / file).is_file() for file in files):
        return name
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):  # `base_of_adapter` raises with the reason.
        return name
    return expanded(base) if isinstance(base, str) and base else name


def _not_found(no_hub: str) -> str:
    """Message about a name that is neither a folder nor in the cache, while the hub cannot be asked.

    Args:
        no_hub: Why it cannot be asked.
    """
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
    if (folder / ADAPTER_CONFIG).is_file():
        base_name = base_of_adapter(name)
        return merge_adapter(_load(expanded(base_name), arguments), name, base_name)
    if (folder / "attributes.pt").is_file():
        fix = "is an agent's checkpoint: build the agent on its base and call load_checkpoint(path), or DPO.load(path)"
        raise ConfigurationError("model_name", name, fix)
    return _load(name, arguments)


def load_classifier(name: str, model_config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a sequence classifier by hub name or folder, with the arguments and errors of `load_base_model`."""
    arguments = {"trust_remote_code": False, **(model_config or {})}
    return _load(expanded(name), arguments, lambda _: AutoModelForSequenceClassification, "sequence classifier")


def _load(
    name: str,
    arguments: Mapping[str, Any],
    class_of: Callable[[Any], Any] = auto_class,
    noun: str = "language model",
) -> PreTrainedModel:
    """The model of a hub name, a folder or a GGUF file, with all weights from its files.

    Args:
        name: The name.
        arguments: Keyword arguments for `from_pretrained`.
        class_of: The class that loads a model of a configuration.
        noun: What the class loads, for messages.
    """
    _check_folder("model_name", name)
    with quiet(), hub_or_cache(name) as no_hub:
        return _loaded(name, arguments, no_hub, class_of, noun)


def _loaded(
    name: str, arguments: Mapping[str, Any], no_hub: str | None, class_of: Callable[[Any], Any], noun: str
) -> PreTrainedModel:
    try:
        config = arguments.get("config")
        if config is None:
            config = AutoConfig.from_pretrained(name, **file_arguments(arguments))
        asked = getattr(config, "_attn_implementation", None)
        if "attn_implementation" not in arguments and not (asked is None or asked in ATTENTION):
            # An unknown name may be that of a kernel on the hub, which is foreign code.
            fix = f"asks for attn_implementation={asked!r}: read what that runs, then pass it in model_config"
            raise ConfigurationError("model_name", name, fix)
        model, loading = class_of(config).from_pretrained(name, **arguments, output_loading_info=True)
    except pickle.UnpicklingError:
        # The message of torch is left out: it says how to unpickle the file nevertheless.
        fix = "its weights are a pickle that holds more than tensors, and was not run: take a model with safetensors"
        raise ConfigurationError("model_name", name, fix) from None
    except ImportError as error:
        raise _what_to_install(name, arguments, error) from error
    except Exception as error:
        # The files, the arguments and custom code of the model raise many kinds of errors.
        if no_hub is not None and is_absence(error):
            raise ConfigurationError("model_name", name, _not_found(no_hub)) from error
        if "trust_remote_code" in str(error) and not arguments["trust_remote_code"]:
            fix = "comes with code of its own, which was not run: read it, then pass trust_remote_code=True"
            raise ConfigurationError("model_name", name, f"cannot be loaded: it {fix} in model_config") from error
        check_arguments(arguments, error)
        reason = f"cannot be loaded as a {noun}: {type(error).__name__}: {error}"
        raise ConfigurationError("model_name", name, reason) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        # transformers initialises missing weights at random.
        fix = (
            f"its files lack weights of {type(model).__name__}: {', '.join(missing[:_NAMED_AT_MOST])} ({len(missing)})"
        )
        raise ConfigurationError("model_name", name, f"cannot be loaded, {fix}")
    assert isinstance(model, PreTrainedModel)
    return model


def _what_to_install(name: str, arguments: Mapping[str, Any], error: ImportError) -> EvoLLMError:
    """The error to raise for an ImportError of transformers: it says which package to install."""
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
