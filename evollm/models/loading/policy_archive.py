"""`policy.pt` of the original DPO repository: all weights of a language model, a step and metrics in one file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evollm.checks import located, usable_path
from evollm.errors import CheckpointError
from evollm.safe_load import read_plain

_NAMED_AT_MOST = 5
_ATTRIBUTE = "_evollm_policy_archive"
_FORM = 'a dict with "step_idx", "state" (of policy.pt all weights by their name) and "metrics"'
# Buffers that older versions of transformers saved with the weights: causal masks and rotary frequencies.
_CONSTANTS = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|masked_bias|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class PolicyArchive:
    """A `policy.pt` without its weights.

    Attributes:
        path: The file.
        step_idx: How far it was trained: in examples if the original repository wrote it, in steps if evollm did.
        metrics: Scores by name; None: the file has none.
    """

    path: str
    step_idx: int
    metrics: Mapping[str, Any] | None


def read_policy_archive(path: str | Path) -> tuple[PolicyArchive, dict[str, Tensor]]:
    """Read a `policy.pt` without executing code from it.

    Returns:
        The archive, and its weights by name, on the CPU, memory-mapped from the file where possible.

    Raises:
        CheckpointError: The file is missing, damaged, not plain data, or of another form.
    """
    archive, state = read_archive(path, mapped=True)
    strange = [name for name, tensor in state.items() if not isinstance(name, str) or not _is_dense(tensor)]
    if strange:
        fix = "give policy.pt, not the optimizer's or the scheduler's file"
        raise CheckpointError(f"{path}: state holds what is not the weights of a model: {_listed(strange)}; {fix}")
    return archive, state


def read_archive(
    path: str | Path, what: str = "a policy archive", *, mapped: bool = False
) -> tuple[PolicyArchive, dict[str, Any]]:
    """Read a dict of `step_idx`, `state` and `metrics` without executing code from it.

    Args:
        path: The file.
        what: The expected kind of file, for messages.
        mapped: Memory-map tensors from the file where possible, for a caller that copies them.

    Returns:
        The archive, and its state.

    Raises:
        CheckpointError: The file is missing, damaged, not plain data, or of another form.
    """
    content = read_plain(usable_path("archive", path), mapped=mapped)
    if not isinstance(content, dict) or not content.keys() >= {"step_idx", "state", "metrics"}:
        found = f"has {sorted(map(str, content))[:_NAMED_AT_MOST]}" if isinstance(content, dict) else "is no dict"
        raise CheckpointError(f"{path} is not {what}, {_FORM}: it {found}")
    step_idx, state, metrics = content["step_idx"], content["state"], content["metrics"]
    if isinstance(step_idx, bool) or not isinstance(step_idx, int):
        raise CheckpointError(f"{path}: step_idx={step_idx!r} must be a whole number")
    if metrics is not None and not isinstance(metrics, dict):
        raise CheckpointError(f"{path}: metrics must be a dict or None, not {type(metrics).__name__}")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: state must be a dict, not {type(state).__name__}")
    return PolicyArchive(located(path), step_idx, metrics), state


def copy_state(path: str | Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Overwrite all weights of a model, or none if one of them does not fit; weights are cast to the model's types.

    Args:
        path: The file that they come from, for messages.
        state: The weights by name. Of tied weights it may hold one or all; buffers that older versions of transformers
            saved with the weights are ignored.
        model: The model.

    Raises:
        CheckpointError: Weights are missing, unknown, of another shape or an unsuitable type, or differ where the model
            ties them.
    """
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    state = {name: tensor for name, tensor in state.items() if name in own or not _is_constant(name, tensor)}
    tied: dict[int, list[str]] = defaultdict(list)
    for name, tensor in own.items():
        tied[id(tensor)].append(name)
    given = {name: [twin for twin in tied[id(tensor)] if twin in state] for name, tensor in own.items()}
    faults = [
        _fault("it lacks", [name for name in own if not given[name]]),
        _fault("the model has no", [name for name in state if name not in own]),
        _fault(
            "of another shape are",
            [
                f"{name} {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
                for name, tensor in state.items()
                if name in own and tensor.shape != own[name].shape
            ],
        ),
        _fault(
            "of another kind are",
            [
                f"{name} {tensor.dtype}, the model's is {own[name].dtype}"
                for name, tensor in state.items()
                if name in own and not _castable(tensor, own[name])
            ],
        ),
    ]
    said = "; ".join(fault for fault in faults if fault)
    if said:
        fix = "load the model that the archive was trained from, in a floating-point type and not quantised"
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {said}. Nothing was loaded: {fix}")
    untied = [name for name, (first, *_) in given.items() if name in state and not _equal(state[name], state[first])]
    if untied:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: the model ties {_listed(untied)} to other weights, which "
            "differ in the archive. Nothing was loaded: load the model with tie_word_embeddings=False"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[given[name][0]])


def note_archive(model: nn.Module, archive: PolicyArchive) -> None:
    """Store on a model which archive its weights were loaded from."""
    # Set in `__dict__`, since `nn.Module.__setattr__` has rules of its own for some types.
    model.__dict__[_ATTRIBUTE] = archive


def loaded_archive(model: nn.Module) -> PolicyArchive | None:
    """The archive that `note_archive` stored; None: none."""
    archive = model.__dict__.get(_ATTRIBUTE)
    return archive if isinstance(archive, PolicyArchive) else None


def _is_dense(tensor: object) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)
    )


def _is_constant(name: str, tensor: Tensor) -> bool:
    is_mask = tensor.dtype in (torch.bool, torch.uint8) or tensor.ndim == 0
    return bool(_CONSTANTS.search(name)) and (is_mask or name.endswith("inv_freq"))


def _castable(tensor: Tensor, target: Tensor) -> bool:
    """Whether copying keeps the values up to rounding; the integers of a quantised weight are codes, not values."""
    if target.is_meta:
        return False
    return tensor.dtype == target.dtype or (tensor.is_floating_point() and target.is_floating_point())


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def _fault(what: str, names: list[str]) -> str:
    return f"{what} {_listed(names)}" if names else ""


def _listed(names: list[Any]) -> str:
    shown = ", ".join(map(str, names[:_NAMED_AT_MOST]))
    return shown + (f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else "")
