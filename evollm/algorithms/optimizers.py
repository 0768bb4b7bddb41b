"""The optimizer of an agent: AdamW, or AdamW with its moments spread over the processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from evollm.errors import CheckpointError
from evollm.processes import uses_deepspeed

_MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(parameters: Sequence[nn.Parameter], lr: float, accelerator: Any = None) -> torch.optim.AdamW:
    """AdamW without weight decay.

    Args:
        parameters: What it updates.
        lr: Learning rate.
        accelerator: An `accelerate.Accelerator` or None; one with DeepSpeed shards the moments.
    """
    if not uses_deepspeed(accelerator):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    from evollm.distributed.sharded_adamw import ShardedAdamW  # noqa: PLC0415
    from evollm.distributed.zero_config import zero_stage  # noqa: PLC0415

    return ShardedAdamW(parameters, lr, zero_stage(accelerator))


def check_moments(state: object, parameters: Sequence[nn.Parameter], source: object) -> None:
    """Refuse an optimizer's saved state that is not AdamW's for these parameters.

    Args:
        state: What a checkpoint holds.
        parameters: In the order of the optimizer.
        source: Where the checkpoint is, for the message.

    Raises:
        CheckpointError: A part is missing, of another kind or of another shape.
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


def free(optimizer: torch.optim.Optimizer) -> None:
    """Free an optimizer's moments; it cannot be used afterwards."""
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()
    optimizer.state.clear()
