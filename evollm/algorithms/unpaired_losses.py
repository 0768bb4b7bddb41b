"""Losses of answers with labels: pure functions of log-ratios, each with its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# (log-ratios (B,), which answers are desirable (B,), divergence, beta) -> losses (B,)
UnpairedLoss = Callable[[Tensor, Tensor, float, float], Tensor]


def kto(logratios: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    """KTO (Ethayarajh et al., arXiv 2402.01306, equation 7), without the weights and its constant.

    Args:
        logratios: (B,) log pi(y | x) - log pi_ref(y | x), summed over tokens.
        desirable: (B,) whether an answer is desirable.
        kl: The reference point z_0, an estimate of KL(pi || pi_ref) in nats, at least 0.
        beta: How fast the value of an answer saturates, and so the strength of the pull towards the reference.

    Returns:
        (B,) 1 - sigmoid(beta (r - z_0)) of desirable answers with log-ratio r, 1 - sigmoid(beta (z_0 - r)) of others.
    """
    above = beta * (logratios - kl)
    return 1 - torch.where(desirable, above, -above).sigmoid()


def apo_zero_unpaired(logratios: Tensor, desirable: Tensor, kl: float, beta: float) -> Tensor:
    """APO-zero of single answers (D'Oosterlinck et al., arXiv 2408.06266, equation 7): `kto` with a divergence of 0."""
    del kl
    return kto(logratios, desirable, 0.0, beta)


# By TRL's names.
UNPAIRED_LOSSES: Mapping[str, UnpairedLoss] = {loss.__name__: loss for loss in (kto, apo_zero_unpaired)}

# Losses with a divergence, which is estimated from mismatched answers.
WITH_KL = frozenset({"kto"})
