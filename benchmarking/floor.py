"""What training on a pair costs at least: floating-point operations counted, the rate of matrix products measured.

The operations are those of `evollm.models.flops`, with the reference's log-probs known.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from evollm import DPO
from evollm.data.samples import Batch
from evollm.models.flops import Parameters, head_parameters, layer_parameters, pass_flops


@dataclass(frozen=True)
class Costs:
    """Sizes of a model that the count needs.

    Attributes:
        layers: P of the formula.
        adapter: A, of one adapter.
        head: E.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
    """

    layers: Parameters
    adapter: Parameters
    head: int
    hidden_size: int
    intermediate_size: int

    @classmethod
    def of(cls, agent: DPO) -> Costs:
        """Count an agent's model."""
        adapter = sum(one.numel() for one in agent.actor_parameters())
        return cls._of(agent.base.network, layer_parameters(agent.base.network, agent.base.adapters.tensors), adapter)

    @classmethod
    def of_network(cls, network: Any, rank: int) -> Costs:
        """Count a decoder without adapter, and LoRA of this rank on all its linear layers but the head."""
        head = network.get_output_embeddings()
        linears = [m for m in network.modules() if isinstance(m, nn.Linear) and m is not head]
        adapter = sum(rank * (m.in_features + m.out_features) for m in linears)
        return cls._of(network, layer_parameters(network), adapter)

    @classmethod
    def _of(cls, network: Any, layers: Parameters, adapter: int) -> Costs:
        config = network.config
        return cls(
            layers=layers,
            adapter=Parameters(adapter, adapter),
            head=head_parameters(network),
            hidden_size=int(config.hidden_size),
            intermediate_size=int(getattr(config, "intermediate_size", 4 * config.hidden_size)),
        )

    def training(self, batch: Batch) -> float:
        """Operations for one member to learn from the batch, the reference known."""
        return pass_flops(batch, self.layers, self.adapter, self.head, training=True)


def gemm_rate(costs: Costs, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int = 20) -> float:
    """Operations a second of the feed-forward products, up and down, with so many tokens in flight."""
    up = torch.randn(costs.intermediate_size, costs.hidden_size, device=device, dtype=dtype)
    down = torch.randn(costs.hidden_size, costs.intermediate_size, device=device, dtype=dtype)
    hidden = torch.randn(tokens, costs.hidden_size, device=device, dtype=dtype)
    # Both once before the clock starts: a library chooses its kernel at the first product of a shape.
    wide = linear(hidden, up)
    linear(wide, down)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        linear(hidden, up)
        linear(wide, down)
    synchronise(device)
    return 4 * tokens * costs.hidden_size * costs.intermediate_size * repeats / (time.perf_counter() - start)


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
