"""The base and the device that an agent's constructor asks for, and the weights of a policy archive on the base."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from evollm.errors import ConfigurationError
from evollm.models.adapters.targets import text_config
from evollm.models.loading.model_config import reloadable
from evollm.models.loading.policy_archive import PolicyArchive, copy_state, note_archive, read_policy_archive
from evollm.models.loading.precision import default_device, with_dtype
from evollm.models.loading.pretrained import find_config, load_base_model
from evollm.models.shared_base import SharedBase, check_plain_model
from evollm.processes import Processes, check_processes, uses_deepspeed, uses_fsdp

if TYPE_CHECKING:
    from accelerate import Accelerator


def load_policy_archive(path: str | Path, model: PreTrainedModel) -> PolicyArchive:
    """Put the weights of a `policy.pt` of the original DPO repository into a model, before agents are built on it.

    The weights are cast to the types that the model has. `DPO(..., archive=path)` does the same.

    Args:
        path: The file: a dict with `step_idx`, `state` (all weights by their name) and `metrics`.
        model: A causal language model without adapters, of the architecture that the archive was trained from.

    Returns:
        The archive without its weights; agents on the model have it as `agent.base.archive`.

    Raises:
        CheckpointError: The file is missing, damaged or not plain data, or does not fit the model; then the model keeps
            its weights.
        ConfigurationError: `model` is no model of transformers, or agents or adapters have been built on it.
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


def usable_device(
    accelerator: Accelerator | None, device: str | torch.device | None, network: PreTrainedModel | None = None
) -> torch.device:
    """The device to train on: the accelerator's; without accelerator `device`.

    Without both it is the device of `network`, and without that a GPU if there is one, or the CPU.

    Raises:
        ConfigurationError: A launch, DeepSpeed or FSDP setting would have no effect, or the device is not available.
        MissingExtraError: DeepSpeed is not installed.
    """
    check_processes(accelerator)
    if accelerator is not None:
        if uses_deepspeed(accelerator):
            from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

            zero_stage(accelerator)
        elif uses_fsdp(accelerator):
            from evollm.distributed.fsdp_settings import check_fsdp  # noqa: PLC0415

            check_fsdp(accelerator)
        elif accelerator.mixed_precision != "no":
            warnings.warn(
                f"mixed_precision={accelerator.mixed_precision!r} has no effect: load the base in the precision to use",
                UserWarning,
                stacklevel=5,
            )
        return cast(torch.device, accelerator.device)
    if device is None:
        # A network that is no model of transformers is refused by `check_plain_model`.
        return _device_of(network) if isinstance(network, PreTrainedModel) else default_device()
    return checked_device(device)


