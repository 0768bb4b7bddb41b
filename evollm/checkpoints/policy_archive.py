"""Writes an agent as `policy.pt`, the checkpoint format of the original DPO repository."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from evollm.checkpoints.atomic import replace_file
from evollm.checkpoints.export import HasActor, main_writes
from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.models.adapters.merging import base_state
from evollm.models.fingerprints import adapter_fingerprint
from evollm.models.loading.policy_archive import read_archive, read_policy_archive

POLICY = "policy.pt"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
# Keys in the parameter group of an optimizer file: the names of the parameters, and the fingerprint of the adapter.
NAMES = "param_names"
ADAPTER = "adapter_sha256"


class Trained(HasActor, Protocol):
    """An agent with its optimizer and counters."""

    steps: int
    fitness: list[float]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the actor."""

    @property
    def lr(self) -> float:
        """The learning rate."""

    @property
    def lr_scheduler_type(self) -> str:
        """The schedule of the learning rate."""

    @property
    def optim(self) -> str:
        """The optimizer."""

    @property
    def loraplus_lr_ratio(self) -> float | None:
        """The ratio of learning rates of LoRA+."""


def no_archive_with(agent: Trained) -> str | None:
    """The name of a setting with which an agent has no `optimizer.pt` and `scheduler.pt`; None: it has these files."""
    usual = {"lr_scheduler_type": ("constant",), "optim": ("adamw_torch",), "loraplus_lr_ratio": (None, 1)}
    return next((name for name, values in usual.items() if getattr(agent, name) not in values), None)


def save_policy_archive(agent: Trained, path: str | Path, metrics: Mapping[str, Any] | None = None) -> None:
    """Write the base with an agent's adapter merged into it as one file, a dict with `step_idx`, `state` and `metrics`.

    `model.load_state_dict(torch.load(path, map_location="cpu")["state"])` loads it, and so does
    `load_policy_archive`. The weights have the base's dtypes and are on the CPU. After a failure there is the old file,
    or none.

    An untrained agent on a policy archive keeps the archive's step and metrics, and every bit of its weights. Otherwise
    `step_idx` is `agent.steps`, in batches.

    If the file is called `policy.pt`, `optimizer.pt` and `scheduler.pt` are written beside it in the same format, as
    the original repository does: the state of AdamW for the adapter, and the state of a `LambdaLR` with a constant
    rate. `agent.load_optimizer_archive` reads them. For an agent with another schedule or optimizer they are not
    written, with a warning.

    Args:
        agent: The agent.
        path: File to write; an existing file is replaced if it is a policy archive.
        metrics: Scores by name, JSON values. None: the agent's latest fitness, if it has one.

    Raises:
        ConfigurationError: The metrics are not JSON values, an existing file is not a policy archive, or the weights
            cannot be merged (see `save_merged_model`).
        CheckpointError: Another process is writing to `path`.
        OSError: The file cannot be written, for example since the disk is full.
    """
    step_idx, scores = _step_and_metrics(agent, metrics)
    # In all processes, since ZeRO divides the optimizer's state among them.
    beside = {}
    if usable_path("path", path).name == POLICY:
        other = no_archive_with(agent)
        if other is None:
            beside = _training_state(agent)
        else:
            warnings.warn(
                f"{OPTIMIZER} and {SCHEDULER} are not written, since they are for a constant learning rate of AdamW "
                f"and the agent has {other}={getattr(agent, other)!r}: save_checkpoint writes its training state",
                UserWarning,
                stacklevel=2,
            )

    def write() -> None:
        _check_replaceable(path, read_policy_archive)
        states: dict[Path, Mapping[str, Any]] = {}
        for name, state in beside.items():
            states[usable_path("path", path).with_name(name)] = state
        for place in states:
            _check_replaceable(place, read_archive)
        # Written last, so that it is unchanged if the disk is full.
        states[usable_path("path", path)] = _on_cpu(base_state(agent.base, agent.actor_adapter))
        for place, content in states.items():
            with replace_file(place) as file, open(file, "wb") as stream:
                torch.save({"step_idx": step_idx, "state": content, "metrics": scores}, stream)

    main_writes(write, agent.base)


def _training_state(agent: Trained) -> dict[str, dict[str, Any]]:
    """Return the states of the optimizer and of a constant learning rate schedule, by file name."""
    optimizer = agent.optimizer.state_dict()
    (group,) = optimizer["param_groups"]
    actor = agent.base.adapters.export(agent.actor_adapter)
    added = {
        NAMES: list(agent.base.adapters.parameters(agent.actor_adapter)),
        ADAPTER: adapter_fingerprint(actor.config, actor.tensors),
    }
    num_steps = max((int(moments["step"]) for moments in optimizer["state"].values()), default=0)
    schedule = LambdaLR(torch.optim.SGD([torch.zeros(1)], lr=agent.lr), lambda step: 1.0).state_dict()
    return {
        OPTIMIZER: {**optimizer, "param_groups": [group | added]},
        SCHEDULER: schedule | {"last_epoch": num_steps, "_step_count": num_steps + 1},
    }


def _step_and_metrics(agent: Trained, metrics: Mapping[str, Any] | None) -> tuple[int, Mapping[str, Any] | None]:
    """Return the step and the metrics to write."""
    archive = agent.base.archive
    untouched = archive is not None and agent.steps == 0
    step_idx = archive.step_idx if archive is not None and untouched else agent.steps
    if metrics is not None:
        try:
            # Through JSON, so that the file has plain Python numbers only.
            return step_idx, dict(json.loads(json.dumps(metrics)))
        except (TypeError, ValueError) as error:
            raise ConfigurationError("metrics", metrics, f"must be scores by name, JSON values ({error})") from None
    if archive is not None and untouched:
        return step_idx, archive.metrics
    return step_idx, {"fitness": agent.fitness[-1]} if agent.fitness else {}


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy weights to the CPU; tied weights stay one tensor, which torch.save writes once."""
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        moved.setdefault((tensor.data_ptr(), tensor.shape), tensor.cpu())
    return {name: moved[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}


def _check_replaceable(path: str | Path, read: Callable[[str | Path], object]) -> None:
    if not usable_path("path", path).exists():
        return
    try:
        read(path)
    except CheckpointError as error:
        fix = f"holds something else, which would be lost: give another file ({error})"
        raise ConfigurationError("path", str(path), fix) from None
