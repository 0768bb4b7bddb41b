"""The passes of members through their base, forward and backward, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from evollm.data.samples import Batch
from evollm.models.adapters.stack import Stack
from evollm.models.blocks import Block, parts_of, shared_passes
from evollm.models.fast_paths import FastPaths
from evollm.models.items import BatchSlot, ItemLoss, PassOptions
from evollm.models.layouts import Layout, PackedLayout
from evollm.models.logprobs import TokenLogprobs, joined, of_all_members
from evollm.models.loss_scaling import Gradients, PlainGradients, ScaledBackward, StackedGradients
from evollm.models.passes import FewSamples
from evollm.models.shared_base import SharedBase
from evollm.processes import Processes


@dataclass(frozen=True)
class Plan:
    """How members go through the base.

    Attributes:
        paths: The fast paths that all members may take.
        layout: The layout of samples.
        options: The caller's options, with the decision on gradient checkpointing.
        budget: Most tokens in a pass.
    """

    paths: FastPaths
    layout: Layout
    options: PassOptions
    budget: int


@dataclass
class Runner:
    """Runs the passes of members.

    Attributes:
        base: The base.
        plan: How they go through it.
        stack: The members' weights; None: they are not routed.
        attention: The attention implementation of the latest pass, in words.
    """

    base: SharedBase
    plan: Plan
    stack: Stack | None
    attention: str = ""

    def of_members(
        self,
        batch: Batch,
        members: Sequence[str | None],
        loss: ItemLoss | None,
        own: Sequence[int],
    ) -> TokenLogprobs | None:
        """The log-probs of these rows of the batch; None without rows."""
        layout, options, budget = self.plan.layout, self.plan.options, self.plan.budget
        groups: list[list[int]] = []
        if own:
            divided = layout.groups(batch.select(own), budget, options.max_pairs)
            groups = [[own[row] for row in rows] for rows in divided]
        slot = options.slot or BatchSlot(0, 1)
        slotted = [*members] * slot.of
        fillers = 0
        if self.base.is_sharded:
            # A pass gathers weight shards from all processes, so a process with fewer passes runs passes of weight 0.
            fillers = Processes.present().largest(len(groups)) - len(groups)
        parts: list[list[TokenLogprobs]] = []
        for rows, weight in [*((rows, 1) for rows in groups), *[([0], 0)] * fillers]:
            few = FewSamples(
                self.base,
                layout,
                batch.select(rows),
                slotted,
                stacking=self.stack is not None,
                reference=options.reference,
                temperature=options.temperature,
                stack=self.stack,
            )
            taken: list[TokenLogprobs] = []
            for numbers in few.passes(budget):
                # With a slot only the pass that contains the slot's place is computed.
                taking = numbers if options.slot is None else [0] if slot.place in numbers else []
                if not taking:
                    continue
                trained = [members[number] for number in taking]
                found = None if loss is None else partial(_weighted, loss, taking, rows, weight)
                place = None if options.slot is None else list(numbers).index(slot.place)
                taken.append(self._pass(few, numbers, options, place, trained, found))
                self.attention = few.attention
            if weight:
                parts.append(taken)
        # Copied to the CPU after all passes are queued, because a copy waits for the device.
        return joined([of_all_members(taken) for taken in parts], groups) if groups else None

    def of_each(
        self,
        batch: Batch,
        owned: Sequence[Sequence[int]],
        loss: ItemLoss | None,
        own: Sequence[int],
    ) -> TokenLogprobs | None:
        """The log-probs of these rows of a batch of which each member has some; None without rows."""
        layout, options, stack = self.plan.layout, self.plan.options, self.stack
        assert stack is not None
        assert isinstance(layout, PackedLayout)
        here, groups = set(own), []
        for rows in owned:
            mine = [row for row in rows if row in here]
            divided = layout.groups(batch.select(mine), self.plan.budget, options.max_pairs) if mine else []
            groups.append([[mine[row] for row in part] for part in divided])
        parts: list[TokenLogprobs] = []
        rows_of: list[Sequence[int]] = []
        for blocks in shared_passes(groups, batch.num_tokens.tolist(), self.plan.budget):
            counts = [len(block.rows) for block in blocks]
            few = FewSamples(
                self.base,
                replace(layout, counts=tuple(counts)),
                batch.select([row for block in blocks for row in block.rows]),
                stack.names,
                stacking=True,
                temperature=options.temperature,
                stack=stack,
                counts=counts,
            )
            numbers = [block.member for block in blocks]
            names = [stack.names[number] for number in numbers]
            found = None if loss is None else partial(_of_blocks, loss, blocks)
            parts += parts_of(self._pass(few, numbers, options, None, names, found), counts)
            rows_of += [block.rows for block in blocks]
            self.attention = few.attention
        return joined(parts, rows_of) if parts else None

    def _pass(
        self,
        few: FewSamples,
        numbers: Sequence[int],
        options: PassOptions,
        place: int | None,
        members: Sequence[str | None],
        loss: Callable[[TokenLogprobs], torch.Tensor] | None,
    ) -> TokenLogprobs:
        """The log-probs of one pass's members; a loss also adds gradients to the `grad` of their parameters."""
        scaled, stack = None, few.stack_of(numbers)
        if loss is not None and self.base.network.dtype == torch.float16:
            names = [name for name in members if name is not None]
            if stack is None:
                gradients: Gradients = PlainGradients([self.base.adapters.rows(name) for name in names])
            else:
                gradients = StackedGradients(stack, range(len(names)) if place is None else [place])
            scaled = ScaledBackward(gradients)
        again = True
        while again:
            recompute = bool(options.gradient_checkpointing)
            with few.forward(numbers, stack=stack, recompute=recompute, balancing=options.balancing) as found:
                taken = found if place is None else found.like([one[place : place + 1] for one in found.tensors])
                # Inside the block, since the backward pass recomputes checkpointed layers.
                again = scaled is not None and loss is not None and scaled.attempt(loss, taken)
                if scaled is None and loss is not None:
                    loss(taken).backward()
            if self.base.is_sharded and scaled is not None:
                again = bool(Processes.present().largest(again))
            results = taken.like([tensor.detach() for tensor in taken.tensors])
            # Free the autograd graph before the next forward pass builds another.
            del found, taken
        if scaled is not None:
            scaled.accumulate()
        return results


def _of_blocks(loss: ItemLoss, blocks: Sequence[Block], found: TokenLogprobs) -> torch.Tensor:
    """The sum of members' losses, each on rows of its own."""
    parts = parts_of(found, [len(block.rows) for block in blocks])
    return torch.stack(
        [loss([block.member], block.rows, part) for block, part in zip(blocks, parts, strict=True)]
    ).sum()


def _weighted(
    loss: ItemLoss, members: Sequence[int], rows: Sequence[int], weight: int, found: TokenLogprobs
) -> torch.Tensor:
    return loss(members, rows, found) * weight
