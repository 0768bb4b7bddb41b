"""Log-probs of many members in few forward passes of the base, by the fastest layout that the probe has confirmed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig

from evollm.data.samples import Batch
from evollm.errors import CheckpointError, ConfigurationError
from evollm.models.blocks import of_rows
from evollm.models.budget import count_saved_bytes
from evollm.models.exchange import from_all_processes
from evollm.models.fast_paths import FastPaths
from evollm.models.flops import EVALUATION, TRAINING
from evollm.models.items import BatchSlot, Item, ItemLoss, PassOptions
from evollm.models.layouts import PackedLayout, layout_for, longest_sequence
from evollm.models.logprobs import MemberLogprobs, TokenLogprobs, pieces_of
from evollm.models.padding import AnswerWays
from evollm.models.pass_budgets import PassBudgets
from evollm.models.passes import FewSamples
from evollm.models.probe import probe, probed_length
from evollm.models.runner import Plan, Runner
from evollm.models.shared_base import SharedBase
from evollm.models.slow_settings import slow_dtype
from evollm.processes import Processes

__all__ = ["BatchSlot", "Engine", "Item", "ItemLoss", "PassOptions"]

_ATTRIBUTE = "_evollm_engine"


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
        adapter. Items that have batches of their own share passes in blocks, one for each adapter; on an
        encoder-decoder or a sharded base, or where the probe finds that to be wrong, they go one after the other.

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
        """The log-probs of all items, in passes that they share."""
        sharing: dict[int, list[int]] = {}
        for number, item in enumerate(items):
            sharing.setdefault(id(item.batch), []).append(number)
            passes = [item.adapter, *options.reference]
            self.base.flops.add(kind, item.batch, passes, training=loss is not None)
        found: dict[int, MemberLogprobs] = {}
        own = [numbers[0] for numbers in sharing.values() if len(numbers) == 1]
        if len(own) > 1 and not options.reference and options.slot is None and not self.base.is_sharded:
            # The processes of a sharded base must make passes with the same members.
            found |= self._run_own(items, own, options, loss)
        for numbers in sharing.values():
            if numbers[0] not in found:
                members, batch = [items[number].adapter for number in numbers], items[numbers[0]].batch
                its = None if loss is None else partial(_of_items, loss, numbers)
                found |= zip(numbers, self._run_batch(batch, members, options, its).members, strict=True)
        return [found[number] for number in range(len(items))]

    def _run_own(
        self, items: Sequence[Item], numbers: Sequence[int], options: PassOptions, loss: ItemLoss | None
    ) -> dict[int, MemberLogprobs]:
        """The log-probs of those items, of which each has a batch of its own; {} if they cannot share passes."""
        batches = [items[number].batch for number in numbers]
        ends = np.cumsum([len(batch) for batch in batches]).tolist()
        rows_of = [range(end - len(batch), end) for end, batch in zip(ends, batches, strict=True)]
        whole = Batch([sample for batch in batches for sample in batch], batches[0].split_name)
        owned: dict[str | None, list[int]] = {}
        for number, rows in zip(numbers, rows_of, strict=True):
            owned.setdefault(items[number].adapter, []).extend(rows)
        if len(owned) == 1 and loss is None:
            found = self._run_batch(whole, [*owned], options, None)
        elif None in owned or (loss is not None and len(owned) < len(numbers)):
            return {}
        else:
            plan = self._plan(whole, [*owned], options, training=loss is not None)
            if not (plan.paths.stacking and plan.paths.own_samples and isinstance(plan.layout, PackedLayout)):
                return {}
            starts = [rows.start for rows in rows_of]
            its = None if loss is None else partial(_of_own, loss, numbers, starts)
            found = self._carry_out(plan, [*owned], whole, its, [*owned.values()])
        return {number: of_rows(found, rows).of(0) for number, rows in zip(numbers, rows_of, strict=True)}

    def _run_batch(
        self, batch: Batch, members: Sequence[str | None], options: PassOptions, loss: ItemLoss | None
    ) -> TokenLogprobs:
        """The log-probs of a batch that these members share."""
        plan = self._plan(batch, members, options, training=loss is not None)
        return self._carry_out(plan, members, batch, loss)

    def _plan(self, batch: Batch, members: Sequence[str | None], options: PassOptions, *, training: bool) -> Plan:
        """How members go through the base with these samples."""
        self.base.adapters.release_lost()
        self.say([slow_dtype(self.base.device.type, self.base.network.dtype)])
        paths = self.prepare([*members, *options.reference], longest_sequence(self.base, batch))
        if training and self.base.adapters.have_hooks([name for name in members if name is not None]):
            # Routed layers compute gradients of rows, of which autograd knows nothing.
            self.say(["members go one by one: their parameters have hooks"])
            paths = replace(paths, stacking=False)
        layout = layout_for(self.base, paths, explicit_positions=options.explicit_positions)
        if training and layout.own_attention:
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
        budget = options.token_budget or self.budgets.budget(saved, training=training, recompute=recompute, tiled=tiled)
        return Plan(paths, layout, replace(options, gradient_checkpointing=recompute), budget)

    def _carry_out(
        self,
        plan: Plan,
        members: Sequence[str | None],
        batch: Batch,
        loss: ItemLoss | None,
        owned: Sequence[Sequence[int]] = (),
    ) -> TokenLogprobs:
        """The log-probs of a batch whose samples are split over the processes; every process gets all results.

        Args:
            plan: How members go through the base.
            members: The members.
            batch: The samples.
            loss: The loss of members on rows of the batch.
            owned: The rows of each member; empty: every member has all rows.
        """
        slotted = [name for name in members if name is not None] * (plan.options.slot or BatchSlot(0, 1)).of
        stack = self.base.adapters.stack(slotted) if plan.paths.stacking and slotted else None
        runner, processes = Runner(self.base, plan, stack), Processes.present()
        run = partial(runner.of_each, batch, owned, loss) if owned else partial(runner.of_members, batch, members, loss)
        own = range(len(batch)) if processes.size == 1 else processes.share(len(batch))
        with nullcontext() if stack is None or loss is None else stack.training():
            found = run(own) if own or self.base.is_sharded else None
        self.attention = runner.attention or self.attention
        if processes.size == 1:
            assert found is not None
            return found
        dtype = torch.promote_types(self.base.network.dtype, torch.float32)
        num_tokens = int(sum(piece.length for piece in pieces_of(batch)))
        nothing = torch.zeros(1 if owned else len(members), num_tokens, dtype=dtype)
        return from_all_processes(found, own, batch, nothing.to(self.base.device), plan.options.balancing)

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


def _of_own(
    loss: ItemLoss,
    items: Sequence[int],
    starts: Sequence[int],
    members: Sequence[int],
    rows: Sequence[int],
    found: TokenLogprobs,
) -> torch.Tensor:
    """`loss` of one member, with its rows in the batch of all items turned into rows of its own batch."""
    (member,) = members
    return loss([items[member]], [row - starts[member] for row in rows], found)


def _read_paths(state: Any) -> dict[tuple[str, int], FastPaths]:
    """The fast paths in an output of `Engine.state_dict`."""
    paths = {}
    for entry in state["paths"]:
        settings, known = entry["settings"], FastPaths.from_dict({k: v for k, v in entry.items() if k != "settings"})
        if not isinstance(settings, str):
            raise ValueError(f"{settings!r} are not the settings of an adapter")
        paths[settings, known.longest] = known
    return paths
