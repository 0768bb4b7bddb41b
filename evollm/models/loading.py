"""Find the frozen base model and its device, once for a whole population."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from evollm.errors import ConfigurationError
from evollm.models.shared_base import SharedBase
from evollm.processes import check_processes

if TYPE_CHECKING:
    from accelerate import Accelerator


def load_base_model(name: str, model_config: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a causal language model by hub name or folder.

    Args:
        name: What `AutoModelForCausalLM.from_pretrained` takes: a hub name or a folder.
        model_config: Keyword arguments for `from_pretrained` (`dtype`, `attn_implementation`, `gguf_file`, ...).

    Raises:
        ConfigurationError: The model cannot be found or loaded; the message holds the library's own reason.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **(model_config or {}))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError("model_name", name, f"cannot be loaded as a causal language model: {error}") from error
    return model


def usable_device(accelerator: Accelerator | None, device: str | torch.device) -> torch.device:
    """The device to train on: the accelerator's, if there is one.

    Raises:
        ConfigurationError: Several processes, or a device that is not there.
    """
    check_processes(accelerator)
    if accelerator is not None:
        if accelerator.mixed_precision != "no":
            warnings.warn(
                f"mixed_precision={accelerator.mixed_precision!r} has no effect: load the base in the precision to use",
                UserWarning,
                stacklevel=4,
            )
        return cast(torch.device, accelerator.device)
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigurationError("device", device, f"cannot be used here: {error}") from error
    return found


def shared_base(
    model_name: str | None,
    actor_network: PreTrainedModel | None,
    model_config: Mapping[str, Any] | None,
    device: torch.device,
) -> SharedBase:
    """The shared base of a model that is given, or loaded by name.

    Raises:
        ConfigurationError: Both or neither are given, or the model cannot be loaded or moved.
    """
    if (model_name is None) == (actor_network is None):
        raise ConfigurationError("model_name", model_name, "pass either model_name or actor_network")
    if actor_network is None:
        assert model_name is not None
        actor_network = load_base_model(model_name, model_config)
    elif model_config is not None:
        raise ConfigurationError("model_config", model_config, "belongs to model_name; a loaded model has its own")
    base = SharedBase.of(actor_network)
    base.move_to(device)
    return base
