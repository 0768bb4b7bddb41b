"""Find the frozen base model and its device, once for a whole population."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from evollm.errors import ConfigurationError
from evollm.models.archive import PolicyArchive, copy_state, note_archive, read_policy_archive
from evollm.models.pretrained import load_base_model, reloadable
from evollm.models.requirements import check_plain_model
from evollm.models.shared_base import SharedBase
from evollm.processes import check_processes, uses_deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator


def load_policy_archive(path: str | Path, model: PreTrainedModel) -> PolicyArchive:
    """Put the weights of a `policy.pt` of the original DPO repository into a model, before agents are built on it.

    The weights are cast to the types that the model has. `DPO(..., archive=path)` does the same.

    Args:
        path: The file: a dict with `step_idx`, `state` (all weights by their name) and `metrics`.
        model: A causal language model without adapters, of the architecture that the archive was trained from.

    Returns:
        What the archive says beside its weights; agents on the model have it as `agent.base.archive`.

    Raises:
        CheckpointError: The file is missing, damaged or not plain data, or does not fit the model, which is as it was.
        ConfigurationError: The model is none, or agents or adapters have been built on it.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigurationError("archive", path, "must be the path of a policy.pt")
    if SharedBase.on(model) is not None:
        raise ConfigurationError(
            "archive", str(path), "agents have been built on this model, whose weights they need: load the model anew"
        )
    check_plain_model("model", model)
    archive, state = read_policy_archive(path)
    copy_state(path, state, model)
    note_archive(model, archive)
    return archive


def usable_device(accelerator: Accelerator | None, device: str | torch.device) -> torch.device:
    """The device to train on: the accelerator's, if there is one.

    Raises:
        ConfigurationError: A launch or DeepSpeed setting that would not do what it seems to, or a device that is not
            there.
        MissingExtraError: DeepSpeed is not installed.
    """
    check_processes(accelerator)
    if accelerator is not None:
        if uses_deepspeed(accelerator):
            from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

            zero_stage(accelerator)
        elif accelerator.mixed_precision != "no":
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
    archive: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> SharedBase:
    """The shared base of a model that is given or loaded by name, with the weights of a policy archive if there is one.

    Raises:
        ConfigurationError: Both or neither are given, or the model cannot be loaded or moved.
        CheckpointError: The archive cannot be read, or does not fit the model.
    """
    if (model_name is None) == (actor_network is None):
        raise ConfigurationError("model_name", model_name, "pass either model_name or actor_network")
    if not isinstance(model_name, str | os.PathLike | None):
        fix = "must be a hub name or a folder; a loaded model is passed as actor_network"
        raise ConfigurationError("model_name", type(model_name).__name__, fix)
    if not isinstance(model_config, Mapping | None):
        fix = "must be keyword arguments of from_pretrained, such as {'dtype': torch.bfloat16}"
        raise ConfigurationError("model_config", model_config, fix)
    if actor_network is None:
        assert model_name is not None
        actor_network = load_base_model(model_name, model_config)
    elif model_config is not None:
        raise ConfigurationError("model_config", model_config, "belongs to model_name; a loaded model has its own")
    sharded = _shards_base(accelerator)
    if sharded and SharedBase.on(actor_network) is None:
        from evollm.distributed.sharded_base import make_whole  # noqa: PLC0415

        make_whole(actor_network)
    if archive is not None:
        load_policy_archive(archive, actor_network)
    base = SharedBase.of(actor_network)
    if model_config is not None:
        base.model_config = reloadable(model_config)
    base.move_to(device)
    if sharded and not base.is_sharded:
        from evollm.distributed.sharded_base import gathered, shard_layers  # noqa: PLC0415

        shard_layers(base.network, base.layers.modules)
        base.layers.gathered = gathered
    return base


def _shards_base(accelerator: Accelerator | None) -> bool:
    """Whether the base's layers are to be spread over the processes: DeepSpeed's stage 3."""
    if not uses_deepspeed(accelerator):
        return False
    from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

    return zero_stage(accelerator) == 3  # noqa: PLR2004
