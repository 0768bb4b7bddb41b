"""A report that is drawn at once, for tests of what becomes of its files."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from evollm.report import write
from evollm.report.style import Picture, drawing, to_picture


def quick_page(record: Any) -> tuple[str, list[Picture]]:
    """In place of `evollm.report.write.render`, which takes seconds: a page with one small picture."""
    with drawing():
        figure = Figure(figsize=(1, 1))
        figure.text(0.1, 0.5, str(record.last_step))
        picture = to_picture(figure, "held-out-accuracy", "nothing")
    return f"{write._PAGE.decode()}{picture.svg}", [picture]
