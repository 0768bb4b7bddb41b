"""Log-probs of many members in few forward passes of the base, by the fastest layout that the probe has confirmed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from peft import LoraConfig

from evollm.data.samples import Batch
from evollm.errors import CheckpointError, ConfigurationError
from evollm.models.adapters.stack import Stack
from evollm.models.budget import count_saved_bytes
from evollm.models.exchange import from_all_processes
from evollm.models.fast_paths import FastPaths
from evollm.models.flops import EVALUATION, TRAINING
from evollm.models.layouts import Layout, layout_for, longest_sequence
from evollm.models.load_balancing import LoadBalancing
from evollm.models.logprobs import MemberLogprobs, TokenLogprobs, joined, of_all_members, pieces_of
from evollm.models.loss_scaling import Gradients, PlainGradients, ScaledBackward, StackedGradients
from evollm.models.padding import AnswerWays
from evollm.models.pass_budgets import PassBudgets
from evollm.models.passes import FewSamples
from evollm.models.probe import probe, probed_length
from evollm.models.shared_base import SharedBase
from evollm.models.slow_settings import slow_dtype
from evollm.processes import Processes

# (positions of items, rows of their batch, log-probs of these rows under the items' adapters) -> the sum of the
# items' losses on these rows.
ItemLoss = Callable[[Sequence[int], Sequence[int], TokenLogprobs], torch.Tensor]

_ATTRIBUTE = "_evollm_engine"


class Item(NamedTuple):
    """A member's adapter, None for the base without adapter, and a batch of samples to compute log-probs of."""

    adapter: str | None
    batch: Batch

    @classmethod
    def on(cls, batch: Batch, adapters: Iterable[str | None]) -> list[Item]:
        """One item for each adapter, all with the same batch."""
        return [cls(adapter, batch) for adapter in adapters]


@dataclass(frozen=True)
class BatchSlot:
    """The position of a member among the members of a step, to replay the member alone in passes of the same shapes.

    The bits of a result depend on the shapes of the pass.

    Attributes:
        place: The member's position, from 0.
        of: Number of members in the step.
    """

    place: int
    of: int


@dataclass(frozen=True)
class PassOptions:
    """Options of the passes through the base, the same for all members of a call.

    Attributes:
        token_budget: Most tokens in a pass, over all its members; a longer sample has a pass of its own. None: chosen
            from the device and its free memory.
        max_pairs: Most samples of one member in a pass; None: no bound.
        explicit_positions: Whether position ids are passed; without them completions cannot share their prompt.
        gradient_checkpointing: Recompute activations in the backward pass. None: only if memory is too short for them.
        slot: For a single member: passes hold `slot.of` copies of the member, and the result is that of the copy at
            `slot.place`. None: each member once.
        balancing: The auxiliary loss of routers, for which each sample's expert loads are returned too; None: no loads.
        reference: Empty, or one adapter, None for the base without adapter: instead of log-probs the passes then give
            divergences from this reference.
        temperature: Divides the logits before their log-probs are taken, so that these are of the distribution that
            answers were sampled from.
    """

    token_budget: int | None = None
    max_pairs: int | None = None
    explicit_positions: bool = True
    gradient_checkpointing: bool | None = False
    slot: BatchSlot | None = None
    balancing: LoadBalancing | None = None
    reference: tuple[str | None, ...] = ()
    temperature: float = 1.0


