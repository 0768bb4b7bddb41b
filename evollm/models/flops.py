"""The floating-point operations of a member's passes, by a formula, and their count.

T tokens of a sample, its prompt once and no padding, pass P matrix parameters of the base's layers and A parameters of
an adapter; C of them are scored by a head of E = hidden size x vocabulary parameters. One multiplication and one
addition for each parameter and token are

    T (2P + 2A) + 2EC    of a forward pass,
    T (4P + 6A) + 4EC    of a forward and a backward pass, since the base is frozen.

Attention scores, padding, recomputed activations and sample answers are left out, so that the count depends on data and
model alone, and not on the device, the layout or the other members.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from evollm.data.samples import Batch
from evollm.models.adapters.registry import AdapterRegistry
from evollm.models.adapters.targets import language_model, text_config
from evollm.models.encoder_decoder import is_encoder_decoder

# What passes are made for.
TRAINING, EVALUATION, REFERENCES, PROBE = "training", "evaluation", "references", "probe"

_STACKED = 3


@dataclass(frozen=True)
class Parameters:
    """Matrix parameters that a token passes.

    Attributes:
        prompt: Those that a prompt's token passes.
        completion: Those that a completion's token passes: others than `prompt` in an encoder-decoder model alone,
            where the keys and values of cross-attention are counted here, although the prompt passes them.
    """

    prompt: int
    completion: int

    @classmethod
    def of(cls, counts: Iterable[tuple[int, bool]], *, apart: bool) -> Parameters:
        """Add up parameters; `apart` says that those marked True are an encoder's, and the others a decoder's."""
        found = [*counts]
        encoder = sum(count for count, marked in found if marked)
        whole = sum(count for count, _ in found)
        return cls(encoder, whole - encoder) if apart else cls(whole, whole)


def layer_parameters(network: Any, adapters: Collection[Tensor] = ()) -> Parameters:
    """The parameters of a base's linear layers without its head; of stacked experts the share that a token is sent to.

    Args:
        network: The base.
        adapters: The tensors of the adapters on it, which are left out.
    """
    known, config = {id(tensor) for tensor in adapters}, text_config(network.config)
    head = network.get_output_embeddings()
    skipped = set() if head is None else set(head.modules())
    encoder = set(network.get_encoder().modules()) if is_encoder_decoder(network.config) else set()
    chosen: int = getattr(config, "num_experts_per_tok", None) or 0

    def count(module: nn.Module) -> int:
        own = [one for one in module.parameters(recurse=False) if id(one) not in known]
        if isinstance(module, nn.Linear):
            # Not the number of elements, since quantised weights are packed.
            return module.in_features * module.out_features if own else 0
        if isinstance(module, Conv1D):
            return int(module.weight.numel())
        stacked = [one for one in own if one.ndim == _STACKED] if chosen and "Conv" not in type(module).__name__ else []
        return sum(one.numel() * chosen // one.shape[0] for one in stacked)

    modules: list[nn.Module] = [module for module in language_model(network).modules() if module not in skipped]
    return Parameters.of(((count(module), module in encoder) for module in modules), apart=bool(encoder))


def head_parameters(network: Any) -> int:
    """E of the formula; 0 of a model without head."""
    head = network.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def pass_flops(batch: Batch, layers: Parameters, adapter: Parameters, head: int, *, training: bool) -> int:
    """Operations of one member's pass over a batch, by the formula above.

    Args:
        batch: B samples.
        layers: P.
        adapter: A.
        head: E.
        training: Whether a backward pass follows.
    """
    prompts = int(batch.prompt_lengths.sum())
    completions = int(batch.num_tokens.sum()) - prompts
    scored = sum(sum(sample.num_scored) for sample in batch)
    of_base, of_adapter = (4, 6) if training else (2, 2)
    return (
        prompts * (of_base * layers.prompt + of_adapter * adapter.prompt)
        + completions * (of_base * layers.completion + of_adapter * adapter.completion)
        + of_base * head * scored
    )


class FlopCount:
    """Counts the operations of all passes through a base.

    Args:
        network: The base.
        adapters: The adapters on it.
    """

    def __init__(self, network: Any, adapters: AdapterRegistry) -> None:
        self._network = network
        self._adapters = adapters
        self._counted: Counter[str] = Counter()
        self._layers: Parameters | None = None
        # By settings of the adapters: adapters of equal settings have equally many parameters.
        self._sizes: dict[str, Parameters] = {}

    def of(self, batch: Batch, adapter: str | None, *, training: bool = False) -> int:
        """Operations of a pass over a batch with an adapter, or without any: None."""
        return self._of(batch, self._size(adapter), training)

    def add(self, kind: str, batch: Batch, adapters: Iterable[str | None], *, training: bool = False) -> None:
        """Count the pass of each adapter over a batch as one of this kind."""
        members = Counter(map(self._size, adapters))
        self._counted[kind] += sum(count * self._of(batch, size, training) for size, count in members.items())

    def take(self) -> dict[str, int]:
        """The operations by kind since the last call."""
        found, self._counted = dict(self._counted), Counter()
        return found

    def _of(self, batch: Batch, adapter: Parameters, training: bool) -> int:
        if self._layers is None:
            self._layers = layer_parameters(self._network, self._adapters.tensors)
        return pass_flops(batch, self._layers, adapter, head_parameters(self._network), training=training)

    def _size(self, adapter: str | None) -> Parameters:
        if adapter is None:
            return Parameters(0, 0)
        settings = self._adapters.settings(adapter)
        if settings not in self._sizes:
            own = self._adapters.parameters(adapter).values()
            apart = is_encoder_decoder(self._network.config)
            encoder = {id(one) for one in self._network.get_encoder().parameters()} if apart else set()
            counts = ((one.numel(), id(one) in encoder) for one in own if one.ndim > 1)
            self._sizes[settings] = Parameters.of(counts, apart=apart)
        return self._sizes[settings]
