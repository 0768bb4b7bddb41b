"""An agent's settings and hyperparameters, and the descriptors that make each an attribute of the agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Generic, TypeVar, overload

from typing_extensions import Self

from evollm.algorithms.optimizers import OptimizerSettings
from evollm.algorithms.schedules import LearningRateSchedule
from evollm.checks import (
    boolean,
    optional_boolean,
    optional_whole_number,
    positive_number,
    whole_number,
)
from evollm.errors import ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig

# The largest seed of torch's generators.
_LARGEST_SEED = 2**63 - 1
# For a check that does not depend on the number of steps.
_SOME_STEPS = 1000
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class AgentSettings(OptimizerSettings, LearningRateSchedule):
    """Settings that no mutation changes, equal for all agents of a population; `DPO` documents each field.

    Attributes:
        added: Names of fields that the config.json of older runs does not have; a subclass adds its own.
    """

    added: ClassVar[frozenset[str]] = frozenset(
        field.name for kind in (OptimizerSettings, LearningRateSchedule) for field in fields(kind)
    )
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
        OptimizerSettings.__post_init__(self)
        LearningRateSchedule.__post_init__(self)
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
        """Check hyperparameters against these settings: here the learning rate, against its schedule.

        Raises:
            ConfigurationError: They contradict each other.
        """
        self.factor(hyperparameters.lr, 0, num_training_steps=_SOME_STEPS)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; those of `added` only if given, so that older runs can be resumed."""
        asked = asdict(self)
        return {
            field.name: asked[field.name]
            for field in fields(self)
            if field.name not in self.added or asked[field.name] != field.default
        }


@dataclass(frozen=True)
class Hyperparameters:
    """The values that evolution may change; a subclass adds those of its loss.

    Attributes:
        lr: Learning rate of the optimizer.
        max_grad_norm: Largest 2-norm of the gradient; a larger gradient is scaled down to it.
        batch_size: Largest number of pairs for one optimizer step.
        update_epochs: Passes over each batch that `learn` is given.
    """

    lr: float = 5e-6
    max_grad_norm: float = 0.1
    batch_size: int = 16
    update_epochs: int = 1

    def __post_init__(self) -> None:
        # Plain Python numbers, since a checkpoint may hold no others.
        for name in ("lr", "max_grad_norm"):
            object.__setattr__(self, name, float(positive_number(name, getattr(self, name))))
        for name in ("batch_size", "update_epochs"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """A copy with these values; the object itself if none of them differs.

        Raises:
            ConfigurationError: A name is unknown or a value invalid.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError("hyperparameters", values, "must be a mapping such as {'lr': 1e-5}")
        current = asdict(self)
        unknown = sorted(set(values) - set(current))
        if unknown:
            raise ConfigurationError("hyperparameters", unknown, f"are not known: choose from {sorted(current)}")
        changed = {name: value for name, value in values.items() if value != current[name]}
        return replace(self, **changed) if changed else self


def check_evolution(
    hp_config: HyperparameterConfig | None, hyperparameters: Hyperparameters, settings: AgentSettings
) -> None:
    """Check that the hyperparameters, and every value which evolution may draw, are valid with these settings.

    Raises:
        ConfigurationError: A hyperparameter contradicts the settings, a bound or choice is invalid, or `hp_config` is
            no `HyperparameterConfig` for these hyperparameters.
    """
    settings.check(hyperparameters)
    if hp_config is None:
        return
    if not isinstance(hp_config, HyperparameterConfig):
        raise ConfigurationError("hp_config", hp_config, "must be HyperparameterConfig(lr=RLParameter(...), ...)")
    values = asdict(hyperparameters)
    hp_config.validate(values, list(values), lambda drawn: settings.check(replace(hyperparameters, **drawn)))


T = TypeVar("T")


class Setting(Generic[T]):
    """A setting as a read-only attribute of the agent, such as `agent.seed`."""

    _source: ClassVar[str] = "settings"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, agent: None, owner: type) -> Self: ...
    @overload
    def __get__(self, agent: Any, owner: type) -> T: ...
    def __get__(self, agent: Any, owner: type) -> T | Self:
        if agent is None:
            return self
        value: T = getattr(getattr(agent, self._source), self.name)
        return value

    def __set__(self, agent: Any, value: T) -> None:
        raise ConfigurationError(self.name, value, "is set when an agent is made and stays: make another agent")


class Evolvable(Setting[T]):
    """A hyperparameter as an attribute of the agent; `agent.lr = 1e-5` changes the optimizer's rate too."""

    _source = "hyperparameters"

    def __set__(self, agent: Any, value: T) -> None:
        agent.set_hyperparameters({self.name: value})
