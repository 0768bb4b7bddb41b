"""Training metrics by their names in TRL."""

from __future__ import annotations

from evollm.models.logprobs import CompletionSums


def pair_metrics(policy: CompletionSums, reference: CompletionSums, beta: float) -> dict[str, float]:
    """Metrics of a batch of pairs, as means over pairs.

    Args:
        policy: (B,) sums of the policy.
        reference: (B,) sums of the reference, float64 on the CPU.
        beta: DPO's beta.

    Returns:
        `logps/chosen` and `logps/rejected` in nats; `rewards/chosen`, `rewards/rejected`, `rewards/margins`, which are
        beta times log-ratios; `rewards/accuracies`, the share of pairs with a margin above 0.
    """
    chosen, rejected = policy.chosen.double().cpu(), policy.rejected.double().cpu()
    chosen_rewards, rejected_rewards = beta * (chosen - reference.chosen), beta * (rejected - reference.rejected)
    margins = chosen_rewards - rejected_rewards
    return {
        "logps/chosen": chosen.mean().item(),
        "logps/rejected": rejected.mean().item(),
        "rewards/chosen": chosen_rewards.mean().item(),
        "rewards/rejected": rejected_rewards.mean().item(),
        "rewards/accuracies": (margins > 0).double().mean().item(),
        "rewards/margins": margins.mean().item(),
    }
