"""Losses of preference pairs: pure functions of summed log-probs, each with its paper.

`LOSSES` has them by TRL's names. Each function maps the scores of B pairs and the settings to (B,) losses, whose mean
is the loss of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from evollm.checks import finite_number, positive_number
from evollm.errors import ConfigurationError

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
        num_chosen_tokens: Completion tokens of the whole optimizer batch, of which these pairs may be a part.

    Returns:
        A scalar in nats per token.
    """
    return -chosen_logprobs.sum() / num_chosen_tokens


def flush_small_gradients(logprobs: Tensor) -> Tensor:
    """The same log-probs, with a hook that sets gradients below 1e-12 to 0.

    Where beta times the margin is large, a loss saturates and its gradient shrinks exponentially. The backward pass
    then fills with denormal numbers, with which some CPUs are many times slower. Adam's epsilon (1e-8) makes the update
    by such gradients negligible.
    """
    if logprobs.requires_grad:
        # A view, so that the hook sees only the gradient of the result.
        logprobs = logprobs.view_as(logprobs)
        logprobs.register_hook(lambda grad: grad.masked_fill(grad.abs() < NEGLIGIBLE, 0.0))
    return logprobs


@dataclass(frozen=True)
class PairScores:
    """Inputs of a loss; sums are over the tokens of a completion, its EOS or end of turn included.

    Attributes:
        chosen: (B,) log pi(y_w | x).
        rejected: (B,) log pi(y_l | x).
        reference_chosen: (B,) log pi_ref(y_w | x).
        reference_rejected: (B,) log pi_ref(y_l | x).
        chosen_lengths: (B,) tokens of y_w.
        rejected_lengths: (B,) tokens of y_l.
        mean_chosen_length: Mean tokens of y_w over the whole optimizer batch, of which these pairs may be a part.
        chosen_likelihood: (B,) unweighted log pi(y_w | x) if the sums above weigh tokens (`ld_alpha`); None: `chosen`.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    mean_chosen_length: float
    chosen_likelihood: Tensor | None = None

    @property
    def chosen_logratios(self) -> Tensor:
        """(B,) log pi - log pi_ref of y_w."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """(B,) log pi - log pi_ref of y_l."""
        return self.rejected - self.reference_rejected

    @property
    def margins(self) -> Tensor:
        """(B,) log-ratio of y_w minus that of y_l."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def token_margins(self) -> Tensor:
        """(B,) margins of log-ratios that are means over tokens."""
        return self.chosen_logratios / self.chosen_lengths - self.rejected_logratios / self.rejected_lengths


@dataclass(frozen=True)
class LossConstants:
    """Parameters of the losses that no mutation changes. A field is a setting of `DPO`, and so an argument of it.

    Attributes:
        loss_weights: With several losses the weight of each; None: 1.
        discopop_tau: Temperature of the blend in `discopop`, above 0.
        simpo_gamma: Target margin of `simpo`, in units of beta times a mean log-prob.
    """

    loss_weights: Sequence[float] | None = None
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.loss_weights is not None:
            if isinstance(self.loss_weights, str) or not isinstance(self.loss_weights, Sequence):
                raise ConfigurationError("loss_weights", self.loss_weights, "must be a list of numbers, or None")
            weights = [float(finite_number("loss_weights", weight)) for weight in self.loss_weights]
            object.__setattr__(self, "loss_weights", weights)
        object.__setattr__(self, "discopop_tau", float(positive_number("discopop_tau", self.discopop_tau)))
        object.__setattr__(self, "simpo_gamma", float(finite_number("simpo_gamma", self.simpo_gamma)))


