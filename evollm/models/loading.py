"""Load the frozen base model, once for a whole population."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from evollm.errors import ConfigurationError


def load_base_model(name: str, model_config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a causal language model by hub name or folder.

    Args:
        name: What `AutoModelForCausalLM.from_pretrained` takes: a hub name or a folder.
        model_config: Keyword arguments for `from_pretrained` (`dtype`, `attn_implementation`, `gguf_file`, ...).

    Raises:
        ConfigurationError: The model cannot be found or loaded; the message holds the library's own reason.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **(model_config or {}))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError("model_name", name, f"cannot be loaded as a causal language model: {error}") from error
    return model
