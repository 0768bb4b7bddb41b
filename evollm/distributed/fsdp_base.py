"""The frozen layers of a base, sharded over the processes by FSDP2 (`torch.distributed.fsdp.fully_shard`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from evollm.errors import ConfigurationError
from evollm.processes import Processes


class ShardedLayers:
    """Layers of which each process holds a share of each weight; weights outside of them stay whole.

    FSDP's hooks follow calls of modules, and evollm skips layers, recomputes them and runs them for several adapters.
    So each layer is sharded as the part of a module that is never called, and gathered where its weights are needed.
    Between these times a layer has stand-ins for its weights: of the same shapes, types and device, all NaN, in the
    memory of one number. What asks a layer for its shape is answered, and what computes with it outside of `gathered`
    shows.

    Args:
        layers: The layers, with whole weights and without adapters, on any device.
        device: The device of the shards and of the gathered weights.
        ignored: Parameters that stay whole.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, ignored: set[nn.Parameter]) -> None:
        self._device, self._processes = device, Processes.present()
        mesh = _mesh_of(self._processes, device)
        self._units = {id(layer): _Unit.of(layer, mesh, device, ignored) for layer in layers}

    @property
    def shards(self) -> list[Tensor]:
        """This process's share of each sharded weight."""
        return [slot.shard.to_local() for unit in self._units.values() for slot in unit.slots]

    @contextmanager
    def gathered(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Inside the block these layers have all their weights; all processes must enter it."""
        units = [self._units[id(layer)] for layer in layers]
        try:
            for unit in units:
                unit.fill()
            yield
        finally:
            for unit in units:
                unit.empty()

    def regroup(self, processes: Processes) -> None:
        """Shard the layers over the processes of a group, one layer after the other.

        Args:
            processes: Those of this process's group; all processes that hold a share by now must call this.
        """
        if processes.group is self._processes.group:
            return
        mesh = _mesh_of(processes, self._device)
        for key, unit in self._units.items():
            self._units[key] = unit.over(mesh, self._device)
        self._processes = processes


def _mesh_of(processes: Processes, device: torch.device) -> DeviceMesh:
    if processes.group is None:
        return init_device_mesh(device.type, (processes.size,))
    return DeviceMesh.from_group(processes.group, device.type)


def shard_layers(model: nn.Module, layers: Sequence[nn.Module], device: torch.device) -> ShardedLayers:
    """Shard the weights of a base's layers over the processes.

    One layer after the other is moved to the device and sharded there, so that no device has to hold the whole base.

    Args:
        model: The base, with whole weights and without adapters.
        layers: Its repeated layers.
        device: This process's device.

    Raises:
        ConfigurationError: The base has no repeated layers, is quantised, or was loaded with a device map.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or "the base"
    reasons = {
        "declares no repeated layers: use plain data parallelism": not layers,
        "is quantised: use plain data parallelism, or load it without quantization_config": (
            getattr(model, "is_quantized", False)
        ),
        "was loaded with a device_map: load it without": hasattr(model, "hf_device_map"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(
                "accelerator.fsdp_plugin", "FullyShardedDataParallelPlugin(...)", f"{name} {reason}"
            )
    return ShardedLayers(layers, device, _unshardable(model, layers))


def _unshardable(model: nn.Module, layers: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Parameters in the layers that stay whole: of several modules or layers, or of a form that FSDP does not take."""
    uses = Counter(one for module in model.modules() for one in module._parameters.values() if one is not None)
    of_layers = Counter(one for layer in layers for one in layer.parameters())
    return {
        one
        for one, count in of_layers.items()
        if count > 1 or uses[one] > 1 or one.ndim == 0 or not one.is_contiguous() or not one.is_floating_point()
    }


class _Uncalled(nn.Module):
    """Holds a layer, and is never called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@dataclass(frozen=True)
class _Slot:
    """The place of a sharded weight in its module.

    Attributes:
        parameters: The module's parameters by name.
        name: The weight's name there.
        shard: The weight, of which this process holds a share.
        stand_in: What is in its place while it is not gathered.
    """

    parameters: dict[str, nn.Parameter | None]
    name: str
    shard: DTensor
    stand_in: nn.Parameter

    @classmethod
    def of(cls, module: nn.Module, name: str, shard: DTensor, device: torch.device) -> _Slot:
        nothing = torch.full((), torch.nan, dtype=shard.dtype, device=device).expand(shard.shape)
        return cls(module._parameters, name, shard, nn.Parameter(nothing, requires_grad=False))


@dataclass(frozen=True)
class _Unit:
    """A layer that is gathered at once.

    Attributes:
        module: What FSDP gathers.
        slots: Its weights.
    """

    module: FSDPModule
    slots: tuple[_Slot, ...]

    @classmethod
    def of(cls, layer: nn.Module, mesh: DeviceMesh, device: torch.device, ignored: set[nn.Parameter]) -> _Unit:
        module = fully_shard(_Uncalled(layer), mesh=mesh, ignored_params=ignored)
        slots = tuple(
            _Slot.of(owner, name, cast(DTensor, parameter), device)
            for owner in layer.modules()
            for name, parameter in owner._parameters.items()
            if isinstance(parameter, DTensor)
        )
        unit = cls(module, slots)
        unit.empty()
        return unit

    def over(self, mesh: DeviceMesh, device: torch.device) -> _Unit:
        """The same layer, sharded over other processes."""
        self.fill()
        weights = {id(slot.parameters[slot.name]) for slot in self.slots}
        layer = cast(_Uncalled, self.module).layer
        # What stayed whole, and the adapters that the layer has by now.
        ignored = {one for one in layer.parameters() if id(one) not in weights}
        return _Unit.of(layer, mesh, device, ignored)

    @torch.no_grad()
    def fill(self) -> None:
        """Put the whole weights into the layer."""
        for slot in self.slots:
            # Where FSDP looks for it at the first time.
            slot.parameters[slot.name] = cast(Any, slot.shard)
        self.module.unshard()
        # Copies: FSDP empties the memory that it gathers into, but autograd may save the weights.
        whole = [
            nn.Parameter(cast(Tensor, slot.parameters[slot.name]).clone(), requires_grad=False) for slot in self.slots
        ]
        self.module.reshard()
        for slot, weight in zip(self.slots, whole, strict=True):
            slot.parameters[slot.name] = weight

    def empty(self) -> None:
        """Put stand-ins into the layer."""
        for slot in self.slots:
            slot.parameters[slot.name] = slot.stand_in
