"""Log-probs of tokens and the gradient of their logits by one Triton kernel, which reads the logits twice.

Triton is a part of torch's builds for CUDA, and compiles the kernel on the machine that it runs on. So log-probs and
gradients are compared with float64 before the first use with each device, dtype and vocabulary.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import one_hot

_DEVICES = ("cuda",)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Largest error of a log-prob in nats, and largest relative error of a gradient beside the rounding to its type.
_BOUND = 2e-4
_ROWS = 5


def log_softmax_rows(logits: Tensor, targets: Tensor, logprobs: Tensor, *, overwrite: bool) -> None:
    """Log softmax(logits) at the targets, summed in float32.

    Args:
        logits: (n, V), rows of consecutive numbers.
        targets: (n,) token ids; a log-prob of an id outside the vocabulary is NaN.
        logprobs: (n,) float32, is filled with the log-probs.
        overwrite: Replace the logits by softmax(logits) - onehot(targets), the gradient of the negative log-prob.
    """
    # Triton may be missing, and is slow to import.
    from evollm.models.head_kernel import log_softmax_rows as launch  # noqa: PLC0415

    launch(logits, targets, logprobs, overwrite=overwrite)


def takes_kernel(logits: Tensor) -> bool:
    """Whether the kernel is used for these logits; where a GPU could use it and does not, one warning says why."""
    if logits.device.type not in _DEVICES or logits.dtype not in _DTYPES:
        return False
    refusal = why_not_fused(logits.device, logits.dtype, logits.shape[1])
    if refusal:
        _warn_of_slow_head(refusal)
    return not refusal


@lru_cache
def why_not_fused(device: torch.device, dtype: torch.dtype, vocabulary: int) -> str:
    """Why the kernel is not used for logits of this size on this device; "" if it gave right results in a trial."""
    if device.type not in _DEVICES:
        return "it runs on CUDA devices"
    if dtype not in _DTYPES:
        return f"it takes bfloat16, float16 and float32, not {dtype}"
    try:
        wrong = _try_kernel(device, dtype, vocabulary)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, a compiler or a driver may be missing, or the card unknown to Triton.
        first, *_ = str(error).strip().splitlines() or [""]
        return f"Triton says: {type(error).__name__}: {first}"
    return f"in a trial its {wrong} were wrong" if wrong else ""


@lru_cache
def _warn_of_slow_head(reason: str) -> None:
    what = "log-probs take several kernels after the head instead of one, which is slower"
    warnings.warn(f"{what}: the Triton kernel is not taken ({reason})", UserWarning, stacklevel=2)


def _try_kernel(device: torch.device, dtype: torch.dtype, vocabulary: int) -> str:
    """What the kernel gets wrong, against float64: "log-probs", "gradients" or ""."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_ROWS, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (_ROWS,), generator=generator)
    # Two rows with a small p - 1, one with excluded tokens in front, and two that are not finite.
    for row, surplus in ((0, 3), (4, 4)):
        drawn[row, targets[row]] = drawn[row].logsumexp(dim=0) + surplus
    drawn[1, : vocabulary // 2] = -torch.inf
    drawn[2, 0], drawn[3, -1] = torch.inf, torch.nan
    given, targets = drawn.to(device, dtype), targets.to(device)

    every = given.double().log_softmax(dim=1)
    exact = every.gather(1, targets.unsqueeze(1)).squeeze(1)
    excess = every.exp() - one_hot(targets, vocabulary)
    limits = torch.finfo(dtype)
    for overwrite in (False, True):
        logits, logprobs = given.clone(), torch.empty(_ROWS, dtype=torch.float32, device=device)
        log_softmax_rows(logits, targets, logprobs, overwrite=overwrite)
        if not torch.allclose(logprobs.double(), exact, rtol=0, atol=_BOUND, equal_nan=True):
            return "log-probs"
    # The logits of the second launch. In float16 a small p is rounded to a multiple of the smallest number.
    smallest = limits.smallest_normal * limits.eps
    right = torch.allclose(logits.double(), excess, rtol=limits.eps + _BOUND, atol=smallest, equal_nan=True)
    return "" if right else "gradients"
