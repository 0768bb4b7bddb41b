"""Datasets of any supported container -> rows -> texts or chat messages, for every kind of row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, cast

from evollm.data.cells import Row, UnreadableCell, UnusableRowError, is_missing
from evollm.data.columns import ColumnMapping, Layout, layout_of, mapping_of, value_of
from evollm.data.containers import columns_of, described, rows_in
from evollm.data.open_dataset import is_files, open_dataset
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.samples import Sample
from evollm.data.shapes import BAD, FIRST, GOOD, INSTRUCTION, PAIR, SECOND, TIE, Kind
from evollm.errors import DataError, EvoLLMError

DroppedRows: TypeAlias = dict[str, list[int]]

NESTED_TOO_DEEPLY = "nested too deeply"
NO_PROMPT_MESSAGE = "no message before the completion"
MIXED_KINDS = "text and messages mixed"
NO_SIDE_IS_BETTER = "neither side is better"
REPEATED_PROMPT = "the prompt repeated in front of their sides, from which it was taken off"
PROMPT_TWICE = "the prompt repeated in front of their sides, as other rows have not, so that it is there twice"
# Keys that a row may have in addition to the roles of its columns.
SPOKEN, REMARK, LABELLED = "spoken", "remark", "labelled"
# The key of a mapping of the columns without a role, of rows that keep them.
OTHERS = "others"


def _whole(sample: Sample) -> tuple[Sample, ...]:
    return (sample,)


@dataclass(frozen=True)
class RowFormat:
    """The format of a dataset's rows, and the parser of a row.

    Attributes:
        noun: Noun for a sample in messages: pair, example or answer.
        kind: The shapes that rows may have.
        read: (position of the row, row keyed by column roles) -> the row's texts or messages. Raises
            `UnusableRowError`, or `UnusedColumnError` for a row with content in a column that would be ignored.
        mapping: The user's mapping of columns.
        divided: A tokenised row -> its samples; by default a row is one sample.
    """

    noun: str
    kind: Kind
    read: Callable[[int, Row], TextPair | ChatPair]
    mapping: ColumnMapping = field(default_factory=ColumnMapping)
    divided: Callable[[Sample], tuple[Sample, ...]] = _whole

    def with_columns(self, columns: object) -> RowFormat:
        """A copy with the user's mapping of columns; see `evollm.data.columns.mapping_of`.

        Raises:
            ConfigurationError: The mapping has an impossible entry.
        """
        return self if columns is None else replace(self, mapping=mapping_of(columns, self.kind))

    @property
    def names(self) -> list[str]:
        """The columns that may be read."""
        return sorted({*self.kind.names, *self.mapping.roles.values()})

    def layout(self, columns: Iterable[str], where: str) -> Layout:
        """The roles of a dataset's columns; `DataError` if the roles cannot be determined."""
        return layout_of(list(columns), self.kind, self.mapping, where)


class UnusedColumnError(Exception):
    """A row has content in a column that would be ignored.

    Args:
        role: The column's role.
        fix: The problem with the column, for the message.
    """

    def __init__(self, role: str, fix: str) -> None:
        super().__init__(fix)
        self.role = role


# A parsed row, the reason why the row is unusable, or the error of a column that would be ignored.
Parsed: TypeAlias = "TextPair | ChatPair | str | UnusedColumnError"


class Rows(list[Row]):
    """Rows keyed by the roles of their columns.

    Attributes:
        layouts: The layout of the columns of each file.
        positions: Position of each row in the user's dataset.
    """

    def __init__(self, rows: Iterable[Row], layouts: Sequence[Layout], positions: Sequence[int] | None = None) -> None:
        super().__init__(rows)
        self.layouts = list(layouts)
        self.positions = range(len(self)) if positions is None else positions
        self._parsed: tuple[RowFormat, list[Parsed]] | None = None

    def parsed(self, row_format: RowFormat) -> list[Parsed]:
        """The parsed rows; the result for the latest format is kept."""
        if self._parsed is None or self._parsed[0] != row_format:
            numbered = zip(self.positions, self, strict=True)
            self._parsed = row_format, [_parsed(row_format, number, row) for number, row in numbered]
        return self._parsed[1]

    def part(self, places: Sequence[int]) -> Rows:
        """The rows at these places, with their positions; rows that are parsed already are not parsed again."""
        found = Rows([self[place] for place in places], self.layouts, [self.positions[place] for place in places])
        if self._parsed is not None:
            row_format, parsed = self._parsed
            found._parsed = row_format, [parsed[place] for place in places]
        return found


