"""An agent's checkpoints: saved, and loaded to resume a run or to start the next training stage."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from typing_extensions import Self

from evollm.algorithms.agent import ACTOR, REFERENCE, LLMAgent
from evollm.algorithms.optimizer_archive import read_optimizer_archive
from evollm.algorithms.optimizer_state import check_replaceable_weights, check_same_optimizer, check_state, load_state
from evollm.algorithms.optimizers import parameter_groups
from evollm.algorithms.saved_attributes import SavedAttributes, accepted_by, read_attributes
from evollm.checkpoints.agent import AgentFolder, read_agent_folder, write_agent_folder
from evollm.checkpoints.export import main_writes
from evollm.checkpoints.find import find_agent
from evollm.checkpoints.lora_merge import check_same_lora, differing_fields, merge_lora_configs, pad_adapter
from evollm.checkpoints.policy_archive import OPTIMIZER, POLICY, no_archive_with
from evollm.checks import boolean, optional_boolean, usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.foreign import LOAD, SAVE, explains
from evollm.models import AdapterState
from evollm.models.adapters.merging import adapter_difference
from evollm.models.fingerprints import adapter_fingerprint
from evollm.models.loading.model_config import reloadable

if TYPE_CHECKING:
    from accelerate import Accelerator


class SavableAgent(LLMAgent):
    """An agent with the methods that write it to a folder and read it from one."""

    @classmethod
    def load(
        cls,
        path: str,
        device: str | torch.device | None = None,
        accelerator: Accelerator | None = None,
        actor_network: PreTrainedModel | None = None,
        model_config: Mapping[str, Any] | None = None,
        archive: str | Path | None = None,
    ) -> Self:
        """Rebuild an agent from a folder that `save_checkpoint` wrote.

        Args:
            path: The folder, or that of a run, whose best agent is loaded; see `load_checkpoint`.
            device: Device of the base; None: as for the constructor.
            accelerator: As for the constructor.
            actor_network: The base. None: the base in the checkpoint (`lora_only=False`), or without one the base that
                the checkpoint names.
            model_config: Keyword arguments for `from_pretrained`, for a base loaded by its name. None: those of the
                original loading that choose weights and their type (`dtype`, `revision`, ...), but never custom code
                or quantisation, which a checkpoint cannot switch on.
            archive: A policy archive whose weights replace those of the base. None: for a base loaded by its name, the
                archive of the original loading.

        Raises:
            CheckpointError: The folder or the archive is missing or damaged, or was saved on another base.
            ConfigurationError: The checkpoint is of another algorithm, or its base has no name or cannot be loaded.
        """
        path = _agent_folder(path)
        folder = read_agent_folder(path)
        attributes = folder.attributes
        if attributes["algorithm"] != cls.algorithm:
            fix = f"{path} holds a {attributes['algorithm']} agent: make one of {cls.algorithm} and use load_checkpoint"
            raise ConfigurationError("path", path, fix)
        saved = read_attributes(attributes, cls.settings_class, cls.hyperparameters_class, path)
        base_name = str(folder.base or attributes["base_name"])
        if actor_network is None and folder.base is None:
            model_config = reloadable(attributes.get("model_config") or {}) if model_config is None else model_config
            archive = archive or attributes.get("archive")
        if actor_network is None and not base_name:
            raise ConfigurationError("actor_network", None, f"{path} names no base model: pass the one it was tuned on")
        arguments: dict[str, Any] = {
            **accepted_by(cls, saved.settings),
            **accepted_by(cls, saved.hyperparameters),
            # These come last, so that no field of a checkpoint can replace them.
            "actor_network": actor_network,
            "model_name": None if actor_network is not None else base_name,
            "model_config": model_config,
            "archive": archive,
            "lora_config": folder.adapter(ACTOR).config,
            "hp_config": saved.hp_config,
            "device": device,
            "accelerator": accelerator,
        }
        agent = cls(**arguments)
        agent.load_checkpoint(path, load_optimizer=folder.optimizer is not None)
        return agent

    @explains(SAVE)
    def save_checkpoint(self, path: str, lora_only: bool = True, save_optimizer: bool = True) -> None:
        """Write the agent into a folder: one subfolder for each adapter, and `attributes.pt`.

        Each subfolder loads with `PeftModel.from_pretrained(base, path + "/actor")`. The folder appears whole or not
        at all; one that was there is replaced. Of several processes the main one writes and the others wait.

        Args:
            path: Folder to write.
            lora_only: Write the adapters alone. False also writes the base as a transformers model, in the subfolder
                `base`, from which `load` takes it.
            save_optimizer: Write the optimizer's moments, which a resume needs.

        Raises:
            ConfigurationError: `path` holds something else than a checkpoint, or `lora_only` is False and the base is
                quantised.
        """
        boolean("save_optimizer", save_optimizer)
        base = None if boolean("lora_only", lora_only) else self.base
        # Called in all processes, since each may hold a shard of the moments.
        folder = self.to_folder(save_optimizer)
        main_writes(lambda: write_agent_folder(path, folder, base_name=self.base.name, base=base), base)

    def to_folder(self, save_optimizer: bool = True) -> AgentFolder:
        """The content of a checkpoint as plain data."""
        adapters = {role: self.base.adapters.export(name) for role, name in self._adapters.items() if name is not None}
        return AgentFolder(adapters, self._attributes(), self.optimizer.state_dict() if save_optimizer else None)

    @explains(LOAD)
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
            path: The folder of an agent. The folder of a run or population also works and gives its best agent; of a
                run that has not ended, with a warning, the best agent of its newest checkpoint.
            load_optimizer: True: a resume restores the optimizer's moments. The next training stage starts with a new
                optimizer, since the moments belong to another loss or reference. If no moments are saved, either warns
                and starts with a new optimizer. False keeps the agent's optimizer as it is.
            overwrite_reference_adapter: True: this is the next training stage. The loaded actor also becomes the
                reference, if the agent has one; hyperparameters, counters and optimizer stay the agent's own. False:
                this is a resume. The saved reference is restored, and from a checkpoint of the same algorithm
                everything else. None: a resume for an agent of the same algorithm, else the next stage, as for a
                folder that holds a single adapter (`save_llm_checkpoint`).
            overwrite_critic_adapter: Accepted for compatibility; this agent has no critic.
            merge_lora_configs: If the LoRA configurations differ, rebuild the agent's adapters with the larger rank,
                the union of the target modules and, with a warning, the agent's values of other fields. The loaded
                adapters keep their outputs; the optimizer is a new one.
            check_base: Refuse a checkpoint that was saved on another base.

        Raises:
            CheckpointError: The folder is missing, damaged, or from another base.
            ConfigurationError: The LoRA configurations differ; the message lists each field. Or the reference is the
                base without adapter, which the next stage cannot replace. Or the kept state of a schedule-free
                optimizer would be that of other weights.
        """
        for name, value in (
            ("load_optimizer", load_optimizer),
            ("overwrite_critic_adapter", overwrite_critic_adapter),
            ("merge_lora_configs", merge_lora_configs),
            ("check_base", check_base),
        ):
            boolean(name, value)
        optional_boolean("overwrite_reference_adapter", overwrite_reference_adapter)
        if not load_optimizer:
            check_replaceable_weights(self.optimizer)
        path = _agent_folder(path)
        folder = read_agent_folder(path)
        if check_base and folder.attributes["base_fingerprint"] != self.base.weights_fingerprint:
            raise _other_base(folder, path, self.base.name or "this one")
        if merge_lora_configs:
            folder = self._merged(folder)
        self.load_folder(folder, load_optimizer, overwrite_reference_adapter, source=path)

    def load_optimizer_archive(self, folder: str | Path) -> None:
        """Load the moments in `optimizer.pt`, which `save_policy_archive` wrote beside a `policy.pt`.

        An agent with the actor that the moments belong to, for example from a checkpoint without optimizer, continues
        bit for bit. A new agent on the base in `policy.pt`, which has the old adapter merged, has a new adapter: it
        starts with the old adapter's moments, with a warning. The learning rate in `scheduler.pt` has to be the
        agent's.

        Args:
            folder: Folder of the files.

        Raises:
            CheckpointError: `optimizer.pt` is missing or not AdamW's for this agent's adapter, or a file is damaged or
                no plain data. The agent is unchanged then.
            ConfigurationError: The agent has another optimizer, or its learning rate is not constant.
        """
        other = no_archive_with(self)
        if other is not None:
            fix = (
                "the files are for a constant learning rate of AdamW: save_checkpoint and load_checkpoint keep the rest"
            )
            raise ConfigurationError(other, getattr(self, other), fix)
        path = usable_path("folder", folder) / OPTIMIZER
        parameters = self.base.adapters.parameters(self.actor_adapter)
        step_idx, state, adapter = read_optimizer_archive(path, parameters, self.lr)
        actor = self.base.adapters.export(self.actor_adapter)
        if adapter != adapter_fingerprint(actor.config, actor.tensors):
            archive = self.base.archive
            if self.steps or archive is None or archive.step_idx != step_idx:
                raise CheckpointError(
                    f"{path}: its moments, of step {step_idx}, are another adapter's: call load_checkpoint of the "
                    f"agent that has it first, or build one with archive={str(path.with_name(POLICY))!r}"
                )
            warnings.warn(
                f"{path}: its moments are those of the adapter that is merged into {archive.path}, and the agent has a "
                "new one: they give it scale and direction, and are no resume to the bit, as load_checkpoint is",
                UserWarning,
                stacklevel=2,
            )
        if not state["state"]:
            warnings.warn(
                f"{path} holds no moments: training goes on with a fresh optimizer", UserWarning, stacklevel=2
            )
        self.optimizer = self._new_optimizer()
        load_state(self.optimizer, self.optim, state)

    def _merged(self, folder: AgentFolder) -> AgentFolder:
        """Rebuild the agent's adapters with a merged LoRA configuration, and give the folder's adapters its shapes."""
        current, saved = self.base.adapters.config(self.actor_adapter), folder.adapter(ACTOR).config
        if not differing_fields(current, saved):
            return folder
        merged, overruled = merge_lora_configs(current, saved)
        if overruled:
            warnings.warn(
                f"LoRA configurations differ in {overruled}: the agent's values hold, not the checkpoint's",
                UserWarning,
                stacklevel=4,
            )
        name = self.base.adapters.add(ACTOR, merged, trainable=True, seed=self.settings.seed)
        fresh = self.base.adapters.export(name)
        try:
            adapters = {
                role: AdapterState(fresh.config, pad_adapter(state, fresh)) for role, state in folder.adapters.items()
            }
            fault = adapter_difference(self.base, folder.adapter(ACTOR), adapters[ACTOR])
            if fault is not None:
                fix = f"would not compute what was saved ({fault}): build the agent with the checkpoint's lora_config"
                raise ConfigurationError("merge_lora_configs", True, fix)
        except ConfigurationError:
            self.base.adapters.use(self.actor_adapter)
            self.base.adapters.release(name)
            raise
        self.base.adapters.release(self.actor_adapter)
        self._adapters[ACTOR] = name
        self.lora_config = merged
        self.base.adapters.use(name)
        self.optimizer = self._new_optimizer()
        return replace(folder, adapters=adapters, optimizer=None)

    def load_folder(
        self,
        folder: AgentFolder,
        load_optimizer: bool = True,
        overwrite_reference_adapter: bool | None = None,
        source: object = "the checkpoint",
    ) -> None:
        """Load the content of a folder, as `load_checkpoint` does; `source` is its name in messages."""
        saved_actor = folder.adapter(ACTOR)
        check_same_lora(self.base.adapters.config(self.actor_adapter), saved_actor.config)
        same_algorithm = folder.attributes["algorithm"] == self.algorithm
        if overwrite_reference_adapter is None:
            # A folder with a single adapter has no reference to restore.
            alone = folder.is_adapter and self._adapters.get(REFERENCE) is not None
            overwrite_reference_adapter = alone or not same_algorithm
        is_resume = same_algorithm and not overwrite_reference_adapter
        if overwrite_reference_adapter and REFERENCE in self._adapters and self._adapters[REFERENCE] is None:
            fix = "the base itself is the reference and cannot become the checkpoint's actor: build the agent with True"
            raise ConfigurationError("use_separate_reference_adapter", False, fix)

        # Everything that may be missing or damaged is read before the agent is changed.
        classes = (self.settings_class, self.hyperparameters_class)
        attributes = read_attributes(folder.attributes, *classes, source) if is_resume else None
        if load_optimizer and attributes is not None and folder.optimizer is not None:
            check_same_optimizer(attributes.settings, self.settings, source)
            parameters = self.base.adapters.parameters(self.actor_adapter)
            groups = [[parameters[path] for path in group] for group in parameter_groups(self.settings, parameters)]
            check_state(folder.optimizer, self.optim, groups, source)
        has_reference = self._adapters.get(REFERENCE) is not None
        if has_reference:
            saved_reference = saved_actor if overwrite_reference_adapter else folder.adapter(REFERENCE)
        self.base.adapters.load(self.actor_adapter, saved_actor.tensors)
        if has_reference:
            self._replace_reference(saved_reference)
        if attributes is not None:
            self._restore_attributes(attributes)
        if not load_optimizer:
            return
        if folder.optimizer is None:
            warnings.warn(
                f"{source} holds no optimizer state for these adapters: training goes on with a fresh optimizer; "
                "load_optimizer=False says that none is wanted",
                UserWarning,
                stacklevel=4,
            )
        self.optimizer = self._new_optimizer()
        if is_resume and folder.optimizer is not None:
            load_state(self.optimizer, self.optim, folder.optimizer)

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
            "num_tokens": self.num_tokens,
            "num_training_steps": self.num_training_steps,
            "schedule_start": self.schedule_start,
            "diverged": self.diverged,
            "reference_update_tracker": self.reference_update_tracker,
            "rng": self.rng.bit_generator.state,
        }

    def _restore_attributes(self, saved: SavedAttributes) -> None:
        restored = ("index", "fitness", "steps", "num_tokens", "schedule_start", "diverged", "reference_update_tracker")
        for name in restored:
            setattr(self, name, getattr(saved, name))
        self._num_training_steps = saved.num_training_steps
        self.rng.bit_generator.state = saved.rng
        self.set_hyperparameters(asdict(saved.hyperparameters))
        self._set_rate()


def _agent_folder(path: str) -> str:
    """The folder of the agent in this folder; for a run or population that of its best agent, see `find_agent`."""
    found = find_agent("path", path)
    if found.remark:
        warnings.warn(found.remark, UserWarning, stacklevel=3)
    return str(found.path)


def _other_base(folder: AgentFolder, path: object, here: str) -> CheckpointError:
    """The error for a checkpoint from another base, with how to load the checkpoint's own base."""
    named = str(folder.attributes["base_name"] or "")
    own = str(folder.base or named)
    fix = "build the agent on the model that it was tuned on"
    if own:
        fix = f"build the agent with model_name={own!r}"
    if folder.base:
        fix += ", which lies beside it"
    elif folder.attributes.get("archive"):
        fix += f" and archive={folder.attributes['archive']!r}"
    if not folder.base:
        fix += ". If it is the same model in another dtype or quantised, load with check_base=False"
    where = named or "a base without a name"
    return CheckpointError(f"{path} was saved on another base ({where}) than {here}, where it means nothing: {fix}")
