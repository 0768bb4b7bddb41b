"""What is strange about rows that are used, counted for the row report."""

from __future__ import annotations

from collections.abc import Sequence

from evollm.data.report import FIRST_ROWS, mixture_warning
from evollm.data.rows import ChatPair, TextPair


def remarks_on(pairs: Sequence[TextPair | ChatPair]) -> str:
    """What to know of a dataset; "" when nothing is strange."""
    found: dict[str, list[int]] = {}
    for pair in pairs:
        for remark in pair.remarks:
            found.setdefault(remark, []).append(pair.row)
    counted = [f"{len(rows)} with {remark}: {_listed(rows)}" for remark, rows in found.items()]
    return "; ".join(filter(None, (mixture_warning(pairs), *counted)))


def _listed(rows: Sequence[int]) -> str:
    more = ", ..." if len(rows) > FIRST_ROWS else ""
    return f"row{'' if len(rows) == 1 else 's'} {', '.join(map(str, rows[:FIRST_ROWS]))}{more}"