def _parsed(row_format: RowFormat, number: int, row: Row) -> Parsed:
    try:
        return row_format.read(number, row)
    except UnusableRowError as unusable:
        return str(unusable)
    except RecursionError:
        return NESTED_TOO_DEEPLY
    except UnusedColumnError as unused:
        return unused


def read_dataset(dataset: object, field: str, row_format: RowFormat) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read a dataset and separate unusable rows.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, any iterable of mappings, a mapping of columns, a pandas
            `DataFrame`, a pyarrow `Table`, the path of a JSON or JSON-lines (`.gz` too), Parquet or CSV file, or the
            name of a dataset on the hub: see `open_dataset`; or a list of paths and names, which are read in order.
        field: Name of the user's argument, for messages.
        row_format: Format of the rows.

    Returns:
        The parsed rows in the dataset's order, and the positions of dropped rows by reason.

    Raises:
        DataError: The dataset cannot be read, lacks a column, has a column that would be ignored, or has no row.
    """
    rows = read_rows(dataset, field, row_format)
    found: list[TextPair | ChatPair] = []
    dropped: DroppedRows = {}
    for number, pair in read_each(rows, field, row_format):
        if isinstance(pair, str):
            dropped.setdefault(pair, []).append(number)
        else:
            found.append(pair)
    return found, dropped


def read_each(rows: Rows, field: str, row_format: RowFormat) -> list[tuple[int, TextPair | ChatPair | str]]:
    """Each row's position, and the parsed row or the reason why the row is unusable.

    Raises:
        DataError: There are more rows with content in a column that would be ignored than usable rows. If there are
            fewer such rows, they are returned as unusable.
    """
    found: list[tuple[int, TextPair | ChatPair | str]] = []
    odd: list[tuple[int, str, UnusedColumnError]] = []
    for number, parsed in zip(rows.positions, rows.parsed(row_format), strict=True):
        if not isinstance(parsed, UnusedColumnError):
            found.append((number, parsed))
            continue
        column = next((layout.roles[parsed.role] for layout in rows.layouts if parsed.role in layout.roles), "")
        odd.append((number, column, parsed))
        found.append((number, f"whose {column!r} {parsed}"))
    usable = sum(not isinstance(pair, str) for _, pair in found)
    if len(odd) > usable:
        number, column, first = odd[0]
        others = f" (so it is in {len(odd)} of {len(rows)} rows)" if len(rows) > 1 else ""
        fix = f"{column!r} {first}{others}; say columns: {{ignore: [{column}]}}, or leave it out of the data"
        raise DataError(field, f"row {number}", fix)
    return found


def read_rows(dataset: object, field: str, row_format: RowFormat) -> Rows:
    """The dataset's rows keyed by the roles of their columns; the rows of several files are concatenated.

    If the sides of all rows are strings that repeat their prompt, the prompt is removed from the sides.
    """
    if isinstance(dataset, Rows):
        return dataset
    files = cast("list[str]", dataset) if is_files(dataset) else None
    parts = [_read_rows(dataset, field, row_format)] if files is None else _read_files(files, field, row_format)
    rows = Rows([row for part in parts for row in part], [layout for part in parts for layout in part.layouts])
    if row_format.kind.sides:
        _take_prompts_off(rows, row_format.kind)
    return rows


def _read_rows(source: object, field: str, row_format: RowFormat) -> Rows:
    dataset = _opened(source, field) if isinstance(source, str | os.PathLike) else source
    known = columns_of(dataset, field)
    layout = None if known is None else row_format.layout(known, field)
    keeps = row_format.kind.keeps_others
    names = list(known or ()) if keeps else row_format.names if layout is None else list(layout.roles.values())
    seen: dict[str, None] = {}
    rows: list[Row] = []
    for number, row in enumerate(rows_in(dataset, names, field, row_format.noun)):
        if not isinstance(row, Mapping):
            wanted = " and ".join(row_format.kind.sides or ("prompt",))
            fix = f"each row must be a mapping with columns such as {wanted}"
            raise DataError(field, f"row {number} is a {type(row).__name__}", fix)
        seen.update(dict.fromkeys(row))
        rows.append(dict(row) if keeps else {name: row[name] for name in names if name in row})
    if not rows:
        raise DataError(field, described(source), f"has no rows; hand in at least one {row_format.noun}")
    layout = layout or row_format.layout(seen, field)
    spoken = row_format.mapping.spoken
    found = Rows([_by_role(row, layout, spoken, number, field) for number, row in enumerate(rows)], [layout])
    others = [name for name in layout.unused if name not in row_format.mapping.ignore] if keeps else []
    for by_role, row in zip(found, rows, strict=True) if keeps else ():
        by_role[OTHERS] = {name: row.get(name) for name in others}
    return found


def _is_filled(value: object) -> bool:
    return not is_missing(value) and (not hasattr(value, "__len__") or len(value) > 0)


def _opened(path: str | os.PathLike[str], field: str) -> Any:
    try:
        return open_dataset(path, field)
    except EvoLLMError:
        raise
    except Exception as error:  # Also for a string that is no valid file name.
        raise DataError(field, str(path), f"cannot be opened ({type(error).__name__}: {error})") from error


def _read_files(paths: Sequence[str], field: str, row_format: RowFormat) -> list[Rows]:
    """The rows of each file; an error names the file."""
    parts = []
    for path in paths:
        try:
            parts.append(_read_rows(path, field, row_format))
        except DataError as error:
            where = "" if str(path) in str(error) else f" (in {path})"
            raise DataError(error.field, error.value, f"{error.fix}{where}") from error
    return parts


def _by_role(row: Row, layout: Layout, spoken: bool, number: int, field: str) -> Row:
    """Rename a row's columns to their roles; of two answers the better one becomes the chosen side.

    The result has all roles of the dataset, with None for columns that the row lacks.
    """
    found = {role: row.get(column) for role, column in layout.roles.items()}
    if spoken or layout.roles.get("prompt") == INSTRUCTION or {"system", "history"} & layout.roles.keys():
        found[SPOKEN] = True
    if FIRST in layout.roles:
        _choose(found, layout, number, field)
    elif not is_missing(found.get("label")):
        meaning = layout.meaning(found["label"])
        if meaning is None and layout.needs_label:
            known = "; ".join(f"{meaning}: {', '.join(values)}" for meaning, values in layout.values.items())
            fix = f"is neither good nor bad ({known}); correct it, or add it to columns.label.{GOOD} or {BAD}"
            raise DataError(field, f"{layout.roles['label']} {found['label']!r} in row {number}", fix)
        found["label"] = None if meaning is None else meaning == GOOD
        found[LABELLED] = True
    return found


def _choose(row: Row, layout: Layout, number: int, field: str) -> None:
    """Replace a row's two answers by its chosen and rejected sides."""
    answers = {FIRST: row.pop(FIRST, None), SECOND: row.pop(SECOND, None)}
    label, other = row.pop("label", None), row.pop("other_label", None)
    better = layout.meaning(label)
    column = layout.roles["label"]
    if better is None and value_of(label) is not None:
        known = "; ".join(f"{meaning}: {', '.join(values)}" for meaning, values in layout.values.items())
        fix = f"says neither side ({known}); add it to columns.label.{FIRST}, {SECOND} or {TIE}"
        raise DataError(field, f"{column} {label!r} in row {number}", fix)
    if better in (None, TIE):
        reason = f"{column} is missing" if better is None else NO_SIDE_IS_BETTER
        row["chosen"] = row["rejected"] = UnreadableCell(reason)
        return
    row["chosen"], row["rejected"] = (answers[FIRST], answers[SECOND])[:: 1 if better == FIRST else -1]
    if layout.meaning(other) not in (None, TIE, better):
        row[REMARK] = f"{layout.roles['other_label']} for the other side than {column}"


