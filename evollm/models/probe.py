"""Does a fast path give the plain path's log-probs? Tried on random tokens and adapters, not looked up by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from evollm.data.batch import IntArray, PreferenceBatch, TokenizedPair
from evollm.models.attention import PairLayout
from evollm.models.encoder_decoder import EncodedPairs, encoder_decoder_logprobs, start_token
from evollm.models.layers import FanOut
from evollm.models.logprobs import PairLogprobs, completion_logprobs, packed_logprobs
from evollm.models.packing import PackedPairs
from evollm.models.shared_base import SharedBase

# Largest difference of a token's log-prob, in nats, that rounding explains. Parts of many models compute in float32
# whatever the model's own dtype is.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_COMPLETION = 8
_SHORTEST = 64
# Added to the adapters' weights until they change the log-probs.
_NOISE = 0.02
_ATTEMPTS = 8
_EMBEDDINGS_AT_ONCE = 4096


@dataclass(frozen=True)
class FastPaths:
    """What the base and a LoRA configuration have been seen to compute rightly.

    Attributes:
        shared_prompt: Packed pairs, the prompt once.
        tiled_head: The head applied to the hidden states of completion tokens alone.
        stacking: Several members in one pass.
        longest: Longest sequence that this was tried with, in tokens.
        reasons: Why a path is not taken, for the user.
    """

    shared_prompt: bool = True
    tiled_head: bool = True
    stacking: bool = True
    longest: int = 0
    reasons: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, data: Any) -> FastPaths:
        """Read what `to_dict` gave.

        Raises:
            ValueError: It is something else.
        """
        names = {part.name for part in fields(cls)}
        if not isinstance(data, Mapping) or data.keys() != names:
            raise ValueError(f"fast paths have {sorted(names)}, not {data!r}")
        taken = [data[name] for name in ("shared_prompt", "tiled_head", "stacking")]
        reasons = data["reasons"]
        if not all(isinstance(value, bool) for value in taken) or type(data["longest"]) is not int:
            raise ValueError(f"{data!r} are not fast paths")
        if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
            raise ValueError(f"{reasons!r} are not reasons")
        return cls(**{**data, "reasons": tuple(reasons)})

    def __and__(self, other: FastPaths) -> FastPaths:
        """The paths that both take."""
        return FastPaths(
            shared_prompt=self.shared_prompt and other.shared_prompt,
            tiled_head=self.tiled_head and other.tiled_head,
            stacking=self.stacking and other.stacking,
            longest=min(self.longest, other.longest),
            reasons=self.reasons + other.reasons,
        )


def probed_length(base: SharedBase, length: int) -> int:
    """Tokens of the pair that stands for pairs of up to `length` tokens: a power of two, or all that the base takes."""
    longest = max(_SHORTEST, 1 << (length - 1).bit_length())
    if base.max_positions is not None and length <= base.max_positions:
        return min(longest, base.max_positions)
    return longest


@torch.no_grad()
def probe(base: SharedBase, config: LoraConfig, longest: int) -> FastPaths:
    """Compare each fast path with the plain one, on a pair of `longest` tokens and a short one.

    The long pair reaches past any attention window that pairs of this length reach past, the short one gives away a
    rejected side that sees its chosen side or another pair. Two adapters with random weights, freed afterwards, give
    away rows that go through the wrong one.

    Args:
        base: The base.
        config: Configuration of the members' adapters.
        longest: Tokens of the longest sequence to vouch for; see `probed_length`.
    """
    long, short = (PreferenceBatch.from_pairs([pair]) for pair in _random_pairs(_usual_ids(base), longest))
    both = PreferenceBatch.from_pairs([long.pair(0), short.pair(0)])
    trial = _Trial(bound=_TOLERANCE.get(base.network.dtype, max(_TOLERANCE.values())) * _COMPLETION)
    with _random_adapters(base, config) as members:
        plain = _log_probs_apart(base, members, short, apart=2 * trial.bound)
        if plain is None:
            reason = "no fast path is taken (adapters with random weights hardly change its log-probs)"
            return FastPaths(False, False, False, longest, (reason,))
        tiled = trial.agrees(
            "all logits are computed at once", lambda: _plain(base, members[0], short, tiled_head=True), plain[0]
        )
        expected = torch.cat([_plain(base, members[0], long), plain[0]])
        shared = trial.agrees(
            "chosen and rejected side do not share their prompt",
            lambda: _shared(base, members[:1], both, tiled_head=tiled)[0],
            expected,
        )
        stacking = False
        if not base.router.can_route(base.network, members):
            trial.reasons.append("members go one by one (its adapters are not plain LoRA on linear layers)")
        elif shared:
            # The second pass enters where the members part, with what the first one left there.
            stacking = trial.agrees(
                "members go one by one",
                lambda: torch.cat(_shared(base, members, short, tiled_head=tiled, routed=True, passes=2)),
                torch.cat(plain),
            )
    return FastPaths(shared, tiled, stacking, longest, tuple(trial.reasons))


@dataclass
class _Trial:
    """Compares log-probs, and notes why a path is not taken.

    Attributes:
        bound: Largest difference of a completion's log-prob, in nats.
        reasons: One for each path that failed.
    """

    bound: float
    reasons: list[str] = field(default_factory=list)

    def agrees(self, otherwise: str, compute: Callable[[], Tensor], expected: Tensor) -> bool:
        """Whether the log-probs are the expected ones; `otherwise` says what happens if not."""
        try:
            gap = float((compute() - expected).abs().max())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does with inputs that it was not written for
            self.reasons.append(f"{otherwise} ({type(error).__name__}: {error})")
            return False
        if gap <= self.bound:
            return True
        self.reasons.append(f"{otherwise} (log-probs would be off by {gap:.2g})")
        return False


def _log_probs_apart(
    base: SharedBase, members: Sequence[str], batch: PreferenceBatch, apart: float
) -> list[Tensor] | None:
    """(1, 2) by the plain path for each member, after so much noise on their weights that they differ."""
    for attempt in range(_ATTEMPTS):
        _add_noise(base, members, _NOISE * 2**attempt)
        plain = [_plain(base, member, batch) for member in members]
        if (plain[0] - plain[1]).abs().max() > apart:
            return plain
    return None


def _plain(base: SharedBase, adapter: str, batch: PreferenceBatch, *, tiled_head: bool = False) -> Tensor:
    """(B, 2) by the plain layout and PEFT's own forward pass."""
    with base.active(adapter) as network:
        if base.is_encoder_decoder:
            pairs = EncodedPairs.of(batch, base.device, start_token(network), shared_prompt=False)
            return _sums(encoder_decoder_logprobs(network, pairs, tiled_head=tiled_head)[0])
        return _sums(completion_logprobs(network, batch, base.device, tiled_head=tiled_head))


