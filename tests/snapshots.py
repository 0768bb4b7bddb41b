"""Bits of adapters and bases, to compare before and after."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from evollm.algorithms import LLMAgent
from evollm.models import SharedBase


def digest(tensors: list[Tensor]) -> str:
    bits = hashlib.sha256()
    for tensor in tensors:
        bits.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def adapter_bits(base: SharedBase) -> dict[str, str]:
    """Digest of every adapter on the base, by name."""
    return {name: digest(list(base.adapters.parameters(name).values())) for name in base.adapters.names}


def actor_bits(agent: LLMAgent) -> str:
    return digest(list(agent.actor_parameters()))


def base_bits(base: SharedBase) -> str:
    """Digest of the base's own weights, adapters left out."""
    adapters = {id(parameter) for name in base.adapters.names for parameter in base.adapters.parameters(name).values()}
    return digest([parameter for parameter in base.network.parameters() if id(parameter) not in adapters])


def states_of(agent: LLMAgent) -> list[dict[str, Tensor]]:
    """The optimizer's state of each of the actor's parameters."""
    states = agent.optimizer.state_dict()["state"]
    return [states[number] for number in range(len(agent.actor_parameters()))]
