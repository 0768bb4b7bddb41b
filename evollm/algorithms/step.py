"""Learning, for any number of agents of one algorithm on one base at once.

Agents that share a batch share the passes through the base; loss, clipping, optimizer and step are each agent's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from evollm.algorithms.core import LLMAgent
from evollm.data.batch import PreferenceBatch
from evollm.errors import DivergedError
from evollm.models.engine import Engine
from evollm.models.logprobs import PairLogprobs
from evollm.processes import Processes

A = TypeVar("A", bound=LLMAgent)


class Objective(Protocol):
    """What one agent makes of the log-probs of one optimizer batch."""

    @property
    def weight(self) -> int:
        """Items of the batch that the loss is the mean over."""

    @property
    def whole_batch(self) -> bool:
        """Whether the loss cannot be computed from parts of the batch."""

    def loss(self, rows: Sequence[int], policy: PairLogprobs) -> Tensor:
        """What these rows contribute to the batch's loss, a scalar."""

    def metrics(self, policy: PairLogprobs) -> dict[str, float]:
        """What to report of the whole batch; `loss` is among it."""


@dataclass(frozen=True)
class Linearised:
    """The first-order part of an objective around log-probs that are known: a loss that falls into rows.

    Its gradient is the objective's own, and it can be computed from parts of the batch.

    Attributes:
        gradient: (B,) derivative of the objective's loss by each log-prob.
    """

    gradient: PairLogprobs

    @classmethod
    def of(cls, objective: Objective, policy: PairLogprobs) -> Linearised:
        """Around the log-probs of the whole batch, (B,)."""
        known = PairLogprobs.of([column.detach().requires_grad_() for column in policy.columns])
        with torch.enable_grad():
            loss = objective.loss(range(len(known.chosen)), known)
        return cls(PairLogprobs.of(torch.autograd.grad(loss, known.columns, materialize_grads=True)))

    def loss(self, rows: Sequence[int], policy: PairLogprobs) -> Tensor:
        """What these rows contribute."""
        columns = zip(self.gradient.columns, policy.columns, strict=True)
        first, *others = (gradient[rows].to(column) * column for gradient, column in columns)
        return sum(others, first).sum()


# From agents that step together and their batch to the objective of each.
Objectives = Callable[[Sequence[A], PreferenceBatch], Sequence[Objective]]


def learn_by(
    objectives: Objectives[A], agents: Sequence[A], batch: PreferenceBatch, *, training: bool
) -> list[dict[str, float]]:
    """Update each agent's actor on the same batch.

    Args:
        objectives: What the agents minimise.
        agents: Agents of one base.
        batch: B pairs.
        training: False computes the metrics and changes nothing.

    Returns:
        For each agent the means of its objective's metrics over the optimizer steps, by the objective's weight, with
        `learning_rate`, `grad_norm` (before clipping) and `num_tokens`, the tokens that the agent has learnt from so
        far, a prompt that two sides share counted once.

    Raises:
        DivergedError: An agent has diverged before and cannot learn any more.
    """
    diverged = [agent.index for agent in agents if agent.diverged]
    if training and diverged:
        levers = levers_of(agents)
        raise DivergedError(
            f"agents {diverged} have diverged: they learn no more; go on from a checkpoint, with a lower {levers}"
        )
    steps: dict[int, list[tuple[int, dict[str, float]]]] = {id(agent): [] for agent in agents}
    for together in alike(agents):
        first = together[0]
        for part in list(batch.split(first.batch_size)) * (first.update_epochs if training else 1):
            going = [agent for agent in together if not (training and agent.diverged)]
            if not going:
                break
            found = objectives(going, part)
            for agent, objective, metrics in zip(going, found, _step(going, found, part, training), strict=True):
                steps[id(agent)].append((objective.weight, metrics))
                agent.num_tokens += int(part.num_tokens.sum()) if training else 0
    for agent in agents if training else ():
        agent.steps += 1
    return [{**_mean_metrics(steps[id(agent)]), "num_tokens": float(agent.num_tokens)} for agent in agents]


