from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from evollm.algorithms.losses import LOSSES, WHOLE_BATCH, LossSettings, PairScores

LENGTHS = {"chosen_lengths": (4, 5, 2), "rejected_lengths": (3, 6, 7)}


def three_pairs(dtype: torch.dtype = torch.float64) -> PairScores:
    """Log-ratios 0, 0.1, -0.9 of the chosen and 0, -9.9, -20.9 of the rejected: margins 0, 10 and 20."""
    return PairScores(
        chosen=torch.tensor([-0.5, -10, -1], dtype=dtype),
        rejected=torch.tensor([-0.1, -30, -21], dtype=dtype),
        reference_chosen=torch.tensor([-0.5, -10.1, -0.1], dtype=dtype),
        reference_rejected=torch.tensor([-0.1, -20.1, -0.1], dtype=dtype),
        mean_chosen_length=11 / 3,
        **{name: torch.tensor(lengths) for name, lengths in LENGTHS.items()},
    )


GOLDEN = [
    ("sigmoid", 0, (0.693147, 0.313262, 0.126928)),
    ("sigmoid", 0.1, (0.693147, 0.413262, 0.326928)),
    ("robust", 0.1, (0.693147, 0.188262, -0.123072)),
    ("hinge", 0, (1, 0, 0)),
    ("nca_pair", 0, (1.386294, 1.195220, 1.122047)),
    ("bco_pair", 0, (1.386294, 1.004121, 0.855775)),
    ("sppo_hard", 0, (50, 48.02, 287.62)),
    ("apo_zero", 0, (1, 0.768412, 0.632557)),
    ("apo_down", 0, (1, 0.771441, 0.596718)),
    ("ipo", 0, (25, 11.0889, 6.072704)),
    ("sigmoid_norm", 0, (0.693147, 0.613129, 0.574377)),
    # By hand: the margins of the policy sorted are -0.4, 20, 20, the reference's -0.4, 0, 10: distances 0, 20, 10.
    ("aot", 0, (0.693147, 0.126928, 0.313262)),
    # By hand: chosen log-ratios sorted are -0.9, 0, 0.1, rejected -20.9, -9.9, 0: distances 20, 9.9, 0.1.
    ("aot_unpaired", 0, (0.126928, 0.315961, 0.688160)),
    # By hand: the likelihood of 11 tokens, a third of the mean for each pair.
    ("sft", 0, (0.5 * 3 / 11, 10 * 3 / 11, 1 * 3 / 11)),
]


@pytest.mark.parametrize(("name", "smoothing", "expected"), GOLDEN, ids=[f"{name}-{eps}" for name, eps, _ in GOLDEN])
def test_each_loss_has_the_values_worked_out_by_hand(name: str, smoothing: float, expected: tuple[float, ...]) -> None:
    found = LOSSES[name](three_pairs(), LossSettings(beta=0.1, label_smoothing=smoothing))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_exo_is_the_reverse_kl_to_the_smoothed_labels() -> None:
    pairs, settings = three_pairs(), LossSettings(beta=0.1, label_smoothing=0.2)
    policy = torch.stack([(0.1 * pairs.margins).sigmoid(), (-0.1 * pairs.margins).sigmoid()])
    labels = torch.tensor([[0.8], [0.2]], dtype=torch.float64)
    torch.testing.assert_close(LOSSES["exo_pair"](pairs, settings), (policy * (policy / labels).log()).sum(0))


def test_discopop_blends_the_logistic_and_the_exponential_loss() -> None:
    found = LOSSES["discopop"](three_pairs(), LossSettings(beta=0.1, discopop_tau=0.05))
    shares = [1 / (1 + math.exp(-logit / 0.05)) for logit in (0, 1, 2)]
    expected = [
        (1 - share) * math.log1p(math.exp(-logit)) + share * math.exp(-logit)
        for share, logit in zip(shares, (0, 1, 2), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_simpo_and_orpo_compare_mean_log_probs_and_know_no_reference() -> None:
    pairs = three_pairs()
    chosen, rejected = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    expected = torch.log1p((-(2.0 * (chosen - rejected) - 0.5)).exp())
    torch.testing.assert_close(LOSSES["simpo"](pairs, LossSettings(beta=2.0)), expected)
    odds = [side.exp() / (1 - side.exp()) for side in (chosen, rejected)]
    ratio = torch.log1p((-(odds[0] / odds[1]).log()).exp())
    torch.testing.assert_close(LOSSES["orpo"](pairs, LossSettings(beta=0.1)), -pairs.chosen * 3 / 11 + 0.1 * ratio)


# As the documentation of `label_smoothing` says.
SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_only_losses_that_are_said_to_see_label_smoothing_change_with_it(name: str) -> None:
    one, other = (LOSSES[name](three_pairs(), LossSettings(label_smoothing=eps)) for eps in (0.1, 0.2))
    assert torch.equal(one, other) == (name not in SMOOTHED)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - WHOLE_BATCH))
def test_a_part_of_a_batch_has_its_part_of_the_loss(name: str) -> None:
    settings = LossSettings(label_smoothing=0.1)
    whole = LOSSES[name](three_pairs(), settings)
    parts = [LOSSES[name](part(three_pairs(), rows), settings) for rows in ([0], [1, 2])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_has_finite_gradients_where_it_saturates(name: str) -> None:
    pairs = three_pairs(torch.float32)
    far = torch.tensor([-900.0, -3.0, -2.0], requires_grad=True)
    pairs = PairScores(**{**vars(pairs), "chosen": far})
    (gradient,) = torch.autograd.grad(LOSSES[name](pairs, LossSettings(label_smoothing=0.1)).sum(), far)
    assert gradient.isfinite().all()


def part(pairs: PairScores, rows: list[int]) -> PairScores:
    """Some rows of the pairs."""
    return PairScores(
        **{name: value[rows] if isinstance(value, Tensor) else value for name, value in vars(pairs).items()}
    )
