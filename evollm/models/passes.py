"""The passes of a population's members over samples that are laid out once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from evollm.data.samples import Batch
from evollm.models.adapters.stack import Stack
from evollm.models.layouts import LaidOut, Layout
from evollm.models.load_balancing import LoadBalancing, RouterLogits, Span, recorded, row_loads
from evollm.models.logprobs import TokenLogprobs
from evollm.models.readings import LOGPROBS, DivergenceReading, LogprobReading, RecordedStates
from evollm.models.shared_base import SharedBase
from evollm.processes import Processes


class FewSamples:
    """Samples that fit into one pass, laid out once, and the members whose log-probs of these samples are computed.

    With a `reference`, a sequence of one adapter or None, the passes give each token's KL(member || reference) instead.

    Args:
        base: The base.
        layout: The layout.
        batch: The samples.
        members: The members' adapters.
        stacking: Whether LoRA layers are routed, so that several members may share a pass.
        reference: See above.
        temperature: Divides the logits before their log-probs are taken.
        stack: The weights of the members, without None; left out, it is made here.
        counts: Where each member has samples of its own: the number of consecutive samples of each, for one pass of all
            members in a `PackedLayout` with the same counts. Its log-probs are divided by `blocks.parts_of`.
    """

    def __init__(
        self,
        base: SharedBase,
        layout: Layout,
        batch: Batch,
        members: Sequence[str | None],
        *,
        stacking: bool,
        reference: Sequence[str | None] = (),
        temperature: float = 1.0,
        stack: Stack | None = None,
        counts: Sequence[int] = (),
    ) -> None:
        self._base = base
        self._counts = list(counts)
        self._num_rows = len(batch)
        self._members = members
        self._stacking = stacking
        names = [name for name in members if name is not None]
        if stacking and names:
            self._stack = base.adapters.stack(names) if stack is None else stack
        self._reference = reference
        self._logprobs = LOGPROBS if temperature == 1 else LogprobReading(temperature)
        self.laid: LaidOut = layout.lay_out(batch, [*members, *reference])

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

    def stack_of(self, numbers: Sequence[int]) -> Stack | None:
        """The weights of these members, which must stand side by side; None: they are not routed."""
        if not self._stacking or self._members[numbers[0]] is None:
            return None
        return self._stack.part(sum(name is not None for name in self._members[: numbers[0]]), len(numbers))

    @contextmanager
    def forward(
        self,
        numbers: Sequence[int],
        *,
        stack: Stack | None = None,
        recompute: bool = False,
        balancing: LoadBalancing | None = None,
    ) -> Iterator[TokenLogprobs]:
        """Run a forward pass of these members; the backward pass must run inside the block.

        Args:
            numbers: Positions of the members.
            stack: `stack_of(numbers)`, if the caller has it.
            recompute: Recompute activations in the backward pass.
            balancing: The auxiliary loss of routers, for which expert loads are returned too; None: no loads.
        """
        laid, names = self.laid, [self._members[number] for number in numbers]
        reading = self._divergences() if self._reference else self._logprobs
        stack = stack or self.stack_of(numbers)
        with self._network(names, stack, recompute=recompute, whole=balancing is not None) as network:
            if balancing is None:
                yield TokenLogprobs(laid.read(network, len(names), reading), laid.pieces)
                return
            with recorded(network) as calls:
                values = laid.read(network, len(names), reading)
            if self._counts:
                loads = _loads_of_blocks(calls, laid.spans(), self._counts, balancing.per_token)
            else:
                loads = row_loads(calls, laid.spans(), self._num_rows, len(names), balancing.per_token)
            yield TokenLogprobs(values, laid.pieces, loads)

    def _divergences(self) -> DivergenceReading:
        """Run the reference's pass over these samples."""
        states = RecordedStates()
        stack = None
        if self._stacking and self._reference[0] is not None:
            stack = self._base.adapters.stack([self._reference[0]])
        with self._network(self._reference, stack) as network:
            self.laid.read(network, 1, states)
        return DivergenceReading(states)

    @contextmanager
    def _network(
        self, names: Sequence[str | None], stack: Stack | None, *, recompute: bool = False, whole: bool = False
    ) -> Iterator[PreTrainedModel]:
        """The network with these adapters, in the layout of the samples, inside the block."""
        base = self._base
        with (
            base.active(names[0], gradient_checkpointing=recompute)
            if stack is None
            else base.routed(stack, gradient_checkpointing=recompute) as network,
            self.laid.passing(len(names), adapted=names[0] is not None, whole=whole),
        ):
            yield network


def _loads_of_blocks(
    calls: Sequence[RouterLogits], spans: Sequence[Span], counts: Sequence[int], per_token: int
) -> Tensor:
    """The expert loads (M, B, 2, E) of members with so many samples of their own, padded with zeros.

    Of each block by itself, since a sum with weights of 0 for the others' tokens would take over their NaN.
    """
    ends, found = np.cumsum(counts).tolist(), []
    for member, (count, end) in enumerate(zip(counts, ends, strict=True)):
        start = end - count
        own = [span._replace(row=span.row - start) for span in spans if start <= span.row < end]
        # Blocks have equally many tokens.
        blocks = [tuple(layer.view(len(counts), -1, layer.shape[-1])[member] for layer in call) for call in calls]
        found.append(row_loads(blocks, own, count, 1, per_token)[0])
    return pad_sequence(found, batch_first=True)
