"""The LoRA adapters of a whole population on one base: their names, owners and fingerprints."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from evollm.errors import ConfigurationError
from evollm.models.adapters.adapter import (
    Adapter,
    AdapterState,
    adapter_homes,
    adapter_parameters,
    adapter_tensors,
    delete_adapter,
    first_layer_with,
    rows_of,
)
from evollm.models.adapters.lora_config import check_lora_config, refusal
from evollm.models.adapters.peft_layers import AdapterLayers
from evollm.models.adapters.routing import AdapterRouter
from evollm.models.adapters.rows import Row
from evollm.models.adapters.stack import PaddedStack, RowStack, stack_of, zero_gradients
from evollm.models.adapters.targets import check_tensors, resolve_all_linear
from evollm.models.encoder_decoder import is_encoder_decoder
from evollm.models.fingerprints import adapter_fingerprint, canonical_settings
from evollm.models.load_balancing import load_balancing
from evollm.models.quantised import check_gradients


class AdapterRegistry:
    """The adapters on a base, each under a name that no other adapter has had.

    An adapter may have several owners: the agents of a fresh population have one reference adapter in common. An owner
    calls `retain` and, when it no longer needs the adapter, `release`; the last `release` frees the adapter's memory.
    Parameters of trainable adapters require gradients and all others do not, whichever adapter is active.

    Args:
        network: The base.
        layers: Its repeated layers.
        router: Takes the LoRA layers of new adapters over.
        on_fingerprint_lost: Called with a fingerprint when no frozen adapter has it any more.

    Attributes:
        active: Name of the active adapter; None: the base without adapter.
        lost: Names of adapters, one for each owner that was garbage-collected without a `release`; `AdapterShares`
            appends them and `release_lost` releases them.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        layers: Sequence[nn.Module],
        router: AdapterRouter,
        on_fingerprint_lost: Callable[[str], None],
    ) -> None:
        self.active: str | None = None
        self.lost: deque[str] = deque()
        self._network = network
        self._layers = layers
        self._router = router
        self._on_fingerprint_lost = on_fingerprint_lost
        self._peft: PeftModel | None = None
        self._adapters: dict[str, Adapter] = {}
        self._peft_layers = AdapterLayers()
        self._active_blocks = 0
        self._created = 0

    @property
    def peft_model(self) -> PeftModel:
        """The PEFT model that holds the adapters.

        Raises:
            ConfigurationError: The base has not had an adapter yet.
        """
        if self._peft is None:
            name = self._network.name_or_path
            raise ConfigurationError("actor_network", name, "has no adapter yet: build an agent on it first")
        return self._peft

    @property
    def names(self) -> list[str]:
        """The names of all adapters that have an owner, oldest first."""
        self.release_lost()
        return list(self._present)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters and buffers of all adapters."""
        return [tensor for name in self._present for tensor in self._settled(name).tensors.values()]

    @property
    def _present(self) -> dict[str, Adapter]:
        """The adapters without those that user code has deleted through PEFT."""
        known = {} if self._peft is None else self._peft.peft_config
        return {name: adapter for name, adapter in self._adapters.items() if name in known}

    def _settled(self, name: str) -> Adapter:
        """An adapter, after user code may have moved or replaced its parameters; see `Row.settle`.

        Raises:
            ConfigurationError: User code has deleted it through PEFT, or has changed its shapes or types.
        """
        self.config(name)
        for row in self._adapters[name].rows:
            row.settle()
        return self._adapters[name]

    def add(self, role: str, config: LoraConfig, *, trainable: bool, seed: int = 0) -> str:
        """Add a freshly initialised adapter, owned by the caller, and make it the active one.

        Args:
            role: `actor` or `reference`; the adapter's name begins with it.
            config: Its LoRA configuration; it is copied.
            trainable: Whether its parameters require gradients.
            seed: Seed of its initialisation; the global random generators keep their state.

        Returns:
            The adapter's name.

        Raises:
            ConfigurationError: The configuration matches no module or would change the base, or the base cannot be
                trained through.
        """
        self.release_lost()
        check_lora_config(config)
        if self._peft is None:
            # Checked here, not in the constructor: by now the base is on its final device.
            check_gradients(self._network)
            # Raises before training if the loss of the base's routers cannot be computed.
            load_balancing(self._network)
        given, config = config, copy.deepcopy(config)
        if is_encoder_decoder(self._network.config):
            # PEFT finds the class of the base by the task of a saved adapter.
            config.task_type = "SEQ_2_SEQ_LM"
        # The configuration may come from another base; PEFT fills in the name of this one.
        config.base_model_name_or_path = None
        resolve_all_linear(config, self._network)
        name = self._new_name(role)
        device: torch.device = cast(Any, self._network.get_input_embeddings()).weight.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            torch.manual_seed(seed)
            # PEFT uses names that transformers deprecates: nothing that a user of evollm can change.
            warnings.simplefilter("ignore", FutureWarning)
            if config.target_parameters or not (given.rank_pattern or given.alpha_pattern):
                # Patterns may be those of stacked experts, and PEFT looks for modules of these names only.
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            with self._peft_layers.only(name):
                self._create(name, config, given)
                self._register(name, trainable=trainable)
        return name

    def _create(self, name: str, config: LoraConfig, given: LoraConfig) -> None:
        """Have PEFT create an adapter; `given` is the configuration for error messages, as the caller has it."""
        try:
            if self._peft is None:
                self._peft = get_peft_model(self._network, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
            check_tensors(self._network, name)
        except Exception as error:  # PEFT has no exception class of its own.
            delete_adapter(self._network, name)
            if isinstance(error, ConfigurationError):
                # `check_tensors` raised, so PEFT has the configuration already.
                self.peft_model.peft_config.pop(name, None)
                raise
            raise refusal(given, self._network, error) from error

    def _register(self, name: str, *, trainable: bool) -> None:
        """Take an adapter that PEFT has created into the registry."""
        model = self.peft_model
        self._router.take_over(model)
        self._peft_layers.find(model)
        # The new adapter's dropout layers are in training mode.
        model.eval()
        parameters = adapter_parameters(model, name)
        for parameter in parameters.values():
            parameter.data = parameter.data.to(self._dtype)
        self._adapters[name] = Adapter(
            settings=canonical_settings(self.config(name)),
            trainable=trainable,
            first_layer=first_layer_with(parameters.values(), self._layers, self._network.get_output_embeddings()),
            parameters=parameters,
            rows=rows_of(name, parameters, adapter_homes(model, name)),
            tensors=adapter_tensors(model, name),
        )
        self._activate_new(name)

    def copy(self, source: str, role: str, *, trainable: bool) -> str:
        """Add an adapter with the weights of `source`, owned by the caller, and make it the active one."""
        self.release_lost()
        return self._copy(source, role, trainable=trainable)

    def _copy(self, source: str, role: str, *, trainable: bool) -> str:
        name, adapter = self._new_name(role), self._settled(source)
        self.peft_model.peft_config[name] = copy.deepcopy(self.config(source))
        copies = self._peft_layers.copy(source, name)
        parameters = {path: copies[id(parameter)] for path, parameter in adapter.parameters.items()}
        self._adapters[name] = replace(
            adapter,
            trainable=trainable,
            parameters=parameters,
            rows=tuple(row.of_copy(name, parameters) for row in adapter.rows),
            tensors={key: copies[id(tensor)] for key, tensor in adapter.tensors.items()},
            owners=1,
            fingerprint=None,
        )
        self._activate_new(name)
        return name

    def _new_name(self, role: str) -> str:
        return f"{role}-{self._created}"

    def _activate_new(self, name: str) -> None:
        self._created += 1
        self.restore_trainability(name)
        self._activate(name)

    def frozen(self, state: AdapterState, role: str) -> str:
        """Name of a frozen adapter with this configuration and these weights, owned by the caller.

        An adapter that the base has already gets one more owner; otherwise a new one is added.

        Raises:
            ConfigurationError: The state does not fit the base.
        """
        self.release_lost()
        wanted = self._fingerprint_of(state.config, state.tensors)
        for name, adapter in self._present.items():
            if not adapter.trainable and self.fingerprint(name) == wanted:
                return self.retain(name)
        settings = canonical_settings(state.config)
        # Copying an adapter of the same configuration takes less time than PEFT does for a new one.
        alike = next((name for name, adapter in self._present.items() if adapter.settings == settings), None)
        if alike is None:
            name = self.add(role, state.config, trainable=False)
        else:
            name = self._copy(alike, role, trainable=False)
        try:
            self.load(name, state.tensors)
        except ConfigurationError:
            self.release(name)
            raise
        return name

    def retain(self, name: str) -> str:
        """Add an owner to an adapter; returns the adapter's name."""
        self._adapters[name].owners += 1
        return name

    def release(self, name: str) -> None:
        """Take an owner from an adapter; without owners its memory is freed."""
        adapter = self._adapters[name]
        adapter.owners -= 1
        if adapter.owners > 0:
            return
        del self._adapters[name]
        self._forget_fingerprint(adapter)
        if self.active == name:
            # PEFT would warn about having to choose another active adapter.
            self._activate(next(iter(self._present), None))
        if name in self.peft_model.peft_config:
            with self._peft_layers.only(name):
                self.peft_model.delete_adapter(name)
        for row in adapter.rows:
            row.free()

    def release_lost(self) -> None:
        """Release adapters whose owners were garbage-collected, unless a block of `held` is being executed."""
        while self.lost and not self._active_blocks:
            name = self.lost.popleft()
            if name in self._adapters:
                self.release(name)

    def use(self, name: str | None) -> None:
        """Make an adapter the active one; None switches all adapters off."""
        if name != self.active:
            self._activate(name)

    @contextmanager
    def activated(self, name: str | None) -> Iterator[None]:
        """Make an adapter the active one inside the block; the previous one is active again after it."""
        before = self.active
        with self.held():
            try:
                self.use(name)
                yield
            finally:
                self.use(before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep `release_lost` from releasing adapters inside the block."""
        self._active_blocks += 1
        try:
            yield
        finally:
            self._active_blocks -= 1

    def _activate(self, name: str | None) -> None:
        self._peft_layers.activate(name)
        if name is not None:
            self.peft_model.active_adapter = name
            cast(Any, self.peft_model.base_model).active_adapter = name
        self.active = name

    def restore_trainability(self, name: str) -> None:
        """Set `requires_grad` of an adapter's parameters again; PEFT's own `set_adapter` changes it."""
        adapter = self._adapters[name]
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(adapter.trainable)

    def settings(self, name: str) -> str:
        """The part of an adapter's configuration that decides what it computes, as JSON."""
        return self._adapters[name].settings

    def config(self, name: str) -> LoraConfig:
        """The LoRA configuration of an adapter.

        Raises:
            ConfigurationError: User code has deleted the adapter through PEFT.
        """
        config = self.peft_model.peft_config.get(name)
        if config is None:
            fix = "was deleted through PEFT: release the agent, and build another one or load its checkpoint"
            raise ConfigurationError("adapter", name, fix)
        assert isinstance(config, LoraConfig)
        return config

    def parameters(self, name: str) -> Mapping[str, nn.Parameter]:
        """An adapter's parameters by their path in the PEFT model, without the adapter's name."""
        return self._settled(name).parameters

    def rows(self, name: str) -> Sequence[Row]:
        """An adapter's parameters as views of one row for each device."""
        return self._adapters[name].rows

    def can_stack(self, names: Sequence[str]) -> bool:
        """Whether `stack` takes these adapters: plain LoRA on linear layers, and each on one device."""
        return all(len(self.rows(name)) == 1 for name in names) and self._router.can_route(self._network, names)

    def have_hooks(self, names: Sequence[str]) -> bool:
        """Whether user code has registered hooks for the gradient of a parameter of these adapters."""
        parameters = (parameter for name in names for parameter in self._adapters[name].parameters.values())
        return any(one._backward_hooks or one._post_accumulate_grad_hooks for one in parameters)

    def stack(self, names: Sequence[str]) -> RowStack | PaddedStack:
        """The weights of these adapters for a routed pass; one may be there several times.

        Adapters of one LoRA configuration are moved to one matrix, where they stay, and are not copied again.
        """
        rows = {name: self._settled(name).rows[0] for name in dict.fromkeys(names)}
        return stack_of(names, [rows[name] for name in names], self._all_rows())

    def zero_gradients(self, names: Sequence[str]) -> None:
        """Set the gradients of distinct adapters to 0, in one matrix if their layouts are equal."""
        zero_gradients([self._settled(name).rows for name in names], self._all_rows())

    def _all_rows(self) -> list[Row]:
        return [row for adapter in self._present.values() for row in adapter.rows]

    def first_layer(self, names: Sequence[str]) -> int | None:
        """Index of the first repeated layer of the base that holds one of these adapters.

        Returns:
            None if no layer does, or an adapter is on a module in front of the layers, such as the embeddings.
        """
        first = min((self._adapters[name].first_layer for name in names), default=-1)
        return first if 0 <= first < len(self._layers) else None

    def export(self, name: str) -> AdapterState:
        """A copy of an adapter on the CPU."""
        copies = {key: tensor.detach().cpu().clone() for key, tensor in self._settled(name).tensors.items()}
        return AdapterState(copy.deepcopy(self.config(name)), copies)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter's weights in place.

        Args:
            name: The adapter.
            tensors: The weights, under the names of PEFT's saved adapters.

        Raises:
            ConfigurationError: Names or shapes are not those of the adapter.
        """
        adapter = self._settled(name)
        own = adapter.tensors
        wrong = sorted(set(own) ^ set(tensors)) or [key for key in own if own[key].shape != tensors[key].shape]
        if wrong:
            raise ConfigurationError("adapter weights", wrong[:3], f"do not fit adapter {name}: other names or shapes")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])
        self._forget_fingerprint(adapter)

    def fingerprint(self, name: str | None) -> str:
        """Digest of a frozen adapter's weights and configuration; `base` for None, the base without adapter.

        Raises:
            ConfigurationError: There is no such adapter, or it is trainable, so that a digest would not stay true.
        """
        if name is None:
            return "base"
        if name not in self._adapters:
            raise ConfigurationError("adapter", name, f"is not an adapter of this base: {', '.join(self.names)}")
        adapter = self._adapters[name]
        if adapter.trainable:
            raise ConfigurationError("adapter", name, "is trainable: only a frozen adapter has a lasting fingerprint")
        if adapter.fingerprint is None:
            adapter.fingerprint = self._fingerprint_of(self.config(name), self._settled(name).tensors)
        return adapter.fingerprint

    def _fingerprint_of(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> str:
        """Digest of an adapter in the type that adapters on this base have."""
        return adapter_fingerprint(config, {key: tensor.to(self._dtype) for key, tensor in tensors.items()})

    def _forget_fingerprint(self, adapter: Adapter) -> None:
        """Clear the fingerprint of an adapter that was overwritten or deleted."""
        fingerprint, adapter.fingerprint = adapter.fingerprint, None
        if fingerprint is not None and all(other.fingerprint != fingerprint for other in self._adapters.values()):
            self._on_fingerprint_lost(fingerprint)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self._network.dtype, torch.float32)
