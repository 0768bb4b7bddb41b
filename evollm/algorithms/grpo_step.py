"""Training of GRPO agents on their own answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evollm.algorithms.agent import REFERENCE
from evollm.algorithms.grpo_settings import GRPOHyperparameters, GRPOSettings
from evollm.algorithms.policy_losses import TOKEN_WEIGHTS, FloatArray, clipped_surrogate, divergence_estimates
from evollm.algorithms.references import Rows
from evollm.algorithms.rollouts import ROLLOUT, Rollout, rollout_of
from evollm.algorithms.step import Method, learn_each_by
from evollm.data.samples import Batch, Sample
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.flops import TRAINING
from evollm.models.logprobs import MemberLogprobs, Pieces
from evollm.models.upload import upload

if TYPE_CHECKING:
    from evollm.algorithms.grpo import GRPO

_OF_TOKENS = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@dataclass(frozen=True)
class GRPOObjective:
    """The loss of `GRPO.learn` for one optimizer batch.

    Attributes:
        samples: B prompts with their answers.
        counts: For each prompt (G,) tokens of each answer that count: 0 of a truncated one that does not.
        weights: For each prompt (G,) the weight of each token of an answer in the loss.
        values: The agent's hyperparameters.
        corrects: Whether the estimated divergence is multiplied by the probability ratio.
    """

    samples: Sequence[Sample]
    counts: Sequence[FloatArray]
    weights: Sequence[FloatArray]
    values: GRPOHyperparameters
    corrects: bool
    whole_batch: ClassVar[bool] = False

    @classmethod
    def of(cls, batch: Batch, values: GRPOHyperparameters, settings: GRPOSettings) -> GRPOObjective:
        """The objective of one optimizer batch."""
        masks, counts = settings.mask_truncated_completions, []
        for sample in batch:
            lengths = np.array(sample.num_scored, np.float64)
            counts.append(np.where(rollout_of(sample).ended, lengths, 0.0) if masks else lengths)
        weigh = TOKEN_WEIGHTS[settings.loss_type]
        weights = np.where(
            np.concatenate(counts) > 0, weigh(np.concatenate(counts), settings.max_completion_length), 0.0
        )
        ends = np.cumsum([len(own) for own in counts])[:-1]
        return cls(list(batch), counts, np.split(weights, ends), values, settings.use_bias_correction_kl)

    @property
    def weight(self) -> int:
        """Number of answers in the batch."""
        return sum(map(len, self.counts))

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The contribution of these rows to the batch's loss."""
        logprobs, values = policy.values, self.values
        advantages, weights, old, reference = self._known(rows, policy)
        losses = clipped_surrogate(logprobs, old, advantages, values.epsilon, values.epsilon_high)
        if reference is not None:
            losses = losses + values.beta * self._divergences(logprobs, old, reference)
        return (weights * losses).sum()

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        """See `GRPO.learn`."""
        rows = range(len(self.samples))
        loss = self.loss(rows, policy).item()
        return {"mean_loss": loss, "loss": loss, **self._of_tokens(policy), **_of_rewards(self.samples)}

    def _known(self, rows: Sequence[int], policy: MemberLogprobs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """For each token of the policy's pieces: advantage, weight, old log-prob, and the reference's if needed."""
        logprobs, pieces = policy.values, policy.pieces
        found = [(rollout_of(self.samples[rows[piece.row]]), self.weights[rows[piece.row]], piece) for piece in pieces]
        lengths = torch.tensor([piece.length for piece in pieces])
        per_answer = torch.tensor(
            [[one.advantages[piece.place], own[piece.place]] for one, own, piece in found], dtype=torch.float64
        )
        table = [*per_answer.repeat_interleave(lengths, dim=0).unbind(dim=1)]
        has_old, has_reference = found[0][0].old is not None, found[0][0].reference is not None
        if has_old:
            table.append(_joined((one.old or ())[piece.place] for one, _, piece in found))
        if has_reference:
            table.append(_joined((one.reference or ())[piece.place] for one, _, piece in found))
        known = [*upload(torch.stack(table).to(logprobs.dtype), logprobs.device).unbind()]
        old = known[2] if has_old else logprobs.detach()
        return known[0], known[1], old, known[-1] if has_reference else None

    def _divergences(self, logprobs: Tensor, old: Tensor, reference: Tensor) -> Tensor:
        found = divergence_estimates(logprobs, reference)
        return found * (logprobs - old).exp() if self.corrects else found

    def _of_tokens(self, policy: MemberLogprobs) -> dict[str, float]:
        """Means over the tokens that count, by TRL's names."""
        logprobs, values = policy.values.detach(), self.values
        advantages, _, old, reference = self._known(range(len(self.samples)), policy)
        lengths = torch.tensor([piece.length for piece in policy.pieces])
        counted = torch.tensor([self.counts[piece.row][piece.place] > 0 for piece in policy.pieces])
        mask = counted.repeat_interleave(lengths).to(logprobs)
        ratios = (logprobs - old).exp()
        low = (ratios < 1 - values.epsilon) & (advantages < 0)
        high = (ratios > 1 + values.epsilon_high) & (advantages > 0)
        kl = torch.zeros_like(logprobs) if reference is None else self._divergences(logprobs, old, reference)
        columns = torch.stack([kl, low.to(kl), high.to(kl), (low | high).to(kl)])
        # Not times the mask: a token that does not count may have an infinite divergence.
        means = torch.where(mask > 0, columns, 0.0).sum(dim=1) / mask.sum().clamp(min=1)
        return dict(zip(_OF_TOKENS, means.tolist(), strict=True))


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.double() for part in parts])


