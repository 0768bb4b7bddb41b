"""Training and evaluation of several KTO agents on one base at once, with cached reference log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evollm.algorithms.agent import OWN
from evollm.algorithms.kto_settings import FEWEST_ANSWERS, KTOHyperparameters
from evollm.algorithms.losses import flush_small_gradients
from evollm.algorithms.references import Rows, finite_rows, reference_logprobs
from evollm.algorithms.scoring import scored_batches
from evollm.algorithms.step import Method, learn_by, policy_logprobs
from evollm.algorithms.unpaired_losses import UNPAIRED_LOSSES, WITH_KL
from evollm.data.samples import Batch, Completion, Sample
from evollm.data.unpaired_rows import DESIRABLE
from evollm.hpo.fitness import UnpairedEvaluation
from evollm.models.engine import Engine, Item
from evollm.models.flops import TRAINING
from evollm.models.logprobs import MemberLogprobs
from evollm.models.reference_cache import ReferenceCache
from evollm.models.upload import upload

if TYPE_CHECKING:
    from evollm.algorithms.kto import KTO
    from evollm.llm_envs import DatasetGym


@dataclass(frozen=True)
class KTOObjective:
    """The loss of `KTO.learn` for one optimizer batch.

    Attributes:
        reference: (B,) log-probs of the answers under the reference, float64 on the CPU.
        desirable: (B,) whether an answer is desirable, on the CPU.
        kl: The estimate of the divergence from the reference, in nats; 0 for a loss without it.
        values: The agent's hyperparameters.
    """

    reference: Tensor
    desirable: Tensor
    kl: float
    values: KTOHyperparameters
    whole_batch: ClassVar[bool] = False

    @property
    def weight(self) -> int:
        """Number of answers in the batch."""
        return len(self.reference)

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The contribution of these rows to the batch's loss."""
        logprobs, values = policy.sums(change=flush_small_gradients).chosen, self.values
        table = torch.stack([self.reference, self.desirable.double()])[:, list(rows)]
        reference, labels = upload(table.to(logprobs.dtype), logprobs.device).unbind()
        desirable = labels == DESIRABLE
        losses = UNPAIRED_LOSSES[values.loss_type](logprobs - reference, desirable, self.kl, values.beta)
        weighted = torch.where(desirable, values.desirable_weight * losses, values.undesirable_weight * losses)
        return weighted.sum() / self.weight

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        """See `KTO.learn`."""
        loss = self.loss(range(self.weight), policy).item()
        logprobs = policy.chosen.double().cpu()
        rewards, found = self.values.beta * (logprobs - self.reference), {}
        for name, kind in (("chosen", self.desirable), ("rejected", ~self.desirable)):
            found[f"logps/{name}"] = logprobs[kind].mean().item()
            found[f"rewards/{name}"] = rewards[kind].mean().item()
        margin = found["rewards/chosen"] - found["rewards/rejected"]
        return {"mean_loss": loss, "loss": loss, "kl": self.kl, **found, "rewards/margins": margin}


def learn_together(agents: Sequence[KTO], batch: Batch, *, training: bool = True) -> list[dict[str, float]]:
    """Update each agent's actor on the same batch; see `KTO.learn`.

    Args:
        agents: Agents of one base.
        batch: B answers with labels.
        training: False computes the metrics and changes nothing.

    Returns:
        The metrics of `KTO.learn` for each agent.

    Raises:
        DivergedError: An agent diverged in an earlier step.
        DataError: A reference gives a non-finite log-prob on a row, and an agent has `drop_nonfinite_rows=False`.
    """
    # Mismatched answers seldom come again in another batch.
    objectives = partial(_objectives, mismatched_references=ReferenceCache())
    return learn_by(Method(objectives, _usable_rows), agents, batch, training=training)


def mismatched(batch: Batch, limit: int | None = None) -> Batch:
    """Each prompt with the answer of the row before, the first one with that of the last row.

    A copy of the row itself, of a set that is repeated, is passed over for the row before that.

    Args:
        batch: B answers.
        limit: Most tokens of prompt and answer, which are cut at their end; None: no limit.
    """
    others = [_with_answer(sample, _before(batch, row).completions[0], limit) for row, sample in enumerate(batch)]
    return replace(batch, samples=others)


def _before(batch: Batch, row: int) -> Sample:
    """The nearest sample before a row, in a circle, that is no copy of it; the row before if all are copies."""
    steps = range(1, len(batch))
    return next((found for step in steps if (found := batch[row - step]).key != batch[row].key), batch[row - 1])


