"""What is wrong with a path that leads to no file, in words."""

from __future__ import annotations

import difflib
import os
from glob import glob
from pathlib import Path

from evollm.checks import hub_name_in

_KINDS = (".jsonl", ".json", ".ndjson", ".gz", ".parquet", ".csv")
# Files that `datasets.save_to_disk` writes.
_SAVED = ("dataset_info.json", "dataset_dict.json")
_NAMED_AT_MOST = 3
_KNOWN = "; pass a JSON-lines, Parquet or CSV file, or org/name of a dataset on the hub"


def why_no_file(path: str) -> str:
    """What to do about a path that leads to no file."""
    if "://" in path:
        name = hub_name_in(path)
        hint = "download the file, and pass its path" if name is None else f"write {name}, its name on the hub"
        return f"is an address: {hint}"
    if os.path.isdir(path):
        return _why_not_folder(Path(path))
    if os.path.exists(path):
        return "is no ordinary file; pass a JSON-lines, Parquet or CSV file"
    return f"no such file{_likely(path)}"


def _likely(path: str) -> str:
    """What was perhaps meant by the name of a file that is not there."""
    if any(sign in path for sign in "*?["):
        found = sorted(glob(path))
        return f", and patterns are not expanded: pass a list, {_listed(found or ['a.jsonl', 'b.jsonl'])}"
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return f": the quotation marks are a part of the name; write {path[1:-1]}"
    near = _nearest_file(path)
    return _KNOWN if near is None else f"; the nearest there is {near!r}"


def _why_not_folder(folder: Path) -> str:
    if any((folder / name).is_file() for name in _SAVED):
        return "is a folder of datasets.save_to_disk: pass datasets.load_from_disk(folder) from Python"
    found = sorted(str(path) for path in folder.iterdir() if path.suffix in _KINDS)
    if not found:
        return f"is a folder without data files ({', '.join(_KINDS)}); pass a file"
    return f"is a folder: pass its files, {_listed(found)}"


def _listed(paths: list[str]) -> str:
    more = ", ..." if len(paths) > _NAMED_AT_MOST else ""
    return f"[{', '.join(paths[:_NAMED_AT_MOST])}{more}]"


def _nearest_file(path: str) -> str | None:
    """A data file in the same folder whose name is nearly that."""
    folder, name = os.path.split(path)
    try:
        there = [entry for entry in os.listdir(folder or ".") if Path(entry).suffix in _KINDS]
    except (OSError, ValueError):
        return None
    return next((os.path.join(folder, near) for near in difflib.get_close_matches(name, there, 1, cutoff=0.75)), None)
