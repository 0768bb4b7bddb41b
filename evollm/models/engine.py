"""Log-probs of many members in few passes through the base, by the fastest path that has proved itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from evollm.data.samples import Batch
from evollm.errors import CheckpointError, ConfigurationError
from evollm.models.attention import PackedSequences
from evollm.models.budget import affordable_tokens, count_saved_bytes, default_budget, should_recompute
from evollm.models.encoder_decoder import (
    EncodedPairs,
    encoder_decoder_logprobs,
    lone_encoder_decoder_logprobs,
    longest_side,
    padded_lengths,
    start_token,
)
from evollm.models.fast_paths import FastPaths
from evollm.models.grouping import balanced_groups, padded_groups
from evollm.models.layers import FanOut
from evollm.models.load_balancing import (
    LoadBalancing,
    Span,
    lone_spans,
    packed_spans,
    padded_spans,
    recorded,
    row_loads,
)
from evollm.models.logprobs import PairLogprobs, completion_logprobs, lone_logprobs, packed_logprobs
from evollm.models.loss_scaling import ScaledBackward
from evollm.models.packing import PackedSamples
from evollm.models.probe import probe, probed_length
from evollm.models.shared_base import SharedBase
from evollm.models.slow_settings import is_card, needless_checkpointing, slow_dtype
from evollm.processes import Processes

# (members, rows, log-probs of each member for these rows) -> the sum of the members' losses on them.
MemberLoss = Callable[[Sequence[int], Sequence[int], list[PairLogprobs]], torch.Tensor]

_ATTRIBUTE = "_evollm_engine"


@dataclass(frozen=True)
class BatchSlot:
    """The place that a member had among others, for passes of the same shapes without them: the bits depend on those.

    Attributes:
        place: Its position, from 0.
        of: How many members there were.
    """

    place: int
    of: int


@dataclass(frozen=True)
class PassOptions:
    """How the members of a population go through the base; the same for all of them.

    Attributes:
        token_budget: Most tokens in a pass, over all its members; a pair that is longer has a pass of its own. None:
            what suits the device and its free memory.
        max_pairs: Most pairs of one member in a pass; None: no bound.
        explicit_positions: Whether position ids are passed; without them pairs cannot share their prompt.
        gradient_checkpointing: Recompute activations in the backward pass. None: where memory is too short for them.
        up_to_shorter: Give each pair's sums up to its shorter side's length too.
        slot: Of a member by itself: it goes through the base in this place, and in the places beside it, too, from
            which nothing is taken. None: the members that are given.
        balancing: The loss of routers for which each pair's loads of experts are given too; None: they are not.
    """

    token_budget: int | None = None
    max_pairs: int | None = None
    explicit_positions: bool = True
    gradient_checkpointing: bool | None = False
    up_to_shorter: bool = False
    slot: BatchSlot | None = None
    balancing: LoadBalancing | None = None


class Engine:
    """Takes members through the base that they share; `Engine.of(base)` gives the base's one engine.

    Attributes:
        base: The base.
        paths: Which fast paths members take, by the settings of their LoRA configuration and the length that was tried.
        attention: What the latest pass computed attention by, in words; "" before the first one.
    """

    def __init__(self, base: SharedBase) -> None:
        self.base = base
        self.paths: dict[tuple[str, int], FastPaths] = {}
        self.attention = ""
        self._budgets: dict[tuple[bool, bool, bool], int] = {}
        # With and without a tiled head: tokens of which the activations fit into memory.
        self._affordable: dict[bool, int] = {}
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
    def logprobs(self, batch: Batch, members: Sequence[str | None], options: PassOptions) -> list[PairLogprobs]:
        """The log-probs of a batch's pairs under each member.

        Args:
            batch: B pairs.
            members: Names of adapters; None: the base without adapter.
            options: How they go through the base.

        Returns:
            (B,) sums for each member, on the base's device.
        """
        options = replace(options, gradient_checkpointing=False)
        return self._run(batch, members, options, loss=None)

    def backward(
        self, batch: Batch, members: Sequence[str], options: PassOptions, loss: MemberLoss
    ) -> list[PairLogprobs]:
        """The same, and add the gradient of the members' losses to their parameters'.

        Args:
            batch: B pairs.
            members: Names of trainable adapters.
            options: How they go through the base.
            loss: From positions of members, of pairs in the batch, and their log-probs, to the sum of these members'
                losses on these pairs. Called once for each pass.
        """
        for name in members:
            # Whoever has the network may have called PEFT's own switch, which freezes all adapters but one.
            self.base.adapters.restore_trainability(name)
        return self._run(batch, members, options, loss)

    def prepare(self, members: Sequence[str | None], length: int) -> FastPaths:
        """The fast paths that all these members may take with pairs of up to `length` tokens; others are probed."""
        configs = {
            self.base.adapters.settings(name): self.base.adapters.config(name) for name in members if name is not None
        }
        if None in members:
            # The base by itself is probed together with an adapter; there is always one.
            settings, config = self._without_adapter or self._settings_of(self.base.adapters.names[0])
            configs.setdefault(settings, config)
        longest = probed_length(self.base, length)
        found = FastPaths(longest=longest)
        for settings, config in configs.items():
            # By the length, and not by the longest one so far: bits must not depend on what came before.
            known = self.paths.get((settings, longest))
            if known is None:
                self.paths[settings, longest] = known = probe(self.base, config, longest)
                self.say(known.reasons)
            found = found & known
        return found

    def _run(
        self, batch: Batch, members: Sequence[str | None], options: PassOptions, loss: MemberLoss | None
    ) -> list[PairLogprobs]:
        """All pairs, each in one of the processes; every process gets all results."""
        self.base.adapters.release_lost()
        self.say([slow_dtype(self.base.device.type, self.base.network.dtype)])
        longest = longest_side(batch) if self.base.is_encoder_decoder else batch.longest_sequence
        paths = self.prepare(members, longest)
        if not (options.explicit_positions or self.base.is_encoder_decoder):
            paths = replace(paths, shared_prompt=False)
        if loss is not None and (self.base.is_encoder_decoder or not paths.shared_prompt):
            self._check_own_attention()
        if paths.goes_alone(options.explicit_positions):
            # Processes that share the base's layers need passes of equally many sequences.
            options = replace(options, max_pairs=1)
        options = replace(options, gradient_checkpointing=self._recomputes(batch, members, options, paths))
        budget = options.token_budget or self._default_budget(batch, members, options, paths, training=loss is not None)
        processes = Processes.present()
        if processes.size == 1:
            return self._run_here(batch, range(len(batch)), members, options, paths, budget, loss)
        own = processes.share(len(batch))
        results: Sequence[PairLogprobs | None] = [None] * len(members)
        if own or self.base.is_sharded:
            results = self._run_here(batch, own, members, options, paths, budget, loss) or results
        columns = 4 if options.up_to_shorter else 2
        experts = None if options.balancing is None else options.balancing.experts
        return [
            _from_everywhere(result, own, (columns, len(batch)), self.base.device, processes, experts)
            for result in results
        ]

    def _run_here(
        self,
        batch: Batch,
        own: Sequence[int],
        members: Sequence[str | None],
        options: PassOptions,
        paths: FastPaths,
        budget: int,
        loss: MemberLoss | None,
    ) -> list[PairLogprobs]:
        """The pairs of these rows, in their order; [] without rows."""
        parts: list[list[PairLogprobs]] = [[] for _ in members]
        groups: list[list[int]] = []
        if own:
            divided = self._groups(batch.select(own), budget, options.max_pairs, paths)
            groups = [[own[row] for row in rows] for rows in divided]
        slot = options.slot or BatchSlot(0, 1)
        slotted = [*members] * slot.of
        fillers = 0
        if self.base.is_sharded:
            # Weights come from all processes: who has fewer passes goes along in passes that count for nothing.
            fillers = Processes.present().largest(len(groups)) - len(groups)
        for rows, weight in [*((rows, 1) for rows in groups), *[([0], 0)] * fillers]:
            few = _FewPairs(self.base, batch.select(rows), slotted, paths)
            for numbers in few.passes(budget):
                # By itself a member takes part in the one pass that its slot is in.
                taking = numbers if options.slot is None else [0] if slot.place in numbers else []
                if not taking:
                    continue
                trained = [members[number] for number in taking]
                found = None if loss is None else _WeightedLoss(loss, taking, rows, weight)
                place = None if options.slot is None else list(numbers).index(slot.place)
                taken = self._pass(few, numbers, options, place, trained, found)
                self.attention = few.attention
                for number, part in zip(taking, taken, strict=True):
                    if weight:
                        parts[number].append(part)
        return [PairLogprobs.join(member_parts, groups) for member_parts in parts] if groups else []

    def _pass(
        self,
        few: _FewPairs,
        numbers: Sequence[int],
        options: PassOptions,
        place: int | None,
        members: Sequence[str | None],
        loss: _WeightedLoss | None,
    ) -> list[PairLogprobs]:
        """The log-probs of the members that take part in one pass, and their gradients added to the parameters'."""
        scaled = None
        if loss is not None and self.base.network.dtype == torch.float16:
            names = [name for name in members if name is not None]
            scaled = ScaledBackward([list(self.base.adapters.parameters(name).values()) for name in names])
        again = True
        while again:
            with few.forward(numbers, options) as logprobs:
                taken = logprobs if place is None else [logprobs[place]]
                # Inside the block, since it recomputes checkpointed layers.
                again = scaled is not None and loss is not None and scaled.attempt(loss, taken)
                if scaled is None and loss is not None:
                    loss(taken).backward()
            if self.base.is_sharded and scaled is not None:
                again = bool(Processes.present().largest(again))
            results = [part.like([tensor.detach() for tensor in part.tensors]) for part in taken]
            # Their graph: the next one must not come to lie beside it.
            del logprobs, taken
        if scaled is not None:
            scaled.accumulate()
        return results

    def _groups(self, batch: Batch, budget: int, max_pairs: int | None, paths: FastPaths) -> list[list[int]]:
        """Rows that go through the base together."""
        if self.base.is_encoder_decoder:
            return padded_groups(padded_lengths(batch, shared_prompt=paths.shared_prompt), budget, max_pairs)
        if paths.shared_prompt:
            return balanced_groups(batch.num_tokens.tolist(), budget, max_pairs)
        # Two padded sequences for each pair, one for an SFT example.
        longest = batch.prompt_lengths + np.maximum(batch.chosen_lengths, batch.rejected_lengths)
        sequences = 1 + (batch.rejected_lengths > 0)
        return padded_groups(sequences * longest, budget, max_pairs)

    def begin(self, adapter: str) -> None:
        """Forget what was found for earlier runs on this base, on which the bits of a run must not depend.

        Args:
            adapter: One of the run's; the base without adapter is probed with its configuration.
        """
        self.paths.clear()
        self._budgets.clear()
        self._affordable.clear()
        self._without_adapter = self._settings_of(adapter)

    def state_dict(self) -> dict[str, Any]:
        """Fast paths, default budgets and room for activations found so far, as JSON: a run's bits depend on them."""
        return {
            "paths": [{"settings": settings, **paths.to_dict()} for (settings, _), paths in self.paths.items()],
            "budgets": [[*kind, budget] for kind, budget in self._budgets.items()],
            "affordable": [[tiled, tokens] for tiled, tokens in self._affordable.items()],
        }

    def load_state_dict(self, state: object) -> None:
        """Take what `state_dict` gave, whatever a probe would find here and whatever memory is free.

        Raises:
            CheckpointError: `state` is not what `state_dict` gave; nothing is changed.
        """
        try:
            paths, budgets, affordable = _read_state(state)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"what the checkpoint says of the fast paths is damaged: {error}") from error
        self.paths, self._budgets, self._affordable = paths, budgets, affordable
        for known in paths.values():
            self.say(known.reasons)

    def _default_budget(
        self,
        batch: Batch,
        members: Sequence[str | None],
        options: PassOptions,
        paths: FastPaths,
        *,
        training: bool,
    ) -> int:
        """The budget for this kind of pass, found at the first of its kind and kept."""
        kind = (training, bool(options.gradient_checkpointing), paths.tiled_head)
        if kind not in self._budgets:
            per_token = self._saved_per_token(batch, members, options, paths)
            budget = default_budget(self.base, per_token, training=training, tiled=paths.tiled_head)
            self._budgets[kind] = Processes.present().smallest(budget)
        return self._budgets[kind]

    def _recomputes(self, batch: Batch, members: Sequence[str | None], options: PassOptions, paths: FastPaths) -> bool:
        """Whether activations are computed again in the backward pass: as the user says, or as memory needs it.

        What is kept is for how many tokens memory has room, and not what follows from it: a longer pair may come.
        """
        base, asked = self.base, options.gradient_checkpointing
        device = base.device.type
        if asked is False or not base.can_checkpoint or base.is_sharded or (asked and not is_card(device)):
            # The layers of a sharded base are recomputed in any case.
            return bool(asked) or (asked is None and base.is_sharded)
        if paths.tiled_head not in self._affordable:
            keeping = replace(options, gradient_checkpointing=False)
            per_token = self._saved_per_token(batch, members, keeping, paths)
            affordable = affordable_tokens(base, per_token, tiled=paths.tiled_head)
            self._affordable[paths.tiled_head] = Processes.present().smallest(affordable)
        room = self._affordable[paths.tiled_head], device, options.token_budget, int(batch.num_tokens.max())
        if asked:
            self.say([needless_checkpointing(device, room[0], room[2], room[3])])
            return True
        return should_recompute(*room)

    def _saved_per_token(
        self, batch: Batch, members: Sequence[str | None], options: PassOptions, paths: FastPaths
    ) -> float:
        """Bytes that a pass of one member saves for each token."""
        # The longest: what a pass saves once, the members' stacked weights, should weigh little.
        longest = batch.select([int(np.argmax(batch.num_tokens))])
        few = _FewPairs(self.base, longest, members, paths)
        with count_saved_bytes(keep=False) as saved, few.forward([0], options):
            pass
        return saved.total / int(longest.num_tokens.sum())

    def _check_own_attention(self) -> None:
        """Refuse to train by an attention of the model's own that cannot be differentiated."""
        attention = self.base.network.config._attn_implementation
        if attention == "flex_attention" and self.base.device.type == "cpu":
            fix = "has no backward pass on a CPU: load the base with attn_implementation='sdpa'"
            raise ConfigurationError("attn_implementation", attention, fix)

    def _settings_of(self, adapter: str) -> tuple[str, LoraConfig]:
        return self.base.adapters.settings(adapter), self.base.adapters.config(adapter)

    def say(self, reasons: Sequence[str]) -> None:
        """Warn of each of these that has not been said of the base yet; "" is nothing to say."""
        for reason in filter(None, reasons):
            # The figures in brackets differ from one LoRA configuration to the next; what follows from them does not.
            what = reason.split(" (", maxsplit=1)[0]
            if what not in self._said:
                self._said.add(what)
                warnings.warn(f"{self.base.name or 'the base'}: {reason}", UserWarning, stacklevel=3)


