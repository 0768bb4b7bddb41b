"""Checks that a layout reproduces the model's own log-probs, on random tokens and adapters, for any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from evollm.data.samples import Batch, IntArray, Sample
from evollm.errors import ConfigurationError
from evollm.models.adapters.targets import bypassed_layers_refused
from evollm.models.blocks import parts_of
from evollm.models.fast_paths import FastPaths
from evollm.models.flops import PROBE
from evollm.models.layouts import Layout, PackedLayout, layout_for, lone_layout
from evollm.models.logprobs import TokenLogprobs
from evollm.models.passes import FewSamples
from evollm.models.rounding import rounded_otherwise
from evollm.models.shared_base import SharedBase

# Tokens of the prompt and of each side of a pair.
_SHORT_PAIRS = ((4, 8, 8), (9, 5, 7), (2, 6, 4))
_COMPLETION = 8
_SHORTEST = 64
# Scale of the first noise that is added to the adapters' weights; doubled until log-probs change enough.
_NOISE = 0.02
_ATTEMPTS = 8
# Random roundings from which the rounding floor is estimated.
_ROUNDINGS = 2
# A path may differ by at most BOUND times the rounding floor; wrong adapters must differ by over _APART times that.
BOUND = 3
_APART = 3
_EMBEDDINGS_AT_ONCE = 4096


def probed_length(base: SharedBase, length: int) -> int:
    """Tokens of the pair that is probed for pairs of up to `length` tokens: a power of two, at most `max_positions`."""
    longest = max(_SHORTEST, 1 << (length - 1).bit_length())
    if base.max_positions is not None and length <= base.max_positions:
        return min(longest, base.max_positions)
    return longest


@torch.no_grad()
def probe(base: SharedBase, config: LoraConfig, longest: int) -> FastPaths:
    """Compare each layout with the model's own forward pass, on a pair of `longest` tokens and on short pairs.

    The model's own pass gets the token ids of one sequence and nothing else. The long pair exceeds every attention
    window that pairs of this length can exceed; the short pairs reveal a rejected side that attends to the chosen side
    or to another pair. Two adapters with random weights, freed afterwards, reveal rows that are routed to the wrong
    adapter. A layout is right if differences are within rounding: see `evollm.models.rounding`.

    Args:
        base: The base.
        config: Configuration of the members' adapters.
        longest: Tokens of the longest sequence for which the result holds; see `probed_length`.
    """
    pairs = random_pairs(base, longest)
    every, uneven, short = (Batch(part) for part in (pairs, pairs[:2], pairs[1:]))
    with random_adapters(base, config) as members:
        floor, apart = make_differ(base, members, short)
        first = own_sums(base, members[0], short.select([0]))
        with bypassed_layers_refused(base.network, members[0]):
            own = own_sums(base, members[0], every)
        floors = torch.full((len(own),), floor)
        floors[0] = max(floor, floor_of_long(base, members[0], pairs[0], own[0, 0]))
        bounds = BOUND * floors
        _refuse_memory(base, first, own[1:2], bounds[1:2])
        trial = Trial()
        explicit, implicit, reasons = _padded_batches(base, members[0], short, own[1:], bounds[1:])
        tiled = trial.agrees(
            "all logits are computed at once",
            lambda: _padded(base, members[0], short, explicit_positions=explicit, tiled_head=True),
            own[1:],
            bounds[1:],
        )
        shared = trial.agrees(
            "chosen and rejected side do not share their prompt",
            lambda: packed_sums(base, members[:1], every, tiled_head=tiled)[0],
            own,
            bounds,
        )
        if not shared:
            # Training will use padded batches, whose rows may have very different lengths.
            explicit, implicit, reasons = _padded_batches(base, members[0], uneven, own[:2], bounds[:2])
            trial.reasons += reasons
        stacking = own_samples = False
        if not base.adapters.can_stack(members):
            trial.reasons.append(
                "members go one by one (its adapters are not plain LoRA on linear layers of one device)"
            )
        elif apart <= _APART * BOUND * floor:
            trial.reasons.append("members go one by one (adapters with random weights hardly change its log-probs)")
        elif shared:
            other = own_sums(base, members[1], short)
            # Two passes: the second one finds the state that the first one left where members fan out.
            stacking = trial.agrees(
                "members go one by one",
                lambda: torch.cat(packed_sums(base, members, short, tiled_head=tiled, routed=True, passes=2)),
                torch.cat([own[1:], other]),
                bounds[1:].repeat(2),
            )
            # Blocks are those of a packed row. That of the second member is the shorter one, and filled up.
            counts = len(short) - 1, 1
            own_samples = (
                stacking
                and not base.is_encoder_decoder
                and trial.agrees(
                    "members with samples of their own go one by one",
                    lambda: _sums_of_own(base, members, short, counts, tiled_head=tiled),
                    torch.cat([own[1:-1], other[-1:]]),
                    bounds[1:],
                )
            )
    return FastPaths(shared, tiled, stacking, longest, tuple(trial.reasons), explicit, implicit, floor, own_samples)


def _padded_batches(
    base: SharedBase, member: str, batch: Batch, expected: Tensor, bounds: Tensor
) -> tuple[bool, bool, list[str]]:
    """Whether padded batches are right with position ids, whether without, and the reasons for a slower path."""
    with_ids, without = Trial(), Trial()
    explicit = with_ids.agrees(
        "position ids are not passed to it",
        lambda: _padded(base, member, batch, explicit_positions=True),
        expected,
        bounds,
    )
    implicit = without.agrees(
        "each sequence goes through it by itself",
        lambda: _padded(base, member, batch, explicit_positions=False),
        expected,
        bounds,
    )
    if explicit:
        return explicit, implicit, []
    return explicit, implicit, with_ids.reasons if implicit else without.reasons


def _refuse_memory(base: SharedBase, before: Tensor, after: Tensor, bounds: Tensor) -> None:
    """Check that a short pair's log-probs are the same before and after a forward pass of a long pair.

    Raises:
        ConfigurationError: The log-probs differ by more than rounding.
    """
    gaps = differences(after - before).cpu()
    if not (gaps <= bounds).all():
        fix = (
            f"after a longer sequence has gone through it, a log-prob is {gaps.max():.2g} nats off: its code keeps "
            "something from one pass to the next, so that no result would be its own"
        )
        raise ConfigurationError("actor_network", base.name or type(base.network).__name__, fix)


@dataclass
class Trial:
    """Compares log-probs, and collects the reasons why paths are not used.

    Attributes:
        reasons: One reason for each path that failed.
    """

    reasons: list[str] = field(default_factory=list)

    def agrees(self, otherwise: str, compute: Callable[[], Tensor], expected: Tensor, bounds: Tensor) -> bool:
        """Whether (B, 2) log-probs equal the expected ones within (B,) bounds; `otherwise` names the fallback."""
        try:
            gaps = differences(compute() - expected).cpu()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may raise anything on inputs that it does not support
            self.reasons.append(f"{otherwise} ({type(error).__name__}: {error})")
            return False
        if (gaps <= bounds).all():
            return True
        worst = int((gaps / bounds).nan_to_num(nan=float("inf")).argmax())
        reason = f"log-probs would be off by {gaps[worst]:.2g}, rounding explains {bounds[worst]:.2g}"
        self.reasons.append(f"{otherwise} ({reason})")
        return False


def differences(found: Tensor) -> Tensor:
    """The root mean square of each pair's differences, (B, N) -> (B,)."""
    return found.pow(2).mean(dim=1).sqrt()


