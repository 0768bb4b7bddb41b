"""The default device of a base, and the type that `dtype="auto"` stands for.

A GPU says whether it supports bfloat16. On a CPU the speed is measured: with AMX, bfloat16 products are several times
as fast as float32 ones, without it several times as slow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import linear

from evollm.errors import ConfigurationError
from evollm.processes import Processes

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Names of types in other libraries.
SHORT_TYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
# Smallest speedup over float32 for which "auto" takes bfloat16 on a CPU; log-probs lose two decimal digits by it.
_SMALLEST_SPEEDUP = 1.5
# Rows of the products that are measured.
_TOKENS = 256
# A product with fewer weights is too short to be measured.
_FEWEST_WEIGHTS = 2**18
_ROUNDS = 5
# Stored types that "auto" may replace; the author of float64 weights had a reason for them.
_COMMON = (None, torch.float32, torch.bfloat16, torch.float16)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_dtype(
    model_config: Mapping[str, Any] | None, dtype: str | torch.dtype | None, config: Any, device: torch.device
) -> dict[str, Any]:
    """Add the type to load a base in to the keyword arguments for `from_pretrained`.

    Args:
        model_config: The user's keyword arguments.
        dtype: A type or its name; `"auto"`: the fastest on the device; None: the type that the weights are stored in.
        config: The model's configuration; None: unknown.
        device: The device that the base will be on.

    Raises:
        ConfigurationError: `dtype` is not the name of a type, or `model_config` has a dtype, too.
    """
    arguments = dict(model_config or {})
    if dtype is None:
        return arguments
    named = [name for name in ("dtype", "torch_dtype") if arguments.get(name) is not None]
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str | torch.dtype) or name not in (AUTO, *DTYPES):
        meant = SHORT_TYPES.get(name.lower())
        hint = f"; write {meant}" if meant else ""
        raise ConfigurationError("dtype", dtype, f"must be {AUTO!r} or one of {', '.join(DTYPES)}{hint}")
    if named:
        raise ConfigurationError("dtype", dtype, f"stands in model_config as {named[0]}, too: leave one out")
    if name == AUTO:
        fastest = _fastest(arguments, config, device)
        return arguments if fastest is None else {**arguments, "dtype": fastest}
    return {**arguments, "dtype": name}


def names_dtype(model_config: Mapping[str, Any] | None) -> bool:
    """Whether keyword arguments for `from_pretrained` decide the type of the weights."""
    names = ("dtype", "torch_dtype", "quantization_config", "gguf_file")
    return isinstance(model_config, Mapping) and any(model_config.get(name) is not None for name in names)


def _fastest(model_config: Mapping[str, Any], config: Any, device: torch.device) -> str | None:
    """The name of the type in which the device computes this base fastest; None: the stored type."""
    quantised = getattr(config, "quantization_config", None) is not None
    stored = getattr(config, "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    if config is None or quantised or names_dtype(model_config) or stored not in _COMMON:
        return None
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type != "cpu":
        return None
    hidden, intermediate = _widths(config)
    if hidden * intermediate < _FEWEST_WEIGHTS:
        return None
    fast = speedup(hidden, intermediate) >= _SMALLEST_SPEEDUP
    # Each process measures by itself; all of them must get the same type.
    return "bfloat16" if Processes.present().smallest(int(fast)) else "float32"


def speedup(hidden: int, intermediate: int) -> float:
    """Time of a float32 product of these widths divided by that of the bfloat16 product, on this CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(intermediate, hidden, generator=generator)
    states = torch.randn(_TOKENS, hidden, generator=generator)
    pairs = {dtype: (states.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(pairs, float("inf"))
    # Alternating, and the shortest time of each: other processes on the machine slow single products down.
    for _ in range(_ROUNDS):
        for dtype, (rows, matrix) in pairs.items():
            started = time.perf_counter()
            linear(rows, matrix)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def _widths(config: Any) -> tuple[int, int]:
    """Widths of the hidden states and of the feed-forward layers; the first is 0 if it is not known."""
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    for name in ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "n_inner"):
        found = getattr(text, name, None)
        if isinstance(found, int):
            return hidden, found
    return hidden, 4 * hidden
