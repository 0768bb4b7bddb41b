"""The layers that adapters go on: `all-linear` by name, and refusals of layers on which an adapter cannot work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from evollm.errors import ConfigurationError
from evollm.models.adapters.peft_layers import holds_any, own_name
from evollm.models.encoder_decoder import is_encoder_decoder

_ALL = "all-linear"
_EXPERTS = "experts"
# Dimensions of a weight that holds several experts: (experts, in, out).
_STACKED = 3


def text_config(config: Any) -> Any:
    """The text part of a multimodal model's configuration; any other configuration itself."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def language_model(model: PreTrainedModel) -> nn.Module:
    """The decoder of a model that also reads images; any other model itself."""
    if is_encoder_decoder(model.config) or text_config(model.config) is model.config:
        return model
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else model


def resolve_all_linear(config: LoraConfig, model: PreTrainedModel) -> None:
    """Replace `all-linear` by module names, in place, where PEFT would also adapt layers that must stay as they are.

    These are vision towers, routers of experts, and layers of state-space mixers that are never called. Experts that
    are stacked in one tensor become `target_parameters`, as PEFT has it.

    Args:
        config: The configuration; unchanged if its `target_modules` are not `all-linear`.
        model: The base, with or without adapters.
    """
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL):
        return
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers  # noqa: PLC0415
    except ImportError:
        pass  # This version of PEFT does not translate configurations for stacked experts.
    else:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    if config.target_parameters:
        stacked = [name for name, weight in model.named_parameters() if weight.ndim == _STACKED]
        names = [name for name in config.target_parameters if any(own_name(path).endswith(name) for path in stacked)]
        config.target_parameters = sorted(names)
    part, excluded = language_model(model), {*_routers(model), *_read_by_mixer(model)}
    if part is model and not excluded:
        return
    inside = {id(module) for module in part.modules()}
    head = model.get_output_embeddings()
    paths = []
    for name, module in model.named_modules():
        path = own_name(name)
        named = isinstance(config.target_modules, str) or path.rpartition(".")[2] in config.target_modules
        if named and _is_linear(module) and id(module) in inside and module is not head and path not in excluded:
            paths.append(path)
    config.target_modules = sorted(set(paths))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer):
        return "Linear" in type(module).__name__
    return isinstance(module, nn.Linear | Conv1D)


def _routers(model: nn.Module) -> Iterator[str]:
    """Paths of the routers of experts: linear layers next to the experts, with one output for each expert."""
    for path, block in model.named_modules():
        experts = getattr(block, _EXPERTS, None)
        if isinstance(experts, nn.Module):
            if isinstance(experts, nn.ModuleList):
                count: int | None = len(experts)
            else:
                count = next((len(weight) for weight in experts.parameters() if weight.ndim == _STACKED), None)
            for name, module in block.named_modules():
                is_beside = not name.startswith(f"{_EXPERTS}.")
                if is_beside and isinstance(module, nn.Linear) and module.out_features == count:
                    yield own_name(f"{path}.{name}")


def _read_by_mixer(model: nn.Module) -> Iterator[str]:
    """Paths of the linear layers of state-space mixers (Mamba, Mamba 2) whose weights the mixer reads itself.

    The mixer never calls these layers, so an adapter on them would have no effect; PEFT refuses some of them.
    """
    for path, mixer in model.named_modules():
        if hasattr(mixer, "A_log") and hasattr(mixer, "in_proj"):
            yield from (own_name(f"{path}.{name}") for name in ("out_proj", "dt_proj") if hasattr(mixer, name))


@torch.no_grad()
def check_tensors(model: nn.Module, adapter: str) -> None:
    """Refuse an adapter on a subclass of `nn.Linear` whose output is not a tensor, such as a router.

    Raises:
        ConfigurationError: The adapter is on such a layer.
    """
    tried: set[type] = set()
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or adapter not in getattr(layer, "lora_A", {}):
            continue
        base: Any = layer.get_base_layer()
        # Quantised layers, whose weights are no floating-point matrix, are left to PEFT.
        is_custom = isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward
        if type(base) in tried or not is_custom or not base.weight.is_floating_point():
            continue
        tried.add(type(base))
        found = base(base.weight.new_zeros(1, base.in_features))
        if not isinstance(found, Tensor):
            name = ".".join(own_name(path).split(".")[-2:])
            fix = f"is a {type(base).__name__}, which gives a {type(found).__name__} and cannot have an adapter: "
            raise ConfigurationError("lora_config.target_modules", name, f"{fix}exclude_modules={[name]!r}")


@contextmanager
def bypassed_layers_refused(model: nn.Module, adapter: str) -> Iterator[None]:
    """Refuse an adapter on a layer that the forward passes inside the block never called.

    Layers whose parent module was not called are passed over, such as those of an expert that no token was routed to.

    Args:
        model: The base with its adapters.
        adapter: The adapter's name.

    Raises:
        ConfigurationError: The adapter is on such a layer, where it would get no gradient and have no effect.
    """
    called: set[nn.Module] = set()

    def note(module: nn.Module, inputs: object) -> None:
        del inputs
        called.add(module)

    adapted: list[tuple[str, nn.Module, Any]] = [
        (path, model.get_submodule(path.rpartition(".")[0]), layer)
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and holds_any(layer, [adapter])
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
