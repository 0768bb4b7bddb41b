"""Training and evaluation of several DPO agents on one base at once, with cached reference log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evollm.algorithms.agent import OWN, REFERENCE
from evollm.algorithms.loss_inputs import LossTable
from evollm.algorithms.losses import (
    LOSSES,
    WHOLE_BATCH,
    LossSettings,
    PairScores,
    flush_small_gradients,
    token_mean_nll,
)
from evollm.algorithms.metrics import pair_metrics
from evollm.algorithms.references import Rows, finite_rows, reference_logprobs
from evollm.algorithms.scoring import scored_batches
from evollm.algorithms.step import Method, alike, learn_by, policy_logprobs
from evollm.data.samples import Batch
from evollm.hpo.fitness import Evaluation
from evollm.models.engine import Engine, Item
from evollm.models.logprobs import CompletionSums, MemberLogprobs

if TYPE_CHECKING:
    from evollm.algorithms.dpo import DPO
    from evollm.llm_envs import DatasetGym


@dataclass(frozen=True)
class DPOObjective:
    """The loss of `DPO.learn` for one optimizer batch.

    Attributes:
        batch: B pairs.
        reference: (B,) sums of the reference, float64 on the CPU, weighted by `ld_alpha`.
        table: The inputs of all members' losses.
        member: This member's place in the table.
        terms: Name and weight of each loss.
        settings: The parameters of the losses.
        nll_alpha: Weight of the negative log-likelihood.
        ld_alpha: Weight of the tokens beyond the shorter side's length; None: 1, as for all other tokens.
    """

    batch: Batch
    reference: CompletionSums
    table: LossTable
    member: int
    terms: tuple[tuple[str, float], ...]
    settings: LossSettings
    nll_alpha: float
    ld_alpha: float | None = None

    @property
    def weight(self) -> int:
        """Number of pairs in the batch."""
        return len(self.reference.chosen)

    @property
    def whole_batch(self) -> bool:
        """Whether one of the losses compares pairs with each other, so that it needs the whole batch."""
        return any(name in WHOLE_BATCH for name, _ in self.terms)

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The contribution of these rows to the batch's loss."""
        sums = self._sums(policy)
        loss = self._pair_loss(rows, sums)
        return loss + self.nll_alpha * self._nll(sums) if self.nll_alpha > 0 else loss

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        """See `DPO.learn`."""
        sums = self._sums(policy)
        loss, nll = self.loss(range(self.weight), policy).item(), self._nll(sums).item()
        pairs = pair_metrics(sums.weighted(self.ld_alpha), self.reference, self.settings.beta)
        return {
            "mean_loss": loss,
            "mean_chosen_reward": pairs["rewards/chosen"],
            "mean_rejected_reward": pairs["rewards/rejected"],
            "loss": loss,
            "nll_loss": nll,
            **pairs,
        }

    @cached_property
    def _num_chosen_tokens(self) -> int:
        return int(self.batch.chosen_scored.sum())

    def _sums(self, policy: MemberLogprobs) -> CompletionSums:
        return policy.sums(up_to_shorter=self.ld_alpha is not None, change=flush_small_gradients)

    def _nll(self, sums: CompletionSums) -> Tensor:
        return token_mean_nll(sums.chosen, self._num_chosen_tokens)

    def _pair_loss(self, rows: Sequence[int], sums: CompletionSums) -> Tensor:
        """The contribution of these rows, whose sums these are, to the batch's mean loss."""
        compared = sums.weighted(self.ld_alpha)
        scores = PairScores(
            chosen=compared.chosen,
            rejected=compared.rejected,
            **self.table.inputs(self.member, rows, compared.chosen)._asdict(),
            mean_chosen_length=self._num_chosen_tokens / self.weight,
            chosen_likelihood=sums.chosen,
        )
        losses = [LOSSES[name](scores, self.settings) for name, _ in self.terms]
        weighted = [
            values if weight == 1 else weight * values for values, (_, weight) in zip(losses, self.terms, strict=True)
        ]
        total = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(dim=0)
        return total.sum() / self.weight


def learn_together(agents: Sequence[DPO], batch: Batch, *, training: bool = True) -> list[dict[str, float]]:
    """Update each agent's actor on the same batch; see `DPO.learn`.

    Args:
        agents: Agents of one base.
        batch: B pairs.
        training: False computes the metrics and changes nothing.

    Returns:
        The metrics of `DPO.learn` for each agent.

    Raises:
        DivergedError: An agent diverged in an earlier step.
        DataError: A reference gives a non-finite log-prob on a row, and an agent has `drop_nonfinite_rows=False`.
    """
    return learn_by(Method(_objectives, _usable_rows), agents, batch, training=training)


