"""The verdicts of the probe, remembered: hundreds of tests would find the same ones, in half of their time.

A verdict depends on the base, the adapters' configuration, the length and the library's code alone. A base is known by
its classes, their plain attributes, its configuration and all its numbers. Where any of them is not as the libraries or
`make_family` have made it (hooks, a `forward` of one's own, compiled or sharded layers, classes from elsewhere,
functions of `evollm.models` that a test has replaced), and in tests with the fixture `every_probe`, the probe runs. The
processes of one run of the tests share what they find, and so do programs that start by `warm_python`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
import xxhash
from families import _rms_norm
from peft import LoraConfig
from torch import nn

from evollm.models import engine, padding
from evollm.models.adapters.routing import _RoutedForward
from evollm.models.fast_paths import FastPaths
from evollm.models.fingerprints import canonical_settings
from evollm.models.layers import _LayerForward
from evollm.models.shared_base import SharedBase

LIBRARIES = ("torch.", "transformers.", "peft.")
PLAIN = (bool, int, float, str, type(None), torch.dtype)
# What a probe is made of, and what is looked up where it is called.
TRIALS = ((engine, "probe"), (padding, "_padded"), (padding, "_together"))


class ProbeMemory:
    """Stands for the trials of the probe once it is installed.

    Args:
        folder: Where verdicts are, a file for each.

    Attributes:
        remembered: How many verdicts have been taken over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trials = {name: getattr(module, name) for module, name in TRIALS}
        self._code = dict(_code())
        self._in_use = True
        self.remembered = 0

    def install(self) -> None:
        """Take the trials' places for the rest of the process."""
        for module, name in TRIALS:
            setattr(module, name, partial(self.find, name))

    @contextmanager
    def unused(self) -> Iterator[None]:
        """Inside the block every trial is made."""
        self._in_use = False
        try:
            yield
        finally:
            self._in_use = True

    def find(self, name: str, base: SharedBase, config: LoraConfig, longest: int, **settings: Any) -> Any:
        """The verdict of a trial, and what it leaves on the base."""
        trial = partial(self._trials[name], base, config, longest, **settings)
        key = key_of(base) if self._in_use and not self._is_patched() else None
        if key is None:
            return trial()
        adapters = canonical_settings(config), str(config.init_lora_weights)
        file = self._folder / xxhash.xxh3_128_hexdigest(repr((name, key, adapters, longest, settings)).encode())
        if file.exists():
            self.remembered += 1
            found, counted, created = json.loads(file.read_text())
            # What a trial leaves: operations that it has counted, and names that it has used.
            base.flops._counted.update(counted)
            base.adapters._created += created
            return found if isinstance(found, str) else FastPaths.from_dict(found)
        before, created = base.flops._counted.copy(), base.adapters._created
        found = trial()
        counted = {kind: count - before[kind] for kind, count in base.flops._counted.items() if count > before[kind]}
        told = found.to_dict() if isinstance(found, FastPaths) else found
        own = file.with_name(f"{file.name}-{os.getpid()}")
        own.write_text(json.dumps([told, counted, base.adapters._created - created]))
        own.replace(file)
        return found

    def _is_patched(self) -> bool:
        present = dict(_code())
        return any(present.get(name) is not value for name, value in self._code.items())


def _code() -> Iterator[tuple[tuple[str, ...], object]]:
    """What the modules of evollm.models hold, and their classes; without the trials, which are replaced."""
    trials = {(module.__name__, name) for module, name in TRIALS}
    for path, module in list(sys.modules.items()):
        if path.startswith("evollm.models."):
            for name, value in list(vars(module).items()):
                if (path, name) not in trials and name != "__builtins__":
                    yield (path, name), value
                if isinstance(value, type) and value.__module__ == path:
                    yield from (((path, name, inner), member) for inner, member in vars(value).items())


def key_of(base: SharedBase) -> str | None:
    """A digest of all of a base that its log-probs depend on; None if that cannot be told."""
    parts = base, base.adapters, base.layers, base.router
    if base.is_sharded or base.router.in_graphs or any(_has_methods_of_others(part) for part in parts):
        return None
    digest = xxhash.xxh3_128(repr((_modes(), _settings(base.network))).encode())
    of_adapters = {id(tensor) for tensor in base.adapters.tensors}
    for name, module in base.network.named_modules():
        if not _is_plain(module):
            return None
        if ".lora_" not in name:
            known = name, _is_exact_norm(module), *_source(type(module)), _attributes(module)
            digest.update(repr(known).encode())
    for name, tensor in (*base.network.named_parameters(), *base.network.named_buffers()):
        if id(tensor) not in of_adapters:
            if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu":
                return None
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _modes() -> tuple[object, ...]:
    strictly = torch.are_deterministic_algorithms_enabled()
    return strictly, torch.get_num_threads(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class says."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or not type(module).__module__.startswith(LIBRARIES) or _has_methods_of_others(module):
        return False
    replaced = vars(module).get("forward")
    if replaced is None or _is_exact_norm(module):
        return True
    ours = replaced if isinstance(replaced, _LayerForward) else getattr(replaced, "__self__", None)
    if not isinstance(ours, _LayerForward | _RoutedForward) or getattr(ours, "_compiled", None) is not None:
        return False
    return getattr(ours._plain, "__func__", None) is type(module).forward


def _is_exact_norm(module: nn.Module) -> bool:
    """Whether a module computes as `make_family` has made it."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _rms_norm and forward.args == (module,)


def _has_methods_of_others(owner: object) -> bool:
    """Whether an object has been given functions but `forward` that are neither evollm's nor the libraries'."""
    functions = (
        value
        for name, value in vars(owner).items()
        if name != "forward" and isinstance(value, FunctionType | MethodType | partial)
    )
    return not all(str(getattr(one, "__module__", "")).startswith((*LIBRARIES, "evollm.")) for one in functions)


def _source(kind: type[nn.Module]) -> tuple[object, ...]:
    """A class, and where its `forward`, which a test may have replaced, is written."""
    code = getattr(kind.forward, "__code__", None)
    place = (code.co_filename, code.co_firstlineno) if code is not None else kind.forward.__qualname__
    return kind.__module__, kind.__qualname__, place


def _attributes(module: nn.Module) -> list[tuple[str, str]]:
    """What a module holds besides tensors, modules, the state of adapters and the folder it was loaded from."""
    own = sorted((name, value) for name, value in vars(module).items() if isinstance(value, PLAIN))
    return [(name, repr(value)) for name, value in own if not name.startswith(("_active", "name_or_path"))]


def _settings(network: Any) -> list[list[tuple[str, str]]]:
    """Configurations, without the folder that a model was loaded from."""
    parts = [network.config, network.config.get_text_config(), network.generation_config]
    return [
        sorted((name, str(value)) for name, value in vars(part).items() if name != "_name_or_path")
        for part in parts
        if part is not None
    ]
