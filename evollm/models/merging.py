"""An adapter's weights added to those of the base, beside it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from evollm.errors import ConfigurationError
from evollm.models.routing import holds_any


@torch.no_grad()
def merged_weights(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The weights that an adapter changes, by their name in the model without adapters.

    Args:
        model: A model with PEFT layers; it stays as it is.
        adapter: Name of a plain LoRA adapter.

    Returns:
        W + scaling B A for each adapted module, summed in float32 at least and rounded to W's type.

    Raises:
        ConfigurationError: The adapter is no plain LoRA, or changes a weight that other modules share.
    """
    users = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    merged = {}
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not holds_any(module, [adapter]):
            continue
        layer: Any = module
        weight = layer.base_layer.weight
        if not isinstance(module, LoraLayer) or adapter in getattr(layer, "lora_variant", {}):
            raise ConfigurationError("lora_config", path, "is no plain LoRA: merge it with PEFT's merge_and_unload()")
        if users[id(weight)] > 1:
            fix = "is tied to another module, which would change with it: save the adapter alone (save_llm_checkpoint)"
            raise ConfigurationError("lora_config.target_modules", path, fix)
        change = layer.get_delta_weight(adapter)
        wide = torch.promote_types(weight.dtype, change.dtype)
        change = change.to(weight.device, wide)
        total = (weight.to(wide) + change).to(weight.dtype)
        # An untrained adapter leaves every bit: -0 + 0 would be +0.
        merged[f"{path}.weight"] = torch.where(change == 0, weight, total)
    return merged
