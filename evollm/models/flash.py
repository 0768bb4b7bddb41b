"""Torch's variable-length flash kernel: many sequences of any length in one call, once it has proved itself.

torch.nn.attention.varlen wraps the operator that is called here, but refuses grouped heads in torch 2.11 and has to be
asked for them later. The operator takes them in every version, and torch differentiates it. It is private, so nothing
is taken for granted: before its first use with a device, a dtype and a head size, output and gradients are compared
with float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad

_DEVICES = ("cuda",)
# Largest relative error of a sequence's output or gradient that rounding explains. A mask that is wrong by one position
# changes more.
_BOUNDS = {torch.float16: 0.01, torch.bfloat16: 0.05}
_LARGEST_HEAD = 256
_MULTIPLE = 8
# (queries, keys) of the sequences that the kernel is tried on: shorter and longer than the blocks that it works in.
_TRIED = ((150, 150), (3, 150), (1, 9), (70, 200))
# One within a block and one beyond.
_WINDOWS = (None, 5, 90)


@dataclass(frozen=True)
class SequenceBounds:
    """Where sequences begin and end that follow each other without padding.

    Attributes:
        query_ends: (S + 1,) int32, 0 and the end of each sequence's queries.
        key_ends: (S + 1,) int32, the same of its keys.
        most_queries: Queries of the sequence that has most.
        most_keys: Keys of the sequence that has most.
    """

    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, counts: Sequence[tuple[int, int]], device: torch.device) -> SequenceBounds:
        """From the numbers of queries and keys of each sequence."""
        queries, keys = zip(*counts, strict=True)

        def ends(lengths: Sequence[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

        return cls(ends(queries), ends(keys), max(queries), max(keys))


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: SequenceBounds, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence, whose last query sees its last key.

    Args:
        query: (T, H, D) queries of all sequences.
        key: (N, K, D) keys of all sequences, H a multiple of K.
        value: (N, K, E).
        sequences: Where they begin and end.
        scale: Factor of the scores, by default 1 / sqrt(D).
        window: Positions that a query sees, its own included; None: all before it.

    Returns:
        (T, H, E).
    """
    size = kernel_head_size(query, value)
    # The kernel takes one size for all; zeros add nothing to a score.
    output = torch.ops.aten._flash_attention_forward.default(
        _widen(query, size),
        _widen(key, size),
        _widen(value, size),
        sequences.query_ends,
        sequences.key_ends,
        sequences.most_queries,
        sequences.most_keys,
        0.0,  # dropout
        window is None,  # causal; a window says so itself, by nothing to the right
        False,  # no dropout mask
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )[0]
    assert isinstance(output, Tensor)
    return output if value.shape[-1] == size else output[..., : value.shape[-1]]


def _widen(states: Tensor, size: int) -> Tensor:
    return states if states.shape[-1] == size else pad(states, (0, size - states.shape[-1]))


def kernel_head_size(query: Tensor, value: Tensor) -> int:
    """The head size that the kernel gets for these: a multiple of eight."""
    return -(-max(query.shape[-1], value.shape[-1]) // _MULTIPLE) * _MULTIPLE


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) True where the last `queries` of `keys` positions see another, at most `window` of them."""
    offset = keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
    return seen if window is None else seen.triu(offset - window + 1)


def takes(dtype: torch.dtype) -> bool:
    """Whether the kernel is made for this type."""
    return dtype in _BOUNDS


@lru_cache
def why_not_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why such heads do not go through the kernel there; "" where it has been tried and was right."""
    if device.type not in _DEVICES:
        return "it runs on CUDA devices"
    if not takes(dtype):
        return f"it takes bfloat16 and float16, not {dtype}: load the base with dtype='bfloat16'"
    if head_size > _LARGEST_HEAD:
        return f"it takes heads of at most {_LARGEST_HEAD} numbers, not {head_size}"
    try:
        gaps = [gap for window in _WINDOWS for gap in _try_kernel(device, dtype, head_size, window)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a build without the kernel, or a device that it is not made for, says
        first, *_ = str(error).strip().splitlines() or [""]
        return f"torch {torch.__version__} says: {type(error).__name__}: {first}"
    # Not by max(): it may pass over a NaN.
    wrong = [gap for gap in gaps if not gap <= _BOUNDS[dtype]]
    return f"in torch {torch.__version__} its output or gradients are off by {wrong[0]:.0%}" if wrong else ""


def _try_kernel(device: torch.device, dtype: torch.dtype, head_size: int, window: int | None) -> list[float]:
    """How far each sequence's output and gradients are from those in float64."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = zip(*_TRIED, strict=True)
    scale = 1.5 * head_size**-0.5

    def states(lengths: Sequence[int], heads: int) -> Tensor:
        drawn = torch.randn(sum(lengths), heads, head_size, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Each sequence's of two tensors for queries and two for keys."""
        lengths = queries, queries, keys, keys
        return zip(*(tensor.detach().split(size) for tensor, size in zip(tensors, lengths, strict=True)), strict=True)

    # Whatever goes on around it, the trial is not part of: not of what a checkpointed layer saves, for one.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        direction, query, key, value = states(queries, 4), states(queries, 4), states(keys, 2), states(keys, 2)
        output = flash_attention(query, key, value, SequenceBounds.of(_TRIED, device), scale, window)
        gradients = torch.autograd.grad(output, (query, key, value), direction)
        gaps = []
        for given, found in zip(parts(direction, query, key, value), parts(output, *gradients), strict=True):
            towards, *inputs = (tensor.double().requires_grad_() for tensor in given)
            exact = _in_float64(*inputs, scale=scale, window=window)
            expected = exact, *torch.autograd.grad(exact, inputs, towards)
            gaps += [_gap(one, other.detach()) for one, other in zip(found, expected, strict=True)]
    return gaps


def _in_float64(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """One sequence, by the definition."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    seen = causal_mask(len(query), len(key), window, query.device)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(dim=-1), value)


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
