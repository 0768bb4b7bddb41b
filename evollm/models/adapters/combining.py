"""New adapters from those on a base, without training: weighted combinations, and scaled or extrapolated ones.

An adapter changes the weight of a layer by the delta scaling * B @ A. `scaled` and the combination `cat` are exact in
these deltas. Other combinations are those of PEFT's `add_weighted_adapter`, computed layer by layer with PEFT's
functions: PEFT's method keeps `use_rslora`, which multiplies its deltas by the square root of the rank, loses rank
patterns, so that `linear` gives a configuration without the ranks of its tensors, and its weights do not average: K
equal adapters with weights of 1 / K give K times the adapter with `linear`, and a K-th of it with `ties`. A result is
an `AdapterState`; `base.adapters.frozen(state, role)` puts it on the base.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import Tensor

from evollm.checks import finite_number, nearest_name, whole_number
from evollm.errors import ConfigurationError
from evollm.models.adapters.adapter import AdapterState
from evollm.models.adapters.peft_layers import own_name
from evollm.models.shared_base import SharedBase

_PREFIX = "base_model.model."
# The names of a layer's A, B and bias of B in a saved adapter; those of an adapter on embeddings come second.
_DOWN, _UP, _BIAS = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B"), ("lora_B.bias",)

# PEFT's functions of (tensors, weights, density), applied to the A's and to the B's of a layer.
_BY_FACTOR: Mapping[str, Callable[[list[Tensor], Tensor, float], Tensor]] = {
    "linear": lambda tensors, weights, _: task_arithmetic(tensors, weights),
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
COMBINATIONS = ("cat", "svd", *_BY_FACTOR)


@dataclass(frozen=True)
class _Factors:
    """An adapter in one layer: its delta is scaling * up @ down.

    Attributes:
        down: (E, r, D_in) A of each of E stacked experts; E is 1 for any other layer.
        up: (E, D_out, r) B.
        bias: (D_out,) bias of B; None: B has none.
        scaling: PEFT's scaling of the layer.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scaling: float


def scaled(base: SharedBase, adapter: str, factor: float, reference: str | None = None) -> AdapterState:
    """The adapter whose delta in each layer is `reference + factor * (adapter - reference)`.

    A factor above 1 extrapolates (ExPO, arXiv 2404.16792, with alpha = factor - 1), one from 0 to 1 shrinks.

    Args:
        base: The base.
        adapter: Name of an adapter on it.
        factor: The factor, any finite number.
        reference: Name of the adapter to start from; None: the base without adapter.

    Returns:
        The adapter on the CPU. Without a reference, or with one whose deltas are 0, it has the configuration and the
        A's of `adapter`, and its B's multiplied by `factor`; else it is the `cat` of both, whose ranks are the sums.

    Raises:
        ConfigurationError: The factor is not finite, there is no such adapter, or an adapter cannot be combined; see
            `combined`.
    """
    factor = finite_number("factor", factor)
    names = [adapter] if reference is None else [adapter, reference]
    _layers(base, names)
    own, *others = [base.adapters.export(name) for name in names]
    if factor != 1 and any(tensor.any() for other in others for tensor in _additive(other).values()):
        return combined(base, names, [factor, 1 - factor])
    return AdapterState(own.config, {**own.tensors, **{key: factor * tensor for key, tensor in _additive(own).items()}})


