"""Methods that scripts written for other evolutionary RL libraries call on an agent.

Nothing in evollm depends on them. They are here so that such a script keeps running, and they do what their names
say for an agent whose only network is an adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from evollm.algorithms.agent import OWN, LLMAgent
from evollm.algorithms.algorithm import algorithm_of
from evollm.algorithms.fit import check_base, check_gym
from evollm.algorithms.saving import SavableAgent
from evollm.checks import whole_number
from evollm.errors import ConfigurationError
from evollm.foreign import TEST, explains
from evollm.hpo.fitness import as_fitness
from evollm.llm_envs import DatasetGym

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


# Arguments that make no difference to an agent; `clone` is a method, too.
_NO_ATTRIBUTES = frozenset({"wrap", "clone"})


@dataclass(frozen=True)
class CosineLRScheduleConfig:
    """A linear warm-up followed by a cosine to zero.

    Attributes:
        num_epochs: Calls of `scheduler.step()` that the schedule spans.
        warmup_proportion: Share of them that warms up, in [0, 1).
    """

    num_epochs: int
    warmup_proportion: float = 0.05


@dataclass(frozen=True)
class NetworkGroup:
    """Names of the attributes that hold an agent's networks."""

    eval_network: str
    shared_networks: tuple[str, ...] = ()
    policy: bool = False


class EvolvableAlgorithm(SavableAgent):
    """An agent with the methods that such scripts call."""

    training = True
    # What is in effect: an argument of that name is accepted, and warned of.
    use_liger_loss = False

    @explains(TEST)
    def test(self, env: DatasetGym, loop: int = 1) -> NDArray[np.float64]:
        """Score the agent on the environment's held-out rows; larger is better. The score is appended to `fitness`.

        Args:
            env: The environment.
            loop: Passes over the rows; the score is their mean (without dropout they are all the same).

        Returns:
            The first number of the algorithm's fitness, 0-dimensional: of DPO the preference accuracy, where ties
            count half, of SFT minus the loss in nats per token.
        """
        whole_number("loop", loop, 1)
        algorithm = algorithm_of(self)
        check_gym(env, algorithm.gym, f"{algorithm.agent.__name__}.evaluate")
        check_base(self.base, env)
        evaluations = [algorithm.evaluate([self], env, "test", OWN)[0] for _ in range(loop)]
        score = np.mean([as_fitness(algorithm.fitness(evaluation))[0] for evaluation in evaluations])
        self.fitness.append(float(score))
        return np.asarray(score)

    def get_policy(self) -> PeftModel:
        """The base with this agent's actor active.

        Whoever holds it may use the agent's adapters without the agent: they are freed by `release` alone from now on.
        """
        self.use_adapter("actor")
        self._adapters.hand_out()
        return self.base.peft_model

    @property
    def actor(self) -> PeftModel:
        """The same as `get_policy()`."""
        return self.get_policy()

    def evolvable_attributes(self, networks_only: bool = False) -> dict[str, Any]:
        """The actor, and the optimizer unless only networks are asked for."""
        networks: dict[str, Any] = {"actor": self.get_policy()}
        return networks if networks_only else {**networks, "optimizer": self.optimizer}

    @staticmethod
    def inspect_attributes(
        agent: LLMAgent, input_args_only: bool = False, exclude: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The public attributes that are no tuned networks.

        Args:
            agent: The agent.
            input_args_only: Only the constructor's arguments, from which `type(agent)(**values)` makes an equal agent
                with fresh adapters. A base that was given as a loaded model is among them; one that was loaded by its
                name is loaded anew.
            exclude: Names to leave out.
        """
        arguments = {name for name in inspect.signature(type(agent)).parameters if hasattr(agent, name)}
        public = {name for name in vars(agent) if not name.startswith("_")} - {"optimizer", "base"}
        names = (arguments if input_args_only else arguments | public) - _NO_ATTRIBUTES - set(exclude)
        return {name: getattr(agent, name) for name in sorted(names)}

    def set_training_mode(self, training: bool) -> None:
        """Record the mode. Dropout stays off in both: policy and reference are always compared."""
        self.training = training

    def to_device(self, *experiences: Any) -> tuple[Any, ...]:
        """Move tensors, alone or in dictionaries or tuples, to the agent's device."""

        def move(item: Any) -> Any:
            if isinstance(item, Tensor):
                return item.to(self.device)
            if isinstance(item, dict):
                return {key: move(value) for key, value in item.items()}
            return tuple(move(value) for value in item) if isinstance(item, tuple) else item

        return tuple(move(experience) for experience in experiences)

    def preprocess_observation(self, observation: Any) -> Any:
        """Give the observation back: a batch of pairs needs no preprocessing."""
        return observation

    def recompile(self) -> None:
        """Compile the base's layers again, in the mode `torch_compiler`; without a mode do nothing."""
        if self.settings.torch_compiler is not None:
            self.base.compile(self.settings.torch_compiler)

    def register_network_group(self, group: NetworkGroup) -> None:
        """Check that a group's networks exist. Which ones evolve is fixed here: the actor."""
        for name in (group.eval_network, *group.shared_networks):
            if name not in ("actor", "reference"):
                raise ConfigurationError("group", name, "is not a network of this agent: actor, reference")

    def reinit_optimizers(self, optimizer: Any = None) -> None:
        """Start the optimizer afresh: no moments, step 0. There is only one, so `optimizer` makes no difference."""
        del optimizer
        self.optimizer = self._new_optimizer()

    @staticmethod
    def update_lr(
        optimizer: torch.optim.Optimizer,
        lr: float | tuple[float, float],
        accelerator: Accelerator | None = None,
        scheduler_config: CosineLRScheduleConfig | None = None,
    ) -> tuple[Accelerator | None, SequentialLR | None]:
        """Set an optimizer's learning rate, keeping its moments; of a pair (actor, critic) the actor's.

        Returns:
            The accelerator as given, and the scheduler that the configuration asks for, for the caller to step.
        """
        actor_lr = lr[0] if isinstance(lr, tuple) else lr
        for group in optimizer.param_groups:
            group["lr"] = actor_lr
        if scheduler_config is None:
            return accelerator, None
        warmup = max(1, round(scheduler_config.num_epochs * scheduler_config.warmup_proportion))
        schedulers = [
            LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
            CosineAnnealingLR(optimizer, T_max=max(1, scheduler_config.num_epochs - warmup)),
        ]
        return accelerator, SequentialLR(optimizer, schedulers, milestones=[warmup])

    @staticmethod
    def get_state_dim(observation_space: spaces.Space[Any]) -> tuple[Any, ...]:
        """Shape of an observation; for a dictionary or tuple, one shape for each part."""
        return _shape_of(observation_space)

    @staticmethod
    def get_action_dim(action_space: spaces.Space[Any]) -> tuple[Any, ...]:
        """Shape of an action; for a dictionary or tuple, one shape for each part."""
        return _shape_of(action_space)


def _shape_of(space: spaces.Space[Any] | list[spaces.Space[Any]]) -> tuple[Any, ...]:
    if isinstance(space, list):
        return tuple(_shape_of(part) for part in space)
    if isinstance(space, spaces.Dict):
        return tuple(_shape_of(part) for part in space.spaces.values())
    if isinstance(space, spaces.Tuple):
        return tuple(_shape_of(part) for part in space.spaces)
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    assert space.shape is not None
    return space.shape
