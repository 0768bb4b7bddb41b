"""From a run folder to `report.html`."""

from __future__ import annotations

import os
from pathlib import Path

from evollm.errors import ConfigurationError
from evollm.report.page import render
from evollm.report.read import read_run


def write_report(run_dir: str | Path, path: str | Path | None = None, pictures: bool = True) -> Path:
    """Write one page that shows how a run went: who descends from whom, which schedule won, and how sure the score is.

    The page needs nothing but itself: no network, no script. It can be written while the run goes on, and equal run
    folders give equal pages. See docs/report.md for how to read it.

    Args:
        run_dir: The run folder.
        path: The page, with the suffix `.html`; by default `report.html` in the run folder.
        pictures: Write each figure as a PNG too, into the folder of the page's name without its suffix.

    Returns:
        The path of the page.

    Raises:
        ConfigurationError: No run folder, or a path that cannot be written to.
        CheckpointError: The run folder is damaged, or its run has not done a step yet.
        MissingExtraError: matplotlib is not installed.
    """
    if path is not None and not (isinstance(path, str | os.PathLike) and Path(path).suffix == ".html"):
        raise ConfigurationError("path", path, "must be the path of a page and end in .html")
    record = read_run(run_dir)
    page = Path(path) if path is not None else record.path / "report.html"
    folder = page.with_suffix("")
    try:
        # Before anything is drawn, which takes some seconds.
        (folder if pictures else page.parent).mkdir(parents=True, exist_ok=True)
        html, drawn = render(record)
        page.write_text(html, encoding="utf-8")
        for picture in drawn if pictures else ():
            (folder / f"{picture.name}.png").write_bytes(picture.png())
    except OSError as error:
        raise ConfigurationError("path", str(page), f"cannot be written: {error}") from error
    return page
