"""Plain data as bytes, for processes that exchange them: one safetensors file, no pickle, which could run code."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import load, save

from evollm.errors import EvoLLMError
from evollm.models.adapters.lora_config import lora_config_from
from evollm.models.reference_cache import ReferenceCache

# The name of the tensor with the JSON text, and the key of the other tensors in it, whose names are numbers.
_TEXT, _TENSOR = "text", "tensor"


def to_bytes(value: Any) -> bytes:
    """Return numbers, texts, lists, mappings, tensors, arrays, dataclasses and reference caches as bytes.

    Raises:
        TypeError: The value holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return save({**tensors, _TEXT: torch.frombuffer(bytearray(text), dtype=torch.uint8)})


def from_bytes(data: bytes) -> Any:
    """Return the value that `to_bytes` was given; tensors are on the CPU, and mappings are dictionaries."""
    tensors = load(data)
    return _value(json.loads(tensors.pop(_TEXT).numpy().tobytes()), tensors)


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON, in which a mapping of one key says of what kind a part is; its tensors go to `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(one, tensors) for one in value]
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    for name, kind in _KINDS.items():
        if kind.holds(value):
            return {name: _plain(kind.taken_apart(value), tensors)}
    raise TypeError(f"{type(value).__name__} is no plain data, which alone processes exchange")


def _value(plain: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `_plain`."""
    if isinstance(plain, list):
        return [_value(one, tensors) for one in plain]
    if not isinstance(plain, dict):
        return plain
    ((name, given),) = plain.items()
    return tensors[given] if name == _TENSOR else _KINDS[name].made(_value(given, tensors))


@dataclass(frozen=True)
class _Kind:
    """A kind of values that is taken apart into what is plain or of another kind, and made again of that."""

    holds: Callable[[Any], bool]
    taken_apart: Callable[[Any], Any]
    made: Callable[[Any], Any]


def _fields_of(value: Any) -> list[Any]:
    kind, fields = type(value), [field.name for field in dataclasses.fields(value) if field.init]
    return [kind.__module__, kind.__qualname__, {name: getattr(value, name) for name in fields}]


def _made_of_fields(parts: Sequence[Any]) -> Any:
    module, name, fields = parts
    kind = getattr(sys.modules[module], name)
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{module}.{name} is no dataclass")
    return cast(Any, kind)(**fields)


def _lora_text(config: Any) -> str:
    return json.dumps({name: sorted(one) if isinstance(one, set) else one for name, one in config.to_dict().items()})


def _cache_of(parts: Sequence[Any]) -> ReferenceCache:
    cache = ReferenceCache()
    cache.add(parts[0].__getitem__, parts[1])
    return cache


def _of_type(*types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types)


_KINDS = {
    "number": _Kind(_of_type(np.generic), lambda value: value.item(), lambda value: value),
    "array": _Kind(_of_type(np.ndarray), lambda value: torch.from_numpy(value.copy()), lambda value: value.numpy()),
    "tuple": _Kind(_of_type(tuple), list, tuple),
    "mapping": _Kind(_of_type(Mapping), lambda value: [list(item) for item in value.items()], dict),
    "lora": _Kind(_of_type(LoraConfig), _lora_text, lambda text: lora_config_from(json.loads(text))),
    "cache": _Kind(_of_type(ReferenceCache), lambda value: list(value.tensors()), _cache_of),
    # After LoraConfig, which is one.
    "dataclass": _Kind(dataclasses.is_dataclass, _fields_of, _made_of_fields),
}


def error_to_bytes(error: Exception) -> bytes:
    """An exception as bytes: its kind, its arguments and its text."""
    # What it is made anew with where it is pickled.
    reduced = error.__reduce__()
    arguments = reduced[1] if isinstance(reduced, tuple) else ()
    return to_bytes([type(error).__name__, [_argument(one) for one in arguments], str(error)])


def error_from_bytes(data: bytes) -> Exception:
    """The exception that `error_to_bytes` was given; of a kind unknown here a RuntimeError with its name."""
    name, arguments, text = from_bytes(data)
    kind = ({**vars(builtins), **_KINDS_OF_TORCH, **vars(sys.modules[EvoLLMError.__module__])}).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, _NO_ERRORS):
        with suppress(Exception):  # One with arguments of its own, which are no plain data.
            found = kind(*(_Shown(one[0]) if isinstance(one, list) else one for one in arguments))
            if str(found) == text:
                return found
    return RuntimeError(f"{name}: {text}")


_KINDS_OF_TORCH = {"OutOfMemoryError": torch.OutOfMemoryError}
# Exceptions that say something else where they are raised.
_NO_ERRORS = (StopIteration, StopAsyncIteration, Warning)


class _Shown(str):
    """The `repr` of what is no plain data, as the value of a ConfigurationError, which shows values by their `repr`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _argument(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else [repr(value)]