def make_differ(base: SharedBase, members: Sequence[str], batch: Batch) -> tuple[float, float]:
    """Add noise to the members' weights until their log-probs differ by clearly more than rounding.

    Returns:
        The rounding floor, in nats, and the largest difference between the members' log-probs.
    """
    found = []
    for attempt in range(_ATTEMPTS):
        _add_noise(base, members, _NOISE * 2**attempt)
        plain = [_padded(base, member, batch) for member in members]
        moved = []
        for seed in range(_ROUNDINGS):
            with rounded_otherwise(base, members, seed):
                moved += [_padded(base, member, batch) - before for member, before in zip(members, plain, strict=True)]
        # At least one rounding of a log-prob, even if no log-prob changed.
        least = torch.finfo(torch.float32).eps * float(torch.cat(plain).abs().max())
        floor = max(least, float(differences(torch.cat(moved, dim=1)).max()))
        apart = float(differences(plain[0] - plain[1]).max())
        found.append((floor, apart))
        if apart > _APART * BOUND * floor:
            return floor, apart
    # All noise is taken back, since more noise did not help and enlarges rounding errors.
    _add_noise(base, members, -_NOISE * (2**_ATTEMPTS - 2))
    return found[0]


def floor_of_long(base: SharedBase, member: str, pair: Sample, expected: Tensor) -> float:
    """The rounding floor of a long sequence, prompt and chosen side, whose log-prob is `expected`."""
    alone = Batch([replace(pair, completions=pair.completions[:1])])
    with rounded_otherwise(base, [member], seed=0):
        return float((own_sums(base, member, alone)[0, 0] - expected).abs())


