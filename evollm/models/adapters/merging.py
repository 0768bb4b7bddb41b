"""Merging an adapter into a copy of the base's weights, and comparing the result with the adapter by log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evollm.errors import ConfigurationError, brief
from evollm.models.adapters.adapter import AdapterState
from evollm.models.adapters.peft_layers import adapted_layers, own_name
from evollm.models.rounding import outputs_rounded_otherwise
from evollm.models.shared_base import SharedBase
from evollm.quiet import quiet

# The largest allowed difference, as a multiple of the difference that rounding makes; as in `evollm.models.probe`.
_BOUND = 3
# Number of trials in which the difference that rounding makes is measured.
_ROUNDINGS = 3
_TOKENS = 24
_INSTEAD = "save the adapter alone (save_llm_checkpoint, evollm export --what adapter)"


def save_base(base: SharedBase, folder: Path, merged: str | None = None) -> None:
    """Write the base so that `from_pretrained` reads it; see `base_state` for the arguments and errors."""
    with quiet():
        base.network.save_pretrained(folder, state_dict=base_state(base, merged))


def base_state(base: SharedBase, merged: str | None = None) -> dict[str, Tensor]:
    """The base's weights, not copied, by their names in the model without adapters.

    Args:
        base: The base.
        merged: Adapter to merge into the weights; None: the weights as they are.

    Raises:
        ConfigurationError: The base is quantised, or the adapter cannot be merged.
    """
    if getattr(base.network, "is_quantized", False):
        fix = (
            "is quantised and cannot be written: save the adapter alone (evollm export --what adapter), and load "
            "the base from where it came"
        )
        raise ConfigurationError("base", base.name, fix)
    of_adapters = {id(tensor) for tensor in base.adapters.tensors}
    changed = {} if merged is None else _checked_merge(base, merged)
    return {
        own_name(name): changed.get(tensor, tensor).detach()
        for name, tensor in base.network.state_dict(keep_vars=True).items()
        if id(tensor) not in of_adapters
    }


def _checked_merge(base: SharedBase, adapter: str) -> Mapping[Tensor, Tensor]:
    """`_merged_weights`, if the base computes with them what it computes with the adapter."""
    merged = _merged_weights(base.network, adapter)
    with base.active(adapter) as network:
        expected = all_logprobs(network)
    with base.active(None) as network, _in_place(merged):
        layers = adapted_layers(network, adapter).values()
        fault = check_same(expected, lambda: all_logprobs(network), layers)
    if fault is not None:
        fix = f"its adapters cannot be merged ({fault}): a weight may be tied to another one; {_INSTEAD}"
        raise ConfigurationError("lora_config.target_modules", base.adapters.config(adapter).target_modules, fix)
    return merged


def adapter_difference(base: SharedBase, one: AdapterState, other: AdapterState) -> str | None:
    """How far the log-probs of two adapters differ, in words; None: by no more than rounding explains.

    Raises:
        ConfigurationError: One of them does not fit the base, or the adapters on it.
    """
    names: list[str] = []
    with base.active(base.adapters.active):
        try:
            for state in (one, other):
                names.append(base.adapters.frozen(state, "check"))
            with base.active(names[0]) as network:
                expected = all_logprobs(network)
            with base.active(names[1]) as network:
                layers = adapted_layers(network, names[1]).values()
                return check_same(expected, lambda: all_logprobs(network), layers)
        finally:
            for name in names:
                base.adapters.release(name)


@torch.no_grad()
def _merged_weights(model: nn.Module, adapter: str) -> dict[Tensor, Tensor]:
    """The merged value of each of the base's weights that an adapter changes; the model stays as it is.

    PEFT merges in float32 or wider here, and each result is rounded once, to the type of its weight.

    Raises:
        ConfigurationError: PEFT cannot merge the adapter.
    """
    merged: dict[Tensor, Tensor] = {}
    for path, layer in adapted_layers(model, adapter).items():
        try:
            merged |= _merged_layer(layer, adapter)
        except Exception as error:  # PEFT's kinds of layers raise different exceptions.
            fix = f"its adapter cannot be merged ({brief(str(error))}): {_INSTEAD}"
            raise ConfigurationError("lora_config", own_name(path), fix) from error
    return merged


def _merged_layer(layer: Any, adapter: str) -> dict[Tensor, Tensor]:
    """`_merged_weights` of one layer."""
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
        # DoRA caches there what it would need to undo the merge.
        getattr(layer, "_caches", {}).clear()
    merged = {}
    for weight, old, new in zip(weights, before, after, strict=True):
        same = new == old
        if not same.all():
            # Where the sum equals the weight, the weight's bits stay: -0 + 0 would be +0.
            merged[weight] = torch.where(same, old, new.to(old.dtype))
    return merged


@contextmanager
def _in_place(merged: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside the block the base's weights, tied ones included, have the merged values."""
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
    """(T, V) log-probs in float64 at each position of a sequence: random tokens, followed by the tokens `ids`."""
    embeddings = network.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(embeddings), (2 * _TOKENS,), generator=generator)
    # Embeddings that are not finite would make all log-probs NaN.
    usual = drawn[torch.isfinite(embeddings[drawn.to(embeddings.device)]).all(dim=1).cpu()][:_TOKENS]
    tokens = torch.cat([usual, torch.tensor([*ids], dtype=torch.long)])[None].to(embeddings.device)
    inputs = {"input_ids": tokens, "use_cache": False}
    if network.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    found: Tensor = network(**inputs).logits[0].double().log_softmax(dim=-1)
    return found


def check_same(expected: Tensor, compute: Callable[[], Tensor], layers: Iterable[nn.Module]) -> str | None:
    """Compare the log-probs of merged weights with those of the adapter.

    How far rounding moves the log-probs is measured: the outputs of the merged layers are changed by one unit in their
    last place, as in `evollm.models.rounding`.

    Args:
        expected: (T, V) log-probs with the adapter.
        compute: Computes the log-probs with the merged weights.
        layers: The layers that were merged.

    Returns:
        None if rounding explains the difference, else the difference in words.
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
    """The largest absolute difference; infinite for other shapes, and where only one of the two is finite."""
    if one.shape != other.shape:
        return float("inf")
    both = ~one.isfinite() & ~other.isfinite()
    gaps = (one - other).abs().masked_fill(both, 0.0).nan_to_num(nan=float("inf"))
    return float(gaps.max())
