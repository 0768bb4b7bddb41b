"""The optimizer of an agent: AdamW, or AdamW with its moments spread over the processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from evollm.processes import uses_deepspeed


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


def free(optimizer: torch.optim.Optimizer) -> None:
    """Free an optimizer's moments; it cannot be used afterwards."""
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()
    optimizer.state.clear()
