"""What every agent has: adapters on the shared base, an optimizer, hyperparameters, and a record of its life."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from peft import LoraConfig
from torch import nn
from typing_extensions import Self

from evollm.algorithms.settings import AgentSettings, Evolvable, Hyperparameters
from evollm.checkpoints.agent import AgentFolder, read_agent_folder, write_agent_folder
from evollm.checkpoints.merge import check_same_lora, differing_fields, merge_lora_configs, pad_adapter
from evollm.checks import whole_number
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo.hyperparameters import HyperparameterConfig
from evollm.models import AdapterState, SharedBase
from evollm.models.engine import PassOptions
from evollm.processes import Processes

ACTOR = "actor"
REFERENCE = "reference"
# Stands for the reference that an agent has itself, where the name of another adapter could be given.
OWN = "its own reference"

# Clones of an agent hold the same objects under these names, and copies of all other attributes ...
_SHARED = frozenset(
    {"base", "accelerator", "device", "settings", "hp_config", "lora_config", "hyperparameters", "_mutation_hooks"}
)
# ... but for these, which a clone makes anew from the weights.
_NETWORKS = frozenset({"_adapters", "optimizer"})

A = TypeVar("A", bound="LLMAgent")


class LLMAgent(ABC):
    """A member of a population: adapters on a shared base, AdamW, hyperparameters.

    Args:
        base: The shared base.
        lora_config: LoRA configuration of its adapters.
        settings: What no mutation changes.
        hyperparameters: What evolution may change.
        hp_config: Which of them it does change, and within which bounds; None: none.
        index: The agent's number in its population.

    Attributes:
        fitness: The scores of `test`, oldest first.
        steps: Batches that the agent has learnt from.
        diverged: Whether a loss or gradient was not finite; the agent has skipped that update.
        rng: The agent's own generator, cloned and saved with it, for subclasses and hooks that draw numbers.
    """

    algorithm: ClassVar[str]

    lr = Evolvable[float]()
    max_grad_norm = Evolvable[float]()
    batch_size = Evolvable[int]()
    update_epochs = Evolvable[int]()

    def __init__(
        self,
        base: SharedBase,
        lora_config: LoraConfig,
        settings: AgentSettings,
        hyperparameters: Hyperparameters,
        hp_config: HyperparameterConfig | None,
        index: int,
    ) -> None:
        index = whole_number("index", index, 0)
        if hp_config is not None:
            if not isinstance(hp_config, HyperparameterConfig):
                raise ConfigurationError(
                    "hp_config", hp_config, "must be HyperparameterConfig(lr=RLParameter(...), ...)"
                )
            hp_config.validate(asdict(hyperparameters), known=list(asdict(hyperparameters)))
        self.base = base
        self.device = base.device
        self.lora_config = lora_config
        self.settings = settings
        self.hyperparameters = hyperparameters
        self.hp_config = hp_config
        self.index = index
        self.fitness: list[float] = []
        self.steps = 0
        self.diverged = False
        self.reference_update_tracker = 0
        self.rng = np.random.default_rng(settings.seed)
        self._mutation_hooks: tuple[Callable[[LLMAgent], None], ...] = ()

        actor = base.add_adapter(ACTOR, lora_config, trainable=True, seed=settings.seed)
        self._adapters: dict[str, str | None] = {ACTOR: actor, **self._frozen_adapters(actor)}
        base.use(actor)
        self.optimizer = self._new_optimizer()

    @abstractmethod
    def _frozen_adapters(self, actor: str) -> dict[str, str | None]:
        """The other roles at birth and the names of their adapters; None: the base without adapter."""

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.actor_parameters(), lr=self.lr, weight_decay=0.0)

    # Adapters and their roles

    def adapter(self, role: str) -> str | None:
        """Name on the shared base of the adapter in this role; None: the base without adapter.

        Raises:
            ConfigurationError: The agent has no such role.
        """
        if not self._adapters:
            raise ConfigurationError("agent", self.index, "was released: it left its population")
        if role not in self._adapters:
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
        if reference_update_tracker <= self.reference_update_tracker:
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
        """Free the agent's adapters and moments; it cannot be used afterwards."""
        for name in self._adapters.values():
            if name is not None:
                self.base.release(name)
        self._adapters.clear()
        self.optimizer.state.clear()

    # Evolution

    def hyperparameter_values(self) -> dict[str, float]:
        """The hyperparameters by name."""
        return asdict(self.hyperparameters)

    def set_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Change hyperparameters; the optimizer follows and keeps its moments.

        Raises:
            ConfigurationError: An unknown name or an impossible value.
        """
        current = self.hyperparameter_values()
        unknown = sorted(set(values) - set(current))
        if unknown:
            raise ConfigurationError("hyperparameters", unknown, f"are not known: choose from {sorted(current)}")
        changed = {name: value for name, value in values.items() if value != current[name]}
        if not changed:
            return
        self.hyperparameters = replace(self.hyperparameters, **changed)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        for hook in self._mutation_hooks:
            hook(self)

    def register_mutation_hook(self, hook: Callable[[LLMAgent], None]) -> None:
        """Call `hook(agent)` after every change of hyperparameters, of this agent and of its later clones."""
        self._mutation_hooks += (hook,)

    def clone(self, index: int | None = None, wrap: bool = True) -> Self:
        """A second agent like this one: own adapter, moments, hyperparameters and generator; nothing of the base.

        The frozen reference is shared, not copied, until either agent changes it.

        Args:
            index: Number of the clone, by default the agent's own.
            wrap: Accepted for compatibility; nothing is wrapped in a single process.
        """
        del wrap
        clone = self.copy_attributes(self, object.__new__(type(self)))
        clone.index = self.index if index is None else index
        clone._adapters = {role: self._bequeath(role) for role in self._adapters}
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

    # Checkpoints

    def save_checkpoint(self, path: str, lora_only: bool = True, save_optimizer: bool = True, **kwargs: Any) -> None:
        """Write the agent into a folder: one subfolder for each adapter, and `attributes.pt`.

        Each subfolder loads with `PeftModel.from_pretrained(base, path + "/actor")`. The folder appears whole or not
        at all; one that was there is replaced. Of several processes the main one writes and the others wait.

        Args:
            path: Folder to write.
            lora_only: Leave the base's weights out. False adds them as a transformers model, in the subfolder `base`,
                from which `load` takes them: the folder then stands by itself.
            save_optimizer: Include the optimizer's moments, to resume from.
            **kwargs: Ignored.

        Raises:
            ConfigurationError: Something else lies at `path`, or `lora_only` is False and the base is quantised.
        """
        del kwargs
        base = None if lora_only else self.base
        processes = Processes.present()
        if processes.is_main:
            write_agent_folder(path, self.to_folder(save_optimizer), base_name=self.base.name, base=base)
        processes.wait()

    def to_folder(self, save_optimizer: bool = True) -> AgentFolder:
        """What `save_checkpoint` writes."""
        adapters = {role: self.base.export(name) for role, name in self._adapters.items() if name is not None}
        return AgentFolder(adapters, self._attributes(), self.optimizer.state_dict() if save_optimizer else None)

    def load_checkpoint(
        self,
        path: str,
        load_optimizer: bool = True,
        overwrite_reference_adapter: bool | None = None,
        overwrite_critic_adapter: bool = True,
        merge_lora_configs: bool = False,
        check_base: bool = True,
    ) -> None:
        """Restore the agent from a folder that `save_checkpoint` wrote.

        Args:
            path: The folder.
            load_optimizer: Also restore the optimizer's moments; with none saved, warn and start afresh. False keeps
                the live optimizer.
            overwrite_reference_adapter: True copies the loaded actor onto the reference (the next stage of a chain),
                False restores the saved reference (a resume). None: a resume when the checkpoint is of the same
                algorithm, the next stage otherwise.
            overwrite_critic_adapter: Accepted for compatibility; this agent has no critic.
            merge_lora_configs: Where the LoRA configurations differ, rebuild the agent's adapters with the larger rank,
                the union of the target modules and, with a warning, its own values of other fields. The loaded
                adapters compute what they computed; the optimizer starts afresh.
            check_base: Refuse a checkpoint that was saved on another base.

        Raises:
            CheckpointError: The folder is missing, damaged, or from another base.
            ConfigurationError: The LoRA configurations differ; the message lists each field.
        """
        del overwrite_critic_adapter
        folder = read_agent_folder(path)
        if check_base and folder.attributes["base_fingerprint"] != self.base.weights_fingerprint:
            saved_on = folder.attributes["base_name"] or "a base without a name"
            raise CheckpointError(
                f"{path} was saved on another base ({saved_on}) than {self.base.name or 'this one'}: its adapters mean "
                "nothing here. The same model in another dtype or quantised counts as another: check_base=False"
            )
        if merge_lora_configs:
            folder = self._merged(folder)
        self.load_folder(folder, load_optimizer, overwrite_reference_adapter, source=path)

    def _merged(self, folder: AgentFolder) -> AgentFolder:
        """The folder's adapters in the shapes of a merged LoRA configuration, which this agent's get too."""
        current, saved = self.base.config(self.actor_adapter), folder.adapter(ACTOR).config
        if not differing_fields(current, saved):
            return folder
        merged, overruled = merge_lora_configs(current, saved)
        if overruled:
            warnings.warn(
                f"LoRA configurations differ in {overruled}: the agent's values hold, not the checkpoint's",
                UserWarning,
                stacklevel=3,
            )
        name = self.base.add_adapter(ACTOR, merged, trainable=True, seed=self.settings.seed)
        fresh = self.base.export(name)
        try:
            adapters = {
                role: AdapterState(fresh.config, pad_adapter(state, fresh)) for role, state in folder.adapters.items()
            }
        except ConfigurationError:
            self.base.use(self.actor_adapter)
            self.base.release(name)
            raise
        self.base.release(self.actor_adapter)
        self._adapters[ACTOR] = name
        self.lora_config = merged
        self.base.use(name)
        self.optimizer = self._new_optimizer()
        return replace(folder, adapters=adapters, optimizer=None)

    def load_folder(
        self,
        folder: AgentFolder,
        load_optimizer: bool = True,
        overwrite_reference_adapter: bool | None = None,
        source: object = "the checkpoint",
    ) -> None:
        """What `load_checkpoint` does once a folder is read; `source` says where it came from."""
        saved_actor = folder.adapter(ACTOR)
        check_same_lora(self.base.config(self.actor_adapter), saved_actor.config)
        is_resume = folder.attributes["algorithm"] == self.algorithm
        if overwrite_reference_adapter is None:
            overwrite_reference_adapter = not is_resume

        has_reference = self._adapters.get(REFERENCE) is not None
        if has_reference:
            # Looked up before anything is changed: it may be missing.
            saved_reference = saved_actor if overwrite_reference_adapter else folder.adapter(REFERENCE)
        self.base.load(self.actor_adapter, saved_actor.tensors)
        if has_reference:
            self._replace_reference(saved_reference)
        if is_resume:
            self._restore_attributes(folder.attributes)
        if load_optimizer:
            self._load_optimizer(folder.optimizer, source)

    def _attributes(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            **self.base.origin(),
            "index": self.index,
            "hyperparameters": asdict(self.hyperparameters),
            "settings": asdict(self.settings),
            "hp_config": self.hp_config.to_dict() if self.hp_config else None,
            "fitness": list(self.fitness),
            "steps": self.steps,
            "diverged": self.diverged,
            "reference_update_tracker": self.reference_update_tracker,
            "rng": self.rng.bit_generator.state,
        }

    def _restore_attributes(self, attributes: Mapping[str, Any]) -> None:
        for name in ("index", "fitness", "steps", "diverged", "reference_update_tracker"):
            setattr(self, name, copy.copy(attributes[name]))
        self.rng.bit_generator.state = attributes["rng"]
        self.set_hyperparameters(attributes["hyperparameters"])

    def _load_optimizer(self, state: Mapping[str, Any] | None, source: object) -> None:
        self.optimizer = self._new_optimizer()
        if state is None:
            warnings.warn(
                f"{source} holds no optimizer state for these adapters: training goes on with a fresh optimizer",
                UserWarning,
                stacklevel=4,
            )
            return
        self.optimizer.load_state_dict(dict(state))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
