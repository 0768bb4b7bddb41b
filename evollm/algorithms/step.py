"""Optimizer steps for several agents of one algorithm on one base at once.

Agents share forward and backward passes, whether they learn from one batch or each from its own; loss, clipping and
optimizer are separate for each agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from evollm.algorithms.agent import LLMAgent
from evollm.algorithms.balanced import Balanced
from evollm.algorithms.optimizers import gradient_point
from evollm.algorithms.references import Judge, Rows, finite_rows, leave_out, other_rows
from evollm.data.samples import Batch
from evollm.errors import DivergedError
from evollm.hpo.hyperparameters import to_lower
from evollm.models.adapters.rows import clip_gradient
from evollm.models.engine import Engine, Item
from evollm.models.flops import TRAINING
from evollm.models.load_balancing import LoadBalancing
from evollm.models.logprobs import MemberLogprobs, TokenLogprobs, pieces_of
from evollm.models.upload import upload
from evollm.processes import Processes

A = TypeVar("A", bound=LLMAgent)


class Objective(Protocol):
    """The loss of one agent on one optimizer batch, as a function of log-probs."""

    @property
    def weight(self) -> int:
        """Number of items, rows or tokens, over which the batch's loss is a mean."""

    @property
    def whole_batch(self) -> bool:
        """Whether the loss needs all rows at once, so that it is not a sum over parts of the batch."""

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The contribution of these rows to the batch's loss, a scalar."""

    def metrics(self, policy: MemberLogprobs) -> dict[str, float]:
        """The metrics of the whole batch; `loss` is one of them."""


@dataclass(frozen=True)
class Linearised:
    """The linearisation of an objective at known log-probs, a loss that is a sum over rows.

    The linearised loss has the objective's gradient, and can be computed from parts of the batch.

    Attributes:
        gradient: Derivatives of the objective's loss with respect to each token's log-prob and to the expert loads.
    """

    gradient: TokenLogprobs

    @classmethod
    def of(cls, objective: Objective, policy: MemberLogprobs) -> Linearised:
        """Linearise an objective at the log-probs of the whole batch."""
        one = TokenLogprobs(policy.values[None], policy.pieces, None if policy.loads is None else policy.loads[None])
        known = one.like([tensor.detach().requires_grad_() for tensor in one.tensors])
        with torch.enable_grad():
            loss = objective.loss(range(known.num_rows), known.of(0))
        return cls(known.like(torch.autograd.grad(loss, known.tensors, materialize_grads=True)))

    def loss(self, rows: Sequence[int], policy: MemberLogprobs) -> Tensor:
        """The contribution of these rows to the linearised loss."""
        index = self.gradient.index_of(piece._replace(row=rows[piece.row]) for piece in policy.pieces)
        gradient = upload(self.gradient.values[0, index].to(policy.values.dtype), policy.values.device)
        found = (gradient * policy.values).sum()
        if self.gradient.loads is None or policy.loads is None:
            return found
        return found + (self.gradient.loads[0, list(rows)].to(policy.loads) * policy.loads).sum().to(found)


@dataclass(frozen=True)
class Method(Generic[A]):
    """The training method of an algorithm.

    Attributes:
        objectives: (agents that share a batch, the batch) -> the objective of each agent.
        usable_rows: Gives the rows of a batch on which each agent can be trained.
    """

    objectives: Callable[[Sequence[A], Batch], Sequence[Objective]]
    usable_rows: Judge[A]


@dataclass(frozen=True)
class _Share(Generic[A]):
    """Agents that learn from the same rows.

    Attributes:
        agents: The agents, at least one.
        batch: The rows.
    """

    agents: Sequence[A]
    batch: Batch


class _Step(NamedTuple):
    """The result of one optimizer batch for one agent: the metrics, their weight, and the number of trained tokens."""

    weight: int
    metrics: dict[str, float]
    num_tokens: int


