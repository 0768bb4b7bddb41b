"""What the documents say, for the tests that hold it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

MODELS = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


@cache
def documented_paths() -> dict[str, dict[str, str]]:
    """For each family or kind of weights that a table names, its answers by the column's title."""
    found = {}
    for table in re.findall(r"^\| (?:family|base) \|.*(?:\n\|.*)+", MODELS, re.MULTILINE):
        titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for row in rows:
            found[row[0].strip("`")] = dict(zip(titles, row, strict=True))
    return found


def as_documented(name: str, **found: bool) -> bool:
    """Whether a row says this of the paths `prompt_once`, `members_together`, `tiled_head`, `lower_layers_once`."""
    said = {path: documented_paths()[name][path.replace("_", " ")] for path in found}
    return all(said[path] in ("depends", "yes" if taken else "no") for path, taken in found.items())


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in a page; those without a language are of language ""."""
    return [
        block
        for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if name == language
    ]
