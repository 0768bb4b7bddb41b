"""A LoRA adapter: apart from any model (`AdapterState`) and on a PEFT model (`Adapter`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from evollm.models.adapters.peft_layers import Home
from evollm.models.adapters.rows import Row, RowLayout


@dataclass(frozen=True)
class AdapterState:
    """An adapter apart from any model.

    Attributes:
        config: Its LoRA configuration.
        tensors: Its weights, under the names of PEFT's saved adapters.
    """

    config: LoraConfig
    tensors: Mapping[str, Tensor]


@dataclass
class Adapter:
    """An adapter on a PEFT model.

    Attributes:
        settings: The part of its configuration that decides what the adapter computes, as JSON.
        trainable: Whether its parameters require gradients.
        first_layer: Index of the first repeated layer of the base that has weights of the adapter; -1: modules in front
            of the layers have some (embeddings); the number of layers: only the head has some.
        parameters: Its parameters by their path in the PEFT model, without the adapter's name; shared ones once.
        rows: The parameters as views of one tensor for each device.
        tensors: Its parameters and buffers, under the names of PEFT's saved adapters; a tensor that two modules share
            has two names.
        owners: Number of owners; see `SharedBase`.
        fingerprint: Digest of a frozen adapter's weights; None: not computed yet.
    """

    settings: str
    trainable: bool
    first_layer: int
    parameters: Mapping[str, nn.Parameter]
    rows: Sequence[Row]
    tensors: Mapping[str, Tensor]
    owners: int = 1
    fingerprint: str | None = None


def rows_of(name: str, parameters: Mapping[str, nn.Parameter], homes: Mapping[str, Sequence[Home]]) -> tuple[Row, ...]:
    """Put an adapter's parameters, by path, into one row for each device."""
    devices = {str(parameter.device): parameter.device for parameter in parameters.values()}
    by_device = [
        {path: parameter for path, parameter in parameters.items() if parameter.device == devices[name]}
        for name in sorted(devices)
    ]
    layouts = [RowLayout.of({path: one.shape for path, one in here.items()}) for here in by_device]
    return tuple(Row(name, layout, here, homes) for layout, here in zip(layouts, by_device, strict=True))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter's weights, also those of an adapter that PEFT has put into some of its layers only."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.delete_adapter(name)


def adapter_parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their path in the PEFT model, without the adapter's name; shared ones once."""
    found = {}
    for path, parameter in model.named_parameters():
        segments = path.split(".")
        if name in segments:
            segments.remove(name)
            found[".".join(segments)] = parameter
    return found


def adapter_homes(model: PeftModel, name: str) -> dict[str, list[Home]]:
    """Where PEFT keeps an adapter's parameters, by the paths of `adapter_parameters`; shared ones in several places."""
    paths = {id(parameter): path for path, parameter in adapter_parameters(model, name).items()}
    homes: dict[str, list[Home]] = {path: [] for path in paths.values()}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in paths:
            before, _, after = path.partition(f".{name}")
            home = Home(model.get_submodule(before), tuple(after.split(".")[1:]))
            homes[paths[id(parameter)]].append(home)
    return homes


def adapter_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    """An adapter's parameters and buffers, not copied, under the names of PEFT's saved adapters."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    own = {path: tensor for path, tensor in tensors.items() if name in path.split(".")}
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=own, adapter_name=name, save_embedding_layers=False
    )
    return found


def first_layer_with(parameters: Iterable[nn.Parameter], layers: Sequence[nn.Module], head: nn.Module | None) -> int:
    """`Adapter.first_layer` of an adapter with these parameters.

    Args:
        parameters: The adapter's parameters.
        layers: The repeated layers of the base.
        head: The base's output embeddings, if it has any.
    """
    wanted = {id(parameter) for parameter in parameters}
    by_layer = [{id(parameter) for parameter in layer.parameters()} for layer in layers]
    in_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    if wanted - in_head.union(*by_layer):
        return -1
    return next((index for index, held in enumerate(by_layer) if held & wanted), len(by_layer))
