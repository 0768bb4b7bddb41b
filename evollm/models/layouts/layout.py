"""The interface of layouts, which lay samples out as the rows of a pass through a base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from evollm.data.samples import Batch
from evollm.models.load_balancing import Span
from evollm.models.logprobs import Pieces
from evollm.models.readings import LOGPROBS, Reading


class LaidOut(Protocol):
    """Samples laid out once on a device, for any number of passes."""

    @property
    def pieces(self) -> Pieces:
        """The completions whose tokens `read` returns, in that order."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a pass of one member, padding included."""

    @property
    def can_stack(self) -> bool:
        """Whether several members may share a pass."""

    @property
    def attention(self) -> str:
        """The attention implementation used so far, in words; "" for the model's own."""

    def passing(self, num_members: int, *, adapted: bool = True, whole: bool = False) -> AbstractContextManager[object]:
        """Configure the network for this layout inside the block, for passes of M members.

        Args:
            num_members: M.
            adapted: Whether the members have adapters; False: the base without adapter.
            whole: Whether every layer must run for each member, even layers below the first adapter.
        """

    def read(self, network: Any, num_members: int, reading: Reading = LOGPROBS) -> Tensor:
        """(M, C) log-probs of the scored tokens, or what else `reading` reads; differentiable."""

    def spans(self) -> Sequence[Span]:
        """The spans of the tokens in the routers' input in a pass of one member, in order."""


class Layout(Protocol):
    """A way to lay samples out."""

    @property
    def own_attention(self) -> bool:
        """Whether passes use the model's own attention implementation."""

    def groups(self, batch: Batch, budget: int, most: int | None) -> list[list[int]]:
        """Divide a batch into passes.

        Args:
            batch: B samples.
            budget: Most tokens in a pass of one member; a longer sample has a pass of its own.
            most: Most samples in a pass; None: no bound.

        Returns:
            The rows of each pass.
        """

    def lay_out(self, batch: Batch, members: Sequence[str | None]) -> LaidOut:
        """Lay samples out for passes of these members: names of adapters, None for the base without adapter."""
