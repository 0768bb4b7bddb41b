"""Random pairs, and how long a population takes to learn from them: what scaling.py measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from floor import Costs, synchronise
from peaks import peak_mib
from peft import LoraConfig

from evollm import DPO
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch, Sample


@dataclass(frozen=True)
class Shape:
    """Mean tokens of a pair's parts; each pair's own are drawn around them."""

    prompt: int = 125
    chosen: int = 40
    rejected: int = 50

    def batch(self, count: int, vocabulary: int, seed: int = 0) -> Batch:
        """`count` pairs of random tokens."""
        rng = np.random.default_rng(seed)
        pairs = []
        for _ in range(count):
            stretch = rng.uniform(0.5, 1.5)
            sizes = (max(2, round(stretch * mean)) for mean in (self.prompt, self.chosen, self.rejected))
            pairs.append(Sample.of(*(rng.integers(vocabulary, size=size) for size in sizes)))
        return Batch(pairs)


@dataclass(frozen=True)
class Measured:
    """One population's cost.

    Attributes:
        rate: Member-pairs a second, the reference known.
        peak_mib: Peak memory: of the process on a CPU, of the allocator on a GPU.
        gflops: The floor's operations, a second.
    """

    rate: float
    peak_mib: float
    gflops: float


def make_population(model: Any, size: int, **settings: Any) -> list[DPO]:
    """`size` agents with rank 16 on all linear layers, and different hyperparameters."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    agents = DPO.population(size, actor_network=model, lora_config=lora, nll_alpha=0.0, max_grad_norm=1.0, **settings)
    for number, agent in enumerate(agents):
        agent.lr, agent.beta = 1e-4 * (1 + number), 0.1 * (1 + number)
    return agents


def measure(agents: Sequence[DPO], batches: Sequence[Batch], *, together: bool) -> Measured:
    """Let the agents learn from each batch, in shared passes, or one agent after the other from all batches.

    One agent's steps follow each other, as when it is trained alone: switching adapters between steps costs time that
    a loop over runs does not pay. The first batch is gone through once before the clock starts, to warm up.
    """
    device = agents[0].device
    groups = [agents] if together else [[agent] for agent in agents]
    for agent in agents:
        for batch in batches:
            agent.reference_logprobs(batch)
    for group in groups:
        learn_together(group, batches[0])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    started = time.perf_counter()
    for group in groups:
        for batch in batches:
            learn_together(group, batch)
    synchronise(device)
    seconds = time.perf_counter() - started
    member_pairs = len(agents) * sum(len(batch) for batch in batches)
    operations = len(agents) * sum(Costs.of(agents[0]).training(batch) for batch in batches)
    return Measured(member_pairs / seconds, peak_mib(device.type), operations / seconds / 1e9)