@dataclass(frozen=True)
class _WeightedLoss:
    """The losses of a pass, as a function of the members' log-probs."""

    loss: MemberLoss
    members: Sequence[int]
    rows: Sequence[int]
    weight: int

    def __call__(self, policies: list[PairLogprobs]) -> torch.Tensor:
        return self.loss(self.members, self.rows, policies) * self.weight


def _read_state(
    state: Any,
) -> tuple[dict[tuple[str, int], FastPaths], dict[tuple[bool, bool, bool], int], dict[bool, int]]:
    """Fast paths, default budgets and room for activations from what `Engine.state_dict` gave."""
    paths, budgets = {}, {}
    for entry in state["paths"]:
        settings, known = entry["settings"], FastPaths.from_dict({k: v for k, v in entry.items() if k != "settings"})
        if not isinstance(settings, str):
            raise ValueError(f"{settings!r} are not the settings of an adapter")
        paths[settings, known.longest] = known
    for *kind, budget in state["budgets"]:
        one, two, three = kind
        if not all(isinstance(value, bool) for value in kind) or type(budget) is not int or budget < 1:
            raise ValueError(f"{[*kind, budget]!r} is not a budget")
        budgets[one, two, three] = budget
    affordable = {}
    # Absent from earlier checkpoints, whose agents all say whether they recompute.
    for tiled, tokens in state.get("affordable", []):
        if not isinstance(tiled, bool) or type(tokens) is not int or tokens < 0:
            raise ValueError(f"{[tiled, tokens]!r} is no room for activations")
        affordable[tiled] = tokens
    return paths, budgets, affordable