def _with_answer(sample: Sample, answer: Completion, limit: int | None) -> Sample:
    if limit is not None and len(sample.prompt_ids) + len(answer) > limit:
        end = max(1, limit - len(sample.prompt_ids))
        answer = Completion(answer.ids[:end], None if answer.mask is None else answer.mask[:end])
    return replace(sample, completions=(answer,), extras={})


def kl_estimates(agents: Sequence[KTO], batch: Batch, cache: ReferenceCache) -> list[float]:
    """Each agent's estimate of its divergence from its reference (arXiv 2402.01306, section 4.2), in nats.

    It is the mean log-ratio of mismatched answers, and at least 0: answers that the prompt does not explain, but that
    are as long as those that are learnt. No gradient goes through it. Mismatched answers on which the reference is not
    finite are left out. A batch of a single answer, such as the last one of an epoch may be, has an estimate of 0.

    Args:
        agents: Agents of one base with equal pass options.
        batch: B answers.
        cache: Keeps the references' log-probs of mismatched answers.
    """
    if len(batch) < FEWEST_ANSWERS or not any(agent.loss_type in WITH_KL for agent in agents):
        return [0.0] * len(agents)
    base = agents[0].base
    others = mismatched(batch, None if base.is_encoder_decoder else base.max_positions)
    # With the slot of a replayed agent, as in the passes that train. All members are in these passes for that reason,
    # also those whose loss has no divergence.
    options = replace(agents[0].pass_options, slot=agents[0].slot)
    items = Item.on(others, [agent.actor_adapter for agent in agents])
    policies = Engine.of(base).logprobs(items, options, TRAINING)
    references = reference_logprobs(agents, others, cache=cache)
    found = []
    for agent, policy, reference in zip(agents, policies, references, strict=True):
        rows = finite_rows([reference]) if agent.loss_type in WITH_KL else []
        ratios = policy.chosen.double()[rows] - reference.chosen[rows]
        found.append(ratios.mean().clamp(min=0).item() if rows else 0.0)
    return found


def _usable_rows(
    agents: Sequence[KTO], batch: Batch, suspects: Sequence[int], reference: str | None = OWN
) -> list[Rows]:
    """The rows on which each agent's reference gives finite log-probs."""
    del suspects
    return [tuple(finite_rows([found])) for found in reference_logprobs(agents, batch, reference)]


def _objectives(agents: Sequence[KTO], batch: Batch, mismatched_references: ReferenceCache) -> list[KTOObjective]:
    references = reference_logprobs(agents, batch)
    estimates = kl_estimates(agents, batch, mismatched_references)
    labels = torch.from_numpy(labels_of(batch) == DESIRABLE)
    return [
        KTOObjective(reference.chosen, labels, kl, agent.hyperparameters)
        for agent, reference, kl in zip(agents, references, estimates, strict=True)
    ]


def labels_of(batch: Batch) -> NDArray[np.float64]:
    """(B,) labels of a batch in which every answer has one."""
    labels = batch.labels
    assert labels is not None
    return labels


def logratios_together(agents: Sequence[KTO], batch: Batch, reference: str | None = OWN) -> list[Tensor]:
    """Each agent's log-ratios of the answers without beta, (B,) in float64 on the CPU."""
    references = reference_logprobs(agents, batch, reference)
    return [
        policy.chosen.double().cpu() - frozen.chosen
        for policy, frozen in zip(policy_logprobs(agents, batch), references, strict=True)
    ]


def evaluate_together(
    agents: Sequence[KTO],
    env: DatasetGym,
    split: str = "test",
    reference: str | None = OWN,
    *,
    rows: int | None = None,
) -> list[UnpairedEvaluation]:
    """Score each agent on the answers of a fixed split; see `KTO.evaluate`."""

    def judge(agents: Sequence[KTO], batch: Batch, suspects: Sequence[int]) -> list[Rows]:
        return _usable_rows(agents, batch, suspects, reference)

    answers = env.evaluation_pairs(split)
    ratios = np.full((len(agents), len(answers)), np.nan)
    scored: list[int] = []
    for positions, batch, policies in scored_batches(judge, agents, env, split, rows):
        references = reference_logprobs(agents, batch, reference)
        for row, (policy, frozen) in enumerate(zip(policies, references, strict=True)):
            ratios[row, positions] = (policy.chosen.double().cpu() - frozen.chosen).numpy()
        scored += positions.tolist()
    scored.sort()
    labels = labels_of(Batch(answers))[scored]
    return [UnpairedEvaluation(own, labels) for own in ratios[:, scored]]