def _shared(
    base: SharedBase,
    members: tuple[str, ...],
    batch: PreferenceBatch,
    *,
    tiled_head: bool,
    routed: bool = False,
    passes: int = 1,
) -> list[Tensor]:
    """(B, 2) for each member with prompts computed once, of the last of some equal passes."""
    if base.is_encoder_decoder:
        return _encoded_once(base, members, batch, tiled_head=tiled_head, routed=routed)
    packed = PackedPairs.of(batch, base.device)
    first = base.first_adapted_layer(members)
    fan_out = None if first is None else FanOut(first, len(members))
    with (
        base.active(members[0]) as network,
        base.router.route(members if routed else None),
        base.packed(PairLayout(packed.lengths, base.device), fan_out),
    ):
        for _ in range(passes):
            found = packed_logprobs(network, packed, len(members), tiled_head=tiled_head)
        return [_sums(member) for member in found]


def _encoded_once(
    base: SharedBase, members: tuple[str, ...], batch: PreferenceBatch, *, tiled_head: bool, routed: bool
) -> list[Tensor]:
    """The same of an encoder-decoder model, which keeps nothing from one pass to the next."""
    pairs = EncodedPairs.of(batch, base.device, start_token(base.network), shared_prompt=True)
    with base.active(members[0]) as network, base.router.route(members if routed else None):
        found = encoder_decoder_logprobs(network, pairs, len(members), tiled_head=tiled_head)
    return [_sums(member) for member in found]


def _sums(found: PairLogprobs) -> Tensor:
    return torch.stack([found.chosen, found.rejected], dim=1)


def _usual_ids(base: SharedBase) -> IntArray:
    """The token ids whose embeddings are finite, all ids if there is none: from NaN no path could be told right."""
    weight = cast(Any, base.network).get_input_embeddings().weight
    # In blocks, since a type that can be summed may be wider.
    finite = torch.cat([torch.isfinite(block.float().sum(dim=1)).cpu() for block in weight.split(_EMBEDDINGS_AT_ONCE)])
    return (finite if finite.any() else ~finite).nonzero().flatten().numpy()


def _random_pairs(ids: IntArray, longest: int) -> tuple[TokenizedPair, TokenizedPair]:
    """A pair whose sequences are `longest` tokens long, and one with a prompt of a few tokens."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> IntArray:
        return ids[rng.integers(len(ids), size=count)]

    pairs = (
        TokenizedPair(tokens(size), tokens(_COMPLETION), tokens(_COMPLETION)) for size in (longest - _COMPLETION, 4)
    )
    long, short = pairs
    return long, short


@contextmanager
def _random_adapters(base: SharedBase, config: LoraConfig) -> Iterator[tuple[str, str]]:
    """Two frozen adapters, for as long as the block lasts."""
    names: list[str] = []
    with base.active(base.active_adapter):
        try:
            names += [base.add_adapter("probe", config, trainable=False, seed=1)]
            names += [base.add_adapter("probe", config, trainable=False, seed=2)]
            yield names[0], names[1]
        finally:
            for name in names:
                base.release(name)


def _add_noise(base: SharedBase, adapters: Sequence[str], scale: float) -> None:
    """Move each adapter's weights by noise of its own, the same at every call but for the scale."""
    generator = torch.Generator().manual_seed(0)
    for name in adapters:
        for parameter in base.parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)
