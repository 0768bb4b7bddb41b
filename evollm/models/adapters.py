"""An adapter apart from the model that it is on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model.

    Attributes:
        config: Its LoRA configuration.
        tensors: Its weights, named as PEFT names them in a saved adapter.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]


def parameters_of(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters whose dotted path has the adapter's name as a segment, under that path without it."""
    found = {}
    for path, parameter in model.named_parameters():
        segments = path.split(".")
        if name in segments:
            segments.remove(name)
            found[".".join(segments)] = parameter
    return found