def _take_prompts_off(rows: Rows, kind: Kind) -> None:
    """Remove the prompt from string sides if all rows repeat their prompt; if only some do, remark on these rows."""
    repeats, loose, others = [], [], False
    for row in rows:
        prompt, texts = row.get("prompt"), [row.get(side) for side in _sides(row, kind)]
        if any(map(is_missing, (prompt, *texts))) or any(isinstance(text, UnreadableCell) for text in texts):
            continue
        if (
            not isinstance(prompt, str)
            or not prompt.strip()
            or any(_is_filled(row.get(more)) for more in ("input", "history"))
            or not all(isinstance(text, str) and text.startswith(prompt) for text in texts)
        ):
            others = True
            if _repeat_loosely(prompt, texts):
                loose.append(row)
            continue
        repeats.append(row)
    for row in (*repeats, *loose) if others else ():
        row.setdefault(REMARK, PROMPT_TWICE)
    for row in () if others else repeats:
        row.update({side: row[side][len(row["prompt"]) :] for side in _sides(row, kind)})
        row[REMARK] = REPEATED_PROMPT


def _sides(row: Row, kind: Kind) -> tuple[str, ...]:
    """The sides of a row, which may be a pair among rows with labels."""
    return PAIR.sides if "chosen" in row else kind.sides


def _repeat_loosely(prompt: Any, texts: Sequence[Any]) -> bool:
    """Whether texts begin with a prompt of several words, up to surrounding whitespace."""
    words = prompt.strip() if isinstance(prompt, str) else ""
    return len(words.split()) > 1 and all(isinstance(text, str) and text.lstrip().startswith(words) for text in texts)
