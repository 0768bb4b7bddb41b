"""The Triton kernel of `evollm.models.fused_head`. This module imports Triton, which need not be installed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192
_WARPS = 16


def log_softmax_rows(logits: Tensor, targets: Tensor, logprobs: Tensor, *, overwrite: bool) -> None:
    """Launch the kernel; see `evollm.models.fused_head.log_softmax_rows`."""
    vocabulary = logits.shape[1]
    assert logits.stride(1) == logprobs.stride(0) == 1
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(logits):
        _log_softmax_row[(len(logits),)](
            logits, targets.contiguous(), logprobs, logits.stride(0), vocabulary, overwrite, block, num_warps=_WARPS
        )


# Triton looks up names in annotations, and knows no others than its own.
@triton.jit
def _log_softmax_row(
    logits, targets, logprobs, stride, vocabulary: tl.constexpr, overwrite: tl.constexpr, block: tl.constexpr
):
    """One row, in float32; Milakov and Gimelshein, 2018, arXiv:1805.02867, algorithm 3."""
    # The number of logits may exceed 2^31.
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, block)
    target = tl.load(targets + row)
    # A target outside the vocabulary has no log-prob, and memory outside the row is not read.
    wanted = tl.load(logits + target, mask=(target >= 0) & (target < vocabulary), other=float("nan")).to(tl.float32)

    largest = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, block):
        inside = start + columns < vocabulary
        values = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(values, axis=0))
        # Where all logits so far are -inf, -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift), axis=0)
        largest = higher
    normaliser = tl.log(total)
    tl.store(logprobs + row, wanted - largest - normaliser)

    if overwrite:
        # Every thread has read the row before one writes to it.
        tl.debug_barrier()
        for start in range(0, vocabulary, block):
            inside = start + columns < vocabulary
            values = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            excess = tl.exp(values - largest - normaliser) - tl.where(start + columns == target, 1.0, 0.0)
            tl.store(logits + start + columns, excess.to(logits.dtype.element_ty), mask=inside)
