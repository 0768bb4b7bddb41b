"""The plain data of an agent, apart from its weights: settings, hyperparameters, and how attributes reach them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

from evollm.errors import ConfigurationError


@dataclass(frozen=True)
class AgentSettings:
    """What is the same for all agents of a population and never mutates; `DPO` documents each field."""

    seed: int = 42
    micro_batch_size_per_gpu: int | None = None
    gradient_checkpointing: bool = True
    calc_position_embeddings: bool = True
    use_separate_reference_adapter: bool = True
    pad_token_id: int | None = None
    pad_token: str | None = None
    torch_compiler: str | None = None

    def __post_init__(self) -> None:
        if self.micro_batch_size_per_gpu is not None:
            require_count("micro_batch_size_per_gpu", self.micro_batch_size_per_gpu)


@dataclass(frozen=True)
class Hyperparameters:
    """The plain data that evolution may change; a subclass adds what its loss needs.

    Attributes:
        lr: Learning rate of AdamW.
        max_grad_norm: The gradient is scaled down to this 2-norm when it is longer.
        batch_size: At most so many pairs for one optimizer step.
        update_epochs: Passes over each batch that `learn` is given.
    """

    lr: float = 5e-6
    max_grad_norm: float = 0.1
    batch_size: int = 16
    update_epochs: int = 1

    def __post_init__(self) -> None:
        require_number("lr", self.lr, positive=True)
        require_number("max_grad_norm", self.max_grad_norm, positive=True)
        require_count("batch_size", self.batch_size)
        require_count("update_epochs", self.update_epochs)


def require_number(name: str, value: object, *, positive: bool) -> None:
    """Raise unless the value is a finite number, above zero (`positive`) or not below it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (positive and value == 0):  # type: ignore[operator]
        raise ConfigurationError(name, value, f"must be a finite number {'> 0' if positive else '>= 0'}")


def require_count(name: str, value: object) -> None:
    """Raise unless the value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(name, value, "must be a whole number >= 1")


T = TypeVar("T")


class HasHyperparameters(Protocol):
    """What `Evolvable` needs of the object that it stands on."""

    hyperparameters: Any

    def set_hyperparameters(self, values: dict[str, Any]) -> None:
        """Change hyperparameters by name."""


class Evolvable(Generic[T]):
    """A hyperparameter as an attribute of the agent: `agent.lr = 1e-5` reaches the optimizer too."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, agent: None, owner: type) -> Evolvable[T]: ...
    @overload
    def __get__(self, agent: HasHyperparameters, owner: type) -> T: ...
    def __get__(self, agent: HasHyperparameters | None, owner: type) -> T | Evolvable[T]:
        if agent is None:
            return self
        value: T = getattr(agent.hyperparameters, self.name)
        return value

    def __set__(self, agent: HasHyperparameters, value: T) -> None:
        agent.set_hyperparameters({self.name: value})
