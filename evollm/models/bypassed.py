"""Adapters that a model passes by: they are on layers that its forward pass never calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from evollm.errors import ConfigurationError
from evollm.models.merging import own_name


@contextmanager
def bypassed_layers_refused(model: nn.Module, adapter: str) -> Iterator[None]:
    """Watch the passes inside the block, and refuse an adapter on a layer that they never called.

    Only layers of modules that were called count: an expert that no token chose says nothing of its layers.

    Args:
        model: The base with its adapters.
        adapter: The adapter's name.

    Raises:
        ConfigurationError: There is such a layer, on which an adapter would learn nothing and change nothing.
    """
    called: set[nn.Module] = set()

    def note(module: nn.Module, inputs: object) -> None:
        del inputs
        called.add(module)

    adapted: list[tuple[str, nn.Module, Any]] = [
        (path, model.get_submodule(path.rpartition(".")[0]), layer)
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and _has(layer, adapter)
    ]
    with ExitStack() as stack:
        for module in {module for _, parent, layer in adapted for module in (parent, layer)}:
            stack.callback(module.register_forward_pre_hook(note).remove)
        yield
    bypassed = [path for path, parent, layer in adapted if parent in called and layer not in called]
    if bypassed:
        names = sorted({own_name(path).rpartition(".")[2] for path in bypassed})
        fix = f"{type(model).__name__} does not call these layers, so an adapter on them would do nothing: "
        raise ConfigurationError("lora_config.target_modules", names, f"{fix}exclude_modules={names!r}")


def _has(layer: BaseTunerLayer, adapter: str) -> bool:
    """Whether the adapter has weights on this layer."""
    return any(adapter in getattr(layer, name, {}) for name in layer.adapter_layer_names)
