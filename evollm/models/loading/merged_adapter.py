"""Folders of PEFT adapters as models: the base that an adapter names, with the adapter merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from evollm.errors import ConfigurationError
from evollm.models.adapters.merging import all_logprobs, check_same
from evollm.models.adapters.peft_layers import adapted_layers, own_name

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Prefix of a weight's name in a saved adapter.
_PEFT_PREFIX = "base_model.model."
_NOT_MERGED = "a weight may be tied to another one; untie the base's embeddings and train the adapter on that"


def base_of_adapter(name: str) -> str:
    """The base that the adapter in a folder names.

    Raises:
        ConfigurationError: The adapter's configuration cannot be read, asks for Megatron, or names no base.
    """
    try:
        config = PeftConfig.from_pretrained(name)
    except Exception as error:
        reason = f"is a PEFT adapter that cannot be read: {type(error).__name__}: {error}"
        raise ConfigurationError("model_name", name, reason) from error
    if getattr(config, "megatron_config", None):
        # PEFT would import a module whose name the configuration gives.
        fix = "is a PEFT adapter that asks for Megatron, which does not work here: take another"
        raise ConfigurationError("model_name", name, fix)
    base_name = config.base_model_name_or_path
    if not base_name:
        fix = "is a PEFT adapter that does not name its base: merge it into the base, and save and load that"
        raise ConfigurationError("model_name", name, fix)
    return str(base_name)


def merge_adapter(model: PreTrainedModel, name: str, base_name: str) -> PreTrainedModel:
    """Merge the adapter in the folder `name` into its base.

    Args:
        model: The base; it is changed.
        name: Folder of the adapter.
        base_name: Name of the base, for messages.

    Raises:
        ConfigurationError: The base is quantised, PEFT cannot merge the adapter, or the merged weights do not compute
            what the adapter computes.
    """
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
    # A checkpoint saves this name, with which the merged weights are loaded again.
    merged.config._name_or_path = name
    return merged


def _merged(model: PreTrainedModel, name: str) -> tuple[Any, str | None]:
    """The merged model, and how its log-probs differ from the adapter's; None: not by more than rounding explains."""
    _resize_embeddings(model, name)
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


def _resize_embeddings(model: PreTrainedModel, name: str) -> None:
    """Resize the base's embeddings to those saved with the adapter, which has more rows if tokens were added."""
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
