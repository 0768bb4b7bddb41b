"""A report that is drawn at once, for tests of what becomes of its files."""

from __future__ import annotations

from typing import Any

from evollm.report import write
from evollm.report.style import Picture, drawing, new_panel, to_picture


def quick_page(record: Any) -> tuple[str, list[Picture]]:
    """In place of `evollm.report.write.render`, which takes seconds: a page with one empty picture."""
    with drawing():
        picture = to_picture(new_panel(str(record.last_step))[0], "held-out-accuracy", "nothing")
    return f"{write._PAGE.decode()}{picture.svg}", [picture]
