"""The frozen base model that a whole population shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from evollm.checks import located
from evollm.errors import ConfigurationError
from evollm.models.adapters.registry import AdapterRegistry
from evollm.models.adapters.routing import AdapterRouter
from evollm.models.adapters.stack import Stack
from evollm.models.adapters.targets import language_model, text_config
from evollm.models.attention import PackedSequences, current_layout, packed_attention
from evollm.models.encoder_decoder import is_encoder_decoder, start_token
from evollm.models.fingerprints import weights_fingerprint
from evollm.models.flops import FlopCount
from evollm.models.layers import FanOut, LayerStack
from evollm.models.load_balancing import LoadBalancing, asked_for, load_balancing
from evollm.models.loading.policy_archive import PolicyArchive, loaded_archive
from evollm.models.quantised import keep_differentiable
from evollm.models.reference_cache import ReferenceCache
from evollm.models.rope import forget_longest_sequences, longest_sequence

_ATTRIBUTE = "_evollm_shared_base"
_RECOMPILE_LIMIT = 64


def check_plain_model(field: str, model: object) -> None:
    """Refuse anything but a model of transformers without adapters.

    Raises:
        ConfigurationError: It is no model of transformers, or has adapters already.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        raise ConfigurationError(
            field,
            model if isinstance(model, str) else type(model).__name__,
            "must be a language model of transformers, causal or encoder-decoder (or use model_name)",
        )
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigurationError(field, type(model).__name__, f"already carries adapters: {_instead(model)}")


def _instead(model: PreTrainedModel | PeftModel) -> str:
    """Advice on what to pass instead of a model with adapters, so that actor and reference start from its outputs.

    TRL trains the adapter of a PEFT model further, with a copy of it as reference; merging gives the same start.
    """
    if not isinstance(model, PeftModel):
        return "pass the plain base model, as it was before, and the LoRA settings as lora_config"
    settings = f"lora_config=model.peft_config[{model.active_adapter!r}]"
    ups = [weight for name, weight in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name]
    if ups and not any(weight.any() for weight in ups):
        return f"they change nothing yet, so pass the base and their settings: model.unload(), {settings}"
    if getattr(model.get_base_model(), "is_quantized", False):
        return (
            "model.save_pretrained(folder), and model_name=folder, which merges them into the base in the type that it "
            "is stored in; actor and reference then start from them"
        )
    return (
        f"merge them into the base, from which actor and reference then start: model.merge_and_unload(), {settings} "
        "(or another one)"
    )


