"""Optimizers whose parameters are segments of rows, with states for each parameter of the adapter."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evollm.errors import ConfigurationError
from evollm.models.adapters.rows import Row


class Place(NamedTuple):
    """Where a parameter of an adapter lies: the segment of a row, the position in it, and the shape."""

    segment: nn.Parameter
    start: int
    shape: torch.Size

    def part(self, value: Tensor) -> Tensor:
        """The parameter's part of a value in the segment's state; of a scalar, such as `step`, a copy."""
        if value.ndim == 0:
            return value.clone()
        return value[self.start : self.start + self.shape.numel()].view(self.shape)


def places_of(rows: Sequence[Row], paths: Sequence[str]) -> list[Place]:
    """The places of a parameter group's parameters; they are one segment of each row that has some of them."""
    found: dict[str, Place] = {}
    for row in rows:
        shapes = dict(row.layout.shapes)
        own = [path for path in paths if path in shapes]
        if own:
            segment, begin = row.segment(own), row.layout.segment(own).start
            found |= {path: Place(segment, row.layout.starts[path] - begin, shapes[path]) for path in own}
    return [found[path] for path in paths]


class RowOptimizer(torch.optim.Optimizer):
    """Mixed into the class of an optimizer that treats each number by itself; to be attached to rows.

    A step then takes as many kernels for an adapter as for one parameter. `state_dict` and `load_state_dict` have the
    state of each parameter of the adapter, as they would without rows.
    """

    _rows: Sequence[Row]
    _places: Sequence[Sequence[Place]]

    def attach(self, rows: Sequence[Row], places: Sequence[Sequence[Place]]) -> None:
        """Say where the parameters of each parameter group lie."""
        self._rows, self._places = rows, places
        # Without a reference to `self`, which would keep the rows' memory until the garbage collector runs.
        self.register_step_pre_hook(_share_gradients)

    def __reduce__(self) -> tuple[Any, ...]:
        # torch's own state has no rows: a copy of an agent would make steps without gradients.
        state = {**super().__getstate__(), "_rows": self._rows, "_places": self._places}
        return _unattached, (type(self).__bases__[1],), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch also calls it to load a state of the parameters.
        if "_rows" in state:
            self.register_step_pre_hook(_share_gradients)

    def settle(self) -> None:
        """Follow parameters that user code has moved or replaced.

        Raises:
            ConfigurationError: See `check_types`.
        """
        for row in self._rows:
            row.settle()
        check_types(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of the adapter's parameters to 0; they keep their memory."""
        del set_to_none
        for row in self._rows:
            row.zero_gradient()

    def state_dict(self) -> dict[str, Any]:
        """The state, with that of each parameter as views of the segments' state."""
        found, states, segments = super().state_dict(), {}, self._segments()
        for numbers, group, places in zip(self._numbers(), found["param_groups"], self._places, strict=True):
            group["params"] = numbers
            for number, place in zip(numbers, places, strict=True):
                state = found["state"].get(segments[place.segment])
                if state:
                    states[number] = {name: place.part(value) for name, value in state.items()}
        return {**found, "state": states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of each parameter.

        Raises:
            ValueError: See `check_equal_progress`.
        """
        saved = state_dict["state"]
        check_equal_progress([saved.get(number, {}) for numbers in self._numbers() for number in numbers])
        states: dict[int, dict[str, Tensor]] = {}
        segments, groups = self._segments(), []
        for numbers, group, places in zip(self._numbers(), state_dict["param_groups"], self._places, strict=True):
            groups.append(
                {**group, "params": [segments[one] for one in dict.fromkeys(place.segment for place in places)]}
            )
            for number, place in zip(numbers, places, strict=True):
                for name, value in saved.get(number, {}).items():
                    state = states.setdefault(segments[place.segment], {})
                    if value.ndim == 0:
                        state[name] = value.clone()
                        continue
                    if name not in state:
                        state[name] = torch.zeros(len(place.segment), dtype=value.dtype, device=value.device)
                    place.part(state[name]).copy_(value)
        super().load_state_dict({**state_dict, "state": states, "param_groups": groups})

    def _segments(self) -> dict[nn.Parameter, int]:
        """The number that the optimizer's own state gives to each segment."""
        return {one: number for number, one in enumerate(one for group in self.param_groups for one in group["params"])}

    def _numbers(self) -> Iterator[list[int]]:
        """The numbers that a state gives to the parameters of each group."""
        start = 0
        for places in self._places:
            yield list(range(start, start + len(places)))
            start += len(places)


def check_types(optimizer: torch.optim.Optimizer) -> None:
    """Check that the parameters of an optimizer have the type of its state, bytes of a quantised one aside.

    Raises:
        ConfigurationError: User code has converted them.
    """
    for parameter, state in optimizer.state.items():
        tensors = [value for value in state.values() if isinstance(value, Tensor) and value.ndim]
        others = {value.dtype for value in tensors if value.is_floating_point()} - {parameter.dtype}
        if others:
            fix = (
                f"the optimizer's state of this adapter is {min(map(str, others))}: convert the model back, or convert "
                "it before agents are built on it (adapters are float32 at least, whatever the base is)"
            )
            raise ConfigurationError("actor_network", str(parameter.dtype), fix)


def check_equal_progress(states: Iterable[Mapping[str, Tensor]]) -> None:
    """Check that the parameters of an adapter, whose states these are, have made equally many steps.

    They lie in one row and make their steps together. A parameter without a state has made none.

    Raises:
        ValueError: They have made different numbers of steps, or only some have a state.
    """
    if len({float(state["step"]) if "step" in state else float(bool(state)) for state in states}) > 1:
        raise ValueError("the parameters have made different numbers of steps")


def _share_gradients(optimizer: Any, *_: Any) -> None:
    optimizer.settle()
    for row in optimizer._rows:
        row.share_gradient()


@functools.cache
def on_rows(kind: type[torch.optim.Optimizer]) -> Any:
    """The class of optimizers with `RowOptimizer` mixed in."""
    return type(kind.__name__, (RowOptimizer, kind), {})


def _unattached(kind: Any) -> Any:
    """An optimizer on rows without a state, which `copy` and `pickle` fill."""
    own = on_rows(kind)
    return own.__new__(own)
