from __future__ import annotations

import math

import pytest
import torch

from evollm.algorithms.losses import dpo_sigmoid_loss, flush_small_gradients, token_mean_nll


def test_sigmoid_loss_equals_the_arithmetic_by_hand() -> None:
    """-log sigmoid(beta d) = log(1 + exp(-beta d)).

    The pairs have log pi (-0.5, -10, -1) and (-0.1, -30, -21), log ref (-0.5, -10.1, -0.1) and (-0.1, -20.1, -0.1):
        log-ratios chosen (0, 0.1, -0.9), rejected (0, -9.9, -20.9), margins d = (0, 10, 20)
        at beta 0.1: log(1 + e^0) = 0.693147, log(1 + e^-1) = 0.313262, log(1 + e^-2) = 0.126928
    """
    chosen, rejected = torch.tensor([0.0, 0.1, -0.9]), torch.tensor([0.0, -9.9, -20.9])
    losses = dpo_sigmoid_loss(chosen, rejected, beta=0.1)
    assert losses.tolist() == pytest.approx([0.693147, 0.313262, 0.126928], abs=1e-6)


def test_sigmoid_loss_stays_finite_for_large_margins() -> None:
    losses = dpo_sigmoid_loss(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4]), beta=1.0)
    assert losses.tolist() == pytest.approx([0.0, 2e4])


def test_nll_is_a_mean_over_tokens_not_over_pairs() -> None:
    """Two completions of 1 and 3 tokens with log-probs -1 and -9: (1 + 9) / 4 tokens, not (1 / 1 + 9 / 3) / 2."""
    assert token_mean_nll(torch.tensor([-1.0, -9.0]), 4).item() == pytest.approx(2.5)


def test_the_loss_of_a_policy_that_is_its_reference_is_ln_2() -> None:
    assert dpo_sigmoid_loss(torch.zeros(1), torch.zeros(1), beta=0.7).item() == pytest.approx(math.log(2))


def test_a_saturated_pair_sends_no_gradient_and_the_others_theirs() -> None:
    """At beta 1 a margin of 60 leaves exp(-60), about 1e-26, with which the backward pass would fill with denormals."""
    margins = torch.tensor([60.0, 1.0], requires_grad=True)
    zero = torch.zeros(2)
    dpo_sigmoid_loss(flush_small_gradients(margins), zero, 1.0).sum().backward()
    assert margins.grad is not None
    assert margins.grad[0] == 0.0
    assert margins.grad[1].item() == pytest.approx(-1 / (1 + math.exp(1.0)), rel=1e-6)
