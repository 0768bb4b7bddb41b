"""Preference losses: pure functions of log-probabilities."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

NEGLIGIBLE = 1e-12


def dpo_sigmoid_loss(chosen_logratios: Tensor, rejected_logratios: Tensor, beta: float) -> Tensor:
    """The DPO loss of each pair, -log sigmoid(beta * margin) (Rafailov et al., arXiv 2305.18290, equation 7).

    Args:
        chosen_logratios: (B,) log pi(y_w | x) - log pi_ref(y_w | x), summed over tokens.
        rejected_logratios: (B,) the same for y_l.
        beta: Strength of the pull towards the reference.

    Returns:
        (B,) losses in nats; ln 2 where the policy is its reference.
    """
    return -logsigmoid(beta * (chosen_logratios - rejected_logratios))


def token_mean_nll(chosen_logprobs: Tensor, num_chosen_tokens: int) -> Tensor:
    """Mean negative log-likelihood of the chosen tokens (Pang et al., arXiv 2404.19733, equation 1).

    Args:
        chosen_logprobs: (B,) log pi(y_w | x), summed over tokens.
        num_chosen_tokens: Completion tokens that the mean is over; the whole batch's when these are a part of it.

    Returns:
        A scalar in nats per token.
    """
    return -chosen_logprobs.sum() / num_chosen_tokens


def quiet_gradient(logprobs: Tensor) -> Tensor:
    """The same log-probs; gradients below 1e-12 become 0 on their way back.

    Where beta times the margin is large, a loss saturates and its gradient shrinks exponentially. The backward pass
    then fills with denormal numbers, with which a CPU is many times slower. Adam's epsilon (1e-8) hides such gradients.
    """
    if logprobs.requires_grad:
        # A new tensor, so that nothing happens to gradients that reach the given one by another way.
        logprobs = logprobs.view_as(logprobs)
        logprobs.register_hook(lambda grad: grad.masked_fill(grad.abs() < NEGLIGIBLE, 0.0))
    return logprobs
