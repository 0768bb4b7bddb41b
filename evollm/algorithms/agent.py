"""What every agent has: adapters on the shared base, an optimizer, hyperparameters, and a record of its life."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self

from evollm.algorithms.arguments import show_arguments
from evollm.algorithms.optimizers import adamw, free
from evollm.algorithms.settings import AgentSettings, Evolvable, Hyperparameters, Setting, check_evolution
from evollm.checks import boolean, located, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig
from evollm.models import AdapterShares, AdapterState
from evollm.models.engine import BatchSlot, Engine, PassOptions
from evollm.models.loading import BaseSource, usable_device
from evollm.models.requirements import check_lora_config
from evollm.models.slow_settings import slow_compile_mode
from evollm.runs.words import Words

if TYPE_CHECKING:
    from accelerate import Accelerator

# What an agent's LoRA is unless the user says otherwise.
DEFAULT_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ACTOR = "actor"
REFERENCE = "reference"
# Stands for the reference that an agent has itself, where the name of another adapter could be given.
OWN = "its own reference"

# Clones of an agent hold the same objects under these names, and copies of all other attributes ...
_SHARED = frozenset(
    {
        *{"base", "accelerator", "device", "settings", "hp_config", "lora_config", "hyperparameters", "model_config"},
        *{"observation_space", "action_space", "_mutation_hooks"},
    }
)
# ... but for these, which a clone makes anew from the weights.
_NETWORKS = frozenset({"_adapters", "optimizer"})

A = TypeVar("A", bound="LLMAgent")


class LLMAgent:
    """A member of a population: adapters on a shared base, AdamW, hyperparameters.

    The constructor takes `AgentArguments`, and the fields of `settings_class` and `hyperparameters_class`, by name: an
    algorithm whose classes have further fields needs no constructor for them. Every argument is an attribute.

    Attributes:
        fitness: The scores of `test`, oldest first.
        steps: Batches that the agent has learnt from.
        num_tokens: Tokens that it has learnt from, a prompt that two sides share counted once.
        diverged: Whether a loss or gradient was not finite; the agent has skipped that update.
        slot: Its place among others that were there when it is trained anew without them; else None.
        rng: The agent's own generator, cloned and saved with it, for subclasses and hooks that draw numbers.
    """

    algorithm: ClassVar[str]
    words: ClassVar[Words]
    # What an agent of this kind is described by, apart from its weights.
    settings_class: ClassVar[type[AgentSettings]] = AgentSettings
    hyperparameters_class: ClassVar[type[Hyperparameters]] = Hyperparameters

    lr = Evolvable[float]()
    max_grad_norm = Evolvable[float]()
    batch_size = Evolvable[int]()
    update_epochs = Evolvable[int]()
    seed = Setting[int]()
    micro_batch_size_per_gpu = Setting["int | None"]()
    gradient_checkpointing = Setting["bool | None"]()
    calc_position_embeddings = Setting[bool]()
    pad_token_id = Setting["int | None"]()
    pad_token = Setting["str | None"]()
    torch_compiler = Setting["str | None"]()
    token_budget = Setting["int | None"]()
    drop_nonfinite_rows = Setting[bool]()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        show_arguments(cls)

    def __init__(
        self,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        *,
        model_name: str | None = None,
        actor_network: PreTrainedModel | None = None,
        model_config: Mapping[str, Any] | None = None,
        archive: str | Path | None = None,
        hp_config: HyperparameterConfig | None = None,
        index: int = 0,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        lora_config: LoraConfig | None = None,
        accelerator: Accelerator | None = None,
        wrap: bool = True,
        clone: bool = False,
        **values: Any,
    ) -> None:
        inspect.signature(type(self)).bind_partial(**values)  # A TypeError names what no agent of this kind takes.
        boolean("wrap", wrap)
        boolean("clone", clone)
        of_settings = {field.name for field in fields(self.settings_class)}
        settings = self.settings_class(**{name: values.pop(name) for name in of_settings & values.keys()})
        hyperparameters = self.hyperparameters_class(**values)
        source = BaseSource(model_name, actor_network, model_config, archive, dtype)
        index = whole_number("index", index, 0)
        for name, space in (("observation_space", observation_space), ("action_space", action_space)):
            if not isinstance(space, spaces.Space | None):
                raise ConfigurationError(name, space, "must be a space of gymnasium or None: give the rest by its name")
        settings.check(hyperparameters)
        check_evolution(hp_config, hyperparameters, settings)
        if lora_config is None:
            lora_config = LoraConfig(**DEFAULT_LORA)
        else:
            check_lora_config(lora_config)
        if lora_config.lora_dropout:
            # stacklevel=4 points the warning at the caller of DPO() or SFT().
            warnings.warn(
                f"lora_dropout={lora_config.lora_dropout} has no effect: the base stays in evaluation mode",
                UserWarning,
                stacklevel=4,
            )
        self.base = base = source.load(usable_device(accelerator, device, actor_network), accelerator)
        self.model_name = None if source.model_name is None else located(source.model_name)
        self.model_config = source.model_config
        # A loaded model holds the archive's weights.
        self.archive = None if source.model_name is None or source.archive is None else located(source.archive)
        self.dtype = source.dtype
        self.observation_space = observation_space
        self.action_space = action_space
        self.accelerator = accelerator
        self.device = base.device
        self.lora_config = lora_config
        self.settings = settings
        self.hyperparameters = hyperparameters
        self.hp_config = hp_config
        self.index = index
        self.fitness: list[float] = []
        self.steps = 0
        self.num_tokens = 0
        self.diverged = False
        self.slot: BatchSlot | None = None
        self.reference_update_tracker = 0
        self.rng = np.random.default_rng(settings.seed)
        self._mutation_hooks: tuple[Callable[[LLMAgent], object], ...] = ()

        self._adapters = AdapterShares(base)
        actor = self._adapters[ACTOR] = base.add_adapter(ACTOR, lora_config, trainable=True, seed=settings.seed)
        self._adapters.update(self._frozen_adapters(actor))
        base.use(actor)
        self.optimizer = self._new_optimizer()
        if settings.gradient_checkpointing and not base.can_checkpoint:
            warnings.warn(
                "gradient_checkpointing=True has no effect: the base declares no layers for it",
                UserWarning,
                stacklevel=4,
            )
        if settings.torch_compiler is not None:
            base.compile(settings.torch_compiler)
            Engine.of(base).say([slow_compile_mode(base.device.type, settings.torch_compiler)])

    def _frozen_adapters(self, actor: str) -> dict[str, str | None]:
        """The other roles at birth and the names of their adapters, by default none; None: the base without adapter."""
        del actor
        return {}

    def _new_optimizer(self) -> torch.optim.AdamW:
        return adamw(self.actor_parameters(), self.lr, self.accelerator)

    @property
    def actor_network(self) -> PreTrainedModel | None:
        """The base as a loaded model, None where it was loaded by `model_name`."""
        return None if self.model_name is not None else self.base.network

    # Adapters and their roles

    def adapter(self, role: str) -> str | None:
        """Name on the shared base of the adapter in this role; None: the base without adapter.

        Raises:
            ConfigurationError: The agent has no such role.
        """
        if not self._adapters:
            raise ConfigurationError("agent", self.index, "was released: it left its population")
        if not isinstance(role, str) or role not in self._adapters:
            raise ConfigurationError("adapter_name", role, f"is not a role of {self.algorithm}: {list(self._adapters)}")
        return self._adapters[role]

    @property
    def actor_adapter(self) -> str:
        """Name on the shared base of the adapter that is trained."""
        name = self.adapter(ACTOR)
        assert name is not None
        return name

    @property
    def pass_options(self) -> PassOptions:
        """How the agent goes through the base."""
        return PassOptions(
            token_budget=self.settings.token_budget,
            max_pairs=self.settings.micro_batch_size_per_gpu,
            explicit_positions=self.settings.calc_position_embeddings,
            gradient_checkpointing=self.settings.gradient_checkpointing,
        )

    def actor_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return list(self.base.parameters(self.actor_adapter).values())

    def use_adapter(self, adapter_name: str) -> None:
        """Make the adapter in this role the active one of the base, until further notice.

        Actors require gradients and references do not, whichever is active.
        """
        self.base.use(self.adapter(adapter_name))

    @contextmanager
    def select_adapter(self, adapter_name: str) -> Iterator[None]:
        """The adapter in this role is active inside the block; what was active before is so again afterwards."""
        with self.base.active(self.adapter(adapter_name)):
            yield

    def set_reference_policy(self, reference_update_tracker: int) -> None:
        """Make the present actor the reference, when the tracker is ahead of the agent's own.

        Args:
            reference_update_tracker: For example the number of epochs completed.

        Raises:
            ConfigurationError: The reference is the base itself (`use_separate_reference_adapter=False`).
        """
        if whole_number("reference_update_tracker", reference_update_tracker, 0) <= self.reference_update_tracker:
            return
        if self.adapter(REFERENCE) is None:
            raise ConfigurationError(
                "use_separate_reference_adapter", False, "the base itself is the reference and cannot be updated"
            )
        self._replace_reference(self.base.export(self.actor_adapter))
        self.reference_update_tracker = reference_update_tracker

    def _replace_reference(self, state: AdapterState) -> None:
        """Change the reference, to another agent's if it has these weights; the old one is not written to."""
        before = self.adapter(REFERENCE)
        assert before is not None
        self._adapters[REFERENCE] = self.base.frozen_adapter(state, REFERENCE)
        self.base.use(self.actor_adapter)
        self.base.release(before)

    def release(self) -> None:
        """Free the agent's adapters and moments at once; it cannot be used afterwards.

        Those of an agent that is dropped are freed too, before the next adapter is added to its base, unless
        `get_policy` has given somebody the model.
        """
        self._adapters.release()
        free(self.optimizer)

    # Evolution

    @classmethod
    def population(
        cls,
        size: int,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        wrapper_cls: type[Any] | None = None,
        wrapper_kwargs: Mapping[str, Any] | None = None,
        *,
        sample_hyperparameters: bool = True,
        **kwargs: Any,
    ) -> list[Self]:
        """Build `size` agents on one base, with the same first weights.

        Args:
            size: Number of agents.
            observation_space: As for one agent.
            action_space: As for one agent.
            wrapper_cls: Called with each agent, and `wrapper_kwargs`; the results are returned instead.
            wrapper_kwargs: Keyword arguments for `wrapper_cls`.
            sample_hyperparameters: With an `hp_config`, agent 0 keeps the given values and the others start from
                log-uniform draws inside the declared bounds. False: all start from the given values.
            **kwargs: As for one agent.

        Raises:
            ConfigurationError: As for one agent, or `size` is below 1.
        """
        whole_number("size", size, 1)
        boolean("sample_hyperparameters", sample_hyperparameters)
        arguments: dict[str, Any] = {"observation_space": observation_space, "action_space": action_space, **kwargs}
        first = cls(**arguments)
        agents = [first] + [first.clone(index=first.index + offset) for offset in range(1, size)]
        if first.hp_config is not None and sample_hyperparameters:
            rng = np.random.default_rng(first.settings.seed)
            for agent in agents[1:]:
                agent.set_hyperparameters(first.hp_config.sample(rng))
        if wrapper_cls is None:
            return agents
        return [wrapper_cls(agent, **(wrapper_kwargs or {})) for agent in agents]

    def hyperparameter_values(self) -> dict[str, float]:
        """The hyperparameters by name."""
        return asdict(self.hyperparameters)

    def set_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Change hyperparameters; the optimizer follows and keeps its moments.

        Raises:
            ConfigurationError: An unknown name or an impossible value.
        """
        hyperparameters = self.check_hyperparameters(values)
        if hyperparameters is self.hyperparameters:
            return
        self.hyperparameters = hyperparameters
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def check_hyperparameters(self, values: Mapping[str, Any]) -> Hyperparameters:
        """The agent's hyperparameters with these values; the agent is not changed.

        Raises:
            ConfigurationError: An unknown name or an impossible value.
        """
        if not isinstance(values, Mapping):
            raise ConfigurationError("hyperparameters", values, "must be a mapping such as {'lr': 1e-5}")
        current = self.hyperparameter_values()
        unknown = sorted(set(values) - set(current))
        if unknown:
            raise ConfigurationError("hyperparameters", unknown, f"are not known: choose from {sorted(current)}")
        changed = {name: value for name, value in values.items() if value != current[name]}
        if not changed:
            return self.hyperparameters
        hyperparameters = replace(self.hyperparameters, **changed)
        self.settings.check(hyperparameters)
        return hyperparameters

    def register_mutation_hook(self, hook: Callable[[], object] | Callable[[LLMAgent], object]) -> None:
        """Call a function whenever an evolution has mutated this agent, or a later clone of it.

        Args:
            hook: Called with nothing if it can be, else with the agent that was mutated. A method of this agent is
                called as the mutated agent's own.

        Raises:
            ConfigurationError: It is no function, or needs more arguments.
        """
        if getattr(hook, "__self__", None) is self:
            hook = hook.__func__  # type: ignore[union-attr]
        self._mutation_hooks += (_of_an_agent(hook),)

    def mutation_hook(self) -> None:
        """Call the functions that were registered; evolution does so after a mutation."""
        for hook in self._mutation_hooks:
            hook(self)

    def clone(self, index: int | None = None, wrap: bool = True) -> Self:
        """A second agent like this one: own adapter, moments, hyperparameters and generator; nothing of the base.

        The frozen reference is shared, not copied, until either agent changes it.

        Args:
            index: Number of the clone, by default the agent's own.
            wrap: Accepted for compatibility; nothing is wrapped in a single process.
        """
        boolean("wrap", wrap)
        clone = self.copy_attributes(self, object.__new__(type(self)))
        clone.index = self.index if index is None else whole_number("index", index, 0)
        clone._adapters = AdapterShares(self.base)
        for role in self._adapters:
            clone._adapters[role] = self._bequeath(role)
        clone.optimizer = clone._new_optimizer()
        clone.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return clone

    def _bequeath(self, role: str) -> str | None:
        """A clone's adapter in this role: a copy where it is trained, the same one where it is frozen."""
        name = self.adapter(role)
        if name is None:
            return None
        return self.base.copy_adapter(name, role, trainable=True) if role == ACTOR else self.base.retain(name)

    @staticmethod
    def copy_attributes(agent: A, clone: A) -> A:
        """Copy all attributes but the networks; what agents share by design is shared."""
        for name, value in vars(agent).items():
            if name in _SHARED:
                setattr(clone, name, value)
            elif name not in _NETWORKS:
                setattr(clone, name, copy.deepcopy(value))
        return clone


def _of_an_agent(hook: Callable[..., object]) -> Callable[[LLMAgent], object]:
    """A hook as a function of an agent."""
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        raise ConfigurationError("hook", hook, "must be a function of an agent, or of nothing") from None
    for takes, function in ((0, lambda agent: hook()), (1, hook)):
        try:
            signature.bind(*(None,) * takes)
        except TypeError:
            continue
        return function
    raise ConfigurationError("hook", hook, "must be a function of an agent, or of nothing")