def alike(agents: Sequence[A]) -> Iterator[list[A]]:
    """Agents that step through a batch in the same way, in their order."""
    kinds: dict[object, list[A]] = {}
    for agent in agents:
        kinds.setdefault((agent.batch_size, agent.update_epochs, agent.pass_options), []).append(agent)
    yield from kinds.values()


def policy_logprobs(agents: Sequence[LLMAgent], batch: PreferenceBatch) -> list[PairLogprobs]:
    """(B,) log-probs of the batch's pairs under each agent's actor."""
    found: dict[int, PairLogprobs] = {}
    for together in alike(agents):
        actors = [agent.actor_adapter for agent in together]
        policies = Engine.of(together[0].base).logprobs(batch, actors, together[0].pass_options)
        found |= {id(agent): policy for agent, policy in zip(together, policies, strict=True)}
    return [found[id(agent)] for agent in agents]


def levers_of(agents: Sequence[LLMAgent]) -> str:
    """The hyperparameters to lower after a divergence."""
    return " or ".join(name for name in ("lr", "beta") if name in agents[0].hyperparameter_values())


def _step(
    agents: Sequence[LLMAgent], objectives: Sequence[Objective], batch: PreferenceBatch, training: bool
) -> list[dict[str, float]]:
    """One optimizer step of each agent; returns their metrics."""
    # Replaying, an agent by itself learns in the passes that it learnt in; all else is computed without others.
    engine, options = Engine.of(agents[0].base), replace(agents[0].pass_options, seat=agents[0].seat)
    actors = [agent.actor_adapter for agent in agents]

    by_rows: dict[int, Objective | Linearised] = dict(enumerate(objectives))
    whole = [number for number, objective in by_rows.items() if training and objectives[number].whole_batch]
    if whole:
        # A forward pass more: how each row counts depends on the log-probs of all.
        known = engine.logprobs(batch, [actors[number] for number in whole], options)
        for number, policy in zip(whole, known, strict=True):
            by_rows[number] = Linearised.of(objectives[number], policy)

    def sum_of_losses(members: Sequence[int], rows: Sequence[int], policies: list[PairLogprobs]) -> Tensor:
        losses = [by_rows[member].loss(rows, policy) for member, policy in zip(members, policies, strict=True)]
        return torch.stack(losses).sum()

    if training:
        blocks = [block for agent in agents for block in _allocate_gradients(agent.actor_parameters())]
        policies = engine.backward(batch, actors, options, sum_of_losses)
        for block in blocks:
            Processes.present().add_up(block)
    else:
        policies = engine.logprobs(batch, actors, options)
    results = []
    for agent, objective, policy in zip(agents, objectives, policies, strict=True):
        metrics = {**objective.metrics(policy), "learning_rate": agent.lr}
        metrics["grad_norm"] = _apply_gradient(agent, metrics["loss"]) if training else 0.0
        results.append(metrics)
    return results


def _allocate_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Put the parameters' gradients, all zero, into one block of memory for each device; returns the blocks.

    Allocated one by one in the backward pass they come to lie between activations, and the memory that those leave
    behind is in pieces: with four members the peak was half as high again.
    """
    blocks = []
    for device in sorted({parameter.device for parameter in parameters}, key=str):
        here = [parameter for parameter in parameters if parameter.device == device]
        sizes = [parameter.numel() for parameter in here]
        block = torch.zeros(sum(sizes), dtype=here[0].dtype, device=device)
        for parameter, piece in zip(here, block.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter)
        blocks.append(block)
    return blocks


def _apply_gradient(agent: LLMAgent, loss: float) -> float:
    """Clip, step and clear; returns the norm before clipping. An update that is not finite is left out."""
    grad_norm = float(torch.nn.utils.clip_grad_norm_(agent.actor_parameters(), agent.max_grad_norm))
    if np.isfinite(loss) and np.isfinite(grad_norm):
        agent.optimizer.step()
    else:
        agent.diverged = True
    agent.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def _mean_metrics(steps: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Weighted means over optimizer steps."""
    weights = [weight for weight, _ in steps]
    return {name: float(np.average([step[name] for _, step in steps], weights=weights)) for name in steps[0][1]}
