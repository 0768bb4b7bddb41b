"""Layouts of samples as the rows of a pass: packed, plain, encoder-decoder, or one sequence at a time."""

from __future__ import annotations

from dataclasses import replace

from evollm.data.samples import Batch
from evollm.models.encoder_decoder import start_token
from evollm.models.fast_paths import FastPaths
from evollm.models.layouts.encoder_decoder import EncoderDecoderLayout, lone_encoder_decoder_logprobs
from evollm.models.layouts.layout import LaidOut, Layout
from evollm.models.layouts.lone import LoneLayout
from evollm.models.layouts.packed import PackedLayout
from evollm.models.layouts.plain import PlainLayout, completion_logprobs, lone_logprobs
from evollm.models.shared_base import SharedBase

__all__ = ["LaidOut", "Layout", "PackedLayout", "completion_logprobs", "layout_for", "lone_layout", "longest_sequence"]


def layout_for(base: SharedBase, paths: FastPaths, *, explicit_positions: bool = True) -> Layout:
    """The fastest layout that the probe has confirmed for a base.

    Args:
        base: The base.
        paths: The fast paths that the probe has confirmed.
        explicit_positions: Whether position ids may be passed; without them a causal model's completions cannot share
            their prompt.
    """
    device, tiled = base.device, paths.tiled_head
    if base.is_encoder_decoder:
        found: Layout = EncoderDecoderLayout(device, start_token(base.network), tiled, paths.shared_prompt)
    elif paths.shared_prompt and explicit_positions:
        return PackedLayout(base, tiled)
    else:
        paths = replace(paths, shared_prompt=False)
        found = PlainLayout(device, tiled, explicit_positions and paths.explicit_positions)
    return _lone(base, found) if paths.goes_alone(explicit_positions) else found


def lone_layout(base: SharedBase) -> Layout:
    """The layout with one sequence in a pass."""
    return _lone(base, layout_for(base, FastPaths(shared_prompt=False)))


def longest_sequence(base: SharedBase, batch: Batch) -> int:
    """Tokens of the longest sequence of a batch as the base's layouts build them."""
    if base.is_encoder_decoder:
        return max(max(len(sample.prompt_ids), *map(len, sample.completions)) for sample in batch)
    return batch.longest_sequence


def _lone(base: SharedBase, padded: Layout) -> LoneLayout:
    logprobs = lone_encoder_decoder_logprobs if base.is_encoder_decoder else lone_logprobs
    return LoneLayout(base.device, logprobs, padded)
