"""Settings that cost time for nothing where the base is: each in one line with what to do about it, "" where not."""

from __future__ import annotations

import torch

from evollm.models.budget import should_recompute, tokens_to_keep

# Where the base is worth a remark: a CPU has no such settings.
_CARDS = ("cuda",)
# They have CUDA record a graph of kernels for fixed shapes.
_RECORDING_MODES = ("reduce-overhead", "max-autotune")


def is_card(device_type: str) -> bool:
    """Whether that is a device on which settings are remarked on."""
    return device_type in _CARDS


def slow_dtype(device_type: str, dtype: torch.dtype) -> str:
    """A base that is wider than what a card multiplies fast, and than what its attention kernel takes."""
    if not is_card(device_type) or not dtype.is_floating_point or torch.finfo(dtype).bits <= 16:  # noqa: PLR2004
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"a {name} base on a card is slow and takes twice the memory or more: load it with dtype='bfloat16'"


def slow_compile_mode(device_type: str, mode: str) -> str:
    """A mode of `torch.compile` that records a graph for each shape, where each batch has another shape."""
    if not is_card(device_type) or mode not in _RECORDING_MODES:
        return ""
    instead = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    return (
        f"torch_compiler={mode!r} records a graph for each number of tokens, and nearly every step has another: "
        f"use {instead!r}"
    )


def needless_checkpointing(device_type: str, affordable: int, token_budget: int | None, longest: int) -> str:
    """`gradient_checkpointing=True` where memory is not short; see `budget.should_recompute` for the arguments."""
    if not is_card(device_type) or should_recompute(affordable, device_type, token_budget, longest):
        return ""
    wanted = tokens_to_keep(device_type, token_budget, longest)
    return (
        "gradient_checkpointing=True costs about a third more time, and memory does not need it (without it "
        f"{affordable} tokens fit into what is free, and {wanted} are enough): leave it out"
    )
