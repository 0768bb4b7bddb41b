"""The rows of a file, or of a dataset on the Hub."""

from __future__ import annotations

import difflib
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

from evollm.checks import expanded, hub_name_in, is_lfs_pointer
from evollm.errors import DataError
from evollm.hub import hub_or_cache
from evollm.quiet import quiet

JSON_LINES_SUFFIXES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson", ".json")
# Suffixes of files that an error message offers.
_DATA_SUFFIXES = (".jsonl", ".json", ".ndjson", ".gz", ".parquet", ".csv")
# Files that `datasets.save_to_disk` writes.
_SAVED_TO_DISK = ("dataset_info.json", "dataset_dict.json")
_NAMED_AT_MOST = 3
# Byte order marks, which some editors write: of UTF-8, and of encodings that are not read.
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# Such as org/name or org/name:test.
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>\w+))?")


def is_files(dataset: object) -> bool:
    """Whether a dataset is a list of paths or Hub names."""
    if not isinstance(dataset, list | tuple) or not dataset:
        return False
    return all(isinstance(path, str | os.PathLike) for path in dataset)


def open_dataset(path: str | os.PathLike[str], field: str) -> Any:
    """Open a file, or a dataset on the Hub.

    Args:
        path: A JSON-lines file or a JSON array of objects, also compressed by gzip; a Parquet file; a CSV file, whose
            cells are text, or messages written as JSON or as Python's `repr`; or `org/name` of a dataset on the Hub,
            followed by `:split` for another split than `train`. `~` is the user's home.
        field: The user's name for the dataset, for messages.

    Returns:
        An iterator of rows, a pyarrow `Table`, a pandas `DataFrame` or a `datasets.Dataset`.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """
    path = expanded(path)
    file = Path(path)
    if not file.is_file():
        hub = _HUB_NAME.fullmatch(path) if isinstance(path, str) and not _reader(file) and not file.exists() else None
        if hub is None:
            raise DataError(field, str(path), _why_no_file(path))
        return _load_from_hub(hub["name"], hub["split"] or "train", field)
    read = _reader(file)
    if read is None:
        fix = "is of no kind that is read (.jsonl, .jsonl.gz, .parquet, .csv); load others with load_dataset()"
        raise DataError(field, str(path), fix)
    _require_content(file, field)
    return read(file, field)


def _require_content(path: Path, field: str) -> None:
    """Refuse an empty file, a pointer of Git LFS, and text in another encoding than UTF-8."""
    try:
        empty, pointer = not path.stat().st_size, is_lfs_pointer(path)
        with path.open("rb") as file:
            encoding = _OTHER_MARKS.get(file.read(2))
    except OSError as error:
        raise DataError(field, str(path), f"cannot be read ({error})") from None
    if empty:
        raise DataError(field, str(path), "is empty (0 bytes); write or fetch it again")
    if encoding is not None:
        raise DataError(field, str(path), f"is a text in {encoding}; save it as UTF-8")
    if pointer:
        fix = "is a pointer of Git LFS and not the data; run git lfs pull in its repository, or fetch the file itself"
        raise DataError(field, str(path), fix)


