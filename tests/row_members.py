"""Small agents on one base whose adapters lie in rows, and a check that they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from families import VOCABULARY
from peft import LoraConfig
from torch import Tensor

from evollm import DPO
from evollm.data.samples import Batch, Sample
from evollm.models.adapters.stack import matrix_of

# The learning rate and beta of each member.
ALIKE = [(1e-2, 0.1), (3e-3, 0.2), (1e-3, 0.3), (1e-4, 0.4)]


def make_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shapes = [(9, 5, 3), (3, 1, 12), (14, 7, 7), (1, 2, 2)]
    return Batch([Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape)) for shape in shapes])


def make_agents(
    model: Any, members: Sequence[tuple[float, float]], targets: Any = "all-linear", **shared: Any
) -> list[DPO]:
    agents = []
    for index, (lr, beta) in enumerate(members):
        lora = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        agents.append(DPO(actor_network=model, lora_config=lora, index=index, seed=index, lr=lr, beta=beta, **shared))
    return agents


def check_rows(agents: Sequence[DPO]) -> Tensor | None:
    """Check that all parameters and gradients are views of rows; the matrix of the actors' rows, if there is one."""
    base = agents[0].base
    for name in base.adapters.names:
        (row,) = base.adapters.rows(name)
        own, gradient = row.values, row.present_gradient()
        views, gradients = row.layout.views(own), None if gradient is None else row.layout.views(gradient)
        for path, parameter in base.adapters.parameters(name).items():
            assert parameter.data_ptr() == views[path].data_ptr()
            if gradients is not None:
                assert parameter.grad is not None
                assert parameter.grad.data_ptr() == gradients[path].data_ptr()
    return matrix_of([base.adapters.rows(agent.actor_adapter)[0].values for agent in agents])
