"""Crossover of two agents: the mean of their adapters.

The mean is taken tensor by tensor, of the A's and of the B's, as in a uniform soup of fine-tuned models (Wortsman et
al. 2022, arXiv 2203.05482). Agents that began with equal adapters have A's that differ little, and then the delta of
the mean is the mean of the deltas but for w (1 - w) (B1 - B2) (A1 - A2), a product of two differences. The nearest
adapter of the same rank by a singular value decomposition (`models.adapters.combining`, `svd`) is nearer to the mean of
the deltas, but has A's and B's of other sizes, to which neither the optimizer's state nor a learning rate would fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from evollm.algorithms.agent import ACTOR
from evollm.algorithms.optimizer_state import mean_state
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import AgentFolder
from evollm.errors import ConfigurationError
from evollm.models import AdapterState
from evollm.models.fingerprints import adapter_fingerprint


def crossed(first: AgentFolder, second: AgentFolder, weight: float) -> AgentFolder:
    """Return the export of a child: the first agent's, with `weight` * its actor + (1 - `weight`) * the second's.

    Raises:
        ConfigurationError: The actors have other tensors or shapes, so that they have no mean, or the second agent's
            schedule-free optimizer has made no step.
    """
    mine, other = (folder.adapter(ACTOR) for folder in (first, second))
    shapes = [{name: tensor.shape for name, tensor in state.tensors.items()} for state in (mine, other)]
    if shapes[0] != shapes[1]:
        fix = "are on other layers or of other rank than the first parent's: a crossover needs equal lora_config"
        raise ConfigurationError("second_parent", "its adapter's tensors", fix)
    mean = {name: torch.lerp(other.tensors[name], tensor, weight) for name, tensor in mine.tensors.items()}
    optimizer = first.optimizer
    if optimizer is not None and second.optimizer is not None:
        optimizer = mean_state(optimizer, second.optimizer, weight)
    adapters = {**first.adapters, ACTOR: AdapterState(mine.config, mean)}
    return replace(first, adapters=adapters, optimizer=optimizer)


def check_crossover(agents: Sequence[SavableAgent], probability: float) -> None:
    """Refuse a crossover of agents that do not begin with equal adapters, whose mean is no mean of their deltas.

    Raises:
        ConfigurationError: An agent's adapter differs from the first one's.
    """
    digests = []
    for agent in agents:
        state = agent.base.adapters.export(agent.actor_adapter)
        digests.append(adapter_fingerprint(state.config, state.tensors))
        if digests[-1] != digests[0]:
            fix = f"needs agents that begin with equal adapters, and agent {agent.index} begins with another one than "
            fix += f"agent {agents[0].index}: make them by DPO.population or by clone, or set crossover=0"
            raise ConfigurationError("crossover", probability, fix)
