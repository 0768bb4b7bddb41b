"""Small populations of different members, batches of random tokens, and gradients of a loss that tells all apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from families import VOCABULARY
from peft import LoraConfig
from torch import Tensor

from evollm import DPO
from evollm.data.samples import Batch, Sample
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.logprobs import TokenLogprobs

EXACT = {"rtol": 0.0, "atol": 1e-10}
# What a member of a mixed population has of its own.
MIXED: list[dict[str, Any]] = [
    {"rank": 4, "alpha": 8, "lr": 1e-3, "beta": 0.1, "nll_alpha": 0.5},
    {"rank": 2, "alpha": 16, "lr": 3e-3, "beta": 0.5, "nll_alpha": 0.0},
    {"rank": 8, "alpha": 4, "lr": 1e-4, "beta": 0.05, "nll_alpha": 1.0},
    {"rank": 4, "alpha": 32, "lr": 2e-2, "beta": 2.0, "nll_alpha": 0.1},
]
SHAPES = [(9, 5, 3), (3, 1, 12), (14, 7, 7), (1, 2, 2), (6, 11, 1)]


def make_batch(seed: int = 0, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Batch:
    """Random tokens; the sides of some pairs are longer than the small models' windows."""
    rng = np.random.default_rng(seed)
    pairs = [Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape if size)) for shape in shapes]
    return Batch(pairs)


def make_agents(model: Any, members: Sequence[dict[str, Any]] = MIXED, targets: Any = None, **shared: Any) -> list[DPO]:
    agents = []
    for index, member in enumerate(members):
        values = dict(member)
        lora = LoraConfig(
            r=values.pop("rank"),
            lora_alpha=values.pop("alpha"),
            target_modules=targets or ["q_proj", "v_proj", "down_proj"],
            # As after some training: without it B is 0, and A gets no gradient.
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        agents.append(DPO(actor_network=model, lora_config=lora, index=index, seed=index, **values, **shared))
    return agents


def backward(agents: Sequence[DPO], batch: Batch, options: PassOptions | None = None) -> list[Tensor]:
    """The gradient of a loss in which every log-prob has another weight."""

    def loss(members: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        weights = torch.tensor(rows) + 1.0
        parts = [p.chosen - 0.3 * p.rejected for p in found.members]
        return torch.stack([((m + 1) * weights * part).sum() for m, part in zip(members, parts, strict=True)]).sum()

    Engine.of(agents[0].base).backward(
        Item.on(batch, [agent.actor_adapter for agent in agents]), options or PassOptions(), loss
    )
    return [p.grad.clone() for agent in agents for p in agent.actor_parameters()]
