"""Torch's variable-length flash attention kernel: many sequences of different lengths in one call.

torch.nn.attention.varlen wraps the operator that is called here, but refuses grouped-query heads in torch 2.11 and
needs an argument for them in later versions. The operator takes them in every version, and torch differentiates it.
Since it is private and may change, its output and gradients are compared with float64 before its first use with each
device, dtype and head size.
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

from evollm.models.upload import upload

_DEVICES = ("cuda",)
# Largest relative error of a sequence's output or gradient that rounding explains; a mask that is wrong by one position
# gives more.
_BOUNDS = {torch.float16: 0.01, torch.bfloat16: 0.05}
_LARGEST_HEAD = 256
_MULTIPLE = 8
# (queries, keys) of the trial's sequences: shorter and longer than the blocks that the kernel works in.
_TRIED = ((150, 150), (3, 150), (1, 9), (70, 200))
# Sliding windows of the trial: none, one smaller than a block and one larger.
_WINDOWS = (None, 5, 90)


@dataclass(frozen=True)
class SequenceBounds:
    """Bounds of S sequences that are concatenated without padding.

    Attributes:
        query_ends: (S + 1,) int32, 0 and the end of each sequence's queries.
        key_ends: (S + 1,) int32, 0 and the end of each sequence's keys.
        most_queries: The largest number of queries of a sequence.
        most_keys: The largest number of keys of a sequence.
    """

    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, counts: Sequence[tuple[int, int]], device: torch.device) -> SequenceBounds:
        """The bounds of sequences with these numbers of queries and keys."""
        queries, keys = zip(*counts, strict=True)
        ends = torch.tensor([[0, *accumulate(lengths)] for lengths in (queries, keys)], dtype=torch.int32)
        query_ends, key_ends = upload(ends, device)
        return cls(query_ends, key_ends, max(queries), max(keys))


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: SequenceBounds, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence; the last query of a sequence is at the position of its last key.

    Args:
        query: (T, H, D) queries of all sequences.
        key: (N, K, D) keys of all sequences, H a multiple of K.
        value: (N, K, E).
        sequences: The bounds of the sequences.
        scale: Factor of the scores, by default 1 / sqrt(D).
        window: Number of positions that a query attends to, its own included; None: all up to its own.

    Returns:
        (T, H, E).
    """
    # The kernel takes one head size for queries, keys and values; padding with zeros does not change the scores.
    size = kernel_head_size(query, value)
    output = torch.ops.aten._flash_attention_forward.default(
        _widen(query, size),
        _widen(key, size),
        _widen(value, size),
        sequences.query_ends,
        sequences.key_ends,
        sequences.most_queries,
        sequences.most_keys,
        0.0,  # dropout
        window is None,  # causal; with a window, window_size_right=0 makes it causal
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
    """The head size that tensors are padded to for the kernel: a multiple of eight."""
    return -(-max(query.shape[-1], value.shape[-1]) // _MULTIPLE) * _MULTIPLE


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """The causal mask of queries at the last positions of the keys.

    Returns:
        (queries, keys), True where a query attends to a key; see `flash_attention` for `window`.
    """
    offset = keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
    return seen if window is None else seen.triu(offset - window + 1)


def takes(dtype: torch.dtype) -> bool:
    """Whether the kernel supports this type."""
    return dtype in _BOUNDS


@lru_cache
def why_not_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why the kernel is not used for heads of this size on this device; "" if it gave right results in a trial."""
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
    except Exception as error:  # Builds without the kernel and unsupported devices raise different exceptions.
        first, *_ = str(error).strip().splitlines() or [""]
        return f"torch {torch.__version__} says: {type(error).__name__}: {first}"
    # max() might ignore a NaN.
    wrong = [gap for gap in gaps if not gap <= _BOUNDS[dtype]]
    return f"in torch {torch.__version__} its output or gradients are off by {wrong[0]:.0%}" if wrong else ""


def _try_kernel(device: torch.device, dtype: torch.dtype, head_size: int, window: int | None) -> list[float]:
    """Relative errors of each sequence's output and gradients, against float64."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = zip(*_TRIED, strict=True)
    scale = 1.5 * head_size**-0.5

    def states(lengths: Sequence[int], heads: int) -> Tensor:
        drawn = torch.randn(sum(lengths), heads, head_size, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Split two tensors of queries and two of keys into sequences."""
        lengths = queries, queries, keys, keys
        return zip(*(tensor.detach().split(size) for tensor, size in zip(tensors, lengths, strict=True)), strict=True)

    # The trial runs within a forward pass, whose grad mode and saved-tensor hooks (of checkpointing) must not apply.
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        direction, query, key, value = states(queries, 4), states(queries, 4), states(keys, 2), states(keys, 2)
        output = flash_attention(query, key, value, SequenceBounds.of(_TRIED, device), scale, window)
        gradients = torch.autograd.grad(output, (query, key, value), direction)
        gaps = []
        for given, found in zip(parts(direction, query, key, value), parts(output, *gradients), strict=True):
            towards, *inputs = (tensor.double().requires_grad_() for tensor in given)
            exact = _in_float64(*inputs, scale=scale, window=window)
            expected = exact, *torch.autograd.grad(exact, inputs, towards)
            pairs = zip(found, (tensor.detach() for tensor in expected), strict=True)
            gaps += [float((one.double() - other).norm() / other.norm()) for one, other in pairs]
    return gaps


def _in_float64(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Attention of one sequence by its definition."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    seen = causal_mask(len(query), len(key), window, query.device)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(dim=-1), value)
