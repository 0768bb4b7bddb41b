"""Adapters: apart from the model that they are on, and on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
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


@dataclass
class Adapter:
    """An adapter on a model.

    Attributes:
        settings: What of its configuration decides what it computes, as JSON.
        trainable: Whether its parameters require gradients.
        first_layer: Index of the first repeated layer of the base that it has weights in; -1: it has some in front of
            the layers; the number of layers: it has none before the head.
        parameters: By their path in the PEFT model without the adapter's name, each once.
        tensors: The same and buffers, named as PEFT names them in a saved adapter; a tensor that two modules share has
            two names.
        owners: How many share it.
        fingerprint: Digest of a frozen adapter's weights; None: not known yet.
    """

    settings: str
    trainable: bool
    first_layer: int
    parameters: Mapping[str, nn.Parameter]
    tensors: Mapping[str, Tensor]
    owners: int = 1
    fingerprint: str | None = None


def drop_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of all layers, also one that was put into a part of them only."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(name)


def parameters_of(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters whose dotted path has the adapter's name as a segment, under that path without it."""
    found = {}
    for path, parameter in model.named_parameters():
        segments = path.split(".")
        if name in segments:
            segments.remove(name)
            found[".".join(segments)] = parameter
    return found


def saved_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """An adapter's tensors themselves, named as PEFT saves them."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    own = {path: tensor for path, tensor in tensors.items() if name in path.split(".")}
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=name, save_embedding_layers=False
    )
    return found