class Engine:
    """Computes log-probs and gradients of members on their shared base; `Engine.of(base)` gives the base's one engine.

    Attributes:
        base: The base.
        paths: The fast paths that the probe confirmed, by settings of the LoRA configuration and probed length.
        budgets: Token budgets of the passes.
        ways: Whether several prompts are answered in one call of `generate`.
        attention: The attention implementation of the latest pass, in words; "" before the first pass.
    """

    def __init__(self, base: SharedBase) -> None:
        self.base = base
        self.paths: dict[tuple[str, int], FastPaths] = {}
        self.budgets = PassBudgets(base)
        self.ways = AnswerWays(base)
        self.attention = ""
        self._said: set[str] = set()
        self._without_adapter: tuple[str, LoraConfig] | None = None

    @classmethod
    def of(cls, base: SharedBase) -> Engine:
        """The engine of a base."""
        engine = getattr(base, _ATTRIBUTE, None)
        if not isinstance(engine, cls):
            engine = cls(base)
            setattr(base, _ATTRIBUTE, engine)
        return engine

    @torch.no_grad()
    def logprobs(self, items: Sequence[Item], options: PassOptions, kind: str = EVALUATION) -> list[MemberLogprobs]:
        """The log-probs of each item's scored tokens under its adapter.

        Items whose batch is the same object share the batch's layout and passes, and the layers below the first
        adapter. Different batches are computed one after the other.

        Args:
            items: Adapters and their samples.
            options: Options of the passes.
            kind: What the passes are made for; see `evollm.models.flops`.

        Returns:
            For each item the log-probs of its batch, on the CPU: all first completions, then all second ones.
        """
        return self._run(items, replace(options, gradient_checkpointing=False), kind, loss=None)

    def divergences(self, items: Sequence[Item], options: PassOptions, reference: str | None) -> list[MemberLogprobs]:
        """Exact KL(pi || ref) of the next token at every scored token, sum_v pi(v) log(pi(v) / ref(v)).

        It is computed at the prefixes of the samples, not at those that the policy would sample. It costs a pass of the
        reference for each pass of the members, and the head twice.

        Args:
            items: Adapters and their samples.
            options: Options of the passes.
            reference: The reference's adapter; None: the base without adapter.

        Returns:
            As of `logprobs`, with divergences in nats in place of log-probs.
        """
        return self.logprobs(items, replace(options, balancing=None, reference=(reference,)))

    def backward(self, items: Sequence[Item], options: PassOptions, loss: ItemLoss) -> list[MemberLogprobs]:
        """Compute `logprobs` and add the gradients of the items' losses to the `grad` of their adapters' parameters.

        Args:
            items: Trainable adapters and their samples.
            options: Options of the passes.
            loss: From positions of items, rows of their batch, and the log-probs, to the sum of these items' losses on
                these rows. Called once for each pass.
        """
        for item in items:
            # PEFT's own set_adapter(), if user code has called it, freezes all adapters but one.
            assert item.adapter is not None
            self.base.adapters.restore_trainability(item.adapter)
        return self._run(items, options, TRAINING, loss)

    def prepare(self, members: Sequence[str | None], length: int) -> FastPaths:
        """The fast paths of these members for sequences of up to `length` tokens; a new configuration is probed."""
        longest = probed_length(self.base, length)
        found = FastPaths(longest=longest)
        for settings, config in self._configs(members).items():
            # Keyed by this length, not the longest length so far: bits must not depend on earlier calls.
            known = self.paths.get((settings, longest))
            if known is None:
                self.paths[settings, longest] = known = probe(self.base, config, longest)
                self.say(known.reasons)
            found = found & known
        return found

    def answers(self, way: str, members: Sequence[str | None], length: int) -> bool:
        """Whether these members may answer several prompts in one call of `generate`; a new configuration is tried.

        Args:
            way: `PADDED` or `TOGETHER` of `evollm.models.padding`.
            members: The members' adapters.
            length: Tokens of the longest prompt and its answer.
        """
        paths = self.prepare(members, length)
        reasons = [
            self.ways.reason(
                way, settings, config, paths.longest, stacking=self.paths.get((settings, paths.longest), paths).stacking
            )
            for settings, config in self._configs(members).items()
        ]
        self.say(reasons)
        return not any(reasons)

    def _configs(self, members: Sequence[str | None]) -> dict[str, LoraConfig]:
        """The LoRA configurations with which these members are probed, by their settings."""
        configs = {
            self.base.adapters.settings(name): self.base.adapters.config(name) for name in members if name is not None
        }
        if None in members:
            # The probe of the base without adapter needs some adapter too; a base always has one.
            settings, config = self._without_adapter or self._settings_of(self.base.adapters.names[0])
            configs.setdefault(settings, config)
        return configs

    def _run(
        self, items: Sequence[Item], options: PassOptions, kind: str, loss: ItemLoss | None
    ) -> list[MemberLogprobs]:
        """The log-probs of all items; items with the same batch share passes."""
        found: dict[int, MemberLogprobs] = {}
        sharing: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            sharing.setdefault(id(item.batch), []).append(number)
        for numbers in sharing.values():
            members, batch = [items[number].adapter for number in numbers], items[numbers[0]].batch
            own = None if loss is None else partial(_of_items, loss, numbers)
            passes = [*members, *options.reference * len(members)]
            self.base.flops.add(kind, batch, passes, training=loss is not None)
            found |= zip(numbers, self._run_batch(batch, members, options, own).members, strict=True)
        return [found[number] for number in range(len(items))]

    def _run_batch(
        self, batch: Batch, members: Sequence[str | None], options: PassOptions, loss: ItemLoss | None
    ) -> TokenLogprobs:
        """The log-probs of a batch whose samples are split over the processes; every process gets all results."""
        self.base.adapters.release_lost()
        self.say([slow_dtype(self.base.device.type, self.base.network.dtype)])
        paths = self.prepare([*members, *options.reference], longest_sequence(self.base, batch))
        if loss is not None and self.base.adapters.have_hooks([name for name in members if name is not None]):
            # Routed layers compute gradients of rows, of which autograd knows nothing.
            self.say(["members go one by one: their parameters have hooks"])
            paths = replace(paths, stacking=False)
        layout = layout_for(self.base, paths, explicit_positions=options.explicit_positions)
        if loss is not None and layout.own_attention:
            self._check_own_attention()

        def saved(recompute: bool) -> float:
            """Bytes that a pass of one member saves for the backward pass, for each token."""
            # Measured on the longest sample, so that bytes saved once a pass (stacked weights) count little per token.
            longest = batch.select([int(np.argmax(batch.num_tokens))])
            few = FewSamples(self.base, layout, longest, members, stacking=paths.stacking)
            forward = few.forward([0], recompute=recompute, balancing=options.balancing)
            with count_saved_bytes(keep=False) as bytes_saved, forward:
                pass
            return bytes_saved.total / int(longest.num_tokens.sum())

        tiled, longest = paths.tiled_head, int(batch.num_tokens.max())
        recompute, remark = self.budgets.recomputes(
            options.gradient_checkpointing, saved, tiled=tiled, token_budget=options.token_budget, longest=longest
        )
        self.say([remark])
        options = replace(options, gradient_checkpointing=recompute)
        budget = options.token_budget or self.budgets.budget(
            saved, training=loss is not None, recompute=recompute, tiled=tiled
        )
        slotted = [name for name in members if name is not None] * (options.slot or BatchSlot(0, 1)).of
        stack = self.base.adapters.stack(slotted) if paths.stacking and slotted else None
        run = partial(self._run_rows, batch, members, options, layout, stack, budget, loss)
        processes = Processes.present()
        with nullcontext() if stack is None or loss is None else stack.training():
            if processes.size == 1:
                whole = run(range(len(batch)))
                assert whole is not None
                return whole
            own = processes.share(len(batch))
            part = run(own) if own or self.base.is_sharded else None
        dtype = torch.promote_types(self.base.network.dtype, torch.float32)
        nothing = torch.zeros(len(members), int(sum(piece.length for piece in pieces_of(batch))), dtype=dtype)
        return from_all_processes(part, own, batch, nothing.to(self.base.device), options.balancing)

    def _run_rows(
        self,
        batch: Batch,
        members: Sequence[str | None],
        options: PassOptions,
        layout: Layout,
        stack: Stack | None,
        budget: int,
        loss: ItemLoss | None,
        own: Sequence[int],
    ) -> TokenLogprobs | None:
        """The log-probs of these rows of the batch; None without rows."""
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
                stacking=stack is not None,
                reference=options.reference,
                temperature=options.temperature,
                stack=stack,
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

    def begin(self, adapter: str) -> None:
        """Forget fast paths, budgets and operations of earlier runs on this base, on which no run must depend.

        Args:
            adapter: One of the run's adapters; the base without adapter is probed with this adapter's configuration.
        """
        self.paths.clear()
        self.budgets.clear()
        self.ways.reasons.clear()
        self.base.flops.take()
        self._without_adapter = self._settings_of(adapter)

    def state_dict(self) -> dict[str, Any]:
        """Fast paths, ways to answer, budgets and affordable tokens so far, as JSON: a run's bits depend on all."""
        paths = [{"settings": settings, **paths.to_dict()} for (settings, _), paths in self.paths.items()]
        return {"paths": paths, "answers": self.ways.state_dict(), **self.budgets.state_dict()}

    def load_state_dict(self, state: object) -> None:
        """Restore the output of `state_dict`, without a new probe or measurement of memory.

        Raises:
            CheckpointError: `state` is not an output of `state_dict`; the engine is unchanged.
        """
        try:
            paths, budgets = _read_paths(state), PassBudgets.from_state(self.base, state)
            # Absent from older checkpoints.
            ways = AnswerWays.from_state(self.base, cast(Any, state).get("answers", []))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"what the checkpoint says of the fast paths is damaged: {error}") from error
        self.paths, self.budgets, self.ways = paths, budgets, ways
        for known in paths.values():
            self.say(known.reasons)
        self.say([*ways.reasons.values()])

    def _check_own_attention(self) -> None:
        """Raise `ConfigurationError` if the model's own attention has no backward pass on this device."""
        attention = self.base.network.config._attn_implementation
        if attention == "flex_attention" and self.base.device.type == "cpu":
            fix = "has no backward pass on a CPU: load the base with attn_implementation='sdpa'"
            raise ConfigurationError("attn_implementation", attention, fix)

    def _settings_of(self, adapter: str) -> tuple[str, LoraConfig]:
        return self.base.adapters.settings(adapter), self.base.adapters.config(adapter)

    def say(self, reasons: Sequence[str]) -> None:
        """Warn of each reason that this engine has not given yet; "" is skipped."""
        for reason in filter(None, reasons):
            # Compared without the figures in brackets, which differ between LoRA configurations.
            what = reason.split(" (", maxsplit=1)[0]
            if what not in self._said:
                self._said.add(what)
                warnings.warn(f"{self.base.name or 'the base'}: {reason}", UserWarning, stacklevel=3)


def _of_items(
    loss: ItemLoss, items: Sequence[int], members: Sequence[int], rows: Sequence[int], found: TokenLogprobs
) -> torch.Tensor:
    """`loss` with members' positions in one batch turned into positions of items."""
    return loss([items[member] for member in members], rows, found)


def _weighted(
    loss: ItemLoss, members: Sequence[int], rows: Sequence[int], weight: int, found: TokenLogprobs
) -> torch.Tensor:
    return loss(members, rows, found) * weight


def _read_paths(state: Any) -> dict[tuple[str, int], FastPaths]:
    """The fast paths in an output of `Engine.state_dict`."""
    paths = {}
    for entry in state["paths"]:
        settings, known = entry["settings"], FastPaths.from_dict({k: v for k, v in entry.items() if k != "settings"})
        if not isinstance(settings, str):
            raise ValueError(f"{settings!r} are not the settings of an adapter")
        paths[settings, known.longest] = known
    return paths