def _of_rewards(samples: Sequence[Sample]) -> dict[str, float]:
    """What the rewards and answers of an optimizer batch are like, by TRL's names."""
    rollouts = [rollout_of(sample) for sample in samples]
    stds = np.array([one.rewards.std(ddof=1) for one in rollouts])
    by_function = np.concatenate([one.by_function for one in rollouts])
    lengths = np.array([count for sample in samples for count in sample.num_scored], np.float64)
    ended = np.concatenate([one.ended for one in rollouts])
    found = {
        "reward": float(np.mean([one.rewards.mean() for one in rollouts])),
        "reward_std": float(stds.mean()),
        "frac_reward_zero_std": float(np.isclose(stds, 0).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
        # 0 without any, as TRL has it.
        "completions/mean_terminated_length": float(lengths[ended].mean()) if ended.any() else 0.0,
    }
    with np.errstate(invalid="ignore"):  # inf - inf, of a function without weight
        for name, column in zip(rollouts[0].names, by_function.T, strict=True):
            found[f"rewards/{name}/mean"] = float(column.mean())
            found[f"rewards/{name}/std"] = float(column.std(ddof=1))
    return found


def learn_together(agents: Sequence[GRPO], batch: Batch, *, training: bool = True) -> list[dict[str, float]]:
    """Update each agent's actor on the same answers; see `GRPO.learn`."""
    return learn_each(agents, [batch] * len(agents), training=training)


def learn_each(agents: Sequence[GRPO], batches: Sequence[Batch], *, training: bool = True) -> list[dict[str, float]]:
    """Update each agent's actor on answers of its own, in passes that the agents share.

    Agents of one temperature share passes, if their batch sizes and epochs are equal, too.

    Args:
        agents: Agents of one base.
        batches: For each agent prompts with their answers.
        training: False computes the metrics and changes nothing.

    Returns:
        The metrics of `GRPO.learn` for each agent.

    Raises:
        DivergedError: An agent diverged in an earlier step.
    """
    asked = [_Asked(agent, _usable(batch)) for agent, batch in zip(agents, batches, strict=True)]
    learning = [one for one in asked if len(one.batch)]
    known = _with_known(learning, training)
    method, learners = Method(_objectives, _all_rows), [one.agent for one in learning]
    learnt = iter(learn_each_by(method, learners, known, training=training))
    return [
        next(learnt) if len(one.batch) else _no_step(one.agent, batch, training)
        for one, batch in zip(asked, batches, strict=True)
    ]


class _Asked(NamedTuple):
    """An agent and the prompts that it learns from."""

    agent: GRPO
    batch: Batch


def _usable(batch: Batch) -> Batch:
    """The prompts whose rewards are all finite."""
    return batch.select([row for row, sample in enumerate(batch) if rollout_of(sample).is_usable])


def _objectives(agents: Sequence[GRPO], batch: Batch) -> list[GRPOObjective]:
    return [GRPOObjective.of(batch, agent.hyperparameters, agent.settings) for agent in agents]


def _all_rows(agents: Sequence[GRPO], batch: Batch, suspects: Sequence[int]) -> list[Rows]:
    """All rows: answers that were sampled have a log-prob under the agent that gave them, unless it has diverged."""
    del suspects
    return [tuple(range(len(batch)))] * len(agents)


def _no_step(agent: GRPO, batch: Batch, training: bool) -> dict[str, float]:
    """The metrics of a batch in which every group has a reward that is not finite: NaN, and nothing is learnt."""
    if training:
        agent.check_schedule()
        agent.count_step()
    with np.errstate(invalid="ignore"):
        names = _of_rewards(list(batch)).keys()
    unknown = dict.fromkeys(("mean_loss", "loss", *_OF_TOKENS, *names), np.nan)
    rate = float(agent.optimizer.param_groups[0]["lr"])
    return {**unknown, "learning_rate": rate, "grad_norm": 0.0, "num_tokens": float(agent.num_tokens)}


def _with_known(asked: Sequence[_Asked], training: bool) -> list[Batch]:
    """The batches with the log-probs that are computed once, before the first optimizer step; known ones stay."""
    old = _logprobs([(one, one.agent.actor_adapter) for one in asked if training and _needs_old(one)])
    reference = _logprobs([(one, one.agent.adapter(REFERENCE)) for one in asked if one.agent.beta > 0])
    found = []
    for agent, batch in asked:
        samples = []
        for row, sample in enumerate(batch):
            rollout: Rollout = replace(
                rollout_of(sample),
                old=old[id(agent)][row] if id(agent) in old else rollout_of(sample).old,
                reference=reference[id(agent)][row] if id(agent) in reference else None,
            )
            samples.append(replace(sample, extras={ROLLOUT: rollout}))
        found.append(replace(batch, samples=samples))
    return found


def _needs_old(asked: _Asked) -> bool:
    """Whether there are several optimizer steps on the same answers, whose policies differ."""
    agent, batch = asked
    several = len(batch) > agent.batch_size or agent.update_epochs > 1
    return several and any(rollout_of(sample).old is None for sample in batch)


def _logprobs(asked: Sequence[tuple[_Asked, str | None]]) -> dict[int, list[tuple[Tensor, ...]]]:
    """For each agent and sample the log-probs of its answers' tokens under an adapter.

    They are not kept: no answer comes again. Agents of one temperature share passes.
    """
    found: dict[int, list[tuple[Tensor, ...]]] = {}
    kinds: dict[PassOptions, list[tuple[_Asked, str | None]]] = {}
    for one, adapter in asked:
        kinds.setdefault(replace(one.agent.pass_options, slot=None), []).append((one, adapter))
    for options, together in kinds.items():
        items = [Item(adapter, one.batch) for one, adapter in together]
        logprobs = Engine.of(together[0][0].agent.base).logprobs(items, options, TRAINING)
        for (one, _), own in zip(together, logprobs, strict=True):
            by_piece = dict(_pieces(own.pieces, own.values))
            found[id(one.agent)] = [
                tuple(by_piece[row, place] for place in range(len(sample.completions)))
                for row, sample in enumerate(one.batch)
            ]
    return found


def _pieces(pieces: Pieces, values: Tensor) -> Iterable[tuple[tuple[int, int], Tensor]]:
    parts = values.split([piece.length for piece in pieces])
    return (((piece.row, piece.place), part) for piece, part in zip(pieces, parts, strict=True))
