"""The plain data of an agent, apart from its weights: settings, hyperparameters, and how attributes reach them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, overload

from evollm.checks import boolean, optional_boolean, optional_whole_number, positive_number, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig

# Of torch's generators.
_LARGEST_SEED = 2**63 - 1
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class AgentSettings:
    """What is the same for all agents of a population and never mutates; `DPO` documents each field."""

    seed: int = 42
    micro_batch_size_per_gpu: int | None = None
    gradient_checkpointing: bool | None = None
    calc_position_embeddings: bool = True
    use_separate_reference_adapter: bool = True
    pad_token_id: int | None = None
    pad_token: str | None = None
    torch_compiler: str | None = None
    token_budget: int | None = None
    drop_nonfinite_rows: bool = True

    def __post_init__(self) -> None:
        for name in ("micro_batch_size_per_gpu", "token_budget"):
            object.__setattr__(self, name, optional_whole_number(name, getattr(self, name), 1))
        object.__setattr__(self, "pad_token_id", optional_whole_number("pad_token_id", self.pad_token_id, 0))
        if not isinstance(self.pad_token, str | None):
            raise ConfigurationError("pad_token", self.pad_token, "must be a text (tokenizer.pad_token) or None")
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0))
        if self.seed > _LARGEST_SEED:
            raise ConfigurationError("seed", self.seed, f"must be at most {_LARGEST_SEED}")
        for name in ("calc_position_embeddings", "use_separate_reference_adapter", "drop_nonfinite_rows"):
            boolean(name, getattr(self, name))
        optional_boolean("gradient_checkpointing", self.gradient_checkpointing)
        if self.torch_compiler is not None and self.torch_compiler not in COMPILE_MODES:
            raise ConfigurationError("torch_compiler", self.torch_compiler, f"must be None or one of {COMPILE_MODES}")

    def check(self, hyperparameters: Hyperparameters) -> None:
        """Refuse hyperparameters that do not go with these settings; a subclass says which.

        Raises:
            ConfigurationError: They do not.
        """
        del hyperparameters


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
        # Plain Python numbers: a checkpoint holds nothing else.
        for name in ("lr", "max_grad_norm"):
            object.__setattr__(self, name, float(positive_number(name, getattr(self, name))))
        for name in ("batch_size", "update_epochs"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))


def check_evolution(
    hp_config: HyperparameterConfig | None, hyperparameters: Hyperparameters, settings: AgentSettings
) -> None:
    """Refuse bounds and choices from which evolution could draw hyperparameters that no agent can have.

    Raises:
        ConfigurationError: It could, or `hp_config` is none, or does not belong to the hyperparameters.
    """
    if hp_config is None:
        return
    if not isinstance(hp_config, HyperparameterConfig):
        raise ConfigurationError("hp_config", hp_config, "must be HyperparameterConfig(lr=RLParameter(...), ...)")
    values = asdict(hyperparameters)
    hp_config.validate(values, list(values), lambda drawn: settings.check(replace(hyperparameters, **drawn)))


T = TypeVar("T")


class HasHyperparameters(Protocol):
    """What `Evolvable` needs of the object that it stands on."""

    hyperparameters: Any

    def set_hyperparameters(self, values: dict[str, Any]) -> None:
        """Change hyperparameters by name."""


class HasSettings(Protocol):
    """What `Setting` needs of the object that it stands on."""

    settings: Any


class Setting(Generic[T]):
    """A setting as an attribute of the agent, such as `agent.seed`, which nothing changes."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, agent: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, agent: HasSettings, owner: type) -> T: ...
    def __get__(self, agent: HasSettings | None, owner: type) -> T | Setting[T]:
        if agent is None:
            return self
        value: T = getattr(agent.settings, self.name)
        return value

    def __set__(self, agent: HasSettings, value: T) -> None:
        raise ConfigurationError(self.name, value, "is set when an agent is made and stays: make another agent")


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
