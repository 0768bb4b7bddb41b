"""What DPO agents do, for any number of agents on one base at once: compare with references, learn, be scored.

Agents that share a batch share the passes through the base; loss, clipping, optimizer and step are each agent's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from evollm.algorithms.core import OWN, REFERENCE
from evollm.algorithms.losses import dpo_sigmoid_loss, quiet_gradient, token_mean_nll
from evollm.algorithms.metrics import pair_metrics
from evollm.data.batch import PreferenceBatch
from evollm.errors import DivergedError
from evollm.hpo.fitness import Evaluation
from evollm.models.engine import Engine
from evollm.models.logprobs import PairLogprobs
from evollm.processes import Processes

if TYPE_CHECKING:
    from evollm.algorithms.dpo import DPO
    from evollm.llm_envs import PreferenceGym


def learn_together(agents: Sequence[DPO], batch: PreferenceBatch, *, training: bool = True) -> list[dict[str, float]]:
    """Update each agent's actor on the same batch; see `DPO.learn`.

    Args:
        agents: Agents of one base.
        batch: B pairs.
        training: False computes the metrics and changes nothing.

    Returns:
        The metrics of `DPO.learn` for each agent.

    Raises:
        DivergedError: An agent has diverged before and cannot learn any more.
    """
    diverged = [agent.index for agent in agents if agent.diverged]
    if training and diverged:
        raise DivergedError(
            f"agents {diverged} have diverged: they learn no more; go on from a checkpoint, with a lower lr or beta"
        )
    steps: dict[int, list[tuple[int, dict[str, float]]]] = {id(agent): [] for agent in agents}
    for together in _alike(agents):
        first = together[0]
        for part in list(batch.split(first.batch_size)) * (first.update_epochs if training else 1):
            going = [agent for agent in together if not (training and agent.diverged)]
            if not going:
                break
            for agent, metrics in zip(going, _step(going, part, training=training), strict=True):
                steps[id(agent)].append((len(part), metrics))
    for agent in agents if training else ():
        agent.steps += 1
    return [_mean_metrics(steps[id(agent)]) for agent in agents]


def logratios_together(
    agents: Sequence[DPO], batch: PreferenceBatch, reference: str | None = OWN
) -> list[tuple[Tensor, Tensor]]:
    """Log-ratios of each agent's chosen and rejected completions, (B,) and (B,) in float64 on the CPU, free of beta."""
    references = reference_logprobs(agents, batch, reference)
    ratios: dict[int, tuple[Tensor, Tensor]] = {}
    for together in _alike(agents):
        engine = Engine.of(together[0].base)
        actors = [agent.actor_adapter for agent in together]
        policies = engine.logprobs(batch, actors, together[0].pass_options)
        for agent, policy in zip(together, policies, strict=True):
            frozen = references[agents.index(agent)]
            ratios[id(agent)] = (
                policy.chosen.double().cpu() - frozen.chosen,
                policy.rejected.double().cpu() - frozen.rejected,
            )
    return [ratios[id(agent)] for agent in agents]


def reference_logprobs(
    agents: Sequence[DPO], batch: PreferenceBatch, reference: str | None = OWN
) -> list[PairLogprobs]:
    """Log-probs of the batch's pairs under each agent's reference, computed once for each reference and pair.

    Args:
        agents: Agents of one base.
        batch: B pairs.
        reference: Name of a frozen adapter, None for the base without adapter; by default each agent's own.

    Returns:
        (B,) float64 tensors on the CPU for each agent.
    """
    base, options = agents[0].base, agents[0].pass_options
    names = [agent.adapter(REFERENCE) if reference == OWN else reference for agent in agents]
    fingerprints = [base.fingerprint(name) for name in names]
    # By content: references of different names may hold the same weights.
    distinct = dict(zip(fingerprints, names, strict=True))
    adapters = list(distinct.values())

    def compute(missing: PreferenceBatch, numbers: Sequence[int]) -> list[PairLogprobs]:
        return Engine.of(base).logprobs(missing, [adapters[number] for number in numbers], options)

    found = base.reference_cache.get(list(distinct), batch, compute)
    by_fingerprint = dict(zip(distinct, found, strict=True))
    return [by_fingerprint[fingerprint] for fingerprint in fingerprints]


