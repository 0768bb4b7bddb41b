"""The agent without an algorithm: adapters on the shared base, an optimizer, settings, hyperparameters and counters."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
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
from evollm.algorithms.configured_agent import ConfiguredAgent
from evollm.algorithms.launch import check_launch
from evollm.algorithms.optimizers import create_optimizer
from evollm.algorithms.settings import AgentSettings, Hyperparameters, check_evolution
from evollm.checks import boolean, located, whole_number
from evollm.errors import ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig
from evollm.models import AdapterShares, AdapterState
from evollm.models.adapters.lora_config import check_lora_config
from evollm.models.engine import BatchSlot, Engine, PassOptions
from evollm.models.loading.base_source import BaseSource, usable_device
from evollm.models.slow_settings import slow_compile_mode
from evollm.runs.words import Words

if TYPE_CHECKING:
    from accelerate import Accelerator

# The LoRA configuration of an agent that is given none.
DEFAULT_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ACTOR = "actor"
REFERENCE = "reference"
# Passed as the name of a reference adapter: each agent's own reference.
OWN = "its own reference"

# Attributes that a clone shares with its agent; it gets deep copies of the others ...
_SHARED = frozenset(
    {
        *{"base", "accelerator", "device", "settings", "hp_config", "lora_config", "hyperparameters", "model_config"},
        *{"observation_space", "action_space", "_mutation_hooks"},
    }
)
# ... except of these, which `clone` builds from the weights.
_NETWORKS = frozenset({"_adapters", "optimizer"})

A = TypeVar("A", bound="LLMAgent")


class LLMAgent(ConfiguredAgent):
    """A member of a population: adapters on a shared base, an optimizer, hyperparameters.

    The constructor takes `AgentArguments`, and the fields of `settings_class` and `hyperparameters_class`, by name: an
    algorithm whose classes have further fields needs no constructor for them. Every argument is an attribute.

    Attributes:
        fitness: The scores of `test`, oldest first.
        steps: Number of batches that the agent has learnt from.
        num_tokens: Number of tokens that it has learnt from; a prompt that two sides share counts once.
        diverged: Whether a loss or gradient was not finite; that update was skipped, and the agent learns no more.
        slot: In a replay of this agent alone, its place in the shared forward passes of the original run; else None.
        rng: The agent's own generator, cloned and saved with it, for subclasses and hooks that draw numbers.
    """

    algorithm: ClassVar[str]
    words: ClassVar[Words]
    # The dataclasses of the agent's settings and hyperparameters.
    settings_class: ClassVar[type[AgentSettings]] = AgentSettings
    hyperparameters_class: ClassVar[type[Hyperparameters]] = Hyperparameters

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
        check_evolution(hp_config, hyperparameters, settings)
        if lora_config is None:
            lora_config = LoraConfig(**DEFAULT_LORA)
        else:
            check_lora_config(lora_config)
        check_launch(settings, lora_config, accelerator)
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
        # A loaded model contains the archive's weights already.
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

        self._adapters = AdapterShares(base.adapters)
        actor = self._adapters[ACTOR] = base.adapters.add(ACTOR, lora_config, trainable=True, seed=settings.seed)
        self._adapters.update(self._frozen_adapters(actor))
        base.adapters.use(actor)
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

    def _new_optimizer(self) -> torch.optim.Optimizer:
        adapters, actor = self.base.adapters, self.actor_adapter
        parameters, rows = adapters.parameters(actor), adapters.rows(actor)
        return create_optimizer(self.settings, parameters, rows, self.lr, self.lr_factor, self.accelerator)

    def _frozen_adapters(self, actor: str) -> dict[str, str | None]:
        """The frozen adapters of a new agent: for each role its name on the base; None for the base without adapter."""
        del actor
        return {}

    @property
    def actor_network(self) -> PreTrainedModel | None:
        """The model that the base is, if it was given as a loaded one; None if it was loaded by `model_name`."""
        return None if self.model_name is not None else self.base.network

    # Adapters and their roles

    def adapter(self, role: str) -> str | None:
        """Name on the shared base of the adapter in this role; None for the base without adapter.

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
        """Name on the shared base of the trained adapter."""
        name = self.adapter(ACTOR)
        assert name is not None
        return name

    @property
    def pass_options(self) -> PassOptions:
        """Options of the agent's forward and backward passes."""
        return PassOptions(
            token_budget=self.settings.token_budget,
            max_pairs=self.settings.micro_batch_size_per_gpu,
            explicit_positions=self.settings.calc_position_embeddings,
            gradient_checkpointing=self.settings.gradient_checkpointing,
        )

    def actor_parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the optimizer's order."""
        return list(self.base.adapters.parameters(self.actor_adapter).values())

    def use_adapter(self, adapter_name: str) -> None:
        """Activate the adapter in this role on the base, until another is activated.

        Which parameters require gradients does not change: those of actors do, those of references do not.
        """
        self.base.adapters.use(self.adapter(adapter_name))

    @contextmanager
    def select_adapter(self, adapter_name: str) -> Iterator[None]:
        """Activate the adapter in this role inside the block, and the one before it again afterwards."""
        with self.base.active(self.adapter(adapter_name)):
            yield

    def set_reference_policy(self, reference_update_tracker: int) -> None:
        """Replace the reference by a copy of the actor, if the tracker is larger than at the last replacement.

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
        self._replace_reference(self.base.adapters.export(self.actor_adapter))
        self.reference_update_tracker = reference_update_tracker

    def _replace_reference(self, state: AdapterState) -> None:
        """Give the agent a reference with these weights, shared with agents that have an equal one.

        The old adapter is released, not written to: other agents may share it.
        """
        before = self.adapter(REFERENCE)
        assert before is not None
        self._adapters[REFERENCE] = self.base.adapters.frozen(state, REFERENCE)
        self.base.adapters.use(self.actor_adapter)
        self.base.adapters.release(before)

    def replace_actor(self, state: AdapterState) -> None:
        """Give the agent an actor with these weights, whose LoRA configuration may differ, and a new optimizer.

        Raises:
            ConfigurationError: The weights do not fit the base; the agent is unchanged.
        """
        name = self.base.adapters.add(ACTOR, state.config, trainable=True)
        try:
            self.base.adapters.load(name, state.tensors)
        except ConfigurationError:
            self.base.adapters.use(self.actor_adapter)
            self.base.adapters.release(name)
            raise
        self.base.adapters.release(self.actor_adapter)
        self._adapters[ACTOR] = name
        self.lora_config = state.config
        self.optimizer = self._new_optimizer()

    def release(self) -> None:
        """Free the agent's adapters and moments now; the agent cannot be used afterwards.

        An agent that is garbage-collected is freed later, when its base adds the next adapter; after `get_policy` its
        adapters stay until `release`, since the caller may still use the model.
        """
        self._adapters.release()
        close = getattr(self.optimizer, "close", None)  # of AdamW sharded by DeepSpeed
        if close is not None:
            close()
        self.optimizer.state.clear()

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
        sampling: str = "random",
        **kwargs: Any,
    ) -> list[Self]:
        """Build `size` agents on one base, with equal initial adapters.

        Args:
            size: Number of agents.
            observation_space: As for one agent.
            action_space: As for one agent.
            wrapper_cls: Called with each agent and `wrapper_kwargs`; its results are returned instead of the agents.
            wrapper_kwargs: Keyword arguments for `wrapper_cls`.
            sample_hyperparameters: With an `hp_config`, agent 0 keeps the given values and the others start from
                log-uniform draws inside the declared bounds. False: all start from the given values.
            sampling: "random": the draws are independent; "latin_hypercube": they are spread evenly over the bounds of
                each hyperparameter.
            **kwargs: As for one agent.

        Raises:
            ConfigurationError: As for one agent, `size` is below 1, or `sampling` is neither of the two.
        """
        whole_number("size", size, 1)
        boolean("sample_hyperparameters", sample_hyperparameters)
        if sampling not in ("random", "latin_hypercube"):
            raise ConfigurationError("sampling", sampling, "must be random or latin_hypercube")
        arguments: dict[str, Any] = {"observation_space": observation_space, "action_space": action_space, **kwargs}
        first = cls(**arguments)
        agents = [first] + [first.clone(index=first.index + offset) for offset in range(1, size)]
        if first.hp_config is not None and sample_hyperparameters:
            rng, config, others = np.random.default_rng(first.settings.seed), first.hp_config, agents[1:]
            spread = sampling == "latin_hypercube"
            drawn = config.sample_spread(len(others), rng) if spread else [config.sample(rng) for _ in others]
            for agent, values in zip(others, drawn, strict=True):
                agent.set_hyperparameters(values)
        if wrapper_cls is None:
            return agents
        return [wrapper_cls(agent, **(wrapper_kwargs or {})) for agent in agents]

    def register_mutation_hook(self, hook: Callable[[], object] | Callable[[LLMAgent], object]) -> None:
        """Register a function that is called after each mutation of this agent or of a later clone.

        Args:
            hook: A function without required arguments, or of the mutated agent. A method of this agent is called as
                the method of the mutated one.

        Raises:
            ConfigurationError: The hook is no function, or requires more arguments.
        """
        if getattr(hook, "__self__", None) is self:
            hook = hook.__func__  # type: ignore[union-attr]
        self._mutation_hooks += (_taking_agent(hook),)

    def mutation_hook(self) -> None:
        """Call the registered functions; evolution does so after each mutation."""
        for hook in self._mutation_hooks:
            hook(self)

    def clone(self, index: int | None = None, wrap: bool = True) -> Self:
        """A copy of the agent on the same base, with its own actor, moments, hyperparameters and generator.

        The frozen reference is shared until either agent replaces it.

        Args:
            index: Number of the clone, by default the agent's own.
            wrap: Accepted for compatibility; nothing is wrapped in a single process.
        """
        boolean("wrap", wrap)
        clone = self.copy_attributes(self, object.__new__(type(self)))
        clone.index = self.index if index is None else whole_number("index", index, 0)
        clone._adapters = AdapterShares(self.base.adapters)
        for role in self._adapters:
            name = self.adapter(role)
            if name is not None:
                trained = role == ACTOR
                name = (
                    self.base.adapters.copy(name, role, trainable=True) if trained else self.base.adapters.retain(name)
                )
            clone._adapters[role] = name
        clone.optimizer = clone._new_optimizer()
        clone.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return clone

    @staticmethod
    def copy_attributes(agent: A, clone: A) -> A:
        """Copy all attributes except adapters and optimizer to the clone; the base and settings are shared."""
        for name, value in vars(agent).items():
            if name in _SHARED:
                setattr(clone, name, value)
            elif name not in _NETWORKS:
                setattr(clone, name, copy.deepcopy(value))
        return clone


def _taking_agent(hook: Callable[..., object]) -> Callable[[LLMAgent], object]:
    """The hook as a function of an agent."""
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