def checked_device(device: str | torch.device) -> torch.device:
    """The device itself.

    Raises:
        ConfigurationError: It is not available.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigurationError("device", device, f"cannot be used here: {error}") from error
    return found


def _device_of(network: PreTrainedModel) -> torch.device:
    """The device of a loaded network; warns if that is the CPU of a machine with a GPU."""
    if network.device.type == "cpu" and torch.cuda.is_available():
        fix = "pass device='cuda' to train on the card, or device='cpu' to go without this warning"
        warnings.warn(f"actor_network is on the CPU and stays there: {fix}", UserWarning, stacklevel=6)
    return network.device


@dataclass(frozen=True)
class BaseSource:
    """The arguments of an agent's constructor that say which base to use; `DPO` documents each field."""

    model_name: str | None
    actor_network: PreTrainedModel | None
    model_config: Mapping[str, Any] | None
    archive: str | Path | None
    dtype: str | torch.dtype | None

    def load(self, device: torch.device, accelerator: Accelerator | None) -> SharedBase:
        """The shared base on this device, with the weights of the policy archive if there is one.

        Raises:
            ConfigurationError: Both or neither of `model_name` and `actor_network` are given, or the model cannot be
                loaded or moved.
            CheckpointError: The archive cannot be read, or does not fit the model.
        """
        network, model_config = self._network(device)
        sharded = _shards_base(accelerator)
        if sharded and SharedBase.on(network) is None:
            from evollm.distributed.sharded_base import make_whole  # noqa: PLC0415

            make_whole(network)
        if self.archive is not None:
            load_policy_archive(self.archive, network)
        base = SharedBase.of(network)
        if model_config is not None:
            base.model_config = reloadable(model_config)
        if uses_fsdp(accelerator) and Processes.present().size > 1 and not base.is_sharded:
            # Before the base is moved: a device need not hold it.
            _shard_by_fsdp(base, device)
        base.move_to(device)
        if sharded and not base.is_sharded:
            from evollm.distributed.sharded_base import gathered, shard_layers  # noqa: PLC0415

            shard_layers(base.network, base.layers.modules)
            base.layers.gathered = gathered
        return base

    def _network(self, device: torch.device) -> tuple[PreTrainedModel, Mapping[str, Any] | None]:
        """The model, and the keyword arguments that it was loaded with if `model_name` is given."""
        if (self.model_name is None) == (self.actor_network is None):
            raise ConfigurationError("model_name", self.model_name, "pass either model_name or actor_network")
        if self.actor_network is not None:
            for field, value in (("model_config", self.model_config), ("dtype", self.dtype)):
                if value is not None:
                    raise ConfigurationError(field, value, "belongs to model_name; a loaded model has its own")
            _check_vocabulary(self.actor_network)
            return self.actor_network, None
        if not isinstance(self.model_name, str | os.PathLike):
            fix = "must be a hub name or a folder; a loaded model is passed as actor_network"
            raise ConfigurationError("model_name", type(self.model_name).__name__, fix)
        if not isinstance(self.model_config, Mapping | None):
            fix = "must be keyword arguments of from_pretrained, such as {'dtype': torch.bfloat16}"
            raise ConfigurationError("model_config", self.model_config, fix)
        model_config = self.model_config
        if self.dtype is not None:
            found = find_config(self.model_name, model_config)
            model_config = with_dtype(model_config, self.dtype, found, device)
        return load_base_model(self.model_name, model_config), model_config


def _check_vocabulary(model: PreTrainedModel) -> None:
    """Refuse a loaded model to which tokens were added: a checkpoint names the model and has no embeddings of theirs.

    Raises:
        ConfigurationError: Its vocabulary is of another size than in the configuration under its name.
    """
    if not isinstance(model, PreTrainedModel) or not model.name_or_path or SharedBase.on(model) is not None:
        return
    if Path(model.name_or_path, "adapter_config.json").is_file():
        # Loading from an adapter's folder adds the same tokens again.
        return
    # The files are in the cache, since the model was loaded from them.
    found = find_config(model.name_or_path, {"local_files_only": True})
    before = getattr(text_config(found), "vocab_size", None)
    now = getattr(text_config(model.config), "vocab_size", None)
    if before is not None and now is not None and before != now:
        fix = (
            f"it has {now} tokens and {model.name_or_path!r} has {before}, so that no checkpoint would hold the rows "
            "of the others: model.save_pretrained(folder), tokenizer.save_pretrained(folder), and model_name=folder"
        )
        raise ConfigurationError("actor_network", type(model).__name__, fix)


def _shard_by_fsdp(base: SharedBase, device: torch.device) -> None:
    """Shard the base's layers over the processes by FSDP2.

    Raises:
        ConfigurationError: The base cannot be sharded, or has adapters already.
    """
    from evollm.distributed.fsdp_base import shard_layers  # noqa: PLC0415

    if base.adapters.names:
        fix = "the base has agents that were built without FSDP: give them all the same accelerator"
        raise ConfigurationError("accelerator", "Accelerator(fsdp_plugin=...)", fix)
    sharded = shard_layers(base.network, base.layers.modules, device)
    base.layers.gathered, base.layers.regroup = sharded.gathered, sharded.regroup


def _shards_base(accelerator: Accelerator | None) -> bool:
    """Whether the base's layers are sharded over the processes: ZeRO stage 3."""
    if not uses_deepspeed(accelerator):
        return False
    from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

    return zero_stage(accelerator) == 3  # noqa: PLR2004
