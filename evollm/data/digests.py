"""Digests of the samples of a split, by which a run that is resumed knows its data and says what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from evollm.data.samples import IntArray, Sample
from evollm.names import row_name

# Most digests of a split, and most tokens of a changed text to show.
_SHARES, _SHOWN_TOKENS = 256, 40


def digests_of(pairs: Sequence[Sample]) -> list[str]:
    """Digests of up to 256 equal parts of the samples in their order."""
    return [_digest_of(share) for share in _shares(pairs)]


def first_change(
    splits: Mapping[str, Sequence[Sample]],
    before: Mapping[str, Sequence[str]],
    decode: Callable[[IntArray], object],
    noun: str,
) -> str:
    """Say in words which text is the first that has changed; "" if no digest of a split says so.

    Args:
        splits: The samples of each split.
        before: The digests of each split then, as `digests_of` gives them.
        decode: From token ids to text.
        noun: What a sample is called.
    """
    for split, pairs in splits.items():
        shares, then = _shares(pairs), before.get(split) or []
        for number, share in enumerate(shares):
            if number >= len(then) or then[number] != _digest_of(share):
                text = str(decode(share[0].token_ids[:_SHOWN_TOKENS]))
                many = f"one of {len(share)} {noun} from" if len(share) > 1 else "that of"
                where = row_name(share[0].row, share[0].set_name)
                return f"{split}: the first other text is {many} {where}, which now begins {text!r}"
        if len(then) > len(shares):
            return f"{split}: there are fewer {noun} than then, {len(pairs)}"
    return ""


def _shares(pairs: Sequence[Sample]) -> list[Sequence[Sample]]:
    """Up to `_SHARES` consecutive parts of equal size; the last part may be smaller."""
    size = -(-len(pairs) // _SHARES) or 1
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def _digest_of(pairs: Iterable[Sample]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for pair in pairs:
        digest.update(pair.key)
    return digest.hexdigest()
