"""Members that have samples of their own in shared passes: who shares a pass, and which log-probs are whose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from evollm.models.logprobs import TokenLogprobs

# Most tokens of a pass over those of its members: what fills up the blocks is computed for nothing.
_MOST_FILLED = 1.25


class Block(NamedTuple):
    """A member's samples in a pass.

    Attributes:
        member: Position of the member.
        rows: Rows of its samples.
    """

    member: int
    rows: Sequence[int]


def shared_passes(
    groups: Sequence[Sequence[Sequence[int]]], tokens: Sequence[int], budget: int
) -> Iterator[list[Block]]:
    """Let members share passes, in which the block of each is as long as the longest one.

    Args:
        groups: For each member the rows of each of the passes that it would take alone.
        tokens: (B,) tokens of each row.
        budget: Most tokens in a pass; a longer group has a pass of its own.

    Yields:
        The blocks of each pass, of members that stand side by side.
    """

    def size(block: Block) -> int:
        return sum(tokens[row] for row in block.rows)

    blocks = [
        sorted((Block(member, rows) for rows in own), key=size, reverse=True) for member, own in enumerate(groups)
    ]
    for turn in range(max(map(len, blocks))):
        together: list[Block] = []
        for block in (own[turn] for own in blocks if turn < len(own)):
            sizes = [size(one) for one in (*together, block)]
            filled = len(sizes) * max(sizes)
            beside = bool(together) and together[-1].member + 1 == block.member
            if together and not (beside and filled <= min(budget, _MOST_FILLED * sum(sizes))):
                yield together
                together = []
            together.append(block)
        yield together


def parts_of(found: TokenLogprobs, counts: Sequence[int]) -> list[TokenLogprobs]:
    """Divide the log-probs of a pass in which each member has samples of its own.

    Args:
        found: The pass's log-probs: M rows, of which each is as long as the longest one, and the pieces of all samples.
        counts: Number of samples of each member.

    Returns:
        For each member its log-probs, (1, C), whose pieces count its own samples from 0.
    """
    parts, start = [], 0
    for member, count in enumerate(counts):
        own = slice(member, member + 1)
        pieces = [piece for piece in found.pieces if start <= piece.row < start + count]
        parts.append(
            TokenLogprobs(
                found.values[own, : sum(piece.length for piece in pieces)],
                tuple(piece._replace(row=piece.row - start) for piece in pieces),
                None if found.loads is None else found.loads[own, :count],
            )
        )
        start += count
    return parts


def of_rows(found: TokenLogprobs, rows: range) -> TokenLogprobs:
    """The log-probs of consecutive samples of a batch, whose pieces count them from 0."""
    pieces = [piece for piece in found.pieces if piece.row in rows]
    return TokenLogprobs(
        found.values.index_select(1, found.index_of(pieces)),
        tuple(piece._replace(row=piece.row - rows.start) for piece in pieces),
        None if found.loads is None else found.loads[:, rows.start : rows.stop],
    )
