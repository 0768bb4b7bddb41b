"""The passes of a population's members over samples that are laid out once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from evollm.data.samples import Batch
from evollm.models.layouts import LaidOut, Layout
from evollm.models.load_balancing import LoadBalancing, recorded, row_loads
from evollm.models.logprobs import TokenLogprobs
from evollm.models.shared_base import SharedBase
from evollm.processes import Processes


class FewSamples:
    """Samples that fit into one pass, laid out once, and the members whose log-probs of these samples are computed."""

    def __init__(
        self, base: SharedBase, layout: Layout, batch: Batch, members: Sequence[str | None], *, stacking: bool
    ) -> None:
        self._base = base
        self._num_rows = len(batch)
        self._members = members
        self._stacking = stacking
        self.laid: LaidOut = layout.lay_out(batch, members)

    @property
    def attention(self) -> str:
        """The attention implementation that was used, in words."""
        return self.laid.attention or f"the model's own ({self._base.network.config._attn_implementation})"

    def passes(self, budget: int) -> list[Sequence[int]]:
        """Positions of the members of each pass: members are split evenly into as few passes as the budget allows."""
        together = 1
        if self._stacking and self.laid.can_stack and None not in self._members:
            together = max(1, budget // self.laid.num_tokens)
        if self._base.is_sharded:
            together = Processes.present().smallest(together)
        count = -(-len(self._members) // together)
        return [part.tolist() for part in np.array_split(np.arange(len(self._members)), count)]

    @contextmanager
    def forward(
        self, numbers: Sequence[int], *, recompute: bool = False, balancing: LoadBalancing | None = None
    ) -> Iterator[TokenLogprobs]:
        """Run a forward pass of these members; the backward pass must run inside the block.

        Args:
            numbers: Positions of the members.
            recompute: Recompute activations in the backward pass.
            balancing: The auxiliary loss of routers, for which expert loads are returned too; None: no loads.
        """
        base, laid = self._base, self.laid
        names = [self._members[number] for number in numbers]
        routes = tuple(name for name in names if name is not None) if self._stacking else ()
        with (
            base.active(names[0], gradient_checkpointing=recompute) as network,
            base.router.route(routes or None),
            laid.passing(len(names), adapted=names[0] is not None, whole=balancing is not None),
        ):
            if balancing is None:
                yield TokenLogprobs(laid.logprobs(network, len(names)), laid.pieces)
                return
            with recorded(network) as calls:
                values = laid.logprobs(network, len(names))
            loads = row_loads(calls, laid.spans(), self._num_rows, len(names), balancing.per_token)
            yield TokenLogprobs(values, laid.pieces, loads)