def evaluate_together(
    agents: Sequence[DPO], env: PreferenceGym, split: str = "test", reference: str | None = OWN
) -> list[Evaluation]:
    """Score each agent on every pair of a fixed split; see `DPO.evaluate`."""
    num_pairs = len(env.test_pairs if split == "test" else env.final_pairs)
    chosen, rejected = np.zeros((len(agents), num_pairs)), np.zeros((len(agents), num_pairs))
    for positions, batch in env.eval_batches(split):
        for row, (chosen_ratios, rejected_ratios) in enumerate(logratios_together(agents, batch, reference)):
            chosen[row, positions], rejected[row, positions] = chosen_ratios.numpy(), rejected_ratios.numpy()
    return [Evaluation(*ratios) for ratios in zip(chosen, rejected, strict=True)]


def _alike(agents: Sequence[DPO]) -> Iterator[list[DPO]]:
    """Agents that step through a batch in the same way, in their order."""
    kinds: dict[object, list[DPO]] = {}
    for agent in agents:
        kinds.setdefault((agent.batch_size, agent.update_epochs, agent.pass_options), []).append(agent)
    yield from kinds.values()


def _step(agents: Sequence[DPO], batch: PreferenceBatch, *, training: bool) -> list[dict[str, float]]:
    """One optimizer step of each agent; returns their metrics."""
    references = reference_logprobs(agents, batch)
    engine, options = Engine.of(agents[0].base), agents[0].pass_options
    actors = [agent.actor_adapter for agent in agents]
    num_chosen_tokens = int(batch.chosen_lengths.sum())

    def loss_of(member: int, rows: Sequence[int], policy: PairLogprobs) -> tuple[Tensor, Tensor]:
        """Loss and negative log-likelihood: what these rows contribute to the batch's means."""
        agent, reference = agents[member], references[member]
        chosen, rejected = quiet_gradient(policy.chosen), quiet_gradient(policy.rejected)
        losses = dpo_sigmoid_loss(
            chosen - reference.chosen[rows].to(chosen), rejected - reference.rejected[rows].to(rejected), agent.beta
        )
        nll = token_mean_nll(chosen, num_chosen_tokens)
        loss = losses.sum() / len(batch)
        return (loss + agent.nll_alpha * nll if agent.nll_alpha > 0 else loss), nll

    def sum_of_losses(members: Sequence[int], rows: Sequence[int], policies: list[PairLogprobs]) -> Tensor:
        losses = [loss_of(member, rows, policy)[0] for member, policy in zip(members, policies, strict=True)]
        return torch.stack(losses).sum()

    if training:
        blocks = [block for agent in agents for block in _allocate_gradients(agent.actor_parameters())]
        policies = engine.backward(batch, actors, options, sum_of_losses)
        for block in blocks:
            Processes.present().add_up(block)
    else:
        policies = engine.logprobs(batch, actors, options)
    all_rows = range(len(batch))
    results = []
    for member, (agent, policy) in enumerate(zip(agents, policies, strict=True)):
        loss, nll = (value.item() for value in loss_of(member, all_rows, policy))
        metrics = {"loss": loss, "nll_loss": nll, "learning_rate": agent.lr}
        metrics |= pair_metrics(policy, references[member], agent.beta)
        metrics["grad_norm"] = _apply_gradient(agent, loss) if training else 0.0
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


def _apply_gradient(agent: DPO, loss: float) -> float:
    """Clip, step and clear; returns the norm before clipping. An update that is not finite is left out."""
    grad_norm = float(torch.nn.utils.clip_grad_norm_(agent.actor_parameters(), agent.max_grad_norm))
    if np.isfinite(loss) and np.isfinite(grad_norm):
        agent.optimizer.step()
    else:
        agent.diverged = True
    agent.optimizer.zero_grad(set_to_none=True)
    return grad_norm


def _mean_metrics(steps: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Means over optimizer steps, weighted by their pairs."""
    weights = [num_pairs for num_pairs, _ in steps]
    metrics = {name: float(np.average([step[name] for _, step in steps], weights=weights)) for name in steps[0][1]}
    return {
        "mean_loss": metrics["loss"],
        "mean_chosen_reward": metrics["rewards/chosen"],
        "mean_rejected_reward": metrics["rewards/rejected"],
        **metrics,
    }
