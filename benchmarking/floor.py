"""What training on a pair costs at least: floating-point operations counted, the rate of matrix products measured.

With the reference's log-probs known, a member-pair costs T (4P + 6A) + 4 E C operations: T tokens of the pair with the
prompt once and no padding, P matrix parameters of the blocks, A adapter parameters, E = hidden size x vocabulary, C
completion tokens. Attention scores and whatever is recomputed are left out.
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


@dataclass(frozen=True)
class Costs:
    """Sizes of a model that the count needs.

    Attributes:
        block_parameters: P, of the matrices in the repeated layers.
        adapter_parameters: A, of one adapter.
        head_parameters: E.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
    """

    block_parameters: int
    adapter_parameters: int
    head_parameters: int
    hidden_size: int
    intermediate_size: int

    @classmethod
    def of(cls, agent: DPO) -> Costs:
        """Count an agent's model."""
        base = agent.base
        adapters = {id(p) for name in base.adapters.names for p in base.adapters.parameters(name).values()}
        blocks = [p for layer in base.layers.modules for p in layer.parameters() if p.ndim == 2]
        return cls._of(
            base.network,
            blocks=sum(p.numel() for p in blocks if id(p) not in adapters),
            adapter=sum(p.numel() for p in agent.actor_parameters()),
        )

    @classmethod
    def of_network(cls, network: Any, rank: int) -> Costs:
        """Count a decoder without adapter, and LoRA of this rank on all its linear layers but the head."""
        head = network.get_output_embeddings()
        linears = [m for m in network.modules() if isinstance(m, nn.Linear) and m is not head]
        return cls._of(
            network,
            blocks=sum(m.weight.numel() for m in linears),
            adapter=sum(rank * (m.in_features + m.out_features) for m in linears),
        )

    @classmethod
    def _of(cls, network: Any, blocks: int, adapter: int) -> Costs:
        config = network.config
        return cls(
            block_parameters=blocks,
            adapter_parameters=adapter,
            head_parameters=network.get_output_embeddings().weight.numel(),
            hidden_size=int(config.hidden_size),
            intermediate_size=int(getattr(config, "intermediate_size", 4 * config.hidden_size)),
        )

    def training(self, batch: Batch) -> float:
        """Operations for one member to learn from the batch, the reference known."""
        completions = int(batch.chosen_lengths.sum() + batch.rejected_lengths.sum())
        return self.training_of(int(batch.num_tokens.sum()), completions)

    def training_of(self, tokens: Any, completions: Any) -> Any:
        """Operations to learn from so many tokens, of which `completions` are of completions; also for arrays."""
        per_token = 4 * self.block_parameters + 6 * self.adapter_parameters
        return tokens * per_token + 4 * self.head_parameters * completions

    def forward_of(self, tokens: Any, completions: Any) -> Any:
        """Operations of a forward pass for log-probs."""
        per_token = 2 * self.block_parameters + 2 * self.adapter_parameters
        return tokens * per_token + 2 * self.head_parameters * completions


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
