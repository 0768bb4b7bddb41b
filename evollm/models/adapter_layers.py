"""The layers that hold adapters, and ways through them past all adapters but one.

PEFT's own functions visit the weights of all adapters, some of them once for each layer. To add, switch or free one of
N adapters must not cost more the more there are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# Where a module dictionary and a parameter dictionary of torch keep their entries.
_ENTRIES = ("_modules", "_parameters", "_keys")


class AdapterLayers:
    """PEFT's layers on a model."""

    def __init__(self) -> None:
        self._layers: list[Any] = []

    def find(self, model: nn.Module) -> None:
        """Note all layers of a model; call it after an adapter came, which may have brought new ones."""
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def activate(self, adapter: str | None) -> None:
        """Compute with this adapter, or with none; which weights require gradients stays as it is."""
        for layer in self._layers:
            if layer.merged:
                layer.unmerge()
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    def copy(self, source: str, target: str) -> dict[int, Any]:
        """Give each layer that holds the adapter `source` a copy of it as the adapter `target`.

        Returns:
            The copy of each of its tensors, by the tensor's `id`.
        """
        copies: dict[int, Any] = {}
        for layer in self._layers:
            settings = [value for value in vars(layer).values() if isinstance(value, dict)]
            for held in (*_containers(layer), *settings):
                if source in held:
                    held[target] = copy.deepcopy(held[source], copies)
        return copies

    @contextmanager
    def only(self, adapter: str) -> Iterator[None]:
        """Inside the block the layers seem to hold this adapter and no other; it may come or go there.

        No forward pass may run in it. After an error they hold what they held before.
        """
        hidden = [
            (vars(container), entries, vars(container)[entries])
            for layer in self._layers
            for container in _containers(layer)
            for entries in _ENTRIES
            if entries in vars(container)
        ]
        for attributes, entries, whole in hidden:
            attributes[entries] = {adapter: whole[adapter]} if adapter in whole else {}
        try:
            yield
        except BaseException:
            for attributes, entries, whole in hidden:
                attributes[entries] = whole
            raise
        for attributes, entries, whole in hidden:
            shown = attributes[entries]
            if adapter not in shown:
                whole.pop(adapter, None)
            whole.update(shown)
            attributes[entries] = whole


def _containers(layer: nn.Module) -> Iterator[nn.ModuleDict | nn.ParameterDict]:
    """What a layer keeps by the names of adapters."""
    for name, child in layer.named_children():
        if name != "base_layer" and isinstance(child, nn.ModuleDict | nn.ParameterDict):
            yield child