def own_sums(base: SharedBase, adapter: str, batch: Batch) -> Tensor:
    """(B, 2) sums by the model's own forward pass, one sequence at a time, from token ids only."""
    return _sums(base, lone_layout(base), (adapter,), batch)[0]


def _padded(
    base: SharedBase, adapter: str, batch: Batch, *, explicit_positions: bool = True, tiled_head: bool = False
) -> Tensor:
    """(B, 2) sums by the plain layout and PEFT's own forward pass."""
    paths = FastPaths(shared_prompt=False, tiled_head=tiled_head)
    return _sums(base, layout_for(base, paths, explicit_positions=explicit_positions), (adapter,), batch)[0]


def packed_sums(
    base: SharedBase,
    members: tuple[str, ...],
    batch: Batch,
    *,
    tiled_head: bool,
    routed: bool = False,
    passes: int = 1,
) -> list[Tensor]:
    """(B, 2) sums for each member with prompts computed once; the last result of `passes` equal passes."""
    return _sums(base, layout_for(base, FastPaths(tiled_head=tiled_head)), members, batch, routed=routed, passes=passes)


def _sums(
    base: SharedBase,
    layout: Layout,
    members: tuple[str, ...],
    batch: Batch,
    *,
    routed: bool = False,
    passes: int = 1,
) -> list[Tensor]:
    """(B, k) sums for each member, 0 for a missing completion; the last result of `passes` equal passes."""
    laid = layout.lay_out(batch, members)
    base.flops.add(PROBE, batch, members * passes)
    with (
        base.routed(base.adapters.stack(members)) if routed else base.active(members[0]) as network,
        laid.passing(len(members)),
    ):
        for _ in range(passes):
            values = laid.read(network, len(members))
        found = torch.stack(TokenLogprobs(values, laid.pieces).sums, dim=2)  # (M, B, k)
    return list(found)


def _sums_of_own(
    base: SharedBase, members: tuple[str, ...], batch: Batch, counts: tuple[int, ...], *, tiled_head: bool
) -> Tensor:
    """(B, 2) sums, for each member of as many consecutive pairs as it has, in one pass."""
    layout = PackedLayout(base, tiled_head, counts)
    stack = base.adapters.stack(members)
    few = FewSamples(base, layout, batch, members, stacking=True, stack=stack, counts=counts)
    base.flops.add(PROBE, batch, members[:1])
    with few.forward(range(len(members))) as found:
        return torch.cat([torch.stack(part.sums, dim=2)[0] for part in parts_of(found, counts)])


def _usual_ids(base: SharedBase) -> IntArray:
    """The token ids with finite embeddings, since a NaN would make every path look wrong; all ids if none is finite.

    The padding id is left out, because some models treat its embedding specially.
    """
    weight = cast(Any, base.network).get_input_embeddings().weight
    # In blocks, since the float32 copy may need more memory than the weights.
    finite = torch.cat([torch.isfinite(block.float().sum(dim=1)).cpu() for block in weight.split(_EMBEDDINGS_AT_ONCE)])
    usual: IntArray = (finite if finite.any() else ~finite).nonzero().flatten().numpy()
    padding = getattr(base.network.config, "pad_token_id", None)
    return usual if padding is None else np.setdiff1d(usual, [padding])


def random_pairs(base: SharedBase, longest: int) -> list[Sample]:
    """A pair whose sequences have `longest` tokens, then short pairs; each side ends with EOS, like a completion."""
    rng, ids = np.random.default_rng(0), _usual_ids(base)
    end = getattr(base.network.config, "eos_token_id", None)
    last = np.array([end] if end in ids else ids[:1])

    def side(count: int) -> IntArray:
        return np.concatenate([ids[rng.integers(len(ids), size=count - 1)], last])

    sizes = [(longest - _COMPLETION, _COMPLETION, _COMPLETION), *_SHORT_PAIRS]
    return [
        Sample.of(ids[rng.integers(len(ids), size=prompt)], side(chosen), side(rejected))
        for prompt, chosen, rejected in sizes
    ]


@contextmanager
def random_adapters(base: SharedBase, config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Two frozen adapters that exist inside the block only."""
    names: list[str] = []
    with base.active(base.adapters.active):
        try:
            names += [base.adapters.add("probe", config, trainable=False, seed=1)]
            names += [base.adapters.add("probe", config, trainable=False, seed=2)]
            yield names[0], names[1]
        finally:
            for name in names:
                base.adapters.release(name)


def _add_noise(base: SharedBase, adapters: Sequence[str], scale: float) -> None:
    """Add noise to the adapters' weights, different for each adapter; calls differ in the scale only."""
    generator = torch.Generator().manual_seed(0)
    for name in adapters:
        for parameter in base.adapters.parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)