def _from_everywhere(
    result: PairLogprobs | None,
    own: Sequence[int],
    shape: tuple[int, int],
    device: torch.device,
    processes: Processes,
    experts: int | None,
) -> PairLogprobs:
    """The log-probs of all pairs, of which each process has its own."""
    sums = torch.zeros(shape, dtype=torch.float64, device=device)
    if result is not None:
        sums[:, list(own)] = torch.stack(result.columns).double()
    processes.add_up(sums)
    if experts is None:
        return PairLogprobs.of(list(sums))
    loads = sums.new_zeros(shape[1], 2, experts)
    if result is not None and result.loads is not None:
        loads[list(own)] = result.loads.double()
    processes.add_up(loads)
    return PairLogprobs.of(list(sums), loads)


class _FewPairs:
    """The pairs of one pass, laid out once, and the members that go through the base with them."""

    def __init__(self, base: SharedBase, batch: Batch, members: Sequence[str | None], paths: FastPaths) -> None:
        self._base = base
        self._batch = batch
        self._members = members
        self._paths = paths
        self._sides: EncodedPairs | None = None
        self._packed: PackedSamples | None = None
        if base.is_encoder_decoder:
            start = start_token(base.network)
            self._sides = EncodedPairs.of(batch, base.device, start, shared_prompt=paths.shared_prompt)
        elif paths.shared_prompt:
            self._packed = PackedSamples.of(batch, base.device)
        self._layout: PackedSequences | None = None
        if self._packed:
            self._layout = PackedSequences(self._packed.lengths, base.device, base.network.dtype)
        first = base.adapters.first_layer([name for name in members if name is not None])
        self._fan_out = FanOut(first, 1) if self._packed and first is not None else None

    @property
    def starts_at_first_adapter(self) -> bool:
        """Whether the layers below the first adapter run once for all members."""
        return self._fan_out is not None

    @property
    def attention(self) -> str:
        """What attention has been computed by, in words."""
        kinds = sorted(self._layout.kinds) if self._layout else []
        return " and ".join(kinds) or f"the model's own ({self._base.network.config._attn_implementation})"

    def passes(self, budget: int) -> list[Sequence[int]]:
        """Positions of the members of each pass: as many as the budget holds, evenly."""
        together = 1
        stacking = self.starts_at_first_adapter or self._sides is not None
        if self._paths.stacking and stacking and None not in self._members:
            tokens = int(self._batch.num_tokens.sum()) if self._sides is None else self._sides.num_tokens
            together = max(1, budget // tokens)
        if self._base.is_sharded:
            together = Processes.present().smallest(together)
        count = -(-len(self._members) // together)
        return [part.tolist() for part in np.array_split(np.arange(len(self._members)), count)]

    @contextmanager
    def forward(self, numbers: Sequence[int], options: PassOptions) -> Iterator[list[PairLogprobs]]:
        """The log-probs of these members, inside a block in which their gradients can be computed."""
        base, paths = self._base, self._paths
        names = [self._members[number] for number in numbers]
        routes = tuple(name for name in names if name is not None) if paths.stacking else ()
        with ExitStack() as stack:
            recompute = bool(options.gradient_checkpointing)
            network = stack.enter_context(base.active(names[0], gradient_checkpointing=recompute))
            stack.enter_context(base.router.route(routes or None))
            if self._packed is not None and self._layout is not None:
                # Without an adapter there are no members to part.
                fan_out = self._fan_out if names[0] is not None else None
                if fan_out is not None:
                    fan_out.members = len(names)
                    if options.balancing is not None:
                        # A layer that runs once for all members has one record of its router for all of them.
                        fan_out.first = 0
                stack.enter_context(base.packed(self._layout, fan_out))
            if options.balancing is None:
                yield self._logprobs(network, len(names), options)
                return
            with recorded(network) as calls:
                found = self._logprobs(network, len(names), options)
            rows, per_token = len(self._batch), options.balancing.per_token
            loads = row_loads(calls, self._spans(options), rows, len(names), per_token)
            yield [replace(member, loads=part) for member, part in zip(found, loads, strict=True)]

    def _logprobs(self, network: Any, num_members: int, options: PassOptions) -> list[PairLogprobs]:
        """The log-probs of these members, whose rows have been routed."""
        base, paths = self._base, self._paths
        wanted = {"tiled_head": paths.tiled_head, "up_to_shorter": options.up_to_shorter}
        if self._packed is not None:
            return packed_logprobs(network, self._packed, num_members, **wanted)
        if paths.goes_alone(options.explicit_positions):
            lone = lone_logprobs if self._sides is None else lone_encoder_decoder_logprobs
            return [lone(network, self._batch, base.device, up_to_shorter=options.up_to_shorter)]
        if self._sides is not None:
            return encoder_decoder_logprobs(network, self._sides, num_members, **wanted)
        explicit = options.explicit_positions and paths.explicit_positions
        return [completion_logprobs(network, self._batch, base.device, explicit_positions=explicit, **wanted)]

    def _spans(self, options: PassOptions) -> list[Span]:
        """Where the tokens are whose routers have been recorded."""
        if self._packed is not None:
            return packed_spans(self._batch)
        return (lone_spans if self._paths.goes_alone(options.explicit_positions) else padded_spans)(self._batch)
