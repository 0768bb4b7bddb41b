"""Evaluations row by row as safetensors files, which keep every bit, NaN included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from evollm.errors import CheckpointError
from evollm.hpo.fitness import AnyEvaluation, Evaluation
from evollm.hpo.scores import RACED
from evollm.own_files import read_bytes

# The names of the two vectors of each type of evaluation; further ones are optional.
VECTORS: dict[type[AnyEvaluation], tuple[str, str]] = {
    kind: (fields(kind)[0].name, fields(kind)[1].name) for kind in RACED
}


def evaluations_to_bytes(evaluations: Mapping[str, AnyEvaluation]) -> bytes:
    """Return one safetensors file as bytes.

    Args:
        evaluations: The evaluations by name, such as `agent-3`. The name of a tensor is this name, a slash and the name
            of the field: `agent-3/chosen_logratios`, (n,) float64.
    """
    return save(
        {
            f"{name}/{field}": getattr(evaluation, field)
            for name, evaluation in evaluations.items()
            for field in (one.name for one in fields(evaluation))
            if getattr(evaluation, field) is not None
        }
    )


def read_evaluations(path: Path) -> dict[str, AnyEvaluation]:
    """Read a file with the bytes of `evaluations_to_bytes`.

    Raises:
        CheckpointError: The file is missing or damaged, or holds other tensors.
    """
    try:
        tensors = load(read_bytes(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    found: dict[str, AnyEvaluation] = {}
    for name in sorted({key.rpartition("/")[0] for key in tensors}):
        kind = next((kind for kind, (field, _) in VECTORS.items() if f"{name}/{field}" in tensors), Evaluation)
        try:
            optional = [one.name for one in fields(kind)[2:] if f"{name}/{one.name}" in tensors]
            found[name] = kind(**{field: tensors[f"{name}/{field}"] for field in (*VECTORS[kind], *optional)})
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path} holds no evaluation of {name!r}: {error}") from error
    return found
