"""An agent's AdamW: built here, and its state checked when it comes from a checkpoint or from an `optimizer.pt`.

`optimizer.pt` and `scheduler.pt` stand beside the `policy.pt` of the original DPO repository.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evollm.checkpoints.policy_archive import ADAPTER, NAMES, OPTIMIZER, SCHEDULER
from evollm.errors import CheckpointError
from evollm.models.loading.policy_archive import read_archive
from evollm.processes import uses_deepspeed

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Keys of a group of parameters that AdamW writes and other optimizers do not have together.
_ADAMW = frozenset({"betas", "eps", "weight_decay"})


def adamw(
    parameters: Sequence[nn.Parameter], lr: float, weight_decay: float, accelerator: Any = None
) -> torch.optim.AdamW:
    """AdamW.

    Args:
        parameters: The parameters that it updates.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        accelerator: An `accelerate.Accelerator` or None; with DeepSpeed the moments are sharded over the processes.
    """
    if not uses_deepspeed(accelerator):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    from evollm.distributed.sharded_adamw import ShardedAdamW  # noqa: PLC0415
    from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

    return ShardedAdamW(parameters, lr, weight_decay, zero_stage(accelerator))


def check_moments(state: object, parameters: Sequence[nn.Parameter], source: object) -> None:
    """Check that a saved state is AdamW's for these parameters.

    Args:
        state: The `state_dict` of a checkpoint.
        parameters: The parameters, in the optimizer's order.
        source: Where the checkpoint is, for the message.

    Raises:
        CheckpointError: A part is missing, of another type or of another shape.
    """
    try:
        (group,) = state["param_groups"]  # type: ignore[index]
        moments = state["state"]  # type: ignore[index]
        if list(group["params"]) != list(range(len(parameters))) or not moments.keys() <= set(group["params"]):
            raise ValueError("it is for other parameters")
        for number, values in moments.items():
            shapes = {name: value.shape for name, value in values.items()}
            expected = {"step": torch.Size(), **dict.fromkeys(_MOMENTS, parameters[number].shape)}
            if shapes != expected:
                raise ValueError(f"parameter {number} has {shapes}, and needs {expected}")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{source}: the optimizer's state cannot be used: {error}") from error


def read_optimizer_archive(
    path: Path, parameters: Mapping[str, nn.Parameter], lr: float
) -> tuple[int, dict[str, Any], str]:
    """Read an `optimizer.pt` that `save_policy_archive` wrote, without running code from it.

    Args:
        path: The file. A `scheduler.pt` beside it must have the same step and the agent's learning rate.
        parameters: The agent's parameters by name, in the optimizer's order.
        lr: The agent's learning rate.

    Returns:
        The step, the `state_dict` for AdamW, and the fingerprint of the adapter that the moments belong to.

    Raises:
        CheckpointError: A file is missing, damaged or not plain data, or the state is not AdamW's for these parameters.
    """
    archive, state = read_archive(path, OPTIMIZER)
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise CheckpointError(f"{path}: state is not an optimizer's, with one group of parameters")
    group = groups[0]
    names, adapter = group.get(NAMES), group.get(ADAPTER)
    if not group.keys() >= _ADAMW or not isinstance(names, list) or not isinstance(adapter, str):
        raise CheckpointError(
            f"{path} is not the state of AdamW for an adapter, it has {sorted(map(str, group))}: of a model that was "
            "tuned as a whole, as the original repository does, policy.pt goes on as archive=, with a fresh optimizer"
        )
    if names != list(parameters):
        strange = [name for name in names if name not in parameters] or [n for n in parameters if n not in names]
        first = f", among them {strange[0]}" if strange else ", in another order"
        fix = "build the agent with the same lora_config"
        raise CheckpointError(f"{path}: its moments are for other parameters than the agent's{first}: {fix}")
    own = {name: value for name, value in group.items() if name not in (NAMES, ADAPTER)}
    found = {"state": moments, "param_groups": [own]}
    check_moments(found, list(parameters.values()), path)
    if path.with_name(SCHEDULER).exists():
        _check_scheduler(path.with_name(SCHEDULER), archive.step_idx, lr)
    return archive.step_idx, found, adapter


def _check_scheduler(path: Path, step_idx: int, lr: float) -> None:
    """Check that a `scheduler.pt` has the step of the `optimizer.pt` beside it, and this constant learning rate."""
    archive, state = read_archive(path, SCHEDULER)
    rates, last = state.get("base_lrs"), state.get("_last_lr")
    if archive.step_idx != step_idx:
        raise CheckpointError(f"{path} is of step {archive.step_idx}, and {OPTIMIZER} beside it of step {step_idx}")
    if rates != last or not isinstance(rates, list) or len(rates) != 1:
        fix = "evollm's are constant: start with a fresh optimizer"
        raise CheckpointError(f"{path} is not at its own rate: base_lrs={rates!r}, _last_lr={last!r}; {fix}")
    if rates[0] != lr:
        raise CheckpointError(f"{path} says lr={rates[0]!r}, and the agent has lr={lr!r}: set agent.lr = {rates[0]!r}")
