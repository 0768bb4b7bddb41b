"""One frozen base model and the LoRA adapters of a whole population on it."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from evollm.checks import located
from evollm.errors import ConfigurationError
from evollm.models.adapter_layers import AdapterLayers
from evollm.models.adapters import Adapter, AdapterState, drop_adapter, parameters_of, saved_tensors
from evollm.models.attention import PairLayout, current_layout, packed_attention
from evollm.models.encoder_decoder import is_encoder_decoder, start_token
from evollm.models.fingerprints import adapter_fingerprint, canonical_settings, weights_fingerprint
from evollm.models.layers import FanOut, LayerStack
from evollm.models.load_balancing import LoadBalancing, asked_for, load_balancing
from evollm.models.merging import (
    INSTEAD,
    adapted_layers,
    all_logprobs,
    check_same,
    in_place,
    merged_weights,
    own_name,
)
from evollm.models.policy_archive import PolicyArchive, loaded_archive
from evollm.models.quantised import check_gradients, keep_differentiable
from evollm.models.reference_cache import ReferenceCache
from evollm.models.requirements import check_lora_config, check_plain_model, refusal
from evollm.models.rope import forget_longest_sequences, longest_sequence
from evollm.models.routing import AdapterRouter
from evollm.models.targets import check_tensors, language_model, resolve_all_linear, text_config
from evollm.quiet import quiet

_ATTRIBUTE = "_evollm_shared_base"


class SharedBase:
    """The frozen base with its adapters, each known by a name of its own.

    An adapter may have several owners (the references of a fresh population are one and the same): whoever needs it
    calls `retain`, whoever is done calls `release`, and the last release frees it. Trainable adapters require
    gradients and all others do not, whichever adapter is active.

    Attributes:
        lost_shares: Adapters that an owner had a share in who is no more; see `AdapterShares`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_plain_model("actor_network", model)
        if is_encoder_decoder(model.config):
            start_token(model)
        keep_differentiable(model)
        forget_longest_sequences(model)
        self.network = model
        if self.name:
            # A relative path would lead elsewhere from another folder.
            self.network.config._name_or_path = located(self.name)
        self.model_config: Mapping[str, Any] = {}
        self.weights_fingerprint = weights_fingerprint(model)
        self.reference_cache = ReferenceCache()
        self._peft: PeftModel | None = None
        self._adapters: dict[str, Adapter] = {}
        self._adapter_layers = AdapterLayers()
        self._active: str | None = None
        self._active_blocks = 0
        self._created = 0
        self.lost_shares: deque[str] = deque()
        self._balancing: tuple[Mapping[str, Any], LoadBalancing | None] = {}, None
        self.router = AdapterRouter()
        self.layers = LayerStack(language_model(model), self._same_again)

    @classmethod
    def of(cls, model: PreTrainedModel) -> SharedBase:
        """The shared base of this model: the same object for every agent that is built on the model."""
        base = cls.on(model)
        if base is None:
            base = cls(model)
            # Past nn.Module's own __setattr__, which would take a holder of modules into account.
            model.__dict__[_ATTRIBUTE] = base
        return base

    @classmethod
    def on(cls, model: PreTrainedModel) -> SharedBase | None:
        """The shared base of this model if there is one."""
        base = getattr(model, _ATTRIBUTE, None)
        return base if isinstance(base, cls) else None

    @property
    def device(self) -> torch.device:
        """Where the base's input embeddings are."""
        return self._embeddings.weight.device

    @property
    def name(self) -> str:
        """The name or path that the base was loaded from, "" if it never had one."""
        return str(getattr(self.network.config, "_name_or_path", "") or "")

    @property
    def archive(self) -> PolicyArchive | None:
        """What the policy archive says that the weights came from, None if they came from the model's own files."""
        return loaded_archive(self.network)

    def origin(self) -> dict[str, Any]:
        """What a checkpoint says of its base: plain data, from which `DPO.load` finds it again."""
        return {
            "base_name": self.name,
            "base_fingerprint": self.weights_fingerprint,
            # A model that was handed in may have been told after it was loaded.
            "model_config": {**self.model_config, **asked_for(self.network)},
            "archive": None if self.archive is None else self.archive.path,
        }

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts go through an encoder and completions through a decoder, as T5's do."""
        return is_encoder_decoder(self.network.config)

    @property
    def load_balancing(self) -> LoadBalancing | None:
        """The loss of routers that the base's configuration asks for at present.

        Raises:
            ConfigurationError: It asks for one that cannot be computed.
        """
        asked = asked_for(self.network)
        if asked != self._balancing[0]:
            self._balancing = asked, load_balancing(self.network)
        return self._balancing[1]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the base was made for, in tokens, where its configuration says."""
        return longest_sequence(text_config(self.network.config))

    @property
    def num_embeddings(self) -> int:
        """How many token ids the base can take."""
        return int(self._embeddings.weight.shape[0])

    @property
    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.network.get_input_embeddings())

    @property
    def peft_model(self) -> PeftModel:
        """The PEFT model that holds the adapters; there is one as soon as there is an adapter."""
        if self._peft is None:
            raise ConfigurationError("actor_network", self.name, "has no adapter yet: build an agent on it first")
        return self._peft

    @property
    def active_adapter(self) -> str | None:
        """The name of the adapter in use; None: the base without adapter."""
        return self._active

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters that have an owner."""
        self.take_back()
        return list(self._adapters)

    def add_adapter(self, role: str, config: LoraConfig, *, trainable: bool, seed: int = 0) -> str:
        """Add a freshly initialised adapter, owned by the caller.

        Args:
            role: `actor` or `reference`; the adapter's name begins with it.
            config: Its LoRA configuration; it is copied.
            trainable: Whether its parameters require gradients.
            seed: Seed of its initialisation; the global generators are left as they were.

        Raises:
            ConfigurationError: The configuration matches no module or would change the base.
        """
        self.take_back()
        check_lora_config(config)
        if self._peft is None:
            # Here the base is on the device that it computes on.
            check_gradients(self.network)
            # So that what cannot be computed is refused before training.
            _ = self.load_balancing
        given, config = config, copy.deepcopy(config)
        if self.is_encoder_decoder:
            # A saved adapter says by its task which class of transformers it belongs on.
            config.task_type = "SEQ_2_SEQ_LM"
        # That of another run's base, perhaps; PEFT fills in this one's.
        config.base_model_name_or_path = None
        resolve_all_linear(config, self.network)
        name = self._new_name(role)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            torch.manual_seed(seed)
            # PEFT asks transformers by names that those deprecate: nothing that a user of evollm can act on.
            warnings.simplefilter("ignore", FutureWarning)
            if not (given.rank_pattern or given.alpha_pattern):
                # all-linear gives stacked experts ranks of their own, and PEFT looks for modules of these names only.
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            with self._adapter_layers.only(name):
                return self._put(name, config, given, trainable=trainable)

    def _put(self, name: str, config: LoraConfig, given: LoraConfig, *, trainable: bool) -> str:
        """Have PEFT make an adapter, and note it; `given` is the configuration as the caller has it."""
        try:
            if self._peft is None:
                self._peft = get_peft_model(self.network, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
            check_tensors(self.network, name)
        except Exception as error:  # Whatever PEFT makes of what is wrong with it.
            drop_adapter(self.network, name)
            if isinstance(error, ConfigurationError):
                # PEFT itself found nothing wrong.
                self.peft_model.peft_config.pop(name, None)
                raise
            raise refusal(given, self.network, error) from error
        self.router.take_over(self._peft)
        self._adapter_layers.find(self._peft)
        # The new adapter's own dropout.
        self._peft.eval()
        parameters = parameters_of(self._peft, name)
        for parameter in parameters.values():
            parameter.data = parameter.data.to(self._adapter_dtype)
        self._adapters[name] = Adapter(
            settings=canonical_settings(self.config(name)),
            trainable=trainable,
            first_layer=self._first_layer(parameters.values()),
            parameters=parameters,
            tensors=saved_tensors(self._peft, name),
        )
        return self._ready(name)

    def _ready(self, name: str) -> str:
        """Activate a new adapter."""
        self._created += 1
        self.restore_trainability(name)
        self._activate(name)
        return name

    def restore_trainability(self, name: str) -> None:
        """Let an adapter's parameters require gradients if it is trainable, whatever PEFT's own switch made of them."""
        adapter = self._adapters[name]
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(adapter.trainable)

    def copy_adapter(self, source: str, role: str, *, trainable: bool) -> str:
        """Add an adapter with the weights of `source`, owned by the caller."""
        self.take_back()
        return self._copy(source, role, trainable=trainable)

    def _copy(self, source: str, role: str, *, trainable: bool) -> str:
        name = self._new_name(role)
        self.peft_model.peft_config[name] = copy.deepcopy(self.config(source))
        copies = self._adapter_layers.copy(source, name)
        adapter = self._adapters[source]
        self._adapters[name] = replace(
            adapter,
            trainable=trainable,
            parameters={path: copies[id(parameter)] for path, parameter in adapter.parameters.items()},
            tensors={key: copies[id(tensor)] for key, tensor in adapter.tensors.items()},
            owners=1,
            fingerprint=None,
        )
        return self._ready(name)

    def _new_name(self, role: str) -> str:
        """A name that no adapter has had; `_ready` counts those that came to be."""
        return f"{role}-{self._created}"

    def retain(self, name: str) -> str:
        """Take a share in an adapter; give it back with `release`."""
        self._adapters[name].owners += 1
        return name

    def release(self, name: str) -> None:
        """Give a share in an adapter back; the last one frees its memory."""
        adapter = self._adapters[name]
        adapter.owners -= 1
        if adapter.owners > 0:
            return
        del self._adapters[name]
        self._forget_fingerprint(adapter)
        if self._active == name:
            # PEFT picks a new active adapter with a warning; moved away from here there is nothing to warn of.
            self._activate(next(iter(self._adapters), None))
        with self._adapter_layers.only(name):
            self.peft_model.delete_adapter(name)

    def take_back(self) -> None:
        """Release what has lost its owner, unless an adapter has been made active for a block that is not over."""
        while self.lost_shares and not self._active_blocks:
            name = self.lost_shares.popleft()
            if name in self._adapters:
                self.release(name)

    def settings(self, name: str) -> str:
        """What of an adapter's configuration decides what it computes, as JSON."""
        return self._adapters[name].settings

    def config(self, name: str) -> LoraConfig:
        """The LoRA configuration of an adapter."""
        config = self.peft_model.peft_config[name]
        assert isinstance(config, LoraConfig)
        return config

    def parameters(self, name: str) -> Mapping[str, nn.Parameter]:
        """An adapter's own parameters, by their name without the adapter's."""
        return self._adapters[name].parameters

    def first_adapted_layer(self, names: Sequence[str]) -> int | None:
        """Index of the first repeated layer that holds one of these adapters.

        None: there is none, or an adapter reaches in front of the layers, to the embeddings for example.
        """
        first = min((self._adapters[name].first_layer for name in names), default=-1)
        return first if 0 <= first < len(self.layers) else None

    def _first_layer(self, parameters: Iterable[nn.Parameter]) -> int:
        """See `Adapter.first_layer`."""
        adapted = {id(parameter) for parameter in parameters}
        held = [{id(parameter) for parameter in layer.parameters()} for layer in self.layers.modules]
        head = self.network.get_output_embeddings()
        behind = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        if adapted - behind.union(*held):
            return -1
        return next((index for index, parameters in enumerate(held) if parameters & adapted), len(held))

    def export(self, name: str) -> AdapterState:
        """A copy of an adapter on the CPU, named as PEFT saves it."""
        copies = {key: tensor.detach().cpu().clone() for key, tensor in self._adapters[name].tensors.items()}
        return AdapterState(copy.deepcopy(self.config(name)), copies)

    def frozen_adapter(self, state: AdapterState, role: str) -> str:
        """Name of a frozen adapter with this configuration and these weights, new or not, owned by the caller."""
        self.take_back()
        wanted = self._fingerprint(state.config, state.tensors)
        for name, adapter in self._adapters.items():
            if not adapter.trainable and self.fingerprint(name) == wanted:
                return self.retain(name)
        settings = canonical_settings(state.config)
        alike = next((name for name, adapter in self._adapters.items() if adapter.settings == settings), None)
        if alike is None:
            name = self.add_adapter(role, state.config, trainable=False)
        else:
            name = self._copy(alike, role, trainable=False)
        try:
            self.load(name, state.tensors)
        except ConfigurationError:
            self.release(name)
            raise
        return name

    def save_weights(self, folder: Path, merged: str | None = None) -> None:
        """Write the base as `from_pretrained` reads it, without adapters or with one of them merged into its weights.

        Raises:
            ConfigurationError: The base is quantised, or the adapter cannot be merged.
        """
        with quiet():
            self.network.save_pretrained(folder, state_dict=self.state(merged))

    def state(self, merged: str | None = None) -> dict[str, Tensor]:
        """The base's own weights, by their names in the model without adapters, not copied; see `save_weights`."""
        if getattr(self.network, "is_quantized", False):
            fix = (
                "is quantised and cannot be written: save the adapter alone (evollm export --what adapter), and load "
                "the base from where it came"
            )
            raise ConfigurationError("base", self.name, fix)
        adapters = {id(tensor) for adapter in self._adapters.values() for tensor in adapter.tensors.values()}
        changed = {} if merged is None else self._merged(merged)
        return {
            own_name(name): changed.get(tensor, tensor).detach()
            for name, tensor in self.network.state_dict(keep_vars=True).items()
            if id(tensor) not in adapters
        }

    def _merged(self, adapter: str) -> Mapping[Tensor, Tensor]:
        """The weights that an adapter changes, merged, if they compute what the adapter computes."""
        merged = merged_weights(self.network, adapter)
        with self.active(adapter) as network:
            expected = all_logprobs(network)
        with self.active(None) as network, in_place(merged):
            layers = adapted_layers(network, adapter).values()
            fault = check_same(expected, lambda: all_logprobs(network), layers)
        if fault is not None:
            fix = f"its adapters cannot be merged ({fault}): a weight may be tied to another one; {INSTEAD}"
            raise ConfigurationError("lora_config.target_modules", self.config(adapter).target_modules, fix)
        return merged

    def difference(self, one: AdapterState, other: AdapterState) -> str | None:
        """How far the log-probs of two adapters are apart, in words; None: by no more than rounding explains.

        Raises:
            ConfigurationError: One of them does not fit the base, or the adapters on it.
        """
        names: list[str] = []
        with self.active(self._active):
            try:
                for state in (one, other):
                    names.append(self.frozen_adapter(state, "check"))
                with self.active(names[0]) as network:
                    expected = all_logprobs(network)
                with self.active(names[1]) as network:
                    layers = adapted_layers(network, names[1]).values()
                    return check_same(expected, lambda: all_logprobs(network), layers)
            finally:
                for name in names:
                    self.release(name)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter's weights in place.

        Raises:
            ConfigurationError: Names or shapes are not those of the adapter.
        """
        adapter = self._adapters[name]
        own = adapter.tensors
        wrong = sorted(set(own) ^ set(tensors)) or [key for key in own if own[key].shape != tensors[key].shape]
        if wrong:
            raise ConfigurationError("adapter weights", wrong[:3], f"do not fit adapter {name}: other names or shapes")
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])
        self._forget_fingerprint(adapter)

    def fingerprint(self, name: str | None) -> str:
        """Digest of a frozen adapter's weights and configuration; None is the base without adapter."""
        if name is None:
            return "base"
        if name not in self._adapters:
            raise ConfigurationError("adapter", name, f"is not an adapter of this base: {', '.join(self.adapters)}")
        adapter = self._adapters[name]
        if adapter.trainable:
            raise ConfigurationError("adapter", name, "is trainable: only a frozen adapter has a lasting fingerprint")
        if adapter.fingerprint is None:
            adapter.fingerprint = self._fingerprint(self.config(name), adapter.tensors)
        return adapter.fingerprint

    def _fingerprint(self, config: LoraConfig, tensors: Mapping[str, Tensor]) -> str:
        """Digest of an adapter as it is, or would be, on this base."""
        return adapter_fingerprint(config, {key: tensor.to(self._adapter_dtype) for key, tensor in tensors.items()})

    @property
    def _adapter_dtype(self) -> torch.dtype:
        return torch.promote_types(self.network.dtype, torch.float32)

    def move_to(self, device: torch.device) -> None:
        """Put the base on a device, unless it was loaded with a device map.

        Raises:
            ConfigurationError: Agents live on the base already, on another device.
        """
        if hasattr(self.network, "hf_device_map") or torch.empty(0, device=device).device == self.device:
            return
        if self.adapters:
            raise ConfigurationError(
                "device", str(device), f"the base's other agents are on {self.device}: use that one"
            )
        cast(nn.Module, self.network).to(device)

    def use(self, name: str | None) -> None:
        """Make an adapter the active one until further notice; None switches all adapters off."""
        if name != self._active:
            self._activate(name)

    @contextmanager
    def active(self, name: str | None, *, gradient_checkpointing: bool = False) -> Iterator[PreTrainedModel]:
        """The base with one adapter active; what was active before is so again afterwards, also after an error."""
        before, before_checkpointing = self._active, self.layers.checkpointing
        if self.network.training:
            # Dropout is off for policy and reference alike, or their difference would be noise.
            self.network.eval()
        self._active_blocks += 1
        try:
            self.use(name)
            self.layers.checkpointing = gradient_checkpointing
            yield self.network
        finally:
            self._active_blocks -= 1
            self.layers.checkpointing = before_checkpointing
            self.use(before)

    @contextmanager
    def packed(self, layout: PairLayout, fan_out: FanOut | None) -> Iterator[None]:
        """Rows are packed pairs inside the block; see `PackedPairs` and `FanOut`."""
        before, self.layers.fan_out = self.layers.fan_out, fan_out
        try:
            with packed_attention(self.network.config, layout):
                yield
        finally:
            self.layers.fan_out = before

    @contextmanager
    def _as(self, adapter: str | None, members: tuple[str, ...] | None, layout: PairLayout | None) -> Iterator[None]:
        with self.active(adapter), self.router.route(members), packed_attention(self.network.config, layout):
            yield

    def _same_again(self) -> AbstractContextManager[None]:
        """What a checkpointed layer is recomputed in: the adapters and the layout of its forward pass."""
        return self._as(self._active, self.router.members, current_layout())

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the layers' weights; all must then call the layers alike."""
        return self.layers.gathered is not None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are whole inside the block; of a sharded base all processes must enter it."""
        gathered = self.layers.gathered
        if gathered is None:
            yield
            return
        with gathered(self.layers.modules):
            # A process may then compute by itself.
            self.layers.gathered = None
            try:
                yield
            finally:
                self.layers.gathered = gathered

    @property
    def can_checkpoint(self) -> bool:
        """Whether the base declares layers whose activations can be recomputed."""
        return len(self.layers) > 0

    def compile(self, mode: str, backend: str = "inductor") -> None:
        """Compile the repeated layers of the base with `torch.compile`, each by itself."""
        # Packed rows have another length in every batch.
        self.layers.compile(mode=mode, backend=backend, dynamic=True)

    def _forget_fingerprint(self, adapter: Adapter) -> None:
        """Weights have changed or gone, and with them the log-probs that nobody else's weights give."""
        fingerprint, adapter.fingerprint = adapter.fingerprint, None
        if fingerprint is not None and all(other.fingerprint != fingerprint for other in self._adapters.values()):
            self.reference_cache.forget(fingerprint)

    def _activate(self, name: str | None) -> None:
        self._adapter_layers.activate(name)
        if name is not None:
            self.peft_model.active_adapter = name
            cast(Any, self.peft_model.base_model).active_adapter = name
        self._active = name