def learn_by(method: Method[A], agents: Sequence[A], batch: Batch, *, training: bool) -> list[dict[str, float]]:
    """Update each agent's actor on the same batch; see `learn_each_by`.

    Args:
        method: The agents' objectives and usable rows.
        agents: Agents of one base.
        batch: B samples.
        training: False computes the metrics and changes nothing.
    """
    return learn_each_by(method, agents, [batch] * len(agents), training=training)


def learn_each_by(
    method: Method[A], agents: Sequence[A], batches: Sequence[Batch], *, training: bool
) -> list[dict[str, float]]:
    """Update each agent's actor on its batch; agents whose batch is the same object share it.

    Rows on which an agent cannot be trained are removed from their optimizer batch. An optimizer batch without any
    other row makes no step.

    Args:
        method: The agents' objectives and usable rows.
        agents: Agents of one base.
        batches: For each agent at least one sample.
        training: False computes the metrics and changes nothing.

    Returns:
        For each agent the means of the objective's metrics over optimizer steps, weighted by the objective's weight,
        with `learning_rate`, `grad_norm` (before clipping) and `num_tokens`, the tokens on which the agent has been
        trained so far, with a prompt that two sides share counted once. Without a step the objective's metrics are NaN.

    Raises:
        DivergedError: An agent diverged in an earlier step.
        ConfigurationError: The schedule of an agent's learning rate has ended, or needs `num_training_steps`.
        DataError: A row is not usable, and an agent has `drop_nonfinite_rows=False`.
    """
    diverged = [agent.index for agent in agents if agent.diverged]
    if training and diverged:
        lower = to_lower(agents[0].hyperparameter_values())
        raise DivergedError(
            f"agents {diverged} have diverged: they learn no more; go on from a checkpoint, with a lower {lower}"
        )
    numbered = {id(batch): _numbered(batch) for batch in batches}
    batch_of = {id(agent): numbered[id(batch)] for agent, batch in zip(agents, batches, strict=True)}
    for agent in agents if training else ():
        agent.check_schedule()
    steps: dict[int, list[_Step]] = {id(agent): [] for agent in agents}
    for together in alike(agents):
        for shares in _optimizer_batches(together, [batch_of[id(agent)] for agent in together], training):
            going = [
                _Share(own, share.batch)
                for share in shares
                if (own := [agent for agent in share.agents if not (training and agent.diverged)])
            ]
            if not going:
                break
            for agent, step in _learn_from(method, going, training):
                steps[id(agent)].append(step)
                agent.num_tokens += step.num_tokens if training else 0
    for agent in agents if training else ():
        agent.count_step()
    return [{**_mean_metrics(steps[id(agent)]), "num_tokens": float(agent.num_tokens)} for agent in agents]


def _numbered(batch: Batch) -> Batch:
    """The batch with a row number for each sample."""
    if batch.rows is not None:
        return batch
    return Batch([replace(sample, row=row) for row, sample in enumerate(batch)], "batch")


def _optimizer_batches(agents: Sequence[A], batches: Sequence[Batch], training: bool) -> Iterator[list[_Share[A]]]:
    """The optimizer batches of alike agents, in order; agents with smaller batches are missing from the last ones."""
    sharing: dict[int, tuple[list[A], Batch]] = {}
    for agent, batch in zip(agents, batches, strict=True):
        sharing.setdefault(id(batch), ([], batch))[0].append(agent)
    first = agents[0]
    parts = [
        [_Share(own, part) for part in batch.split(first.batch_size)] * (first.update_epochs if training else 1)
        for own, batch in sharing.values()
    ]
    for shares in zip_longest(*parts):
        yield [share for share in shares if share is not None]


def alike(agents: Sequence[A]) -> Iterator[list[A]]:
    """Groups of agents with equal batch size, update epochs and pass options, in the agents' order."""
    kinds: dict[object, list[A]] = {}
    for agent in agents:
        kinds.setdefault((agent.batch_size, agent.update_epochs, agent.pass_options), []).append(agent)
    yield from kinds.values()


