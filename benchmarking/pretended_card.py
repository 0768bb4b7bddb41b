"""A CUDA card that is not there: which kernels it would be asked for, and for which copies the host would wait.

A tensor "on the card" is one of torch's meta tensors, with shape and type and without values, so that a model of any
size takes no memory. To Python it says that it is on `cuda`. What is on the CPU is real. A value that comes back from
the card is made up: 1, or True.

Kernels are counted by the operators that torch is asked for, below autograd. An operator that torch composes of others
on every device, such as `logsumexp`, counts as those. Any other counts as one kernel, with these exceptions: views,
allocations and empty results launch none, and a `_foreach_` or `_fused_` operator launches one for as many tensors and
chunks as fit into a kernel's arguments. What an operator launches beside its own kernel (the second stage of a
reduction, a split product of cuBLAS, flash attention's preparations) is not seen.

A copy between host and card counts as blocking unless it goes up from pinned memory and is not waited for. So does
the reading of a value, as by `item`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

CARD, META, CPU = torch.device("cuda"), torch.device("meta"), torch.device("cpu")
# Composed of other operators although a card has a kernel of its own; and those that take none.
_WHOLE = frozenset({"copy_"})
_FREE = frozenset({"empty", "empty_strided", "_unsafe_view", "lift_fresh", "resize_", "set_"})
_ON_LISTS = ("_foreach_", "_fused_")
# Kernels that are made of other operators. An operator with a kernel for CPUs has one for CUDA.
_COMPOSING = (
    torch._C.DispatchKey.CompositeExplicitAutograd,
    torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional,
    torch._C.DispatchKey.CompositeImplicitAutograd,
)
# Chunk size, and most tensors and chunks of one launch by the number of lists (torch's MultiTensorApply.cuh).
_CHUNK, _MOST_CHUNKS, _MOST_TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


class Call(NamedTuple):
    """A kind of kernel or copy: its operator, or direction (`up` to the card or `down`), and where it came from."""

    what: str
    part: str
    where: str


@dataclass
class Counts:
    """What a card was asked for.

    Attributes:
        kernels: Number of each kind of kernel.
        copies: Number of each kind of blocking copy.
        queued: Number of each kind of copy that nobody waits for.
    """

    kernels: Counter[Call] = field(default_factory=Counter)
    copies: Counter[Call] = field(default_factory=Counter)
    queued: Counter[Call] = field(default_factory=Counter)

    def clear(self) -> None:
        """Begin anew."""
        for counter in (self.kernels, self.copies, self.queued):
            counter.clear()


# From the frame of the caller to the part of a step and the place in the code.
Place = Callable[[FrameType | None], tuple[str, str]]


@contextmanager
def pretended_card(place: Place) -> Iterator[Counts]:
    """Inside the block tensors can be put on `cuda`, and what they launch is counted."""
    counts = Counts()
    with ExitStack() as stack:
        for function in ("_lazy_init", "get_rng_state", "set_rng_state"):
            stack.enter_context(patch.object(torch.cuda, function, lambda *args: None))
        for function in ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"):
            # Torch's own grouping of tensors by device, in C++, says meta.
            types = [*getattr(_foreach_utils, function)(), "meta"]
            for module in (_foreach_utils, sys.modules["torch.optim.optimizer"]):
                stack.enter_context(patch.object(module, function, lambda types=types: types))
        # The addresses of all meta tensors are 0.
        stack.enter_context(patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata))
        stack.enter_context(_Kernels(counts, place))
        stack.enter_context(_Devices())
        yield counts


class _Devices(TorchFunctionMode):
    """Says `cuda` where a tensor is on `meta`, and does on `meta` what is asked of `cuda`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__":
            return _attribute(func, args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return _pinned(args[0])
        if func in (torch.tensor, torch.as_tensor) and _moved(kwargs.get("device")) is META:
            # Torch makes it on the CPU and copies it; for meta it leaves the copy out.
            return func(*args, **{**kwargs, "device": CPU}).to(META)
        if func is torch.Tensor.__getitem__ and torch.Tensor.is_meta.__get__(args[0]):
            args = (args[0], _uploaded(args[1]))
        return func(*map(_moved, args), **{name: _moved(value) for name, value in kwargs.items()})


def _attribute(func: Any, tensor: Tensor) -> Any:
    found = func(tensor)
    if func.__self__ is torch.Tensor.device:
        return CARD if found == META else found
    if func.__self__ is torch.Tensor.is_cuda:
        return torch.Tensor.is_meta.__get__(tensor)
    return False if func.__self__ is torch.Tensor.is_meta else found


def _moved(value: Any) -> Any:
    """A device as torch is to see it: meta for a card."""
    if isinstance(value, torch.device):
        return META if value.type == "cuda" else value
    return META if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _pinned(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.pretends_to_be_pinned = True  # type: ignore[attr-defined]
    return copy


def _uploaded(index: Any) -> Any:
    """An index with its lists as tensors that are copied to the card."""
    if isinstance(index, tuple):
        return tuple(map(_uploaded, index))
    return torch.tensor(index).to(META) if isinstance(index, list | range) else index


class _Kernels(TorchDispatchMode):
    """Counts operators on meta tensors, and makes up what comes back from them."""

    def __init__(self, counts: Counts, place: Place) -> None:
        super().__init__()
        self._counts = counts
        self._place = place

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [*_tensors((*args, *kwargs.values()))]
        target = kwargs.get("device")
        if not any(tensor.is_meta for tensor in given) and target != META:
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            self._count(self._counts.copies, "down")
            return torch.ones((), dtype=given[0].dtype).item()
        if name == "copy_" and given[0].is_meta != given[1].is_meta:
            return self._copied(given[1], given[0], kwargs)
        if name == "_to_copy" and target is not None and (target == META) != given[0].is_meta:
            dtype = kwargs.get("dtype") or given[0].dtype
            return self._copied(given[0], torch.empty_like(given[0], device=target, dtype=dtype), kwargs)
        if name.startswith("index"):
            self._index(name, given[1:])
        composing = _composing(func)
        if composing is not None:
            with self:
                return func._op_dk(composing, *args, **kwargs)
        result = func(*args, **kwargs)
        launches = self._launches(func, name, args, result)
        if launches:
            self._count(self._counts.kernels, name, launches)
        return result

    def _index(self, name: str, others: Sequence[Tensor]) -> None:
        """Count the indices that are copied to the card."""
        if name == "index" and any(tensor.dtype == torch.bool for tensor in others):
            raise NotImplementedError("a mask as an index: its number of rows is not known without values")
        for tensor in others:
            if not tensor.is_meta and tensor.ndim:
                self._count(self._counts.copies, "up")

    def _copied(self, source: Tensor, target: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """A copy between host and card; one that also changes the type takes a kernel for this."""
        queued = not source.is_meta and kwargs.get("non_blocking") and getattr(source, "pretends_to_be_pinned", False)
        self._count(self._counts.queued if queued else self._counts.copies, "down" if source.is_meta else "up")
        if target.dtype != source.dtype:
            self._count(self._counts.kernels, "copy_")
        return target.fill_(1) if source.is_meta else target

    def _launches(self, func: Any, name: str, args: Sequence[Any], result: Any) -> int:
        if name in _FREE or func.is_view:
            return 0
        if name.startswith(_ON_LISTS):
            lists = [part for part in args if isinstance(part, list | tuple) and any(t.is_meta for t in _tensors(part))]
            return multi_tensor_launches([tensor.numel() for tensor in lists[0]], len(lists)) if lists else 0
        return int(any(tensor.numel() for tensor in _tensors([result])))

    def _count(self, counter: Counter[Call], what: str, number: int = 1) -> None:
        counter[Call(what, *self._place(sys._getframe()))] += number


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@cache
def _composing(func: Any) -> torch._C.DispatchKey | None:
    """The key of the kernel that composes an operator of others; None: a card has a kernel for it, or needs none."""
    name = func._schema.name.partition("::")[2]
    if name in _WHOLE or name in _FREE or func.is_view or name.startswith(_ON_LISTS):
        return None
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CPU):
        return None
    return next((key for key in _COMPOSING if func.has_kernel_for_dispatch_key(key)), None)


def multi_tensor_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches of an operator on lists of tensors, as torch's `multi_tensor_apply` divides them.

    Args:
        sizes: Elements of each tensor of a list.
        depth: Number of lists.
    """
    most_tensors = _MOST_TENSORS[min(depth, max(_MOST_TENSORS))]
    chunks = [(-(-size // _CHUNK)) for size in sizes if size]
    launches = tensors = taken = 0
    for count in chunks:
        tensors += 1
        for left in reversed(range(count)):
            taken += 1
            if taken == _MOST_CHUNKS or (tensors == most_tensors and not left):
                launches, taken = launches + 1, 0
                # A tensor that is cut here has its other chunks in the next launch.
                tensors = int(left > 0)
    return launches + (taken > 0)