class SharedBase:
    """A frozen base model, the adapters on it, and the log-probs of frozen adapters.

    Attributes:
        network: The base model of transformers; its forward pass uses the active adapter.
        adapters: The adapters on it.
        layers: Its repeated layers.
        router: Lets a forward pass use several adapters.
        reference_cache: Log-probs of frozen adapters.
        flops: Counts the operations of the passes through it.
        model_config: Keyword arguments of `from_pretrained` with which a checkpoint loads the base again.
        weights_fingerprint: Digest of its weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_plain_model("actor_network", model)
        if is_encoder_decoder(model.config):
            start_token(model)
        keep_differentiable(model)
        forget_longest_sequences(model)
        self.network = model
        if self.name:
            # Checkpoints name the base, and are also loaded from other working directories.
            self.network.config._name_or_path = located(self.name)
        self.model_config: Mapping[str, Any] = {}
        self.weights_fingerprint = weights_fingerprint(model)
        self.reference_cache = ReferenceCache()
        self.router = AdapterRouter()
        self.layers = LayerStack(language_model(model), self._recompute_context)
        self.adapters = AdapterRegistry(model, self.layers.modules, self.router, self.reference_cache.forget)
        self.flops = FlopCount(model, self.adapters)
        self._balancing: tuple[Mapping[str, Any], LoadBalancing | None] = {}, None

    @classmethod
    def of(cls, model: PreTrainedModel) -> SharedBase:
        """The shared base of this model: created at the first call, and the same object in every later one."""
        base = cls.on(model)
        if base is None:
            base = cls(model)
            # Set in `__dict__`, since `nn.Module.__setattr__` would register it.
            model.__dict__[_ATTRIBUTE] = base
        return base

    @classmethod
    def on(cls, model: PreTrainedModel) -> SharedBase | None:
        """The shared base of this model, None if `of` was not called for it."""
        base = getattr(model, _ATTRIBUTE, None)
        return base if isinstance(base, cls) else None

    @property
    def device(self) -> torch.device:
        """The device of the base's input embeddings."""
        return self._embeddings.weight.device

    @property
    def name(self) -> str:
        """The name or path that the base was loaded from; "" for a model that was built from a configuration."""
        return str(getattr(self.network.config, "_name_or_path", "") or "")

    @property
    def archive(self) -> PolicyArchive | None:
        """The policy archive that the weights were loaded from; None: they are those of the model's own files."""
        return loaded_archive(self.network)

    def origin(self) -> dict[str, Any]:
        """A checkpoint's description of its base, with which `DPO.load` loads the base again: plain data."""
        return {
            "base_name": self.name,
            "base_fingerprint": self.weights_fingerprint,
            # The user may have changed the router settings of `actor_network` after loading it.
            "model_config": {**self.model_config, **asked_for(self.network)},
            "archive": None if self.archive is None else self.archive.path,
        }

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompts go through an encoder and completions through a decoder, as T5's do."""
        return is_encoder_decoder(self.network.config)

    @property
    def load_balancing(self) -> LoadBalancing | None:
        """The load-balancing loss that the base's configuration asks for at present; None: none.

        Raises:
            ConfigurationError: The loss cannot be computed for this model.
        """
        asked = asked_for(self.network)
        if asked != self._balancing[0]:
            self._balancing = asked, load_balancing(self.network)
        return self._balancing[1]

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the base was made for, in tokens; None: its configuration does not say."""
        return longest_sequence(text_config(self.network.config))

    @property
    def num_embeddings(self) -> int:
        """Rows of the input embeddings: every token id must be below this."""
        return int(self._embeddings.weight.shape[0])

    @property
    def _embeddings(self) -> nn.Embedding:
        return cast(nn.Embedding, self.network.get_input_embeddings())

    def move_to(self, device: torch.device) -> None:
        """Put the base on a device, unless it was loaded with a device map.

        Raises:
            ConfigurationError: The base has adapters already and is on another device.
        """
        if hasattr(self.network, "hf_device_map") or torch.empty(0, device=device).device == self.device:
            return
        if self.adapters.names:
            raise ConfigurationError(
                "device", str(device), f"the base's other agents are on {self.device}: use that one"
            )
        cast(nn.Module, self.network).to(device)

    @contextmanager
    def active(self, name: str | None, *, gradient_checkpointing: bool = False) -> Iterator[PreTrainedModel]:
        """The base with one adapter active inside the block, in evaluation mode.

        Args:
            name: The adapter; None: the base without adapter.
            gradient_checkpointing: Whether activations are recomputed in the backward pass.
        """
        with self.adapters.activated(name), self._evaluating(gradient_checkpointing):
            yield self.network

    @contextmanager
    def routed(self, stack: Stack, *, gradient_checkpointing: bool = False) -> Iterator[PreTrainedModel]:
        """The base with block m of the rows going through member m of a stack, as `active` otherwise."""
        # PEFT's layers that are not routed compute with the active adapter.
        adapters = self.adapters.held() if self.router.routes_all else self.adapters.activated(stack.names[0])
        first = self.adapters.first_layer(stack.names)
        before, self.layers.routed_from = self.layers.routed_from, len(self.layers) if first is None else first
        try:
            with adapters, self._evaluating(gradient_checkpointing), self.router.route(stack):
                yield self.network
        finally:
            self.layers.routed_from = before

    @contextmanager
    def _evaluating(self, gradient_checkpointing: bool) -> Iterator[None]:
        before = self.layers.checkpointing
        if self.network.training:
            # Dropout would add noise to the difference of policy and reference.
            self.network.eval()
        self.layers.checkpointing = gradient_checkpointing
        try:
            yield
        finally:
            self.layers.checkpointing = before

    @contextmanager
    def packed(self, layout: PackedSequences, fan_out: FanOut | None) -> Iterator[None]:
        """Inside the block the rows of a forward pass are packed pairs; see `PackedSamples` and `FanOut`."""
        before, self.layers.fan_out = self.layers.fan_out, fan_out
        try:
            with packed_attention(self.network.config, layout):
                yield
        finally:
            self.layers.fan_out = before

    def _recompute_context(self) -> AbstractContextManager[None]:
        """Where a checkpointed layer is recomputed: with the adapters and the layout of its forward pass."""
        adapter, stack, layout = self.adapters.active, self.router.stack, current_layout()

        @contextmanager
        def as_in_forward() -> Iterator[None]:
            base = self.active(adapter) if stack is None else self.routed(stack)
            with base, packed_attention(self.network.config, layout):
                yield

        return as_in_forward()

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of each layer; then all processes must make the same forward passes."""
        return self.layers.gathered is not None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block each process holds all weights; with a sharded base all processes must enter it."""
        gathered = self.layers.gathered
        if gathered is None:
            yield
            return
        with gathered(self.layers.modules):
            # So that a process may make a forward pass that the others do not make.
            self.layers.gathered = None
            try:
                yield
            finally:
                self.layers.gathered = gathered

    @property
    def can_checkpoint(self) -> bool:
        """Whether the base has layers that transformers declares as checkpointable."""
        return len(self.layers) > 0

    def compile(self, mode: str, backend: str = "inductor") -> None:
        """Compile each repeated layer of the base with `torch.compile`."""
        self.router.in_graphs = True
        # A layer's code is compiled for one and for several members, with and without gradients, and for each model.
        torch._dynamo.config.recompile_limit = max(_RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        # Dynamic shapes, since nearly every batch has another number of tokens.
        self.layers.compile(mode=mode, backend=backend, dynamic=True)
