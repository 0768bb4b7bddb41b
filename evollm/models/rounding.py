"""How far rounding alone moves a model's log-probs: tried, since it depends on the model far more than on its type.

The inputs of the model are moved by one unit in their last place, and the adapters rounded to its type. From there on
every intermediate result is rounded anew, so that the difference is that of two computations which are both right (in
the manner of CESTAC: Vignes, Mathematics and Computers in Simulation 35, 1993).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from evollm.models.quantised import quantised_layers
from evollm.models.shared_base import SharedBase


@contextmanager
def rounded_otherwise(base: SharedBase, adapters: Sequence[str], seed: int) -> Iterator[None]:
    """Inside the block the base's embeddings and these adapters are rounded in another way, for each seed its own."""
    generator = torch.Generator().manual_seed(seed)

    # Parts of many models compute in float32 whatever their own type: less would be lost there.
    least = torch.finfo(torch.float32).eps
    if any(layer.weight.dtype == torch.int8 for _, layer in quantised_layers(base.network)):
        # LLM.int8() computes in float16.
        least = torch.finfo(torch.float16).eps

    def move(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        unit = max(torch.finfo(output.dtype).eps, least)
        steps = torch.randint(-1, 2, output.shape, generator=generator).to(output)
        return output * (1 + unit * steps)

    network = cast(Any, base.network)
    embeddings = [network.get_input_embeddings()]
    # An encoder and a decoder may each have a module for the weights that they share.
    embeddings += [module for module in network.modules() if isinstance(module, nn.Embedding)]
    handles = [module.register_forward_hook(move) for module in dict.fromkeys(embeddings)]
    weights = [parameter for name in adapters for parameter in base.parameters(name).values()]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.copy_(weight.data.to(base.network.dtype))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)
