"""PEFT's layers, with operations on one adapter that leave all other adapters alone.

PEFT's own functions visit the weights of every adapter, some of them once for each layer. With N adapters on one base,
the time to add, activate or delete one of them must not grow with N.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# The attributes in which nn.ModuleDict and nn.ParameterDict keep their entries.
_ENTRIES = ("_modules", "_parameters", "_keys")


def own_name(path: str) -> str:
    """The path of a module or weight in the model without adapters: without the segments `base_layer`."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def holds_any(layer: Any, adapters: Sequence[str]) -> bool:
    """Whether a PEFT layer holds weights of one of these adapters."""
    held = set().union(*(getattr(layer, name, {}) for name in layer.adapter_layer_names))
    return any(name in held for name in adapters)


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """PEFT's layers that hold an adapter, by path; of nested ones the outer one comes first."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and holds_any(module, [adapter])
    }


class Home(NamedTuple):
    """Where PEFT keeps a parameter of each adapter.

    Attributes:
        entries: The `nn.ModuleDict` or `nn.ParameterDict` with an entry for each adapter.
        path: The attributes that lead from an adapter's entry to the parameter.
    """

    entries: nn.Module
    path: tuple[str, ...]

    def links(self, adapter: str) -> list[tuple[dict[str, Any], str, Any]]:
        """The dictionaries that lead to the parameter of an adapter, each with its key and the value that it has now.

        The last value is the parameter, or None if it is not there.
        """
        found: list[tuple[dict[str, Any], str, Any]] = []
        module: Any = self.entries
        keys = adapter, *self.path
        for depth, key in enumerate(keys, 1):
            entries = module._parameters if depth == len(keys) else module._modules
            module = entries.get(key)
            found.append((entries, key, module))
            if module is None:
                break
        return found


class AdapterLayers:
    """PEFT's layers on a model."""

    def __init__(self) -> None:
        self._layers: list[Any] = []

    def find(self, model: nn.Module) -> None:
        """Look the layers of a model up; to be called after each new adapter, which may have added layers."""
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    def activate(self, adapter: str | None) -> None:
        """Compute with this adapter, or without any; `requires_grad` of the weights stays as it is."""
        for layer in self._layers:
            if layer.merged:
                layer.unmerge()
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]

    def copy(self, source: str, target: str) -> dict[int, Any]:
        """Copy the adapter `source` to a new adapter `target` in each layer that holds it.

        Returns:
            The copy of each of its tensors, by the `id` of the original.
        """
        copies: dict[int, Any] = {}
        for layer in self._layers:
            settings = [value for value in vars(layer).values() if isinstance(value, dict)]
            for by_adapter in (*_containers(layer), *settings):
                if source in by_adapter:
                    by_adapter[target] = copy.deepcopy(by_adapter[source], copies)
        return copies

    @contextmanager
    def only(self, adapter: str) -> Iterator[None]:
        """Inside the block the layers hold no other adapter, so that PEFT's functions visit this one alone.

        The adapter may be added or deleted in the block. No forward pass may run in it. After an error the layers hold
        the entries that they held before.
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
    """The layer's dictionaries from adapter name to module or parameter."""
    for name, child in layer.named_children():
        if name != "base_layer" and isinstance(child, nn.ModuleDict | nn.ParameterDict):
            yield child
