"""Find the frozen base model and its device, once for a whole population."""

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
from evollm.models.policy_archive import PolicyArchive, copy_state, note_archive, read_policy_archive
from evollm.models.precision import default_device, with_dtype
from evollm.models.pretrained import find_config, load_base_model, reloadable
from evollm.models.shared_base import SharedBase, check_plain_model
from evollm.models.targets import text_config
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


def usable_device(
    accelerator: Accelerator | None, device: str | torch.device | None, network: PreTrainedModel | None = None
) -> torch.device:
    """The device to train on: the accelerator's, if there is one, else the one that is asked for.

    Where none is asked for, a loaded network stays where it is, and anything else goes to a card if there is one.

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
                stacklevel=5,
            )
        return cast(torch.device, accelerator.device)
    if device is None:
        # Anything else is refused when it is made the base.
        return _where_it_is(network) if isinstance(network, PreTrainedModel) else default_device()
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ConfigurationError("device", device, f"cannot be used here: {error}") from error
    return found


def _where_it_is(network: PreTrainedModel) -> torch.device:
    """The device of a loaded network, with a warning if that is the slow one of two."""
    if network.device.type == "cpu" and torch.cuda.is_available():
        fix = "pass device='cuda' to train on the card, or device='cpu' to go without this warning"
        warnings.warn(f"actor_network is on the CPU and stays there: {fix}", UserWarning, stacklevel=6)
    return network.device


@dataclass(frozen=True)
class BaseSource:
    """What an agent's constructor is told of its base; `DPO` documents each field."""

    model_name: str | None
    actor_network: PreTrainedModel | None
    model_config: Mapping[str, Any] | None
    archive: str | Path | None
    dtype: str | torch.dtype | None

    def load(self, device: torch.device, accelerator: Accelerator | None) -> SharedBase:
        """The shared base; `shared_base` says what it raises."""
        return shared_base(
            self.model_name, self.actor_network, self.model_config, device, self.archive, accelerator, self.dtype
        )


def shared_base(
    model_name: str | None,
    actor_network: PreTrainedModel | None,
    model_config: Mapping[str, Any] | None,
    device: torch.device,
    archive: str | Path | None = None,
    accelerator: Accelerator | None = None,
    dtype: str | torch.dtype | None = None,
) -> SharedBase:
    """The shared base of a model that is given or loaded by name, with the weights of a policy archive if there is one.

    Raises:
        ConfigurationError: Both or neither are given, or the model cannot be loaded or moved.
        CheckpointError: The archive cannot be read, or does not fit the model.
    """
    actor_network, model_config = _network(model_name, actor_network, model_config, device, dtype)
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


def _network(
    model_name: str | None,
    actor_network: PreTrainedModel | None,
    model_config: Mapping[str, Any] | None,
    device: torch.device,
    dtype: str | torch.dtype | None,
) -> tuple[PreTrainedModel, Mapping[str, Any] | None]:
    """The model that is given or loaded by name, and the keyword arguments that it was loaded with."""
    if (model_name is None) == (actor_network is None):
        raise ConfigurationError("model_name", model_name, "pass either model_name or actor_network")
    if actor_network is not None:
        for field, value in (("model_config", model_config), ("dtype", dtype)):
            if value is not None:
                raise ConfigurationError(field, value, "belongs to model_name; a loaded model has its own")
        _check_size(actor_network)
        return actor_network, None
    if not isinstance(model_name, str | os.PathLike):
        fix = "must be a hub name or a folder; a loaded model is passed as actor_network"
        raise ConfigurationError("model_name", type(model_name).__name__, fix)
    if not isinstance(model_config, Mapping | None):
        fix = "must be keyword arguments of from_pretrained, such as {'dtype': torch.bfloat16}"
        raise ConfigurationError("model_config", model_config, fix)
    if dtype is not None:
        model_config = with_dtype(model_config, dtype, find_config(model_name, model_config), device)
    return load_base_model(model_name, model_config), model_config


def _check_size(model: PreTrainedModel) -> None:
    """Refuse a loaded model with tokens that are not where it came from: no checkpoint would hold their weights.

    Raises:
        ConfigurationError: Its vocabulary is of another size than that of the model of its name.
    """
    if not isinstance(model, PreTrainedModel) or not model.name_or_path or SharedBase.on(model) is not None:
        return
    if Path(model.name_or_path, "adapter_config.json").is_file():
        # An adapter's folder holds the rows.
        return
    # It has been loaded from there: without asking the hub again.
    found = find_config(model.name_or_path, {"local_files_only": True})
    before = getattr(text_config(found), "vocab_size", None)
    now = getattr(text_config(model.config), "vocab_size", None)
    if before is not None and now is not None and before != now:
        fix = (
            f"it has {now} tokens and {model.name_or_path!r} has {before}, so that no checkpoint would hold the rows "
            "of the others: model.save_pretrained(folder), tokenizer.save_pretrained(folder), and model_name=folder"
        )
        raise ConfigurationError("actor_network", type(model).__name__, fix)


def _shards_base(accelerator: Accelerator | None) -> bool:
    """Whether the base's layers are to be spread over the processes: DeepSpeed's stage 3."""
    if not uses_deepspeed(accelerator):
        return False
    from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

    return zero_stage(accelerator) == 3  # noqa: PLR2004
