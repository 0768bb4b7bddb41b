"""The parameters of an adapter as views of one tensor, its row, and their gradients as views of another one.

What is done to all parameters alike, such as clipping, an optimizer's step or a copy, is then done to one tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from evollm.errors import ConfigurationError
from evollm.models.adapters.peft_layers import Home

# Parameters begin at multiples of this many numbers, since the bits of a matrix product may depend on the alignment.
_ALIGNMENT = 32
# The kinds of parameters that LoRA+ tells apart, in the order of a row.
KINDS = ("A", "embedding", "B", "bias")


def kind_of_parameters(shapes: Mapping[str, torch.Size]) -> dict[str, str]:
    """The kind, one of `KINDS`, of an adapter's parameters by their path, as in PEFT's `create_loraplus_optimizer`."""
    embeddings = {_layer(path) for path in shapes if ".lora_embedding_" in path}
    kinds = {}
    for path, shape in shapes.items():
        kind = "A"
        if _layer(path) in embeddings:
            kind = "embedding"
        elif "lora_B" in path or len(shape) == 1:
            kind = "bias" if "bias" in path else "B"
        kinds[path] = kind
    return kinds


def _layer(path: str) -> str:
    """The path of the layer that an adapter's parameter belongs to."""
    return path.rpartition(".lora_")[0]


