"""Evaluations pair by pair as files: safetensors, so that every number comes back as it was, NaN included."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from evollm.errors import CheckpointError
from evollm.hpo.fitness import AnyEvaluation, Evaluation, LikelihoodEvaluation
from evollm.own_files import read_bytes

# The two vectors of each kind.
VECTORS: dict[type[AnyEvaluation], tuple[str, str]] = {
    Evaluation: ("chosen_logratios", "rejected_logratios"),
    LikelihoodEvaluation: ("logprobs", "num_tokens"),
}


def evaluations_to_bytes(evaluations: Mapping[str, AnyEvaluation]) -> bytes:
    """Put evaluations into the bytes of one safetensors file.

    Args:
        evaluations: By the name of who was scored. A tensor's name is this name, a slash and the field's name:
            `agent-3/chosen_logratios`, (n,) float64.
    """
    return save(
        {
            f"{name}/{field}": getattr(evaluation, field)
            for name, evaluation in evaluations.items()
            for field in VECTORS[type(evaluation)]
        }
    )


def read_evaluations(path: Path) -> dict[str, AnyEvaluation]:
    """Read a file of what `evaluations_to_bytes` gave.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something else.
    """
    try:
        tensors = load(read_bytes(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found: dict[str, AnyEvaluation] = {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        kind = next((kind for kind, (field, _) in VECTORS.items() if f"{name}/{field}" in tensors), Evaluation)
        try:
            found[name] = kind(*(tensors[f"{name}/{field}"] for field in VECTORS[kind]))
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} holds no evaluation of {name!r}: {error}") from error
    return found
