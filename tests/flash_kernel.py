"""Torch's flash operators for the CPU, by their definition: a stand-in for the kernel that torch has for CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evollm.models import attention, flash


@dataclass
class Kernel:
    """Reference kernel for variable lengths; its faults are those that a trial must find.

    Attributes:
        calls: Forward calls so far.
        corner: 0: the mask is aligned to the upper left corner, as flash-attn did before version 2.1.
        window_by: Added to the window.
        gradient: Factor of the gradient of the keys.
        raises: Raised by the backward pass.
    """

    corner: int = 1
    window_by: int = 0
    scale: float | None = None
    gradient: float = 1.0
    raises: str = ""
    calls: int = 0

    def forward(self, query, key, value, query_ends, key_ends, most_queries, most_keys, dropout, causal, *_, **options):
        assert dropout == 0.0
        assert query.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
        assert query.shape[2] == key.shape[2] == value.shape[2]
        assert query_ends.dtype == key_ends.dtype == torch.int32
        assert (int(query_ends[-1]), int(key_ends[-1])) == (len(query), len(key))
        assert (int(query_ends.diff().max()), int(key_ends.diff().max())) == (most_queries, most_keys)
        self.calls += 1
        found = []
        for one, two, three in self._sequences((query, query_ends), (key, key_ends), (value, key_ends)):
            weights = self._weights(one, two, causal, options)
            found.append(weights @ _per_query_head(three, weights))
        empty = torch.empty(0)
        return self._join(found, query), torch.zeros(query.shape[1], len(query)), empty, empty, empty

    def backward(
        self, grad, query, key, value, out, logsumexp, query_ends, key_ends, mq, mk, dropout, causal, *_, **options
    ):
        if self.raises:
            raise RuntimeError(self.raises)
        found = []
        queries, keys = [(tensor, query_ends) for tensor in (grad, out, query)], [(key, key_ends), (value, key_ends)]
        for towards, output, one, two, three in self._sequences(*queries, *keys):
            weights = self._weights(one, two, causal, options)
            of_weights = towards @ _per_query_head(three, weights).mT
            of_scores = weights * (of_weights - (towards * output).sum(-1, keepdim=True))
            of_scores = of_scores.to(query.dtype).to(weights.dtype) * (self.scale or options["scale"])
            groups = (len(two), -1)
            of_key = (of_scores.mT @ one).unflatten(0, groups).sum(1) * self.gradient
            found.append(
                (of_scores @ _per_query_head(two, weights), of_key, (weights.mT @ towards).unflatten(0, groups).sum(1))
            )
        return tuple(self._join(parts, query) for parts in zip(*found, strict=True))

    @staticmethod
    def _sequences(*tensors: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """(heads, length, size) of each sequence in float32 or wider."""
        split = (tensor.tensor_split(ends[1:-1].long()) for tensor, ends in tensors)
        for parts in zip(*split, strict=True):
            wide = torch.promote_types(parts[0].dtype, torch.float32)
            yield tuple(part.transpose(0, 1).to(wide) for part in parts)

    @staticmethod
    def _join(sequences, like: Tensor) -> Tensor:
        return torch.cat([part.transpose(0, 1) for part in sequences]).to(like.dtype)

    def _weights(self, query: Tensor, key: Tensor, causal: bool, options: dict[str, Any]) -> Tensor:
        """(H, queries, keys); none where a row of the mask is empty."""
        left = options["window_size_left"]
        assert options["window_size_right"] == 0
        assert causal == (left < 0)
        scores = query @ _per_query_head(key, query).mT * (self.scale or options["scale"])
        queries, keys = scores.shape[1:]
        ago = torch.arange(queries)[:, None] + (keys - queries) * self.corner - torch.arange(keys)
        seen = (ago >= 0) & (ago <= (keys if left < 0 else left + self.window_by))
        return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()


def _per_query_head(states: Tensor, queries: Tensor) -> Tensor:
    return states.repeat_interleave(len(queries) // len(states), 0)


@contextmanager
def on_the_cpu(kernel: Kernel, **bounds: float) -> Iterator[Kernel]:
    """Let torch's operators be this kernel's on the CPU inside the block, and evollm ask for them there.

    Args:
        kernel: What they do.
        **bounds: What the trial lets pass, by the name of a dtype, beside the dtypes that it takes anyway.
    """
    before = flash._DEVICES, flash._BOUNDS
    flash.why_not_flash.cache_clear()
    attention._warn_of_slow_attention.cache_clear()
    flash._DEVICES = ("cuda", "cpu")
    flash._BOUNDS = before[1] | {getattr(torch, name): bound for name, bound in bounds.items()}
    try:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("_flash_attention_forward", kernel.forward, "CPU")
            library.impl("_flash_attention_backward", kernel.backward, "CPU")
            yield kernel
    finally:
        flash._DEVICES, flash._BOUNDS = before
        flash.why_not_flash.cache_clear()
        attention._warn_of_slow_attention.cache_clear()
