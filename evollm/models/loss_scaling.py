"""Loss scaling for backward passes through a float16 base, so that small gradients do not underflow to 0.

float16 has no number between 0 and 6e-8. The gradients of a loss that is a mean over many pairs, or has a small weight,
underflow in the activations (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740). The gradient with
respect to the log-probs is known before the backward pass through the base, so the scale is computed from this
gradient, not adapted from step to step: scaling brings the largest of its entries to between 1/2 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from evollm.models.adapters.rows import Row
from evollm.models.adapters.stack import Stack
from evollm.models.logprobs import TokenLogprobs

# Limit of the scale's exponent, so that float32 gradients neither overflow nor become denormal.
_LARGEST_EXPONENT = 100
# If gradients overflow float16 nevertheless, the scale is lowered by 2^4, at most four times. Lowering by 2^8 in one
# step rounded some gradients to a fifth.
_STEP, _STEPS = 4, 4


def scale_exponent(largest: float) -> int:
    """The k for which `largest` * 2^k is between 1/2 and 1; 0 if `largest` is 0 or not finite."""
    if largest == 0 or not math.isfinite(largest):
        return 0
    return max(-_LARGEST_EXPONENT, min(_LARGEST_EXPONENT, -math.frexp(largest)[1]))


class Gradients(Protocol):
    """The gradients of the members of a pass."""

    def backward(self, outputs: Sequence[Tensor], directions: Sequence[Tensor]) -> list[list[Tensor]]:
        """The gradients of the outputs in these directions; for each member one (P,) for each device."""

    def add(self, member: int, gradients: Sequence[Tensor]) -> None:
        """Add gradients to `grad` of a member's parameters."""


class PlainGradients:
    """Gradients of a pass of PEFT's own layers.

    Args:
        rows: The rows of each member's parameters.
    """

    def __init__(self, rows: Sequence[Sequence[Row]]) -> None:
        self._rows = rows

    def backward(self, outputs: Sequence[Tensor], directions: Sequence[Tensor]) -> list[list[Tensor]]:
        """See `Gradients.backward`."""
        parameters = [parameter for rows in self._rows for row in rows for parameter in row.parameters]
        found = iter(torch.autograd.grad(outputs, parameters, directions, allow_unused=True))
        return [[row.filled([next(found) for _ in row.parameters]) for row in rows] for rows in self._rows]

    def add(self, member: int, gradients: Sequence[Tensor]) -> None:
        """See `Gradients.add`."""
        for row, gradient in zip(self._rows[member], gradients, strict=True):
            row.gradient().add_(gradient)


class StackedGradients:
    """Gradients of a routed pass.

    Args:
        stack: The stack of the pass, which is training.
        members: The members' numbers in it.
    """

    def __init__(self, stack: Stack, members: Sequence[int]) -> None:
        assert stack.gradient is not None
        self._stack = stack
        self._total = stack.gradient
        self._members = members

    def backward(self, outputs: Sequence[Tensor], directions: Sequence[Tensor]) -> list[list[Tensor]]:
        """See `Gradients.backward`."""
        self._stack.gradient = found = torch.zeros_like(self._total)
        torch.autograd.backward(outputs, directions)
        return [[found[member]] for member in self._members]

    def add(self, member: int, gradients: Sequence[Tensor]) -> None:
        """See `Gradients.add`."""
        self._total[self._members[member]].add_(gradients[0])


class ScaledBackward:
    """The backward pass of members that share a forward pass, with one scale for each member.

    Scales are powers of two, which leave the mantissa unchanged, and are divided out in float32. A gradient that
    overflows float16 is recomputed with a smaller scale; a gradient that overflows at every scale stays infinite, and
    the caller treats the member as diverged.

    Args:
        gradients: The gradients of the members, in float32 or wider.
    """

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients
        self._lowered: dict[int, int] = {}
        self._found: dict[int, list[Tensor]] = {}

    def attempt(self, loss: Callable[[TokenLogprobs], Tensor], policies: TokenLogprobs) -> bool:
        """Compute the gradients of members that have none yet.

        Args:
            loss: From the members' log-probs to the sum of their losses.
            policies: The members' log-probs, from a new forward pass.

        Returns:
            Whether a member's gradient exceeds float16, so that another forward pass and attempt are needed.
        """
        leaves = policies.like([tensor.detach().requires_grad_() for tensor in policies.tensors])
        towards = torch.autograd.grad(loss(leaves), leaves.tensors, materialize_grads=True)
        largest = torch.stack([one.abs().flatten(1).amax(dim=1) for one in towards]).amax(dim=0).tolist()
        exponents = [scale_exponent(one) - self._lowered.get(member, 0) for member, one in enumerate(largest)]
        directions = [
            torch.stack([gradient * 2.0**k for k, gradient in zip(exponents, one, strict=True)]) for one in towards
        ]
        for member, gradients in enumerate(self._gradients.backward(policies.tensors, directions)):
            if member in self._found:
                continue
            lowered = self._lowered.get(member, 0)
            if math.isfinite(largest[member]) and lowered < _STEP * _STEPS and not _all_finite(gradients):
                self._lowered[member] = lowered + _STEP
            else:
                self._found[member] = [one * 2.0 ** -exponents[member] for one in gradients]
        return len(self._found) < len(largest)

    def accumulate(self) -> None:
        """Add the computed gradients to `grad` of the parameters."""
        for member, gradients in self._found.items():
            self._gradients.add(member, gradients)


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    return bool(torch.isfinite(torch.stack([gradient.abs().sum() for gradient in gradients])).all())