def policy_logprobs(
    agents: Sequence[LLMAgent], batch: Batch, balancing: LoadBalancing | None = None
) -> list[MemberLogprobs]:
    """Log-probs of the batch's samples under each agent's actor, with expert loads if `balancing` is given."""
    found: dict[int, MemberLogprobs] = {}
    for together in alike(agents):
        policies = _logprobs(together, [batch] * len(together), balancing)
        found |= {id(agent): policy for agent, policy in zip(together, policies, strict=True)}
    return [found[id(agent)] for agent in agents]


def _learn_from(method: Method[A], shares: Sequence[_Share[A]], training: bool) -> list[tuple[A, _Step]]:
    """One optimizer step of each agent on the rows that are usable for the agent."""
    ready: list[_Share[A]] = []
    found: list[tuple[A, _Step]] = []
    for share in shares:
        agents, batch = share.agents, share.batch
        sharing: dict[Rows, list[A]] = {}
        for agent, usable in zip(agents, method.usable_rows(agents, batch, ()), strict=True):
            sharing.setdefault(usable, []).append(agent)
        for rows, sharers in sharing.items():
            if len(rows) < len(batch):
                leave_out(sharers, batch.select(other_rows(rows, len(batch))))
            if rows:
                ready.append(_Share(sharers, batch.select(rows)))
            else:
                found += _no_step(method, sharers, batch)
    return found + (_step(method, ready, training) if ready else [])


def _step(method: Method[A], shares: Sequence[_Share[A]], training: bool) -> list[tuple[A, _Step]]:
    """One optimizer step of each agent; restarted without the rows whose log-probs show that they are not usable."""
    agents = [agent for share in shares for agent in share.agents]
    batches = [share.batch for share in shares for _ in share.agents]
    balancing = agents[0].base.load_balancing
    with ExitStack() as gradient_points:
        for agent in agents if training else ():
            gradient_points.enter_context(gradient_point(agent.optimizer))
        objectives = [
            objective for share in shares for objective in _objectives(method, share.agents, share.batch, balancing)
        ]
        if training:
            policies, gradients = _backward(agents, objectives, batches, balancing)
        else:
            policies, gradients = _logprobs(agents, batches, balancing), []
        if _shows_unusable_rows(method, shares, policies):
            gradient_points.close()
            return _learn_from(method, shares, training)
        results, norms = [], [0.0] * len(agents)
        if training:
            clipped = [clip_gradient(own, agent.max_grad_norm) for agent, own in zip(agents, gradients, strict=True)]
            # One copy to the CPU for all agents, because a copy waits for the device.
            norms = torch.stack(clipped).tolist()
        found = zip(agents, batches, objectives, policies, norms, strict=True)
        for agent, batch, objective, policy, norm in found:
            metrics = {**objective.metrics(policy), "learning_rate": _rate_of(agent), "grad_norm": norm}
            if training:
                _apply_gradient(agent, metrics)
            results.append((agent, _Step(objective.weight, metrics, int(batch.num_tokens.sum()))))
    for gradient in (one for own in gradients for one in own):
        gradient.zero_()
    return results


def _shows_unusable_rows(method: Method[A], shares: Sequence[_Share[A]], policies: Sequence[MemberLogprobs]) -> bool:
    """Whether log-probs of actors, in the order of all agents, show that some rows are not usable."""
    left = iter(policies)
    # Judged all, since what is known of one batch's rows is needed when the step is made again.
    found = []
    for share in shares:
        own = [next(left).sums() for _ in share.agents]
        suspects = other_rows(finite_rows(own), len(share.batch))
        usable = method.usable_rows(share.agents, share.batch, suspects) if suspects else []
        found.append(any(len(rows) < len(share.batch) for rows in usable))
    return any(found)


def _objectives(
    method: Method[A], agents: Sequence[A], batch: Batch, balancing: LoadBalancing | None
) -> Sequence[Objective]:
    """The objective of each agent, with the auxiliary loss of routers if the base's configuration enables it."""
    objectives = method.objectives(agents, batch)
    return objectives if balancing is None else [Balanced(objective, balancing) for objective in objectives]


