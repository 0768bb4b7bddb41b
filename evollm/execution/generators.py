"""The global random generators, which a user's own functions may draw from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from evollm.errors import CheckpointError


def global_generators() -> dict[str, Any]:
    """States of the global random generators as JSON values."""
    kind, words, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(words).tolist(), *position],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_global_generators(state: Mapping[str, Any]) -> None:
    """Restore the result of `global_generators`.

    Raises:
        CheckpointError: The state is incomplete or damaged.
    """
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(tuple(state["numpy"]))
        torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([torch.tensor(one, dtype=torch.uint8) for one in state["cuda"]])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the states of the random generators are incomplete: {error!r}") from error