def references_of(agents: Sequence[DPO], batch: Batch, reference: str | None = OWN) -> list[CompletionSums]:
    """Log-probs under each agent's reference, with the sums that `ld_alpha` needs; see `reference_logprobs`."""
    found: dict[int, CompletionSums] = {}
    for weighs in (False, True):
        some = [agent for agent in agents if (agent.settings.ld_alpha is not None) == weighs]
        sums = reference_logprobs(some, batch, reference, up_to_shorter=weighs) if some else []
        found |= zip(map(id, some), sums, strict=True)
    return [found[id(agent)] for agent in agents]


def _usable_rows(
    agents: Sequence[DPO], batch: Batch, suspects: Sequence[int], reference: str | None = OWN
) -> list[Rows]:
    """The rows on which each agent's reference gives finite log-probs."""
    del suspects
    return [tuple(finite_rows([found])) for found in references_of(agents, batch, reference)]


def _objectives(agents: Sequence[DPO], batch: Batch) -> list[DPOObjective]:
    found = zip(agents, references_of(agents, batch), strict=True)
    references = [reference.weighted(agent.settings.ld_alpha) for agent, reference in found]
    table = LossTable(batch, references)
    return [
        DPOObjective(
            batch,
            reference,
            table,
            member,
            agent.loss_terms,
            agent.loss_settings,
            agent.nll_alpha,
            agent.settings.ld_alpha,
        )
        for member, (agent, reference) in enumerate(zip(agents, references, strict=True))
    ]


def logratios_together(agents: Sequence[DPO], batch: Batch, reference: str | None = OWN) -> list[tuple[Tensor, Tensor]]:
    """Each agent's log-ratios of chosen and rejected completions without beta, (B,) and (B,) in float64 on the CPU."""
    references = references_of(agents, batch, reference)
    return [
        (policy.chosen.double().cpu() - frozen.chosen, policy.rejected.double().cpu() - frozen.rejected)
        for policy, frozen in zip(policy_logprobs(agents, batch), references, strict=True)
    ]


def evaluate_together(
    agents: Sequence[DPO],
    env: DatasetGym,
    split: str = "test",
    reference: str | None = OWN,
    *,
    kl: bool = False,
    rows: int | None = None,
) -> list[Evaluation]:
    """Score each agent on the pairs of a fixed split; see `DPO.evaluate`."""
    judge = partial(_usable_rows, reference=reference)
    num_pairs = len(env.evaluation_pairs(split))
    ratios = np.full((len(agents), 2, num_pairs), np.nan)
    divergences = np.full((len(agents), num_pairs), np.nan)
    scored: list[int] = []
    for positions, batch, policies in scored_batches(judge, agents, env, split, rows):
        if kl:
            divergences[:, positions] = _divergences(agents, batch, reference)
        references = references_of(agents, batch, reference)
        for row, (policy, frozen) in enumerate(zip(policies, references, strict=True)):
            for side, (ours, theirs) in enumerate(zip(policy.sums().columns, frozen.columns, strict=True)):
                ratios[row, side, positions] = (ours.double().cpu() - theirs).numpy()
        scored += positions.tolist()
    scored.sort()
    return [
        Evaluation(chosen, rejected, divergence if kl else None)
        for (chosen, rejected), divergence in zip(ratios[:, :, scored], divergences[:, scored], strict=True)
    ]


def _divergences(agents: Sequence[DPO], batch: Batch, reference: str | None) -> NDArray[np.float64]:
    """(M, B) `Evaluation.kl` of each agent's actor."""
    sharing: dict[str | None, list[DPO]] = {}
    for agent in agents:
        sharing.setdefault(agent.adapter(REFERENCE) if reference == OWN else reference, []).append(agent)
    found: dict[int, Tensor] = {}
    for name, sharers in sharing.items():
        for together in alike(sharers):
            items = Item.on(batch, [agent.actor_adapter for agent in together])
            tokens = Engine.of(together[0].base).divergences(items, together[0].pass_options, name)
            found |= {
                id(agent): torch.stack(one.sums().columns).double().mean(dim=0)
                for agent, one in zip(together, tokens, strict=True)
            }
    return torch.stack([found[id(agent)] for agent in agents]).numpy()