def _reader(path: Path) -> Callable[[Path, str], Any] | None:
    """The function that reads a file with this suffix; None for a suffix that is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"] and suffixes[-2:-1] and suffixes[-2] in JSON_LINES_SUFFIXES:
        return _parse_json
    kind = suffixes[-1] if suffixes else ""
    return _parse_json if kind in JSON_LINES_SUFFIXES else _TABLES.get(kind)


def _read_parquet(path: Path, field: str) -> Any:
    import pyarrow.parquet  # noqa: PLC0415 - slow to import, and most datasets do not need it

    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(field, str(path), f"is not a whole Parquet file ({error})") from None


def _read_csv(path: Path, field: str) -> Any:
    import pandas  # noqa: PLC0415 - slow to import, and most datasets do not need it

    try:
        # All cells are text, since a prompt may be "12" or "NA"; only an empty cell is missing.
        cells = pandas.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
    except (ValueError, OSError, pandas.errors.ParserError) as error:
        raise DataError(field, str(path), f"is not a CSV file with a header in UTF-8 ({error})") from None
    (only, *others) = cells.columns
    separator = next((sign for sign in ";\t" if not others and sign in str(only)), None)
    if separator is not None:
        raise DataError(field, str(path), f"is separated by {separator!r}; save it with commas between the columns")
    return cells.astype(object)


_TABLES = {".parquet": _read_parquet, ".csv": _read_csv}


def _load_from_hub(name: str, split: str, field: str) -> Any:
    import datasets  # noqa: PLC0415 - slow to import, and most datasets do not need it

    no_hub = None
    try:
        with quiet(), hub_or_cache(name) as no_hub:
            return datasets.load_dataset(name, split=split)
    except Exception as error:  # The network, the Hub and loading scripts raise errors of many types.
        if no_hub is not None:
            fix = (
                f"is no file here and not in the cache of datasets, split {split!r}, and {no_hub}: give a file, or a "
                f"network; a dataset that is in the cache loads without one ({type(error).__name__}: {error})"
            )
            raise DataError(field, name, fix) from error
        fix = f"is neither a file nor a dataset that the hub gives, split {split!r} ({type(error).__name__}: {error})"
        raise DataError(field, name, fix) from error


def _parse_json(path: Path, field: str) -> Iterator[object]:
    """The objects of JSON lines, or of a JSON array."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
            numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.lstrip(_UTF8_MARK).strip())
            for first, (number, line) in enumerate(numbered):
                if first == 0 and line.lstrip(_UTF8_MARK).lstrip().startswith(b"["):
                    yield from _parse_array(line + lines.read(), number, path, field)
                else:
                    yield _parse_object(line, number, path, field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(field, str(path), f"is not a whole gzip file ({error}); fetch or compress it again") from None
    except OSError as error:
        raise DataError(field, str(path), f"cannot be read ({error})") from None


def _parse_array(content: bytes, line: int, path: Path, field: str) -> Iterator[object]:
    """The objects of a JSON array that begins on this line of a file."""
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1} of a JSON array"
        raise DataError(field, str(path), f"{where} is not valid JSON ({error.msg}); correct it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(field, str(path), f"line {line} is not valid JSON ({error}); correct or remove it") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            fix = f"item {number} of the JSON array is a {type(row).__name__}; each must be an object"
            raise DataError(field, str(path), fix)
        yield row


def _parse_object(line: bytes, number: int, path: Path, field: str) -> object:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; too many brackets
        what_to_do = _json_hint(line) if number == 1 else "correct or remove it"
        fix = f"line {number} is not valid JSON ({error}); {what_to_do}"
        raise DataError(field, str(path), fix) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(field, str(path), f"line {number} holds a {kind}; JSON lines have one object on each line")
    return value


def _json_hint(line: bytes) -> str:
    """What to do about a file whose first line is not JSON."""
    start = line.lstrip(_UTF8_MARK).lstrip()
    if start.startswith(b"<"):
        return "it is a web page or XML: download the file itself"
    if start.startswith(b"{'"):
        return "it is what Python prints: write lines with json.dumps, in double quotation marks"
    return "correct or remove it; an object over several lines is not read: write one on each line, or an array"


# ------------------------------------------------------------------------------------------------- paths without a file


def _why_no_file(path: str) -> str:
    """What is wrong with a path at which no data file is, and what to do."""
    if "://" in path:
        name = hub_name_in(path)
        hint = "download the file, and pass its path" if name is None else f"write {name}, its name on the hub"
        return f"is an address: {hint}"
    if os.path.isdir(path):
        return _why_not_folder(Path(path))
    if os.path.exists(path):
        return "is no ordinary file; pass a JSON-lines, Parquet or CSV file"
    return f"no such file{_what_was_meant(path)}"


def _what_was_meant(path: str) -> str:
    """What a path that does not exist may have been meant to be."""
    if any(sign in path for sign in "*?["):
        found = sorted(glob(path))
        return f", and patterns are not expanded: pass a list, {_as_list(found or ['a.jsonl', 'b.jsonl'])}"
    if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
        return f": the quotation marks are a part of the name; write {path[1:-1]}"
    near = _nearest_file(path)
    if near is None:
        return "; pass a JSON-lines, Parquet or CSV file, or org/name of a dataset on the hub"
    return f"; the nearest there is {near!r}"


def _why_not_folder(folder: Path) -> str:
    if any((folder / name).is_file() for name in _SAVED_TO_DISK):
        return "is a folder of datasets.save_to_disk: pass datasets.load_from_disk(folder) from Python"
    found = sorted(str(path) for path in folder.iterdir() if path.suffix in _DATA_SUFFIXES)
    if not found:
        return f"is a folder without data files ({', '.join(_DATA_SUFFIXES)}); pass a file"
    return f"is a folder: pass its files, {_as_list(found)}"


def _as_list(paths: list[str]) -> str:
    more = ", ..." if len(paths) > _NAMED_AT_MOST else ""
    return f"[{', '.join(paths[:_NAMED_AT_MOST])}{more}]"


def _nearest_file(path: str) -> str | None:
    """The data file in the same folder with the most similar name."""
    folder, name = os.path.split(path)
    try:
        there = [entry for entry in os.listdir(folder or ".") if Path(entry).suffix in _DATA_SUFFIXES]
    except (OSError, ValueError):
        return None
    return next((os.path.join(folder, near) for near in difflib.get_close_matches(name, there, 1, cutoff=0.75)), None)
