"""Copies from the host to a device, for which neither waits where the device allows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evollm.data.samples import IntArray


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device of a tensor on the CPU; on a CPU the tensor itself."""
    if device.type != "cuda":
        return tensor.to(device)
    # From memory that is not pinned, the host would wait until the kernels in the queue are done.
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_arrays(arrays: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """One-dimensional arrays of integers on a device, by one copy."""
    whole = upload(torch.from_numpy(np.concatenate(arrays)), device)
    return list(whole.split([len(array) for array in arrays]))
