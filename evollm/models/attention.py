"""Attention within packed samples: each completion attends to its prompt and itself only, without a square mask.

A sample's prompt and first completion are one causal sequence; its other completions continue the same prompt.
Registered with transformers as an attention implementation, so that every model whose layers look theirs up by name
can use it. `evollm.models.probe` checks each model's log-probs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from evollm.data.samples import Sample
from evollm.models.flash import SequenceBounds, causal_mask, flash_attention, kernel_head_size, takes, why_not_flash
from evollm.models.upload import upload

PAIR_ATTENTION = "evollm_pairs"
# Arguments that change the scores unless they are None. The probe detects arguments missing from this list.
_CHANGES_SCORES = ("s_aux", "position_bias", "head_mask")
SLOW_WITHOUT_FLASH = ("cuda",)
# Queries below which torch's CPU kernel of attention works on blocks of 32 queries instead of 64.
_SHORT = 192
# Names of the implementations, for messages.
FLASH = "torch's flash kernel, all sequences in one call"
ONE_BY_ONE = "scaled_dot_product_attention, one sequence after the other"
SOFT_CAPPED = "products with a soft cap, one sequence after the other"


class SampleLengths(NamedTuple):
    """Number of tokens of a sample's prompt and of each completion."""

    prompt: int
    completions: tuple[int, ...]

    @classmethod
    def of(cls, sample: Sample) -> SampleLengths:
        """The lengths of a sample."""
        return cls(len(sample.prompt_ids), tuple(map(len, sample.completions)))


class UnsupportedAttentionError(RuntimeError):
    """A model requests an option that attention within packed samples does not support."""


class PackedSequences:
    """The boundaries of the samples in a packed row, and the masks derived from them, built once for all layers.

    Attributes:
        lengths: Tokens of the samples' parts.
        base_dtype: The base's dtype if the engine warns of slow dtypes, so that attention does not warn too; else None.
        kinds: The attention implementations that layers have used so far, in words.
    """

    def __init__(
        self, lengths: tuple[SampleLengths, ...], device: torch.device, base_dtype: torch.dtype | None = None
    ) -> None:
        self.lengths = lengths
        self.base_dtype = base_dtype
        self.kinds: set[str] = set()
        self._device = device
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}
        self._varlen: _VarlenIndices | None = None

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor | None:
        """(queries, keys) True where the last `queries` of `keys` positions attend to a key; None: plain causal."""
        known = (queries, keys, window)
        if known not in self._masks:
            if queries == keys and (window is None or window >= keys):
                self._masks[known] = None
            else:
                self._masks[known] = causal_mask(queries, keys, window, self._device)
        return self._masks[known]

    @property
    def varlen(self) -> _VarlenIndices:
        """The boundaries as indices for variable-length kernels."""
        if self._varlen is None:
            self._varlen = _VarlenIndices(self.lengths, self._device)
        return self._varlen


# Set during a forward and backward pass. Not a context variable, since autograd's threads read this layout too.
_current: PackedSequences | None = None


@contextmanager
def packed_attention(config: Any, layout: PackedSequences | None) -> Iterator[None]:
    """Make the model with this configuration use `pair_attention` with a layout inside the block; None: no change."""
    global _current
    if layout is None:
        yield
        return
    before, implementations = _current, {"": config._attn_implementation}
    for name in config.sub_configs:
        # Setting config._attn_implementation also sets every sub-configuration's, so each value is saved.
        implementations[name] = getattr(getattr(config, name, None), "_attn_implementation", None)
    _current, config._attn_implementation = layout, PAIR_ATTENTION
    try:
        yield
    finally:
        _current, config._attn_implementation = before, implementations


def current_layout() -> PackedSequences | None:
    """The layout that `pair_attention` uses at present."""
    return _current


