"""Reads files of `torch.save` that have plain data only: tensors, numbers, strings, dicts and lists."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evollm.errors import CheckpointError

PLAIN = "tensors, numbers, strings, dicts and lists"
_LEAVES = (Tensor, str, int, float, bool, type(None))


def read_plain(path: Path, *, mapped: bool = False) -> Any:
    """Read a file of `torch.save` without running code from it; tensors are on the CPU.

    All of evollm reads such files through this function alone.

    Args:
        path: The file.
        mapped: Map the tensors into memory if the file's format allows it, for a caller that copies them one by one.

    Raises:
        CheckpointError: The file is missing, damaged, or has values that are not plain data.
    """
    if not path.is_file():  # reading a pipe would wait for a writer
        raise CheckpointError(f"{path} cannot be read: there is no such file")
    try:
        # The format before torch 1.6 is no zip archive and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # Only the name from torch's message, the rest of which explains how to load the file with its code.
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds {name[1]}" if name else "it holds something else"
        raise CheckpointError(
            f"{path} cannot be read: {what}, and evollm reads {PLAIN} only. Nothing of it was run"
        ) from None
    except Exception as error:  # a damaged pickle may raise any exception
        raise CheckpointError(f"{path} cannot be read: {error or type(error).__name__}") from error
    try:
        strange = foreign_type(content)
    except RecursionError:
        strange = "list or dict that is nested too deeply"
    if strange is not None:
        raise CheckpointError(f"{path} cannot be read: it holds a {strange}, and evollm reads {PLAIN} only")
    return content


def foreign_type(value: object) -> str | None:
    """Return the name of the first type in a nested value that is not plain data; None if there is none."""
    if isinstance(value, _LEAVES):
        return None
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list | tuple):
        return type(value).__name__
    return next((strange for strange in map(foreign_type, value) if strange is not None), None)
