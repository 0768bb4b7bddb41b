"""From a run folder to `report.html`."""

from __future__ import annotations

import os
from pathlib import Path

from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.own_files import check_can_be_made, inside, read_bytes, remove_leftovers, replace_bytes
from evollm.report.page import render
from evollm.report.style import SOFTWARE, Picture
from evollm.runs.reader import read_run
from evollm.runs.record import RunRecord

# What a page and a picture of a report are known by.
_PAGE = f'<meta name="generator" content="{SOFTWARE}">'.encode()
_PICTURE = f"Software\0{SOFTWARE}".encode()


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
    page = usable_path("path", path) if path is not None else record.path / "report.html"
    folder = page.with_suffix("")
    check_can_be_made("path", page)
    _check_ours(inside(page.parent, page.name), _PAGE)
    try:
        # Before anything is drawn, which takes some seconds.
        (inside(page.parent, folder.name) if pictures else page.parent).mkdir(parents=True, exist_ok=True)
        html, drawn = _rendered(record)
        images = {inside(folder, f"{picture.name}.png"): picture.png() for picture in drawn if pictures}
        for image in images:
            _check_ours(image, _PICTURE)
        remove_leftovers(page.parent, page.name)
        if images:
            remove_leftovers(folder)
        replace_bytes(page, html.encode())
        for image, content in images.items():
            replace_bytes(image, content)
    except OSError as error:
        raise ConfigurationError("path", str(page), f"cannot be written: {error}") from error
    return page


def _rendered(record: RunRecord) -> tuple[str, list[Picture]]:
    try:
        return render(record)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise CheckpointError(f"{record.path} holds numbers that cannot be drawn: {error}") from error


def _check_ours(path: Path, mark: bytes) -> None:
    """Refuse to replace what is no part of a report.

    Raises:
        ConfigurationError: A file without the mark, or something else than a file.
    """
    try:
        if mark in read_bytes(path):
            return
    except FileNotFoundError:
        return
    except OSError:
        pass
    raise ConfigurationError("path", str(path), "holds something else, which would be lost: give another path")