@dataclass(frozen=True)
class RowLayout:
    """Where each parameter of an adapter lies in a row.

    Attributes:
        shapes: Path and shape of each parameter, in the row's order; those of a kind stand side by side.
    """

    shapes: tuple[tuple[str, torch.Size], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, torch.Size]) -> RowLayout:
        """The layout of parameters of these shapes, by path."""
        kinds = kind_of_parameters(shapes)
        return cls(tuple(sorted(shapes.items(), key=lambda entry: KINDS.index(kinds[entry[0]]))))

    @classmethod
    def union(cls, layouts: Sequence[RowLayout]) -> RowLayout:
        """A layout with room for the parameters of each of these layouts, at the beginning of each dimension."""
        shapes: dict[str, torch.Size] = {}
        for path, shape in (entry for layout in layouts for entry in layout.shapes):
            shapes[path] = torch.Size(map(max, shape, shapes.get(path, shape)))
        return cls.of(shapes)

    @cached_property
    def starts(self) -> Mapping[str, int]:
        """The position of each parameter's first number."""
        starts, position = {}, 0
        for path, shape in self.shapes:
            starts[path] = position
            position += -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT
        return starts

    @cached_property
    def size(self) -> int:
        """P, the numbers of a row: those of all parameters, and zeros between them."""
        path, shape = self.shapes[-1]
        return self.starts[path] + -(-shape.numel() // _ALIGNMENT) * _ALIGNMENT

    def segment(self, paths: Collection[str]) -> slice:
        """The part of a row with these parameters, which must stand side by side in it."""
        starts, own = [*self.starts.values(), self.size], set(paths)
        numbers = [number for number, (path, _) in enumerate(self.shapes) if path in own]
        assert numbers == list(range(numbers[0], numbers[0] + len(own)))
        return slice(starts[numbers[0]], starts[numbers[-1] + 1])

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The parameters' views of a row (P,) by path."""
        starts = self.starts
        return {path: row[starts[path] : starts[path] + shape.numel()].view(shape) for path, shape in self.shapes}

    def stacked(self, matrix: Tensor, path: str) -> Tensor:
        """The view (M, R, C) of a matrix (M, P) of rows that holds a parameter (R, C) of each row."""
        start, shape = self._stacked[path]
        return matrix.as_strided(
            (len(matrix), *shape), (matrix.stride(0), shape[1], 1), matrix.storage_offset() + start
        )

    @cached_property
    def _stacked(self) -> Mapping[str, tuple[int, torch.Size]]:
        return {path: (self.starts[path], shape) for path, shape in self.shapes}


class Row:
    """The parameters of an adapter on one device.

    The parameters in PEFT's layers are the truth: `settle` puts their values, wherever user code has moved them, into
    the row. All else takes the parameters as of the last `settle`. The parameters' objects stay the same: if user code
    replaces one in its layer, `settle` takes the values and the gradient of the new one and puts the old one back.

    Args:
        adapter: The adapter's name.
        layout: Where the parameters lie.
        parameters: The parameters by path.
        homes: Where PEFT keeps them, by path.

    Attributes:
        values: (P,) the parameters.
        parameters: The parameters, in the row's order.
        pinned: Whether the row must stay where it is, since somebody else writes to its memory.
    """

    def __init__(
        self,
        adapter: str,
        layout: RowLayout,
        parameters: Mapping[str, nn.Parameter],
        homes: Mapping[str, Sequence[Home]],
    ) -> None:
        self.layout = layout
        self.pinned = False
        self.parameters = [parameters[path] for path, _ in layout.shapes]
        self._adapter = adapter
        self._homes = homes
        # The dictionaries of PEFT's modules that lead to the parameters, with key and value. Looked up by `settle`,
        # since PEFT's modules have others while an adapter is added; see `AdapterLayers.only`.
        self._links: tuple[Sequence[dict[str, Any]], Sequence[str], Sequence[Any]] | None = None
        self._offsets = [layout.starts[path] for path, _ in layout.shapes]
        self._segments: dict[tuple[int, int], nn.Parameter] = {}
        self._gradient: Tensor | None = None
        self.values = torch.empty(0)
        self._collect()

    def of_copy(self, adapter: str, parameters: Mapping[str, nn.Parameter]) -> Row:
        """The row of a copy of the adapter, whose parameters these are by path."""
        return Row(adapter, self.layout, parameters, self._homes)

    def settle(self) -> Tensor:
        """(P,) the row; parameters that user code has moved or replaced are put into it again.

        `model.to(device)` moves them, and `load_state_dict(assign=True)`, for example, replaces them.

        Raises:
            ConfigurationError: They are on several devices or in several types now, have other shapes, or are deleted.
        """
        if self._links is None or not all(map(operator.is_, map(dict.get, *self._links[:2]), self._links[2])):
            self._take_back()
        start, size = self.values.data_ptr(), self.values.element_size()
        for parameter, offset in zip(self.parameters, self._offsets, strict=True):
            if parameter.data_ptr() != start + size * offset:
                self._collect()
                break
        return self.values

    def free(self) -> None:
        """Let go of the memory, of which a matrix of other members' rows may be a part."""
        self.values, self._gradient = self.values.new_empty(0), None
        self._homes, self._links = {}, None
        for parameter in (*self.parameters, *self._segments.values()):
            parameter.data, parameter.grad = self.values, None

    @torch.no_grad()
    def _take_back(self) -> None:
        """Put the row's parameters back where user code has replaced them, with the new ones' values and gradients."""
        links: list[tuple[dict[str, Any], str, Any]] = []
        for (path, shape), parameter in zip(self.layout.shapes, self.parameters, strict=True):
            for home in self._homes[path]:
                *before, (entries, key, found) = home.links(self._adapter)
                if found is None:
                    fix = "is no longer in its PEFT layer: release the agent, and build another one"
                    raise ConfigurationError("adapter", f"{path} of {self._adapter}", fix)
                if found is not parameter:
                    if found._backward_hooks or found._post_accumulate_grad_hooks:
                        fix = "was replaced by a parameter with hooks: register them on agent.actor_parameters()"
                        raise ConfigurationError("adapter", f"{path} of {self._adapter}", fix)
                    self._check_shape(path, shape, found)
                    parameter.data = found.to(parameter.dtype)
                    parameter.grad = None if found.grad is None else found.grad.to(parameter.dtype)
                    entries[key] = parameter
                links += [*before, (entries, key, parameter)]
        self._links = [link[0] for link in links], [link[1] for link in links], [link[2] for link in links]

    def _check_shape(self, path: str, shape: torch.Size, found: Tensor) -> None:
        if found.shape != shape:
            fix = (
                f"has shape {(*found.shape,)} now, and had {(*shape,)}: an adapter keeps its rank; build another agent"
            )
            raise ConfigurationError("adapter", f"{path} of {self._adapter}", fix)

    @torch.no_grad()
    def _collect(self) -> None:
        """Make a new row of the parameters' values."""
        for (path, shape), parameter in zip(self.layout.shapes, self.parameters, strict=True):
            self._check_shape(path, shape, parameter)
        kinds = {(parameter.device, parameter.dtype) for parameter in self.parameters}
        if len(kinds) > 1:
            fix = "an adapter's parameters were moved apart: move the base as a whole, or before agents are built on it"
            raise ConfigurationError("actor_network", sorted(map(str, kinds)), fix)
        values = self.values if self.pinned else self.parameters[0].new_zeros(self.layout.size)
        for parameter, view in zip(self.parameters, self.layout.views(values).values(), strict=True):
            view.copy_(parameter)
        self._point(values)

    @torch.no_grad()
    def move_to(self, values: Tensor) -> None:
        """Copy the row to a tensor (P,), where the parameters lie from now on."""
        values.copy_(self.values)
        self._point(values)

    def pin(self, values: Tensor) -> None:
        """Move the row to a tensor (P,) for good: others write to its memory, too."""
        self.settle()
        self.move_to(values)
        self.pinned = True

    def _point(self, values: Tensor) -> None:
        self.values = values
        for parameter, view in zip(self.parameters, self.layout.views(values).values(), strict=True):
            parameter.data = view
        for (start, stop), segment in self._segments.items():
            segment.data = values[start:stop]

    def segment(self, paths: Collection[str]) -> nn.Parameter:
        """These parameters, which stand side by side, as one for an optimizer; it follows the row.

        `share_gradient` gives it their gradient.
        """
        where = self.layout.segment(paths)
        key = where.start, where.stop
        if key not in self._segments:
            self._segments[key] = nn.Parameter(self.values[where])
        return self._segments[key]

    def gradient(self) -> Tensor:
        """(P,) the gradient, in which the parameters' `grad` lies from now on; 0 where a parameter has none."""
        found = self.present_gradient()
        if found is None:
            self.move_gradient_to(torch.zeros_like(self.values))
            found = self._gradient
        assert found is not None
        return found

    def present_gradient(self) -> Tensor | None:
        """(P,) the gradient, in which the parameters' `grad` lies from now on; None if no parameter has one."""
        if self._gradient is not None and self._holds_gradients(self._gradient):
            return self._gradient
        if all(parameter.grad is None for parameter in self.parameters):
            self._gradient = None
        else:
            self.move_gradient_to(torch.zeros_like(self.values))
        return self._gradient

    @torch.no_grad()
    def move_gradient_to(self, gradient: Tensor) -> None:
        """Copy the parameters' `grad` to zeros (P,), where it lies from now on."""
        for parameter, view in zip(self.parameters, self.layout.views(gradient).values(), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
            parameter.grad = view
        self._gradient = gradient
        # A step shares the gradient anew; till then segments must not hold the old one's matrix.
        for segment in self._segments.values():
            segment.grad = None

    def _holds_gradients(self, gradient: Tensor) -> bool:
        start, size = gradient.data_ptr(), gradient.element_size()
        for parameter, offset in zip(self.parameters, self._offsets, strict=True):
            if parameter.grad is None or parameter.grad.data_ptr() != start + size * offset:
                return False
        return gradient.device == self.values.device

    def filled(self, parts: Sequence[Tensor | None]) -> Tensor:
        """(P,) a row of these values for the parameters; 0 for None."""
        found = torch.zeros_like(self.values)
        for part, view in zip(parts, self.layout.views(found).values(), strict=True):
            if part is not None:
                view.copy_(part)
        return found

    def share_gradient(self) -> None:
        """Give the segments the parameters' gradient."""
        gradient = self.gradient()
        for (start, stop), segment in self._segments.items():
            segment.grad = gradient[start:stop]

    def zero_gradient(self) -> Tensor:
        """(P,) the gradient, set to 0."""
        self.settle()
        if self._gradient is None or not self._holds_gradients(self._gradient):
            for parameter in self.parameters:
                parameter.grad = None
        return self.gradient().zero_()


@torch.no_grad()
def clip_gradient(gradients: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale a gradient down to a norm of `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    Args:
        gradients: The gradient of an adapter, (P,) for each device.
        max_norm: The largest norm.

    Returns:
        The norm before, a scalar. Where it is not finite, neither is the gradient afterwards.
    """
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    norm: Tensor = norms[0]
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack([one.to(norm.device) for one in norms]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))
    return norm
