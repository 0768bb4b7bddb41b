"""Log-probs of tokens from hidden states, without the logits of all tokens in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

# Bytes of float32 logits in one tile: large enough for full speed, small beside the activations.
TILE_BYTES = 128 * 2**20


def token_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Log softmax(hidden W^T + bias) at the targets.

    Logits are computed tile by tile. If `hidden` requires a gradient, the forward pass also computes the gradient of
    each log-prob with respect to its hidden state, W[y] - sum_v p_v W[v], and the backward pass only scales it: logits
    are not recomputed, and D numbers per token are saved instead of V. The head is frozen and gets no gradient.

    Args:
        hidden: (n, D) hidden states.
        weight: (V, D) of the head.
        bias: (V,) or None.
        targets: (n,) token ids.

    Returns:
        (n,) log-probs, at least in float32.
    """
    result = _TokenLogprobs.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


def token_divergences(hidden: Tensor, reference: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Exact KL(pi || ref) of the next token, sum_v pi(v) (log pi(v) - log ref(v)), tile by tile and without gradients.

    Args:
        hidden: (n, D) hidden states of the policy.
        reference: (n, D) hidden states of the reference.
        weight: (V, D) of the head.
        bias: (V,) or None.

    Returns:
        (n,) in nats, at least in float32.
    """
    tile = max(1, TILE_BYTES // (4 * len(weight)))
    tiles = [slice(start, start + tile) for start in range(0, len(hidden), tile)]
    parts = [
        divergences_of(linear(hidden[rows], weight, bias), linear(reference[rows], weight, bias)) for rows in tiles
    ]
    return torch.cat(parts)


def divergences_of(logits: Tensor, reference: Tensor) -> Tensor:
    """Exact KL(pi || ref) from logits, (..., V) and (..., V) -> (...), at least in float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    policy, frozen = (values.to(wide).log_softmax(dim=-1) for values in (logits, reference))
    # A token that the policy excludes, with a logit of -inf, contributes 0.
    return torch.where(policy == -torch.inf, 0.0, policy.exp() * (policy - frozen)).sum(dim=-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        differentiable = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        gradient = torch.empty(hidden.shape if differentiable else 0, dtype=wide, device=hidden.device)
        tile = max(1, TILE_BYTES // (4 * len(weight)))
        for start in range(0, len(hidden), tile):
            rows = slice(start, start + tile)
            wanted = targets[rows].unsqueeze(1)
            logits = linear(hidden[rows], weight, bias).to(wide)
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            logprobs[rows] = (logits.gather(1, wanted) - normaliser).squeeze(1)
            if differentiable:
                # Rounding p - 1 rather than p: where p[y] is nearly 1, W[y] - sum p W would lose all its digits.
                excess = logits.sub_(normaliser).exp_()
                excess.scatter_add_(1, wanted, excess.new_full(wanted.shape, -1.0))
                gradient[rows] = -(excess.to(weight.dtype) @ weight).to(wide)
        if differentiable:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0].unsqueeze(1)).to(ctx.dtype), None, None, None
