"""The weights of several adapters, the members of a forward pass, as one matrix, and their gradients as another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from evollm.models.adapters.rows import Row, RowLayout

# What follows the path of a layer in those of its parameters.
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def matrix_of(rows: Sequence[Tensor]) -> Tensor | None:
    """(M, P) the matrix of which these are consecutive rows (P,); None if there is none."""
    first, size = rows[0], len(rows[0])
    storage, start, step = first.untyped_storage().data_ptr(), first.data_ptr(), size * first.element_size()
    for number, row in enumerate(rows):
        if row.untyped_storage().data_ptr() != storage or row.data_ptr() != start + number * step:
            return None
    return first.as_strided((len(rows), size), (size, 1), first.storage_offset())


def weights_together(rows: Sequence[Row], others: Iterable[Row]) -> Tensor:
    """(M, P) the weights of settled rows of one layout, which are moved to one matrix if they do not lie in one.

    Args:
        rows: The rows, each once.
        others: All rows. One that shares a matrix with a row that moves gets memory of its own: the matrix goes.
    """
    values = [row.values for row in rows]
    matrix = matrix_of(values)
    if matrix is not None:
        return matrix
    left = {one.untyped_storage().data_ptr() for one in values}
    matrix = values[0].new_zeros(len(rows), len(values[0]))
    for row, one in zip(rows, matrix, strict=True):
        row.move_to(one)
    for other in others:
        if other.values.untyped_storage().data_ptr() in left and not other.pinned:
            other.move_to(torch.zeros_like(other.settle()))
    return matrix


def gradients_together(rows: Sequence[Row], others: Iterable[Row]) -> Tensor:
    """(M, P) the gradients of settled rows of one layout, which are moved as `weights_together` moves weights."""
    found = [row.present_gradient() for row in rows]
    present = [one for one in found if one is not None]
    matrix = matrix_of(present) if len(present) == len(rows) else None
    if matrix is not None:
        return matrix
    left = {one.untyped_storage().data_ptr() for one in present}
    matrix = torch.zeros(len(rows), rows[0].layout.size, dtype=rows[0].values.dtype, device=rows[0].values.device)
    for row, one in zip(rows, matrix, strict=True):
        row.move_gradient_to(one)
    for other in others:
        other.settle()
        gradient = other.present_gradient()
        if gradient is not None and gradient.untyped_storage().data_ptr() in left:
            other.move_gradient_to(torch.zeros_like(gradient))
    return matrix


def zero_gradients(rows: Sequence[Sequence[Row]], others: Iterable[Row]) -> None:
    """Set the gradients of distinct adapters to 0, in one matrix if their layouts are equal.

    Gradients that backward passes allocate one by one lie between activations, so that freed activations leave
    fragmented memory: with four members peak memory was 1.5 times as high.

    Args:
        rows: The settled rows of each adapter, one for each device.
        others: All rows; see `weights_together`.
    """
    every = [row for own in rows for row in own]
    if all(len(own) == 1 for own in rows) and of_one_kind(every):
        gradients_together(every, others).zero_()
    else:
        for row in every:
            row.gradient().zero_()


def of_one_kind(rows: Sequence[Row]) -> bool:
    """Whether these settled rows have one layout and one type, so that they fit into one matrix."""
    layout, dtype = rows[0].layout, rows[0].values.dtype
    return all((row.layout is layout or row.layout == layout) and row.values.dtype == dtype for row in rows)


class Stack:
    """The weights of M members, for the routed layers of forward passes; the weights must not change meanwhile.

    Args:
        names: The members' adapters.
        layout: Where the weights lie in each row.
        weights: (M, P) the weights.

    Attributes:
        names: The members' adapters.
        gradient: (M, P) to which backward passes add the members' gradients; None: only forward passes are made.
        anchor: An empty tensor that requires a gradient: autograd records the routed layers because of it, since it
            knows nothing of the rows.
    """

    def __init__(self, names: Sequence[str], layout: RowLayout, weights: Tensor) -> None:
        self.names = tuple(names)
        self.gradient: Tensor | None = None
        self.anchor = torch.empty(0, requires_grad=True)
        self._layout = layout
        self._weights = weights
        self._casts: dict[torch.dtype, Tensor] = {}
        self._factors: dict[tuple[tuple[float, ...], torch.dtype], Tensor] = {}

    def part(self, start: int, count: int) -> Stack:
        """The stack of `count` of the members, from number `start` on; it shares their weights and gradients."""
        return _Part(self, slice(start, start + count))

    def holds(self, layer: str) -> bool:
        """Whether a member has weights in the layer with this path."""
        return layer + _DOWN in self._layout.starts

    def weights(self, layer: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The members' A (M, r, D_in) and B (M, D_out, r) in the layer with this path."""
        return self._views(self._matrix(dtype), layer)

    def gradients(self, layer: str) -> tuple[Tensor, Tensor]:
        """The gradients of `weights`, to add to, in the parameters' type."""
        assert self.gradient is not None, "the stack is not training"
        return self._views(self.gradient, layer)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """(M, P) the weights in this type; cast once for all passes and parts."""
        if dtype == self._weights.dtype:
            return self._weights
        if dtype not in self._casts:
            self._casts[dtype] = self._cast(dtype)
        return self._casts[dtype]

    def _cast(self, dtype: torch.dtype) -> Tensor:
        return self._weights.to(dtype)

    def _views(self, matrix: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        return self._layout.stacked(matrix, layer + _DOWN), self._layout.stacked(matrix, layer + _UP)

    def factors(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        """(M, 1, 1) a factor for each member, at least in float32, on the device and for products with a tensor."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if (values, dtype) not in self._factors:
            self._factors[values, dtype] = torch.tensor(values, dtype=dtype, device=like.device)[:, None, None]
        return self._factors[values, dtype]


class _Part(Stack):
    """The stack of some members of a whole stack, which do not train without the others."""

    def __init__(self, whole: Stack, members: slice) -> None:
        super().__init__(whole.names[members], whole._layout, whole._weights[members])
        self.gradient = None if whole.gradient is None else whole.gradient[members]
        self._factors = whole._factors
        self._whole, self._members = whole, members

    def _cast(self, dtype: torch.dtype) -> Tensor:
        return self._whole._matrix(dtype)[self._members]


class RowStack(Stack):
    """A stack of distinct settled rows of one layout, without a copy.

    Args:
        names: The members' adapters.
        rows: Their rows, each once.
        others: All rows of the base; see `weights_together`.
    """

    def __init__(self, names: Sequence[str], rows: Sequence[Row], others: Sequence[Row]) -> None:
        pinned = any(row.pinned for row in rows)
        weights = torch.stack([row.values for row in rows]) if pinned else weights_together(rows, others)
        super().__init__(names, rows[0].layout, weights)
        self._rows, self._others = rows, others

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside the block backward passes add gradients to those of the members' rows."""
        self.gradient = gradients_together(self._rows, self._others)
        try:
            yield
        finally:
            self.gradient = None


class PaddedStack(Stack):
    """A stack of copies, padded with zeros: settled rows of different layouts or types, or a row that is there twice.

    Args:
        names: The members' adapters.
        rows: Their rows.
    """

    def __init__(self, names: Sequence[str], rows: Sequence[Row]) -> None:
        self._rows = rows
        layout = RowLayout.union([row.layout for row in rows])
        dtype = reduce(torch.promote_types, (row.values.dtype for row in rows))
        weights = rows[0].values.new_zeros(len(rows), layout.size, dtype=dtype)
        super().__init__(names, layout, weights)
        for row, one in zip(rows, weights, strict=True):
            for view, own in self._pairs(row, one, row.values):
                view.copy_(own)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside the block backward passes collect gradients, which are added to those of the rows after it."""
        self.gradient = torch.zeros_like(self._weights)
        try:
            yield
            for row, one in zip(self._rows, self.gradient, strict=True):
                for view, own in self._pairs(row, one, row.gradient()):
                    own.add_(view)
        finally:
            self.gradient = None

    def _pairs(self, row: Row, padded: Tensor, own: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The places of each parameter in a padded row and in the row itself."""
        views = self._layout.views(padded)
        for path, view in row.layout.views(own).items():
            yield views[path][tuple(map(slice, view.shape))], view


def stack_of(names: Sequence[str], rows: Sequence[Row], others: Sequence[Row]) -> RowStack | PaddedStack:
    """The stack of these adapters, of which each has one settled row; one may be there several times."""
    if of_one_kind(rows) and len(set(names)) == len(names):
        return RowStack(names, rows, others)
    return PaddedStack(names, rows)
