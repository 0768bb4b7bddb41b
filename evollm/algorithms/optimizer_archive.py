"""Reads `optimizer.pt` and `scheduler.pt`, which stand beside the `policy.pt` of the original DPO repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from evollm.algorithms.optimizer_state import check_state
from evollm.algorithms.optimizers import ADAMW
from evollm.checkpoints.policy_archive import ADAPTER, NAMES, OPTIMIZER, SCHEDULER
from evollm.errors import CheckpointError
from evollm.models.loading.policy_archive import read_archive

# Keys of a group of parameters that AdamW writes and other optimizers do not have together.
_ADAMW = frozenset({"betas", "eps", "weight_decay"})


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
    check_state(found, ADAMW, [list(parameters.values())], path)
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
