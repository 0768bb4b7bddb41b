"""Methods that scripts written for AgileRL call on an agent, and that evollm itself does not need."""

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
from evollm.algorithms.input_checks import check_base, check_gym
from evollm.algorithms.optimizers import set_learning_rate
from evollm.algorithms.saving import SavableAgent
from evollm.checks import whole_number
from evollm.errors import ConfigurationError
from evollm.foreign import TEST, explains
from evollm.hpo.fitness import as_fitness
from evollm.llm_envs import DatasetGym

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel


# Arguments of the constructor that are no attributes: `wrap` has no effect, and `clone` is a method.
_NO_ATTRIBUTES = frozenset({"wrap", "clone"})


@dataclass(frozen=True)
class CosineLRScheduleConfig:
    """A linear warm-up followed by a cosine decay to zero.

    Attributes:
        num_epochs: Number of calls of `scheduler.step()`.
        warmup_proportion: Share of the calls in the warm-up, in [0, 1).
    """

    num_epochs: int
    warmup_proportion: float = 0.05


@dataclass(frozen=True)
class NetworkGroup:
    """Names of an agent's attributes that hold its networks."""

    eval_network: str
    shared_networks: tuple[str, ...] = ()
    policy: bool = False


class EvolvableAlgorithm(SavableAgent):
    """An agent with AgileRL's interface."""

    training = True
    # Always off: the argument of this name is accepted with a warning.
    use_liger_loss = False

    @explains(TEST)
    def test(self, env: DatasetGym, loop: int = 1) -> NDArray[np.float64]:
        """Score the agent on the environment's held-out rows; larger is better. The score is appended to `fitness`.

        Args:
            env: The environment.
            loop: Number of passes over the rows, whose mean is the score; without dropout they are equal.

        Returns:
            0-dimensional, the first number of the algorithm's fitness: for DPO the preference accuracy, where ties
            count half, for SFT minus the loss in nats per token.
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

        From now on only `release` frees the agent's adapters: the caller may use the model without the agent.
        """
        self.use_adapter("actor")
        self._adapters.hand_out()
        return self.base.adapters.peft_model

    @property
    def actor(self) -> PeftModel:
        """The same as `get_policy()`."""
        return self.get_policy()

    def evolvable_attributes(self, networks_only: bool = False) -> dict[str, Any]:
        """The actor and, unless `networks_only`, the optimizer."""
        networks: dict[str, Any] = {"actor": self.get_policy()}
        return networks if networks_only else {**networks, "optimizer": self.optimizer}

    @staticmethod
    def inspect_attributes(
        agent: LLMAgent, input_args_only: bool = False, exclude: Iterable[str] = ()
    ) -> dict[str, Any]:
        """The public attributes of an agent, without base and optimizer.

        Args:
            agent: The agent.
            input_args_only: Only the constructor's arguments: `type(agent)(**values)` builds an equal agent with new
                adapters, on the same base if that was given as a loaded model, else on a base loaded again by name.
            exclude: Names to leave out.
        """
        arguments = {name for name in inspect.signature(type(agent)).parameters if hasattr(agent, name)}
        public = {name for name in vars(agent) if not name.startswith("_")} - {"optimizer", "base"}
        names = (arguments if input_args_only else arguments | public) - _NO_ATTRIBUTES - set(exclude)
        return {name: getattr(agent, name) for name in sorted(names)}

    def set_training_mode(self, training: bool) -> None:
        """Set `training`. Dropout stays off in both modes, so that policy and reference remain comparable."""
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
        """Return the observation unchanged."""
        return observation

    def recompile(self) -> None:
        """Compile the base's layers again in the mode `torch_compiler`; without a mode do nothing."""
        if self.settings.torch_compiler is not None:
            self.base.compile(self.settings.torch_compiler)

    def register_network_group(self, group: NetworkGroup) -> None:
        """Check that a group's networks exist. The group has no other effect: the actor alone is trained."""
        for name in (group.eval_network, *group.shared_networks):
            if name not in ("actor", "reference"):
                raise ConfigurationError("group", name, "is not a network of this agent: actor, reference")

    def reinit_optimizers(self, optimizer: Any = None) -> None:
        """Replace the optimizer by a new one, without moments. An agent has only one, so `optimizer` has no effect."""
        del optimizer
        self.optimizer = self._new_optimizer()

    @staticmethod
    def update_lr(
        optimizer: torch.optim.Optimizer,
        lr: float | tuple[float, float],
        accelerator: Accelerator | None = None,
        scheduler_config: CosineLRScheduleConfig | None = None,
    ) -> tuple[Accelerator | None, SequentialLR | None]:
        """Set an optimizer's learning rate and keep its moments; of a pair (actor, critic) the actor's rate.

        Returns:
            The accelerator, and a scheduler for the caller to step if `scheduler_config` is given.
        """
        set_learning_rate(optimizer, lr[0] if isinstance(lr, tuple) else lr)
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
        """Shape of an observation; for a dictionary or tuple one shape per part."""
        return _shape_of(observation_space)

    @staticmethod
    def get_action_dim(action_space: spaces.Space[Any]) -> tuple[Any, ...]:
        """Shape of an action; for a dictionary or tuple one shape per part."""
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
