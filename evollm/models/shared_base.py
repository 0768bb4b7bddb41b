"""One frozen base model and the LoRA adapters of a whole population on it."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from evollm.errors import ConfigurationError
from evollm.models.adapters import AdapterState, parameters_of
from evollm.models.archive import PolicyArchive, loaded_archive
from evollm.models.attention import PairLayout, current_layout, packed_attention
from evollm.models.encoder_decoder import is_encoder_decoder, start_token
from evollm.models.identity import adapter_fingerprint, computing_settings, weights_fingerprint
from evollm.models.layers import FanOut, LayerStack
from evollm.models.merging import merged_weights
from evollm.models.quantised import check_gradients, keep_differentiable
from evollm.models.reference_cache import ReferenceCache
from evollm.models.requirements import check_lora_config, check_plain_model
from evollm.models.routing import AdapterRouter

_ATTRIBUTE = "_evollm_shared_base"


class SharedBase:
    """The frozen base with its adapters, each known by a name of its own.

    An adapter may have several owners (the references of a fresh population are one and the same): whoever needs it
    calls `retain`, whoever is done calls `release`, and the last release frees it. Trainable adapters require
    gradients and all others do not, whichever adapter is active.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_plain_model("actor_network", model)
        if is_encoder_decoder(model.config):
            start_token(model)
        keep_differentiable(model)
        self.network = model
        self.model_config: Mapping[str, Any] = {}
        self.weights_fingerprint = weights_fingerprint(model)
        self.reference_cache = ReferenceCache()
        self._peft: PeftModel | None = None
        self._owners: Counter[str] = Counter()
        self._trainable: set[str] = set()
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._fingerprints: dict[str, str] = {}
        self._active: str | None = None
        self._created = 0
        self.router = AdapterRouter()
        self.layers = LayerStack(model, self._same_again)

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
            "model_config": dict(self.model_config),
            "archive": None if self.archive is None else self.archive.path,
        }

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts go through an encoder and completions through a decoder, as T5's do."""
        return is_encoder_decoder(self.network.config)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the base was made for, in tokens, where its configuration says."""
        positions = getattr(self.network.config, "max_position_embeddings", None)
        return int(positions) if positions else None

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
        """The names of all adapters."""
        return list(self._parameters)

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
        check_lora_config(config)
        if self._peft is None:
            # Here the base is on the device that it computes on.
            check_gradients(self.network)
        config = copy.deepcopy(config)
        if self.is_encoder_decoder:
            # A saved adapter says by its task which class of transformers it belongs on.
            config.task_type = "SEQ_2_SEQ_LM"
        # That of another run's base, perhaps; PEFT fills in this one's.
        config.base_model_name_or_path = None
        name = f"{role}-{self._created}"
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            torch.manual_seed(seed)
            # PEFT asks transformers by names that those deprecate: nothing that a user of evollm can act on.
            warnings.simplefilter("ignore", FutureWarning)
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.network, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except Exception as error:  # Whatever PEFT makes of what is wrong with it.
                raise ConfigurationError(
                    "lora_config.target_modules", config.target_modules, f"PEFT cannot apply {config!r}: {error}"
                ) from error
        assert self._peft is not None
        self.router.take_over(self._peft)
        # The new adapter's own dropout.
        self._peft.eval()
        self._created += 1
        self._parameters[name] = parameters_of(self._peft, name)
        wide = torch.promote_types(self.network.dtype, torch.float32)
        for parameter in self._parameters[name].values():
            parameter.data = parameter.data.to(wide)
        self._owners[name] = 1
        if trainable:
            self._trainable.add(name)
        self._activate(name)
        return name

    def copy_adapter(self, source: str, role: str, *, trainable: bool) -> str:
        """Add an adapter with the weights of `source`, owned by the caller."""
        name = self.add_adapter(role, self.config(source), trainable=trainable)
        with torch.no_grad():
            for key, parameter in self._parameters[name].items():
                parameter.copy_(self._parameters[source][key])
        return name

    def retain(self, name: str) -> str:
        """Take a share in an adapter; give it back with `release`."""
        self._owners[name] += 1
        return name

    def release(self, name: str) -> None:
        """Give a share in an adapter back; the last one frees its memory."""
        self._owners[name] -= 1
        if self._owners[name] > 0:
            return
        del self._owners[name], self._parameters[name]
        self._trainable.discard(name)
        self._forget_fingerprint(name)
        if self._active == name:
            # PEFT picks a new active adapter with a warning; moved away from here there is nothing to warn of.
            self._activate(next(iter(self._parameters), None))
        self.peft_model.delete_adapter(name)

    def config(self, name: str) -> LoraConfig:
        """The LoRA configuration of an adapter."""
        config = self.peft_model.peft_config[name]
        assert isinstance(config, LoraConfig)
        return config

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's own parameters, by their name without the adapter's."""
        return self._parameters[name]

    def first_adapted_layer(self, names: Sequence[str]) -> int | None:
        """Index of the first repeated layer that holds one of these adapters.

        None: there is none, or an adapter reaches in front of the layers, to the embeddings for example.
        """
        adapted = {id(parameter) for name in names for parameter in self._parameters[name].values()}
        held = [{id(parameter) for parameter in layer.parameters()} for layer in self.layers.modules]
        head = self.network.get_output_embeddings()
        behind = {id(parameter) for parameter in head.parameters()} if head is not None else set()
        if adapted - behind.union(*held):
            return None
        return next((index for index, parameters in enumerate(held) if parameters & adapted), None)

    def export(self, name: str) -> AdapterState:
        """A copy of an adapter on the CPU, named as PEFT saves it."""
        tensors = get_peft_model_state_dict(self.peft_model, adapter_name=name, save_embedding_layers=False)
        copies = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
        return AdapterState(copy.deepcopy(self.config(name)), copies)

    def frozen_adapter(self, state: AdapterState, role: str) -> str:
        """Name of a frozen adapter with this configuration and these weights, new or not, owned by the caller."""
        name = self._find_frozen(state)
        if name is not None:
            return self.retain(name)
        name = self.add_adapter(role, state.config, trainable=False)
        self.load(name, state.tensors)
        return name

    def _find_frozen(self, state: AdapterState) -> str | None:
        wanted = computing_settings(state.config)
        for name in self._parameters:
            if name not in self._trainable and computing_settings(self.config(name)) == wanted:
                own = self.export(name).tensors
                if own.keys() == state.tensors.keys() and all(torch.equal(own[key], state.tensors[key]) for key in own):
                    return name
        return None

    def save_weights(self, folder: Path, merged: str | None = None) -> None:
        """Write the base as `from_pretrained` reads it, without adapters or with one of them merged into its weights.

        Raises:
            ConfigurationError: The base is quantised, or the adapter cannot be merged.
        """
        self.network.save_pretrained(folder, state_dict=self.state(merged))

    def state(self, merged: str | None = None) -> dict[str, Tensor]:
        """The base's own weights, by their names in the model without adapters, not copied; see `save_weights`."""
        if getattr(self.network, "is_quantized", False):
            fix = (
                "is quantised and cannot be written: save the adapter alone (evollm export --what adapter), and load "
                "the base from where it came"
            )
            raise ConfigurationError("base", self.name, fix)
        adapters = {id(parameter) for name in self._parameters for parameter in self._parameters[name].values()}
        weights = {
            name.replace(".base_layer.", "."): tensor.detach()
            for name, tensor in self.network.state_dict(keep_vars=True).items()
            if id(tensor) not in adapters
        }
        return weights if merged is None else weights | merged_weights(self.network, merged)

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite an adapter's weights in place.

        Raises:
            ConfigurationError: Names or shapes are not those of the adapter.
        """
        own = self.export(name).tensors
        wrong = sorted(set(own) ^ set(tensors)) or [key for key in own if own[key].shape != tensors[key].shape]
        if wrong:
            raise ConfigurationError("adapter weights", wrong[:3], f"do not fit adapter {name}: other names or shapes")
        set_peft_model_state_dict(self.peft_model, dict(tensors), adapter_name=name)
        self._forget_fingerprint(name)

    def fingerprint(self, name: str | None) -> str:
        """Digest of a frozen adapter's weights and configuration; None is the base without adapter."""
        if name is None:
            return "base"
        if name in self._trainable:
            raise ConfigurationError("adapter", name, "is trainable: only a frozen adapter has a lasting fingerprint")
        if name not in self._fingerprints:
            self._fingerprints[name] = adapter_fingerprint(self.config(name), self._parameters[name])
        return self._fingerprints[name]

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
        try:
            self.use(name)
            self.layers.checkpointing = gradient_checkpointing
            yield self.network
        finally:
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

    def whole(self) -> AbstractContextManager[Any]:
        """All weights are whole inside the block; of a sharded base all processes must enter it."""
        return self.layers.gathered(self.layers.modules) if self.layers.gathered is not None else nullcontext()

    @property
    def can_checkpoint(self) -> bool:
        """Whether the base declares layers whose activations can be recomputed."""
        return len(self.layers) > 0

    def compile(self, mode: str, backend: str = "inductor") -> None:
        """Compile the repeated layers of the base with `torch.compile`, each by itself."""
        # Packed rows have another length in every batch.
        self.layers.compile(mode=mode, backend=backend, dynamic=True)

    def _forget_fingerprint(self, name: str) -> None:
        """Weights have changed or gone, and with them the log-probs that nobody else's weights give."""
        fingerprint = self._fingerprints.pop(name, None)
        if fingerprint is not None and fingerprint not in self._fingerprints.values():
            self.reference_cache.forget(fingerprint)

    def _activate(self, name: str | None) -> None:
        tuner = cast(Any, self.peft_model.base_model)
        if name is None:
            tuner.disable_adapter_layers()
        else:
            if self._active is None:
                tuner.enable_adapter_layers()
            self.peft_model.set_adapter(name)
        self._active = name
        # PEFT makes the active adapter trainable and freezes the others; here that depends on the role alone.
        for adapter, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(adapter in self._trainable)