def combined(
    base: SharedBase,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    combination: str = "cat",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> AdapterState:
    """A weighted average of adapters.

    With each combination, equal adapters whose weights add up to 1 give that adapter (`ties`: with equal weights and
    density 1; `dare_linear` and `dare_ties`: on average over seeds).

    - `cat`: the weighted sum of the deltas, exactly; the rank in a layer is the sum of the ranks there.
    - `svd`: the nearest approximation of that sum with rank `rank`.
    - `linear`: the weighted sum of the A's times that of the B's, each with the square root of its scaling. It has
      products of one adapter's B and another one's A, so it is near to the sum of deltas only where adapters are alike.
    - `ties` (arXiv 2306.01708): of the A's, then of the B's, the smallest entries of each adapter are set to 0, and the
      values that have the majority's sign are averaged.
    - `dare_linear`, `dare_ties` (arXiv 2311.03099): as `linear` and `ties`, but random entries of each adapter are set
      to 0 and the others divided by `density`.

    Args:
        base: The base.
        adapters: Names of K adapters on it.
        weights: (K,) the weight of each, finite numbers; only `cat` and `svd` take negative ones. None: 1 / K each.
        combination: One of `COMBINATIONS`.
        rank: Largest rank of `svd`; None: in each layer the largest rank of the adapters there.
        density: Share of the entries that `ties`, `dare_linear` and `dare_ties` keep, above 0 and at most 1.
        seed: Seed of `dare_linear` and `dare_ties`; the global random generators keep their state.

    Returns:
        The adapter on the CPU; its `lora_alpha` is its rank in each layer, which is a scaling of 1.

    Raises:
        ConfigurationError: An argument is invalid, the adapters are on different layers, one of them is not linear in
            its B (DoRA) or has weights that two layers share, or, except for `cat` and `svd`, they have different
            ranks, or biases. It is raised before anything is computed.
    """
    adapters = list(adapters)
    given = [1 / len(adapters) for _ in adapters] if weights is None else weights
    numbers = [finite_number(f"weights[{index}]", weight) for index, weight in enumerate(given)]
    if not adapters or len(numbers) != len(adapters):
        raise ConfigurationError("weights", numbers, f"must be one for each of the adapters {adapters}, at least one")
    if combination not in COMBINATIONS:
        nearest = nearest_name(str(combination), COMBINATIONS)
        fix = f"must be one of {', '.join(COMBINATIONS)}: did you mean {nearest!r}?"
        raise ConfigurationError("combination", combination, fix)
    if combination in _BY_FACTOR and min(numbers) < 0:
        raise ConfigurationError("weights", numbers, f"must not be negative for {combination!r}: use 'cat' or 'svd'")
    if rank is not None:
        whole_number("rank", rank, 1)
    if not 0 < finite_number("density", density) <= 1:
        raise ConfigurationError("density", density, "must be above 0 and at most 1")
    layers = _layers(base, adapters)
    states = [base.adapters.export(name) for name in adapters]
    factors = {
        path: [_factors(path, layer, name, state) for name, state in zip(adapters, states, strict=True)]
        for path, layer in layers.items()
    }
    if combination in _BY_FACTOR:
        _check_alike(factors, combination)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, parts in factors.items():
            if combination in _BY_FACTOR:
                # `ties` and `dare_ties` divide by the number of adapters.
                shares = [weight * len(parts) for weight in numbers] if combination.endswith("ties") else numbers
                found = _by_factor(parts, shares, _BY_FACTOR[combination], density)
            else:
                found = _concatenated(parts, numbers)
            if combination == "svd":
                found = _truncated(found, rank or max(part.down.shape[1] for part in parts))
            tensors |= _as_saved(found, path, states[0].tensors)
            ranks[_pattern(path, layers[path])] = found.down.shape[1]
    return AdapterState(_with_ranks(states[0].config, ranks), tensors)


def check_combinable(base: SharedBase, adapters: Sequence[str], combinations: Sequence[str] = ()) -> None:
    """Refuse adapters that `scaled` or one of these combinations refuses, whatever their weights.

    Raises:
        ConfigurationError: See `combined`.
    """
    layers = _layers(base, adapters)
    states = [base.adapters.export(name) for name in adapters]
    for path, layer in layers.items():
        parts = [_factors(path, layer, name, state) for name, state in zip(adapters, states, strict=True)]
        for combination in combinations:
            if combination in _BY_FACTOR:
                _check_alike({path: parts}, combination)


def _layers(base: SharedBase, adapters: Sequence[str]) -> dict[str, Any]:
    """The layers that the adapters are on, by path, if all are plain LoRA on the same layers."""
    found: dict[str, Any] = {}
    for number, name in enumerate(adapters):
        if name not in base.adapters.names:
            fix = f"is not an adapter of this base: {', '.join(base.adapters.names)}"
            raise ConfigurationError("adapter", name, fix)
        if base.adapters.config(name).ensure_weight_tying:
            raise ConfigurationError(
                "lora_config.ensure_weight_tying", True, "such adapters cannot be combined or scaled"
            )
        if base.adapters.config(name).use_dora:
            fix = "cannot be combined or scaled: DoRA divides by a norm that depends on the adapter"
            raise ConfigurationError("lora_config.use_dora", True, fix)
        paths = dict.fromkeys(_split(key)[0] for key in base.adapters.export(name).tensors)
        others = sorted(paths.keys() ^ found.keys()) if number else []
        if others:
            fix = f"have only one of {adapters[0]} and {name}: adapters must be on the same layers"
            raise ConfigurationError("adapters", others[:3], fix)
        found = {path: base.network.get_submodule(path) for path in paths}
        variants = {type(layer.lora_variant[name]).__name__ for layer in found.values() if name in layer.lora_variant}
        if variants:
            raise ConfigurationError(
                "lora_config", sorted(variants), "is no plain LoRA and cannot be combined or scaled"
            )
    return found


def _split(key: str) -> tuple[str, str]:
    """The path of the layer and the name in it, such as `lora_A.weight`, of a tensor of a saved adapter."""
    path, _, name = key.removeprefix(_PREFIX).rpartition(".lora_")
    if f"lora_{name}" not in {*_DOWN, *_UP, *_BIAS}:
        raise ConfigurationError("adapter", key, "is no weight of plain LoRA: the adapter cannot be combined or scaled")
    return path, f"lora_{name}"


def _additive(state: AdapterState) -> dict[str, Tensor]:
    """The B's and their biases, in which the deltas are linear."""
    return {key: tensor for key, tensor in state.tensors.items() if _split(key)[1] in {*_UP, *_BIAS}}


def _factors(path: str, layer: Any, name: str, state: AdapterState) -> _Factors:
    """An adapter in the layer at this path."""
    down, up, bias = (
        next(
            (state.tensors[key] for key in (f"{_PREFIX}{path}.{kind}" for kind in kinds) if key in state.tensors), None
        )
        for kinds in (_DOWN, _UP, _BIAS)
    )
    assert down is not None
    assert up is not None
    if up.shape[1] != len(down):
        fix = "is a convolution in groups, on which adapters cannot be combined"
        raise ConfigurationError("lora_config.target_modules", own_name(path), fix)
    experts = getattr(layer, "num_experts", 1)
    # PEFT stores the A's of experts one after the other, and their B's interleaved. The kernel of a convolution counts
    # as inputs.
    stacked = up.flatten(1).reshape(len(up), -1, experts).permute(2, 0, 1)
    return _Factors(down.flatten(1).reshape(experts, -1, down[0].numel()), stacked, bias, layer.scaling[name])


def _as_saved(factors: _Factors, path: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer under the names, and with the dimensions of inputs and outputs, of a saved adapter."""
    found = {}
    for kinds, tensor, own in (
        (_DOWN, factors.down.flatten(0, 1), 1),
        (_UP, factors.up.permute(1, 2, 0).flatten(1), 2),
        (_BIAS, factors.bias, 1),
    ):
        for key in (f"{_PREFIX}{path}.{kind}" for kind in kinds):
            if key in like and tensor is not None:
                found[key] = tensor.reshape(*tensor.shape[:own], *like[key].shape[own:]).contiguous()
    return found


def _check_alike(factors: Mapping[str, Sequence[_Factors]], combination: str) -> None:
    """Refuse adapters of which PEFT's functions would leave something out, or cannot add the A's up."""
    for path, parts in factors.items():
        ranks = [part.down.shape[1] for part in parts]
        if len(set(ranks)) > 1:
            fix = (
                f"are the adapters' ranks in {own_name(path)}; {combination!r} needs equal ones, 'cat' and 'svd' do not"
            )
            raise ConfigurationError("adapters", ranks, fix)
        if any(part.bias is not None for part in parts):
            fix = f"gives a bias that {combination!r} does not combine: use 'cat' or 'svd'"
            raise ConfigurationError("lora_config.lora_bias", True, fix)


def _concatenated(parts: Sequence[_Factors], weights: Sequence[float]) -> _Factors:
    """The weighted sum of deltas: [A_1; A_2; ...] and [w_1 s_1 B_1, w_2 s_2 B_2, ...]."""
    sizes = [weight * part.scaling for part, weight in zip(parts, weights, strict=True)]
    ups = [size * part.up for part, size in zip(parts, sizes, strict=True)]
    biases = [size * part.bias for part, size in zip(parts, sizes, strict=True) if part.bias is not None]
    bias = torch.stack(biases).sum(dim=0) if biases else None
    return _Factors(torch.cat([part.down for part in parts], dim=1), torch.cat(ups, dim=2), bias, 1.0)


def _truncated(factors: _Factors, rank: int) -> _Factors:
    """The nearest factors of at most this rank, from the SVD of a (r, r) matrix: B A = Q_B (R_B R_A^T) Q_A^T."""
    if factors.down.shape[1] <= rank:
        return factors
    outer, up = torch.linalg.qr(factors.up)
    inner, down = torch.linalg.qr(factors.down.mT)
    left, values, right = torch.linalg.svd(up @ down.mT, full_matrices=False)
    rank = min(rank, values.shape[-1])
    return _Factors(
        down=right[:, :rank] @ inner.mT,
        up=(outer @ left[:, :, :rank]) * values[:, None, :rank],
        bias=factors.bias,
        scaling=factors.scaling,
    )


def _by_factor(
    parts: Sequence[_Factors],
    weights: Sequence[float],
    combine: Callable[[list[Tensor], Tensor, float], Tensor],
    density: float,
) -> _Factors:
    """The combined A's and the combined B's, each with the weight times the square root of the scaling."""
    sizes = torch.tensor([weight * math.sqrt(part.scaling) for part, weight in zip(parts, weights, strict=True)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* no pruning will be performed")
        down, up = (
            combine(tensors, sizes.to(tensors[0].dtype), density)
            for tensors in ([part.down for part in parts], [part.up for part in parts])
        )
    return _Factors(down, up, None, 1.0)


def _pattern(path: str, layer: Any) -> str:
    """The pattern that matches the layer alone in PEFT's `rank_pattern`; that of a stacked weight names the weight."""
    name = own_name(path)
    parameter = getattr(layer, "parameter_name", None)
    return "^" + re.escape(name if parameter is None else f"{name}.{parameter}")


def _with_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration with these ranks, by pattern, and a scaling of 1 everywhere."""
    config = copy.deepcopy(config)
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = config.r
    config.rank_pattern = {pattern: rank for pattern, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    return config
