"""Which questions are answered in one call of `generate`: how many, and how different the lengths of their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

# For how many tokens of a prompt a pass takes as long as for a token of each of a few answers, where mostly weights
# are read. Guesses: they decide how much is padded, not what is answered.
_STEP_TOKENS = {"cpu": 16}
_STEP_TOKENS_OTHERWISE = 128

Name = TypeVar("Name", bound=str | None)


class Room(NamedTuple):
    """What a call of `generate` may have.

    Attributes:
        tokens: Most tokens of prompts, padding and answers; 0: each question has a call of its own.
        padding: Most tokens of padding, which are computed like others; 0: prompts of one length only.
        stacking: Whether several adapters may answer.
    """

    tokens: int
    padding: int
    stacking: bool


ALONE = Room(tokens=0, padding=0, stacking=False)


def step_tokens(device_type: str) -> int:
    """Tokens of padding that cost what one token more of all answers of a call costs: see `_STEP_TOKENS`."""
    return _STEP_TOKENS.get(device_type, _STEP_TOKENS_OTHERWISE)


def divided(
    asked: Mapping[Name, Sequence[int]], lengths: Sequence[int], max_new_tokens: int, room: Room
) -> Iterator[dict[Name, list[int]]]:
    """The questions of each call, the longest prompts first.

    Args:
        asked: Numbers of questions, by adapter.
        lengths: Of each question the tokens of its prompt.
        max_new_tokens: Tokens that an answer may have.
        room: What a call may have. A question that exceeds it has a call of its own.

    Yields:
        The questions of a call by adapter, in the order of `asked`. Of a length of which padding leaves no room for all
        questions none is taken.
    """
    left = {name: sorted(own, key=lambda row: -lengths[row]) for name, own in asked.items()}
    while left := {name: own for name, own in left.items() if own}:
        heads = {name: lengths[own[0]] for name, own in left.items()}
        longest = max(heads.values())
        most = max(1, room.tokens // (longest + max_new_tokens))
        names = sorted(left, key=lambda name: -heads[name])[: most if room.stacking else 1]
        first = {name: left[name][: max(1, most // len(names))] for name in names}
        sizes = sorted((lengths[row] for own in first.values() for row in own), reverse=True)
        padding = dict(zip(sizes, accumulate(longest - size for size in sizes), strict=True))
        shortest = min(size for size, total in padding.items() if total <= room.padding)
        call = {name: [row for row in first.get(name, []) if lengths[row] >= shortest] for name in left}
        yield {name: own for name, own in call.items() if own}
        left = {name: own[len(call[name]) :] for name, own in left.items()}
