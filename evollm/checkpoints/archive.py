"""An agent as `policy.pt` of the original DPO repository."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from evollm.checkpoints.export import HasActor, main_writes
from evollm.checkpoints.files import replace_file
from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.models.archive import read_policy_archive


class Trained(HasActor, Protocol):
    """An agent with a record of its life."""

    steps: int
    fitness: list[float]


def save_policy_archive(agent: Trained, path: str | Path, metrics: Mapping[str, Any] | None = None) -> None:
    """Write the base with an agent's adapter merged into it as one file, a dict with `step_idx`, `state` and `metrics`.

    `model.load_state_dict(torch.load(path, map_location="cpu")["state"])` loads it, and so does
    `load_policy_archive`. The weights have the base's types and are on the CPU. The file appears whole or not at all.

    An agent that has learnt nothing on a policy archive keeps that archive's step and metrics, and every bit of its
    weights. Otherwise `step_idx` is `agent.steps`, in batches.

    Args:
        agent: The agent.
        path: File to write; one that is there is replaced if it is a policy archive.
        metrics: Scores by name, JSON values. None: the agent's latest fitness, if it has one.

    Raises:
        ConfigurationError: The metrics are not JSON values, something else lies at `path`, or the weights cannot be
            merged (see `save_merged_model`).
        CheckpointError: Another process is writing to `path`.
        OSError: The disk is full, for example.
    """
    step_idx, scores = _record(agent, metrics)

    def write() -> None:
        _check_replaceable(path)
        content = {"step_idx": step_idx, "state": _on_cpu(agent.base.state(agent.actor_adapter)), "metrics": scores}
        with replace_file(path) as file, open(file, "wb") as stream:
            torch.save(content, stream)

    main_writes(write, agent.base)


def _record(agent: Trained, metrics: Mapping[str, Any] | None) -> tuple[int, Mapping[str, Any] | None]:
    """The step and the metrics to write."""
    archive = agent.base.archive
    untouched = archive is not None and agent.steps == 0
    step_idx = archive.step_idx if archive is not None and untouched else agent.steps
    if metrics is not None:
        try:
            # What reads back as plain numbers, whatever kind of numbers they are.
            return step_idx, dict(json.loads(json.dumps(metrics)))
        except (TypeError, ValueError) as error:
            raise ConfigurationError("metrics", metrics, f"must be scores by name, JSON values ({error})") from None
    if archive is not None and untouched:
        return step_idx, archive.metrics
    return step_idx, {"fitness": agent.fitness[-1]} if agent.fitness else {}


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of what is elsewhere; tied weights stay one, and are written once."""
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in weights.values():
        moved.setdefault((tensor.data_ptr(), tensor.shape), tensor.cpu())
    return {name: moved[tensor.data_ptr(), tensor.shape] for name, tensor in weights.items()}


def _check_replaceable(path: str | Path) -> None:
    if not usable_path("path", path).exists():
        return
    try:
        read_policy_archive(path)
    except CheckpointError as error:
        fix = f"holds something else, which would be lost: give another file ({error})"
        raise ConfigurationError("path", str(path), fix) from None
