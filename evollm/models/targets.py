"""What of a model `all-linear` means: the layers of its language model on which an adapter can learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from evollm.errors import ConfigurationError
from evollm.models.encoder_decoder import is_encoder_decoder
from evollm.models.merging import own_name

_ALL = "all-linear"
_EXPERTS = "experts"
# Weights of several experts in one tensor: (experts, in, out).
_STACKED = 3


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text; the whole of it where there is no other part."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def language_model(model: PreTrainedModel) -> nn.Module:
    """The part of a model that reads text: of one that reads pictures too, its decoder; else the whole model."""
    if is_encoder_decoder(model.config) or text_config(model.config) is model.config:
        return model
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else model


def resolve_all_linear(config: LoraConfig, model: PreTrainedModel) -> None:
    """Replace `all-linear` by names, in place, where PEFT would take in more than language model and experts.

    PEFT adapts experts that are stacked in one tensor as `target_parameters`, and with them the router.

    Args:
        config: The configuration; left alone if it says anything else than `all-linear`.
        model: The base, with or without adapters.
    """
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL):
        return
    _convert(config, model)
    if config.target_parameters:
        stacked = [name for name, weight in model.named_parameters() if weight.ndim == _STACKED]
        names = [name for name in config.target_parameters if any(own_name(path).endswith(name) for path in stacked)]
        config.target_parameters = sorted(names)
    part, left_out = language_model(model), {*routers(model), *read_by_their_mixer(model)}
    if part is model and not left_out:
        return
    inside = {id(module) for module in part.modules()}
    head = model.get_output_embeddings()
    paths = []
    for place, module in model.named_modules():
        path = own_name(place)
        named = isinstance(config.target_modules, str) or path.rpartition(".")[2] in config.target_modules
        if named and _is_linear(module) and id(module) in inside and module is not head and path not in left_out:
            paths.append(path)
    config.target_modules = sorted(set(paths))


def _convert(config: LoraConfig, model: PreTrainedModel) -> None:
    """PEFT's own translation of `all-linear` for models whose experts transformers has stacked."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers  # noqa: PLC0415
    except ImportError:  # A version of PEFT that translates nothing.
        return
    convert_peft_config_for_transformers(config, model=model, conversions=None)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer):
        return "Linear" in type(module).__name__
    return isinstance(module, nn.Linear | Conv1D)


def routers(model: nn.Module) -> Iterator[str]:
    """Paths of the linear layers that choose among experts: beside the experts, with one number for each of them."""
    for path, block in model.named_modules():
        experts = getattr(block, _EXPERTS, None)
        if isinstance(experts, nn.Module):
            count = _count(experts)
            for name, module in block.named_modules():
                is_beside = not name.startswith(f"{_EXPERTS}.")
                if is_beside and isinstance(module, nn.Linear) and module.out_features == count:
                    yield own_name(f"{path}.{name}")


def read_by_their_mixer(model: nn.Module) -> Iterator[str]:
    """Paths of the linear layers of state-space mixers (Mamba, Mamba 2) whose weights the mixer or its kernel reads.

    An adapter on such a layer is passed by; PEFT refuses some of them.
    """
    for path, mixer in model.named_modules():
        if hasattr(mixer, "A_log") and hasattr(mixer, "in_proj"):
            yield from (own_name(f"{path}.{name}") for name in ("out_proj", "dt_proj") if hasattr(mixer, name))


def _count(experts: nn.Module) -> int | None:
    """How many there are."""
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    return next((len(weight) for weight in experts.parameters() if weight.ndim == _STACKED), None)


@torch.no_grad()
def check_tensors(model: nn.Module, adapter: str) -> None:
    """Refuse adapters on layers of a model's own kind that do not give a tensor, such as a router's.

    Raises:
        ConfigurationError: There is one.
    """
    tried: set[type] = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or adapter not in getattr(layer, "lora_A", {}):
            continue
        base: Any = layer.get_base_layer()
        # Quantised layers are PEFT's own business; their weights are no float matrix.
        is_own_kind = isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward
        if type(base) in tried or not is_own_kind or not base.weight.is_floating_point():
            continue
        tried.add(type(base))
        found = base(base.weight.new_zeros(1, base.in_features))
        if not isinstance(found, Tensor):
            name = ".".join(own_name(path).split(".")[-2:])
            fix = f"is a {type(base).__name__}, which gives a {type(found).__name__} and cannot have an adapter: "
            raise ConfigurationError("lora_config.target_modules", name, f"{fix}exclude_modules={[name]!r}")