@torch.compiler.disable  # type: ignore[untyped-decorator]
def pair_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of M rows of N packed tokens, with the signature of transformers' `AttentionInterface`.

    Args:
        module: The attention layer.
        query: (M, H, N, D).
        key: (M, K, N, D), H a multiple of K.
        value: (M, K, N, D).
        attention_mask: None.
        scaling: Factor of the scores, by default 1 / sqrt(D).
        sliding_window: Positions that a token attends to, itself included; None: all positions up to its own.
        softcap: Scores become softcap * tanh(score / softcap).
        **others: Ignored, except that an argument known to change the scores raises `UnsupportedAttentionError`.

    Returns:
        (M, N, H, D) and None.
    """
    layout = _current
    asked = [name for name in _CHANGES_SCORES if others.get(name) is not None]
    if layout is None or asked or attention_mask is not None or not getattr(module, "is_causal", True):
        raise UnsupportedAttentionError(f"attention within samples cannot follow {asked or 'this mask'}")
    if softcap is None:
        refusal = why_not_flash(query.device, query.dtype, kernel_head_size(query, value))
        if not refusal:
            layout.kinds.add(FLASH)
            return layout.varlen.attend(query, key, value, scaling, sliding_window), None
        # For a base whose dtype the kernel does not support the engine already warns of the dtype.
        too_wide = query.dtype == layout.base_dtype and not takes(query.dtype)
        if query.device.type in SLOW_WITHOUT_FLASH and not too_wide:
            _warn_of_slow_attention(refusal)
    layout.kinds.add(ONE_BY_ONE if softcap is None else SOFT_CAPPED)

    groups = query.shape[1] // key.shape[1]
    # CPU kernels support grouped query heads; CUDA's float32 kernels do not.
    if groups > 1 and (query.device.type != "cpu" or softcap is not None):
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    # split() rather than slices: its backward pass is one cat(), whereas each slice's allocates a whole tensor.
    sizes = [size for prompt, (first, *rest) in layout.lengths for size in (prompt + first, *rest)]
    sequences = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    parts: list[Tensor] = []
    for prompt, completions in layout.lengths:
        first, *later = islice(sequences, len(completions))
        # Only later completions need the prompt's keys and values on their own.
        shared = [tensor[:, :, :prompt] for tensor in first[1:]] if later else []
        continuing = [(other[0], *map(_after, shared, other[1:])) for other in later]
        for asking, seen_keys, seen_values in [first, *continuing]:
            mask = layout.mask(asking.shape[2], seen_keys.shape[2], sliding_window)
            parts.append(_attend(asking, seen_keys, seen_values, mask, scaling, softcap).transpose(1, 2))
    return torch.cat(parts, dim=1), None


def _after(shared: Tensor, own: Tensor) -> Tensor:
    """Concatenate the keys (or values) of a prompt and of a completion."""
    return torch.cat([shared, own], dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """Attention of one sequence; mask None is plain causal."""
    if softcap is None:
        slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] < _SHORT
        if slow and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
            found = _ShortAttention.apply(query, key, value, mask, scaling)  # type: ignore[no-untyped-call]
            assert isinstance(found, Tensor)
            return found
        return _sdpa(query, key, value, mask, scaling)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=shared
    )


class _ShortAttention(torch.autograd.Function):
    """`_sdpa` with a backward pass in float32.

    Below `_SHORT` queries the backward pass of torch's CPU kernel takes 2.4 times as long in bfloat16 as in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        return _sdpa(query, key, value, mask, scaling)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            wide = [tensor.float().requires_grad_() for tensor in inputs]
            output = _sdpa(wide[0], wide[1], wide[2], mask, ctx.scaling)
        grads = torch.autograd.grad(output, wide, grad_outputs[0].float())
        return (*(grad.to(tensor.dtype) for grad, tensor in zip(grads, inputs, strict=True)), None, None)


@lru_cache
def _warn_of_slow_attention(reason: str) -> None:
    """Warn once for each reason that the flash kernel cannot be used on a GPU."""
    what = "attention within samples goes one sequence at a time, which is slow on a GPU"
    warnings.warn(f"{what}: torch's flash kernel is not taken ({reason})", UserWarning, stacklevel=2)


class _VarlenIndices:
    """Each completion is a sequence of a variable-length kernel with the causal mask aligned to the lower right corner.

    Queries are not copied: prompt and first completion are one sequence of queries, each further completion another.
    Keys and values are gathered as `prompt | completion | prompt | completion`.
    """

    def __init__(self, lengths: tuple[SampleLengths, ...], device: torch.device) -> None:
        columns, counts = [], []
        start = 0
        for prompt, (first, *others) in lengths:
            end = start + prompt + first
            columns.append(torch.arange(start, end))
            counts.append((prompt + first, prompt + first))
            for length in others:
                columns += [torch.arange(start, start + prompt), torch.arange(end, end + length)]
                counts.append((length, prompt + length))
                end += length
            start = end
        self._columns = upload(torch.cat(columns), device)
        self._counts = counts
        self._sequences: dict[int, SequenceBounds] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None
    ) -> Tensor:
        """Attention by the flash kernel, (M, H, N, D) queries -> (M, N, H, D)."""
        members, _, num_tokens, _ = query.shape
        gathered = (tensor.transpose(1, 2).index_select(1, self._columns) for tensor in (key, value))
        keys, values = (tensor.flatten(0, 1) for tensor in gathered)
        queries = query.transpose(1, 2).flatten(0, 1)
        if members not in self._sequences:
            self._sequences[members] = SequenceBounds.of(self._counts * members, query.device)
        output = flash_attention(queries, keys, values, self._sequences[members], scaling, sliding_window)
        return output.view(members, num_tokens, *output.shape[1:])


AttentionInterface.register(PAIR_ATTENTION, pair_attention)
