"""Loss scaling for backward passes through a float16 base, so that small gradients do not underflow to 0.

float16 has no number between 0 and 6e-8. The gradients of a loss that is a mean over many pairs, or has a small weight,
underflow in the activations (Micikevicius et al., Mixed Precision Training, arXiv 1710.03740). The gradient with
respect to the log-probs is known before the backward pass through the base, so the scale is computed from this
gradient, not adapted from step to step: scaling brings the largest of its entries to between 1/2 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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


class ScaledBackward:
    """The backward pass of members that share a forward pass, with one scale for each member.

    Scales are powers of two, which leave the mantissa unchanged, and are divided out in float32. A gradient that
    overflows float16 is recomputed with a smaller scale; a gradient that overflows at every scale stays infinite, and
    the caller treats the member as diverged.

    Args:
        parameters: The trained parameters of each member, float32 or wider.
    """

    def __init__(self, parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        self._parameters = parameters
        self._lowered = [0] * len(parameters)
        self._found: list[list[Tensor | None]] = [[] for _ in parameters]
        self._missing = set(range(len(parameters)))

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
        exponents = [scale_exponent(one) - down for one, down in zip(largest, self._lowered, strict=True)]
        directions = [
            torch.stack([gradient * 2.0**k for k, gradient in zip(exponents, one, strict=True)]) for one in towards
        ]
        inputs = [parameter for parameters in self._parameters for parameter in parameters]
        found = iter(torch.autograd.grad(policies.tensors, inputs, directions, allow_unused=True))
        for member, (parameters, exponent) in enumerate(zip(self._parameters, exponents, strict=True)):
            gradients = [next(found) for _ in parameters]
            if member not in self._missing:
                continue
            self._found[member] = [None if one is None else one * 2.0**-exponent for one in gradients]
            can_be_lowered = math.isfinite(largest[member]) and self._lowered[member] < _STEP * _STEPS
            if can_be_lowered and not _all_finite(gradients):
                self._lowered[member] += _STEP
            else:
                self._missing.remove(member)
        return bool(self._missing)

    def accumulate(self) -> None:
        """Add the computed gradients to `grad` of the parameters."""
        for parameters, gradients in zip(self._parameters, self._found, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _all_finite(gradients: Sequence[Tensor | None]) -> bool:
    sums = [gradient.abs().sum() for gradient in gradients if gradient is not None]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())
