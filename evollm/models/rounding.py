"""Measures how far rounding alone changes a model's log-probs, which depends more on the model than on its dtype.

The model's input embeddings are changed by one unit in the last place, and the adapters rounded to the base's dtype.
All later intermediate results then round differently, so that the difference is that of two equally right computations
(like CESTAC: Vignes, Mathematics and Computers in Simulation 35, 1993).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from evollm.models.quantised import quantised_layers

if TYPE_CHECKING:
    from evollm.models.shared_base import SharedBase


@contextmanager
def outputs_rounded_otherwise(modules: Iterable[nn.Module], seed: int, least: float = 0.0) -> Iterator[None]:
    """Inside the block these modules' outputs change at random by a relative machine epsilon, or `least` if larger.

    One random generator serves all outputs, so the draws depend on the seed and on the order of execution.
    """
    generator = torch.Generator().manual_seed(seed)

    def move(module: nn.Module, inputs: object, output: Any) -> Any:
        del module, inputs
        if not (isinstance(output, Tensor) and output.is_floating_point()):
            return output
        unit = max(torch.finfo(output.dtype).eps, least)
        steps = torch.randint(-1, 2, output.shape, generator=generator).to(output)
        return output * (1 + unit * steps)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(move).remove)
        yield


@contextmanager
def rounded_otherwise(base: SharedBase, adapters: Sequence[str], seed: int) -> Iterator[None]:
    """Inside the block the base's embeddings are perturbed by a seed, and these adapters rounded to its dtype."""
    # Many models compute parts in float32 whatever their dtype; a smaller change would be lost there.
    least = torch.finfo(torch.float32).eps
    if any(layer.weight.dtype == torch.int8 for _, layer in quantised_layers(base.network)):
        # LLM.int8() computes in float16.
        least = torch.finfo(torch.float16).eps

    network = cast(Any, base.network)
    embeddings = [network.get_input_embeddings()]
    # An encoder and a decoder may each have an embedding module with the same weights.
    embeddings += [module for module in network.modules() if isinstance(module, nn.Embedding)]
    weights = [parameter for name in adapters for parameter in base.adapters.parameters(name).values()]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.copy_(weight.data.to(base.network.dtype))
        with outputs_rounded_otherwise(dict.fromkeys(embeddings), seed, least):
            yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)
