"""Writes the report of a run folder, `report.html`, and its pictures."""

from __future__ import annotations

import os
from pathlib import Path

from evollm.checks import usable_path
from evollm.errors import CheckpointError, ConfigurationError
from evollm.own_files import check_can_be_made, inside, read_bytes, remove_leftovers, replace_bytes
from evollm.report.page import render
from evollm.report.style import SOFTWARE
from evollm.runs.reader import read_run

# The bytes by which a page and a picture of a report are recognised.
_PAGE = f'<meta name="generator" content="{SOFTWARE}">'.encode()
_PICTURE = f"Software\0{SOFTWARE}".encode()


def write_report(run_dir: str | Path, path: str | Path | None = None, pictures: bool = True) -> Path:
    """Write one page with a run's family tree, hyperparameters, scores with intervals, training curves and settings.

    The page is self-contained: it needs no network and has no script. It can be written while the run goes on, and
    equal run folders give equal pages. See docs/report.md for how to read it.

    Args:
        run_dir: The run folder.
        path: Path of the page, with the suffix `.html`; by default `report.html` in the run folder.
        pictures: Write each figure as a PNG, too, into a folder with the page's name without its suffix.

    Returns:
        The path of the page.

    Raises:
        ConfigurationError: `run_dir` is not a run folder, or the path cannot be written to.
        CheckpointError: The run folder is damaged, or the run has not done a step yet.
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
        # First, so that a folder that cannot be made is found before the figures are drawn, which takes seconds.
        (inside(page.parent, folder.name) if pictures else page.parent).mkdir(parents=True, exist_ok=True)
        try:
            html, drawn = render(record)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise CheckpointError(f"{record.path} holds numbers that cannot be drawn: {error}") from error
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


def _check_ours(path: Path, mark: bytes) -> None:
    """Check that a file is part of a report, before it is replaced.

    Raises:
        ConfigurationError: There is a file without the mark, or something that is not a file.
    """
    try:
        if mark in read_bytes(path):
            return
    except FileNotFoundError:
        return
    except OSError:
        pass
    raise ConfigurationError("path", str(path), "holds something else, which would be lost: give another path")
