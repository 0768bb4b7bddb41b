"""The frozen layers of a base, sharded over the processes by DeepSpeed (ZeRO, arXiv 1910.02054, stage 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from evollm.distributed.zero_config import import_deepspeed
from evollm.errors import ConfigurationError


def shard_layers(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Shard the weights of the layers over the processes; weights outside the layers stay whole.

    Args:
        model: The base, with whole weights and without adapters.
        layers: Its repeated layers.

    Raises:
        ConfigurationError: The base has no repeated layers, or is quantised.
        MissingExtraError: DeepSpeed is not installed.
    """
    deepspeed = import_deepspeed()
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not layers or getattr(model, "is_quantized", False):
        what = "is quantised" if layers else "declares no repeated layers"
        raise ConfigurationError("zero_optimization.stage", 3, f"{name or 'the base'} {what}: use stage 1 or 2")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=nn.ModuleList(layers), config_dict_or_path=config)


@contextmanager
def gathered(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside the block these layers have all their weights; all processes must enter it."""
    modules = [module for layer in layers for module in layer.modules()]
    held = [
        (module._parameters, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and hasattr(parameter, "ds_id")
    ]
    shards = {id(parameter): parameter for _, _, parameter in held}
    with import_deepspeed().zero.GatheredParameters(list(shards.values())):
        # As new parameters: DeepSpeed empties its own at the end, but autograd may have saved the weights.
        whole = {key: nn.Parameter(shard.data, requires_grad=False) for key, shard in shards.items()}
        for parameters, name, shard in held:
            parameters[name] = whole[id(shard)]
        try:
            yield
        finally:
            for parameters, name, shard in held:
                parameters[name] = shard


@torch.no_grad()
def make_whole(model: nn.Module) -> None:
    """Undo the sharding by transformers, which shards each model that is loaded under an accelerator of stage 3."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return
    zero = import_deepspeed().zero
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in whole:
                with zero.GatheredParameters([parameter]):
                    whole[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(module, name, whole[id(parameter)])
