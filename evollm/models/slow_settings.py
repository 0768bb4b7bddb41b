"""Warnings about settings that only cost time on a GPU: one line each with a remedy; "" if there is nothing to say."""

from __future__ import annotations

import torch

from evollm.models.budget import should_recompute, tokens_to_keep

# Devices with such settings: GPUs, and not CPUs.
_CARDS = ("cuda",)
# Modes of `torch.compile` that record CUDA graphs, which are for fixed shapes.
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def is_card(device_type: str) -> bool:
    """Whether this is the type of a GPU."""
    return device_type in _CARDS


def slow_dtype(device_type: str, dtype: torch.dtype) -> str:
    """A base in float32 or wider: slow to multiply, and refused by the flash attention kernel."""
    if not is_card(device_type) or not dtype.is_floating_point or torch.finfo(dtype).bits <= 16:  # noqa: PLR2004
        return ""
    name = str(dtype).removeprefix("torch.")
    return f"a {name} base on a card is slow and takes twice the memory or more: load it with dtype='bfloat16'"


def slow_compile_mode(device_type: str, mode: str) -> str:
    """A mode of `torch.compile` that records a graph for each shape, though nearly every batch has another shape."""
    if not is_card(device_type) or mode not in _CUDA_GRAPH_MODES:
        return ""
    instead = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    return (
        f"torch_compiler={mode!r} records a graph for each number of tokens, and nearly every step has another: "
        f"use {instead!r}"
    )


def needless_checkpointing(device_type: str, affordable: int, token_budget: int | None, longest: int) -> str:
    """`gradient_checkpointing=True` though memory is not short; see `budget.should_recompute` for the arguments."""
    if not is_card(device_type) or should_recompute(affordable, device_type, token_budget, longest):
        return ""
    wanted = tokens_to_keep(device_type, token_budget, longest)
    return (
        "gradient_checkpointing=True costs about a third more time, and memory does not need it (without it "
        f"{affordable} tokens fit into what is free, and {wanted} are enough): leave it out"
    )
