"""`optimizer.pt` and `scheduler.pt` beside the `policy.pt` of the original DPO repository, read for an agent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evollm.checkpoints.policy_archive import ADAPTER, NAMES, OPTIMIZER, SCHEDULER
from evollm.errors import CheckpointError
from evollm.models.policy_archive import read_archive

_ADAMW = frozenset({"betas", "eps", "weight_decay"})


def read_optimizer(path: Path) -> tuple[int, dict[str, Any], list[str], str]:
    """Read an `optimizer.pt` that `save_policy_archive` wrote, without running anything that is in it.

    Returns:
        The step, the state for AdamW, the names of the parameters in its order, and the digest of their adapter.

    Raises:
        CheckpointError: The file is missing, damaged, not plain data, or the state of another optimizer.
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
    own = {name: value for name, value in group.items() if name not in (NAMES, ADAPTER)}
    return archive.step_idx, {"state": moments, "param_groups": [own]}, names, adapter


def check_schedule(path: Path, step_idx: int, lr: float) -> None:
    """Refuse a `scheduler.pt` under which an agent would not learn at its own, constant rate.

    Args:
        path: The file; nothing is checked where there is none.
        step_idx: The step of the `optimizer.pt` beside it.
        lr: The agent's learning rate.

    Raises:
        CheckpointError: It is damaged, not plain data, of another step, or says another rate.
    """
    if not path.exists():
        return
    archive, state = read_archive(path, SCHEDULER)
    rates, last = state.get("base_lrs"), state.get("_last_lr")
    if archive.step_idx != step_idx:
        raise CheckpointError(f"{path} is of step {archive.step_idx}, and {OPTIMIZER} beside it of step {step_idx}")
    if rates != last or not isinstance(rates, list) or len(rates) != 1:
        fix = "evollm's are constant: start with a fresh optimizer"
        raise CheckpointError(f"{path} is not at its own rate: base_lrs={rates!r}, _last_lr={last!r}; {fix}")
    if rates[0] != lr:
        raise CheckpointError(f"{path} says lr={rates[0]!r}, and the agent has lr={lr!r}: set agent.lr = {rates[0]!r}")


def check_names(path: Path, names: list[str], own: Mapping[str, Any]) -> None:
    """Refuse moments of other parameters than an agent's own, which stand in their order.

    Raises:
        CheckpointError: They are of others; the message names the first.
    """
    strange = [name for name in names if name not in own] or [name for name in own if name not in names]
    if names != list(own):
        first = f", among them {strange[0]}" if strange else ", in another order"
        fix = "build the agent with the same lora_config"
        raise CheckpointError(f"{path}: its moments are for other parameters than the agent's{first}: {fix}")
