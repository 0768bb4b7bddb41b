"""An adapter's weights added to those of the base, beside it, and whether that computes what the adapter computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from evollm.errors import ConfigurationError, brief
from evollm.models.rounding import outputs_rounded_otherwise
from evollm.models.routing import holds_any

# Merged and adapter may be apart by so many times what rounding is seen to do; as in `evollm.models.probe`.
_BOUND = 3
_ROUNDINGS = 3
_TOKENS = 24
INSTEAD = "save the adapter alone (save_llm_checkpoint, evollm export --what adapter)"


def own_name(path: str) -> str:
    """The path of a module or weight in the model without adapters."""
    return ".".join(part for part in path.split(".") if part != "base_layer")


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """PEFT's layers that hold an adapter, by path; of those around one another the inner ones come last."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and holds_any(module, [adapter])
    }


@torch.no_grad()
def merged_weights(model: nn.Module, adapter: str) -> dict[Tensor, Tensor]:
    """The base's weights that an adapter changes, and what they become.

    PEFT's own merge is done in float32 at least, and rounded to a weight's type once.

    Args:
        model: A model with PEFT layers; it stays as it is.
        adapter: Name of an adapter.

    Raises:
        ConfigurationError: PEFT cannot merge it.
    """
    merged: dict[Tensor, Tensor] = {}
    for path, layer in adapted_layers(model, adapter).items():
        try:
            merged |= _merged_layer(layer, adapter)
        except Exception as error:  # Each kind of adapter refuses in its own way.
            fix = f"its adapter cannot be merged ({brief(str(error))}): {INSTEAD}"
            raise ConfigurationError("lora_config", own_name(path), fix) from error
    return merged


def _merged_layer(layer: Any, adapter: str) -> dict[Tensor, Tensor]:
    """The same of one layer."""
    weights = [weight for weight in layer.get_base_layer().parameters(recurse=False) if weight.is_floating_point()]
    before = [weight.data for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        layer.merge(adapter_names=[adapter])
        after = [weight.data for weight in weights]
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data
        layer.merged_adapters.clear()
        # DoRA keeps there what it would need to undo the merge.
        getattr(layer, "_caches", {}).clear()
    merged = {}
    for weight, old, new in zip(weights, before, after, strict=True):
        same = new == old
        if not same.all():
            # An untrained adapter leaves every bit: -0 + 0 would be +0.
            merged[weight] = torch.where(same, old, new.to(old.dtype))
    return merged


@contextmanager
def in_place(merged: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside the block the base computes with the merged weights, and whatever shares a weight with it."""
    before = {weight: weight.data for weight in merged}
    try:
        for weight, data in merged.items():
            weight.data = data
        yield
    finally:
        for weight, data in before.items():
            weight.data = data


@torch.no_grad()
def all_logprobs(network: Any, ids: Iterable[int] = ()) -> Tensor:
    """(T, V) log-probs after each of some random tokens, and of the tokens `ids`, in float64."""
    embeddings = network.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(embeddings), (2 * _TOKENS,), generator=generator)
    # A row that is not finite would hide all others.
    usual = drawn[torch.isfinite(embeddings[drawn.to(embeddings.device)]).all(dim=1).cpu()][:_TOKENS]
    tokens = torch.cat([usual, torch.tensor([*ids], dtype=torch.long)])[None].to(embeddings.device)
    inputs = {"input_ids": tokens, "use_cache": False}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    found: Tensor = network(**inputs).logits[0].double().log_softmax(dim=-1)
    return found


def check_same(expected: Tensor, compute: Callable[[], Tensor], layers: Iterable[nn.Module]) -> str | None:
    """Whether merged weights give an adapter's log-probs, as far as rounding allows; what is wrong if they do not.

    How far rounding moves them is tried: the outputs of the layers that were merged are moved by one unit in their last
    place, as in `evollm.models.rounding`.

    Args:
        expected: (T, V) the adapter's.
        compute: Gives those of the merged weights.
        layers: What was merged.
    """
    layers = list(layers)
    found = compute()
    gap = _apart(found, expected)
    floor = float(torch.finfo(torch.float32).eps * expected[expected.isfinite()].abs().max().nan_to_num())
    for seed in range(_ROUNDINGS):
        if gap <= _BOUND * floor:
            break
        with outputs_rounded_otherwise(layers, seed):
            floor = max(floor, _apart(compute(), found))
    if gap <= _BOUND * floor:
        return None
    return f"log-probs would be off by {gap:.2g}, rounding explains {_BOUND * floor:.2g}"


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where one of them is not a number and the other is."""
    if one.shape != other.shape:
        return float("inf")
    both = ~one.isfinite() & ~other.isfinite()
    gaps = (one - other).abs().masked_fill(both, 0.0).nan_to_num(nan=float("inf"))
    return float(gaps.max())
