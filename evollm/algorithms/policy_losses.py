"""Policy gradients of groups of answers: pure functions of log-probs and rewards, each with its paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray: TypeAlias = NDArray[np.float64]

# What a standard deviation is made larger by, as TRL does.
EPSILON = 1e-4
SCALES = ("group", "batch", "none")


def group_advantages(rewards: FloatArray, scale: str) -> FloatArray:
    """Advantages of answers over the others to their prompt.

    Args:
        rewards: (B, G) finite rewards of G answers to each of B prompts.
        scale: What the distance from the group's mean is divided by: `group`, the group's standard deviation (GRPO,
            Shao et al. 2024, arXiv 2402.03300, section 4.1.2); `batch`, that of all rewards (arXiv 2508.08221); `none`,
            nothing (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). Standard deviations are those of a sample, with
            `EPSILON` added.

    Returns:
        (B, G) advantages; 0 in a group with equal rewards.
    """
    centred: FloatArray = rewards - rewards.mean(axis=1, keepdims=True)
    # Exactly 0, which the mean's rounding is not.
    centred[np.ptp(rewards, axis=1) == 0] = 0.0
    if scale == "none":
        return centred
    spread = rewards.std(axis=1, ddof=1, keepdims=True) if scale == "group" else rewards.std(ddof=1)
    found: FloatArray = centred / (spread + EPSILON)
    return found


def clipped_surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped surrogate of each token, as a loss (Schulman et al. 2017, arXiv 1707.06347, equation 7).

    Args:
        logprobs: (C,) log pi of tokens.
        old: (C,) log-probs under the policy that the tokens were sampled from.
        advantages: (C,) the advantage of each token's answer.
        low: The ratio pi / old has no gradient below 1 - `low` where the advantage is negative ...
        high: ... and above 1 + `high` where it is positive; DAPO (Yu et al. 2025, arXiv 2503.14476) takes a larger one.

    Returns:
        (C,) losses.
    """
    ratios = (logprobs - old).exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)


def divergence_estimates(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(C,) estimates of KL(pi || ref) of each token, at least 0: Schulman's k3, equation 4 of arXiv 2402.03300."""
    ratios = reference - logprobs
    return ratios.exp() - ratios - 1


def _by_answer(lengths: FloatArray, most: int) -> FloatArray:
    """GRPO's: the mean over answers of the mean over an answer's tokens, so that tokens of long answers count less."""
    del most
    return 1 / (len(lengths) * np.maximum(lengths, 1))


def _by_longest(lengths: FloatArray, most: int) -> FloatArray:
    """Dr. GRPO's: the sum over tokens by a constant, the number of answers times the longest possible one."""
    return np.full(len(lengths), 1 / (len(lengths) * most))


def _by_token(lengths: FloatArray, most: int) -> FloatArray:
    """DAPO's: the mean over the tokens of all answers."""
    del most
    return np.full(len(lengths), 1 / max(1, lengths.sum()))


# By TRL's names: (lengths (n,) of the answers that count, 0 for others; most tokens of an answer) -> (n,) weights.
TOKEN_WEIGHTS: Mapping[str, Callable[[FloatArray, int], FloatArray]] = {
    "grpo": _by_answer,
    "dr_grpo": _by_longest,
    "dapo": _by_token,
    # TRL's means over the tokens of one device's part of a batch; here a batch is never averaged by parts.
    "bnpo": _by_token,
}
