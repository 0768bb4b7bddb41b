"""What is strange about rows that are used, counted for the row report."""

from __future__ import annotations

from collections.abc import Sequence

from evollm.data.report import FIRST_ROWS, listed, mixture_warning
from evollm.data.rows import ChatPair, TextPair


def remarks_on(pairs: Sequence[TextPair | ChatPair]) -> str:
    """What to know of a dataset; "" when nothing is strange."""
    found: dict[str, list[int]] = {}
    for pair in pairs:
        for remark in pair.remarks:
            found.setdefault(remark, []).append(pair.row)
    counted = [f"{len(rows)} with {remark}: {listed(len(rows), rows[:FIRST_ROWS])}" for remark, rows in found.items()]
    return "; ".join(filter(None, (mixture_warning(pairs), *counted)))