@dataclass(frozen=True)
class LossSettings(LossConstants):
    """All parameters of the losses.

    Attributes:
        beta: Strength of the pull towards the reference; its exact role is in each loss's formula.
        label_smoothing: Assumed probability that a label is wrong, in [0, 0.5).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0


PairLoss = Callable[[PairScores, LossSettings], Tensor]


def sigmoid(pairs: PairScores, settings: LossSettings) -> Tensor:
    """DPO (Rafailov et al., arXiv 2305.18290, equation 7); with label smoothing conservative DPO (Mitchell, 2023)."""
    if settings.label_smoothing == 0:
        return dpo_sigmoid_loss(pairs.chosen_logratios, pairs.rejected_logratios, settings.beta)
    return _smoothed(settings.beta * pairs.margins, settings.label_smoothing)


def robust(pairs: PairScores, settings: LossSettings) -> Tensor:
    """Robust DPO: unbiased if the share `label_smoothing` of labels is flipped (Chowdhury et al., arXiv 2403.00409)."""
    logits, flipped = settings.beta * pairs.margins, settings.label_smoothing
    return (-(1 - flipped) * logsigmoid(logits) + flipped * logsigmoid(-logits)) / (1 - 2 * flipped)


def hinge(pairs: PairScores, settings: LossSettings) -> Tensor:
    """Hinge on beta times the margin (SLiC-HF, arXiv 2305.10425, with the log-ratios of RSO, arXiv 2309.06657)."""
    return relu(1 - settings.beta * pairs.margins)


def ipo(pairs: PairScores, settings: LossSettings) -> Tensor:
    """IPO: the target of the token-mean margin is 1 / (2 beta) (Azar et al., arXiv 2310.12036, equation 17)."""
    return (pairs.token_margins - 1 / (2 * settings.beta)) ** 2


def sigmoid_norm(pairs: PairScores, settings: LossSettings) -> Tensor:
    """DPO with log-ratios that are means over tokens (Lambert et al., Tulu 3, arXiv 2411.15124)."""
    return -logsigmoid(settings.beta * pairs.token_margins)


def exo_pair(pairs: PairScores, settings: LossSettings) -> Tensor:
    """EXO: reverse KL to the smoothed labels (Ji et al., arXiv 2402.00856, equation 16); smoothing must be above 0."""
    logits = settings.beta * pairs.margins
    labels = torch.tensor(settings.label_smoothing, dtype=logits.dtype, device=logits.device)
    right = logits.sigmoid() * (logsigmoid(logits) - torch.log1p(-labels))
    return right + (-logits).sigmoid() * (logsigmoid(-logits) - labels.log())


def nca_pair(pairs: PairScores, settings: LossSettings) -> Tensor:
    """NCA for two completions (Chen et al., arXiv 2402.05369)."""
    chosen, rejected = settings.beta * pairs.chosen_logratios, settings.beta * pairs.rejected_logratios
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(pairs: PairScores, settings: LossSettings) -> Tensor:
    """BCO without its reward shift: a binary classifier of single completions (Jung et al., arXiv 2404.04656)."""
    chosen, rejected = settings.beta * pairs.chosen_logratios, settings.beta * pairs.rejected_logratios
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(pairs: PairScores, settings: LossSettings) -> Tensor:
    """SPPO with hard labels, a win probability of 1 (Wu et al., arXiv 2405.00675, equation 4.7)."""
    goal = 0.5 / settings.beta
    return (pairs.chosen_logratios - goal) ** 2 + (pairs.rejected_logratios + goal) ** 2


def apo_zero(pairs: PairScores, settings: LossSettings) -> Tensor:
    """APO for chosen sides better than the model's own (D'Oosterlinck et al., arXiv 2408.06266, equation 7)."""
    chosen, rejected = settings.beta * pairs.chosen_logratios, settings.beta * pairs.rejected_logratios
    return (1 - chosen.sigmoid()) + rejected.sigmoid()


def apo_down(pairs: PairScores, settings: LossSettings) -> Tensor:
    """APO for chosen sides worse than the model's own (D'Oosterlinck et al., arXiv 2408.06266, equation 8)."""
    return (settings.beta * pairs.chosen_logratios).sigmoid() + (1 - (settings.beta * pairs.margins).sigmoid())


def aot(pairs: PairScores, settings: LossSettings) -> Tensor:
    """AOT on pairs: sorted margins of the policy minus those of the reference (Melnyk et al., arXiv 2406.05882).

    Pairs are compared by rank, so that the loss needs the whole batch: see `WHOLE_BATCH`.
    """
    policy, _ = (pairs.chosen - pairs.rejected).sort()
    reference, _ = (pairs.reference_chosen - pairs.reference_rejected).sort()
    return _smoothed(settings.beta * (policy - reference), settings.label_smoothing)


def aot_unpaired(pairs: PairScores, settings: LossSettings) -> Tensor:
    """AOT on two sets: sorted chosen minus sorted rejected log-ratios (Melnyk et al., arXiv 2406.05882)."""
    chosen, _ = pairs.chosen_logratios.sort()
    rejected, _ = pairs.rejected_logratios.sort()
    return _smoothed(settings.beta * (chosen - rejected), settings.label_smoothing)


def discopop(pairs: PairScores, settings: LossSettings) -> Tensor:
    """DiscoPOP: a blend of the logistic and the exponential loss (Lu et al., arXiv 2406.08414, equation 5)."""
    logits = settings.beta * pairs.margins
    share = logits / settings.discopop_tau
    # The exponential term is computed from its logarithm: very negative logits would give 0 times infinity.
    return share.neg().sigmoid() * -logsigmoid(logits) + (logsigmoid(share) - logits).exp()


def sft(pairs: PairScores, settings: LossSettings) -> Tensor:
    """Negative log-likelihood of the chosen sides, a mean over all chosen tokens of the batch; without beta."""
    del settings
    likelihood = pairs.chosen if pairs.chosen_likelihood is None else pairs.chosen_likelihood
    return -likelihood / pairs.mean_chosen_length


def simpo(pairs: PairScores, settings: LossSettings) -> Tensor:
    """SimPO: mean log-probs instead of log-ratios, and a target margin (Meng et al., arXiv 2405.14734, equation 6)."""
    margins = pairs.chosen / pairs.chosen_lengths - pairs.rejected / pairs.rejected_lengths
    return -logsigmoid(settings.beta * margins - settings.simpo_gamma)


def orpo(pairs: PairScores, settings: LossSettings) -> Tensor:
    """ORPO: negative log-likelihood plus beta times the odds-ratio loss (Hong et al., arXiv 2403.07691, eq. 6, 7)."""
    chosen, rejected = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return sft(pairs, settings) - settings.beta * logsigmoid(log_odds)


LOSSES: Mapping[str, PairLoss] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        robust,
        hinge,
        ipo,
        sigmoid_norm,
        exo_pair,
        nca_pair,
        bco_pair,
        sppo_hard,
        apo_zero,
        apo_down,
        aot,
        aot_unpaired,
        discopop,
        sft,
        simpo,
        orpo,
    )
}

# Losses that cannot be computed from a part of the batch.
WHOLE_BATCH = frozenset({"aot", "aot_unpaired"})


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid, with labels flipped with probability `label_smoothing`."""
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
