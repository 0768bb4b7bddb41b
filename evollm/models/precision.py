"""Where a frozen base lies and in which type, where the user leaves it to the library.

The type that a device is fast at is a property of a GPU. Of a CPU it is a measurement: one with AMX multiplies bfloat16
several times as fast as float32, one without several times as slowly.
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
# What types are called elsewhere.
SHORT_TYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
# So many times as fast as float32 bfloat16 has to be on a CPU: with it log-probs lose two decimal digits.
_WORTH = 1.5
_TOKENS = 256
# Below this a product takes no time, and a measurement of it is noise.
_FEWEST_WEIGHTS = 2**18
_ROUNDS = 5
# Types that weights are stored in for use; float64 is somebody's decision.
_COMMON = (None, torch.float32, torch.bfloat16, torch.float16)


def default_device() -> torch.device:
    """A card if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_dtype(
    model_config: Mapping[str, Any] | None, dtype: str | torch.dtype | None, config: Any, device: torch.device
) -> dict[str, Any]:
    """The keyword arguments for `from_pretrained` with the type to load a base in.

    Args:
        model_config: Those of the user.
        dtype: A type or its name; `"auto"`: what the device is fastest at; None: what the weights are stored in.
        config: The model's configuration; None: unknown.
        device: Where the base will be.

    Raises:
        ConfigurationError: `dtype` is none, or `model_config` names one, too.
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
    """Whether keyword arguments for `from_pretrained` already say what type the weights have."""
    names = ("dtype", "torch_dtype", "quantization_config", "gguf_file")
    return isinstance(model_config, Mapping) and any(model_config.get(name) is not None for name in names)


def _fastest(model_config: Mapping[str, Any], config: Any, device: torch.device) -> str | None:
    """The name of the type that this base is fastest in there; None: as it is stored."""
    quantised = getattr(config, "quantization_config", None) is not None
    if config is None or quantised or names_dtype(model_config) or _stored(config) not in _COMMON:
        return None
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if fast else "float32"
    if device.type != "cpu":
        return None
    hidden, intermediate = _widths(config)
    if hidden * intermediate < _FEWEST_WEIGHTS:
        return None
    worth = speedup(hidden, intermediate) >= _WORTH
    # The same in all processes, which each measure.
    return "bfloat16" if Processes.present().smallest(int(worth)) else "float32"


def speedup(hidden: int, intermediate: int) -> float:
    """How many times as fast as in float32 products of these widths are in bfloat16, on this CPU."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(intermediate, hidden, generator=generator)
    states = torch.randn(_TOKENS, hidden, generator=generator)
    pairs = {dtype: (states.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(pairs, float("inf"))
    # In turns, and the best of each: what else the machine does must not decide.
    for _ in range(_ROUNDS):
        for dtype, (rows, matrix) in pairs.items():
            started = time.perf_counter()
            linear(rows, matrix)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return best[torch.float32] / best[torch.bfloat16]


def _stored(config: Any) -> torch.dtype | None:
    """The type that the weights are stored in, as far as the configuration says."""
    stored = getattr(config, "dtype", None)
    return getattr(torch, stored, None) if isinstance(stored, str) else stored


def _widths(config: Any) -> tuple[int, int]:
    """Width of the hidden states and of the feed-forward layers; 0 where they are not known."""
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    for name in ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "n_inner"):
        found = getattr(text, name, None)
        if isinstance(found, int):
            return hidden, found
    return hidden, 4 * hidden