def _logprobs(
    agents: Sequence[LLMAgent], batches: Sequence[Batch], balancing: LoadBalancing | None
) -> list[MemberLogprobs]:
    """The log-probs of alike agents, each on its batch."""
    options = replace(agents[0].pass_options, balancing=balancing)
    items = [Item(agent.actor_adapter, batch) for agent, batch in zip(agents, batches, strict=True)]
    return Engine.of(agents[0].base).logprobs(items, options)


def _no_step(method: Method[A], agents: Sequence[A], batch: Batch) -> list[tuple[A, _Step]]:
    """The results of agents for which no row of a batch is usable: metrics are NaN, the weight is 0."""
    results, balancing = [], agents[0].base.load_balancing
    for agent, objective in zip(agents, _objectives(method, agents, batch, balancing), strict=True):
        pieces = pieces_of(batch)
        values = torch.full((1, sum(piece.length for piece in pieces)), torch.nan)
        loads = None if balancing is None else torch.full((1, len(batch), 2, balancing.experts), torch.nan)
        unknown = TokenLogprobs(values, pieces, loads).of(0)
        metrics = {
            **dict.fromkeys(objective.metrics(unknown), np.nan),
            "learning_rate": _rate_of(agent),
            "grad_norm": 0.0,
        }
        results.append((agent, _Step(0, metrics, 0)))
    return results


def _backward(
    agents: Sequence[LLMAgent],
    objectives: Sequence[Objective],
    batches: Sequence[Batch],
    balancing: LoadBalancing | None,
) -> tuple[list[MemberLogprobs], list[list[Tensor]]]:
    """The log-probs and the gradient, (P,) for each device, of each agent's actor."""
    # A replayed agent has a slot, so that its training passes have the same shapes as in the original run. Evaluation
    # and reference passes do not use the slot.
    engine = Engine.of(agents[0].base)
    options = replace(agents[0].pass_options, slot=agents[0].slot, balancing=balancing)
    items = [Item(agent.actor_adapter, batch) for agent, batch in zip(agents, batches, strict=True)]

    by_rows: dict[int, Objective | Linearised] = dict(enumerate(objectives))
    whole = [number for number, objective in by_rows.items() if objectives[number].whole_batch]
    if whole:
        # One more forward pass, because the gradient of each row depends on the log-probs of all rows.
        known = engine.logprobs([items[number] for number in whole], options, TRAINING)
        for number, policy in zip(whole, known, strict=True):
            by_rows[number] = Linearised.of(objectives[number], policy)

    def sum_of_losses(numbers: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        losses = [by_rows[number].loss(rows, policy) for number, policy in zip(numbers, found.members, strict=True)]
        return torch.stack(losses).sum()

    adapters, names = engine.base.adapters, [agent.actor_adapter for agent in agents]
    adapters.zero_gradients(names)
    policies = engine.backward(items, options, sum_of_losses)
    gradients = [[row.gradient() for row in adapters.rows(name)] for name in names]
    for gradient in (one for own in gradients for one in own):
        Processes.present().add_up(gradient)
    return policies, gradients


def _apply_gradient(agent: LLMAgent, metrics: Mapping[str, float]) -> None:
    """Make a step; a loss or a norm that is not finite skips the step: diverged."""
    if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
        agent.optimizer.step()
    else:
        agent.diverged = True


def _rate_of(agent: LLMAgent) -> float:
    """The learning rate of the next optimizer step."""
    return float(agent.optimizer.param_groups[0]["lr"])


def _mean_metrics(steps: Sequence[_Step]) -> dict[str, float]:
    """Weighted means over optimizer steps; without a step the metrics of the first entry."""
    made = [step for step in steps if step.weight]
    if not made:
        return dict(steps[0].metrics)
    weights = [step.weight for step in made]
    return {name: float(np.average([step.metrics[name] for step in made], weights=weights)) for name in made[0].metrics}
