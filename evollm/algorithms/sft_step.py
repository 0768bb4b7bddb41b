"""Training and evaluation of several SFT agents on one base at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from evollm.algorithms.losses import token_mean_nll
from evollm.algorithms.references import Rows, other_rows, reference_logprobs
from evollm.algorithms.scoring import scored_batches
from evollm.algorithms.step import Method, learn_by
from evollm.data.samples import Batch
from evollm.hpo.fitness import LikelihoodEvaluation
from evollm.models.logprobs import MemberLogprobs

if TYPE_CHECKING:
    from evollm.algorithms.sft import SFT
    from evollm.llm_envs import DatasetGym


@dataclass(frozen=True)
class SFTObjective:
    """The loss of `SFT.learn` for one optimizer batch.

    Attributes:
        weight: Number of scored completion tokens in the whole batch.
    """

    weight: int
    whole_batch: ClassVar[bool] = False

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The contribution of these rows to the batch's loss."""
        del rows
        return token_mean_nll(policy.chosen, self.weight)

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        """See `SFT.learn`."""
        loss = token_mean_nll(policy.chosen, self.weight).item()
        return {"mean_loss": loss, "loss": loss}


def learn_together(agents: Sequence[SFT], batch: Batch, *, training: bool = True) -> list[dict[str, float]]:
    """Update each agent's actor on the same batch; see `SFT.learn`.

    Args:
        agents: Agents of one base.
        batch: B examples.
        training: False computes the metrics and changes nothing.

    Returns:
        The metrics of `SFT.learn` for each agent.

    Raises:
        DivergedError: An agent diverged in an earlier step.
        DataError: The base gives a non-finite log-prob on a row, and an agent has `drop_nonfinite_rows=False`.
    """
    return learn_by(Method(_objectives, _usable_rows), agents, batch, training=training)


def _objectives(agents: Sequence[SFT], batch: Batch) -> list[SFTObjective]:
    return [SFTObjective(int(batch.chosen_scored.sum()))] * len(agents)


def _usable_rows(agents: Sequence[SFT], batch: Batch, suspects: Sequence[int]) -> list[Rows]:
    """All rows except those with a known non-finite log-prob under the base without adapter; computed for suspects."""
    base = agents[0].base
    if suspects:
        reference_logprobs(agents, batch.select(suspects), None)
    known = base.reference_cache.known_as_not_finite(base.adapters.fingerprint(None), batch)
    return [tuple(other_rows(known, len(batch)))] * len(agents)


def evaluate_together(
    agents: Sequence[SFT], env: DatasetGym, split: str = "test", *, rows: int | None = None
) -> list[LikelihoodEvaluation]:
    """Score each agent on the examples of a fixed split; see `SFT.evaluate`."""
    examples = env.evaluation_pairs(split)
    logprobs = np.full((len(agents), len(examples)), np.nan)
    scored: list[int] = []
    for positions, _, policies in scored_batches(_usable_rows, agents, env, split, rows):
        for row, policy in enumerate(policies):
            logprobs[row, positions] = policy.chosen.double().cpu().numpy()
        scored += positions.tolist()
    num_tokens = np.array([example.num_scored[0] for example in examples])
    return [LikelihoodEvaluation(row, num_tokens[sorted(scored)]) for row in logprobs[:, sorted(scored)]]
