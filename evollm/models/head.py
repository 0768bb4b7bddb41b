"""Log-probs of tokens from hidden states, without the logits of all tokens in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from evollm.models.fused_head import log_softmax_rows, takes_kernel

# Bytes of float32 logits in one tile: large enough for full speed, small beside the activations.
TILE_BYTES = 128 * 2**20
# On a GPU, where each launch costs time, a tile takes this share of the memory: 2,200 rows of 152,000 tokens on 80 GB.
_TILE_SHARE = 1 / 64
# Memory that a tile takes while its log-probs are computed, in units of its float32 logits.
_PEAK = 3


def _is_card(device: torch.device) -> bool:
    return device.type == "cuda"


def tile_bytes(device: torch.device) -> int:
    """Bytes of float32 logits in one tile on a device."""
    if not _is_card(device):
        return TILE_BYTES
    # The card's whole memory, not what is free: the bits of a log-prob depend on the tile.
    return max(TILE_BYTES, int(_TILE_SHARE * torch.cuda.get_device_properties(device).total_memory))


def extra_bytes(device: torch.device) -> int:
    """Bytes that the head takes on a device beside those of a tile on a CPU, which are small beside the activations."""
    return _PEAK * (tile_bytes(device) - TILE_BYTES)


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log softmax((hidden W^T + bias) / temperature) at the targets.

    Logits are computed tile by tile. If `hidden` requires a gradient, the forward pass also computes the gradient of
    each log-prob with respect to its hidden state, W[y] - sum_v p_v W[v], and the backward pass only scales it: logits
    are not recomputed, and D numbers per token are saved instead of V. The head is frozen and gets no gradient.

    Args:
        hidden: (n, D) hidden states.
        weight: (V, D) of the head.
        bias: (V,) or None.
        targets: (n,) token ids.
        temperature: Divides the logits.

    Returns:
        (n,) log-probs, at least in float32.
    """
    result = _TokenLogprobs.apply(hidden, weight, bias, targets, temperature)  # type: ignore[no-untyped-call]
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
    parts = [
        divergences_of(linear(hidden[rows], weight, bias), linear(reference[rows], weight, bias))
        for rows in _tiles(hidden, weight)
    ]
    return torch.cat(parts)


def divergences_of(logits: Tensor, reference: Tensor) -> Tensor:
    """Exact KL(pi || ref) from logits, (..., V) and (..., V) -> (...), at least in float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    policy, frozen = (values.to(wide).log_softmax(dim=-1) for values in (logits, reference))
    # A token that the policy excludes, with a logit of -inf, contributes 0.
    return torch.where(policy == -torch.inf, 0.0, policy.exp() * (policy - frozen)).sum(dim=-1)


def _tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    tile = max(1, tile_bytes(hidden.device) // (4 * len(weight)))
    return [slice(start, start + tile) for start in range(0, len(hidden), tile)]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        differentiable = ctx.needs_input_grad[0]
        logprobs = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        # (n, D) sum_v p_v W[v] - W[y], the gradient of each negative log-prob.
        gradient = torch.empty(hidden.shape if differentiable else 0, dtype=weight.dtype, device=hidden.device)
        for rows in _tiles(hidden, weight):
            # (n, V) logits, which become p - onehot(y) if differentiable.
            tile = linear(hidden[rows], weight, bias)
            if temperature != 1:
                # In half precision the quotient would be rounded, and not be that of the logits that are sampled from.
                tile = tile.to(wide).div_(temperature)
            if takes_kernel(tile):
                log_softmax_rows(tile, targets[rows], logprobs[rows], overwrite=differentiable)
            else:
                tile = _log_softmax_rows(tile, targets[rows], logprobs[rows], differentiable)
            if differentiable:
                torch.mm(tile.to(weight.dtype), weight, out=gradient[rows])
        if differentiable:
            ctx.save_for_backward(gradient)
            ctx.dtype = hidden.dtype
            ctx.temperature = temperature
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = -grad_outputs[0] if ctx.temperature == 1 else -grad_outputs[0] / ctx.temperature
        return (gradient * scale.unsqueeze(1)).to(ctx.dtype), None, None, None, None


def _log_softmax_rows(logits: Tensor, targets: Tensor, logprobs: Tensor, overwrite: bool) -> Tensor:
    """`fused_head.log_softmax_rows` by torch's operators; the result is (n, V), and the logits may be changed."""
    wanted = targets.unsqueeze(1)
    # Two kernels instead of ten; on a CPU neither way is faster.
    if _is_card(logits.device):
        every = logits.log_softmax(dim=1, dtype=logprobs.dtype)
        found = every.gather(1, wanted)
    else:
        every = logits.to(logprobs.dtype)
        normaliser = every.logsumexp(dim=1, keepdim=True)
        found = every.gather(1, wanted) - normaliser
        if overwrite:
            every.sub_(normaliser)
    logprobs.copy_(found.squeeze(1))
    if not overwrite:
        return every
    # Rounding p - 1 rather than p: where p[y] is nearly 1, W[y] - sum p W would lose all its digits.
    return every.exp_().scatter_add_(1, wanted, every.new_full((1, 1), -1.0).expand_as(wanted))
