"""Anything a user hands in -> rows -> texts or chat messages, whatever the rows are for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from evollm.data.cells import Message, Row, UnusableRowError, without_nones
from evollm.data.columns import unused_column
from evollm.data.files import is_files, open_dataset
from evollm.errors import DataError, EvoLLMError

DroppedRows: TypeAlias = dict[str, list[int]]

NESTED_TOO_DEEPLY = "nested too deeply"
NO_PROMPT_MESSAGE = "no message before the completion"
MIXED_KINDS = "text and messages mixed"


@dataclass(frozen=True)
class TextPair:
    """A preference pair of strings; `prompt + chosen` and `prompt + rejected` are the two whole texts.

    Attributes:
        row: Position of the pair's row in the user's dataset.
        prompt: What both completions continue; may be empty.
        chosen: The preferred completion.
        rejected: The other completion; None: an example for SFT, which has one completion.
    """

    row: int
    prompt: str
    chosen: str
    rejected: str | None = None

    @property
    def question(self) -> str:
        """The prompt as a person would read it."""
        return self.prompt.strip()

    @property
    def completions(self) -> tuple[str, ...]:
        """The one or two completions, the chosen one first."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


@dataclass(frozen=True)
class ChatPair:
    """A preference pair of chat messages; `prompt + chosen` and `prompt + rejected` are the two conversations.

    Attributes:
        row: Position of the pair's row in the user's dataset.
        prompt: The messages before the completion, at least one.
        chosen: The messages of the preferred completion, at least one.
        rejected: The messages of the other completion, at least one; None: an example for SFT.
        tools: Functions or JSON schemas of the tools that the chat template is told of; None: none.
        template_kwargs: Further arguments of the chat template, such as `enable_thinking`.
    """

    row: int
    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message] | None = None
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The prompt's last message, as a person would read it."""
        return str(self.prompt[-1].get("content", "")).strip()

    @property
    def completions(self) -> tuple[Sequence[Message], ...]:
        """The one or two completions, the chosen one first."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


@dataclass(frozen=True)
class RowFormat:
    """Which columns the rows of a dataset have, and what a row becomes.

    Attributes:
        noun: What a row becomes, for messages.
        columns: The columns that are read, as far as they are there; two more go to the chat template.
        fault: From the columns of a dataset to what is wrong with them and how to correct it; "" when nothing is.
        read: From a row's position, the row, and the columns that any row has, to its texts or messages. It raises
            `UnusableRowError`.
    """

    noun: str
    columns: tuple[str, ...]
    fault: Callable[[Sequence[str]], str]
    read: Callable[[int, Row, AbstractSet[str]], TextPair | ChatPair]

    def check(self, columns: Iterable[str], field: str) -> None:
        """Raise unless a dataset with these columns can be read."""
        seen = list(columns)
        fix = self.fault(seen) or unused_column(seen, self.columns)
        if fix:
            raise DataError(field, f"columns {seen}", fix)


class RowsOfDataset(list[Row]):
    """Some of a dataset's rows, which keep the positions that they have there.

    Attributes:
        positions: One for each row.
    """

    def __init__(self, rows: Sequence[Row], positions: Sequence[int]) -> None:
        super().__init__(rows[position] for position in positions)
        self.positions = positions


def read_dataset(dataset: object, field: str, row_format: RowFormat) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read a dataset and set apart the rows that are not usable.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, any iterable of mappings, a mapping of columns, a pandas
            `DataFrame`, a pyarrow `Table`, the path of a JSON-lines (`.gz` too), Parquet or CSV file, or the name of a
            dataset on the hub: see `open_dataset`; or a list of paths and names, which are read one after the other.
        field: What the user calls the dataset, for messages.
        row_format: What its rows look like.

    Returns:
        What the rows hold, in the dataset's order, and for each reason the positions of the rows that were dropped.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    rows = read_rows(dataset, field, row_format)
    columns = set().union(*rows)
    found: list[TextPair | ChatPair] = []
    dropped: DroppedRows = {}
    positions = dataset.positions if isinstance(dataset, RowsOfDataset) else range(len(rows))
    for number, row in zip(positions, rows, strict=True):
        try:
            found.append(row_format.read(number, row, columns))
        except UnusableRowError as unusable:
            dropped.setdefault(str(unusable), []).append(number)
        except RecursionError:
            dropped.setdefault(NESTED_TOO_DEEPLY, []).append(number)
    return found, dropped


def read_rows(dataset: object, field: str, row_format: RowFormat) -> list[Row]:
    """The dataset's rows, reduced to the columns that matter here; those of several files follow each other."""
    if is_files(dataset):
        return [row for path in cast("list[str]", dataset) for row in _read_file(path, field, row_format)]
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, row in enumerate(_guarded(dataset, field, row_format)):
        if not isinstance(row, Mapping):
            wanted = " and ".join(row_format.columns)
            fix = f"each row must be a mapping with columns such as {wanted}"
            raise DataError(field, f"row {number} is a {type(row).__name__}", fix)
        columns.update(dict.fromkeys(row))
        rows.append({name: row[name] for name in row_format.columns if name in row})
    if not rows:
        raise DataError(field, _describe(dataset), f"has no rows; hand in at least one {row_format.noun}")
    row_format.check(columns, field)
    return rows


def _read_file(path: str, field: str, row_format: RowFormat) -> list[Row]:
    """The rows of one file of several, which an error names."""
    try:
        return read_rows(path, field, row_format)
    except DataError as error:
        where = "" if str(path) in str(error) else f" (in {path})"
        raise DataError(error.field, error.value, f"{error.fix}{where}") from error


def _guarded(dataset: object, field: str, row_format: RowFormat) -> Iterator[object]:
    """The dataset's rows; whatever its library raises on the way is a `DataError`."""
    number = 0
    try:
        for number, row in enumerate(_iterate_rows(dataset, field, row_format), start=1):  # noqa: B007
            yield row
    except EvoLLMError:
        raise
    except Exception as error:
        fix = f"cannot be read beyond its first {number} rows ({type(error).__name__}: {error})"
        raise DataError(field, _describe(dataset), fix) from error


# ---------------------------------------------------------------------------------------------------------- containers


def _iterate_rows(dataset: Any, field: str, row_format: RowFormat) -> Iterable[object]:
    """Containers are told apart by their methods, so that pandas and pyarrow need not be imported."""
    if isinstance(dataset, str | os.PathLike):
        return _iterate_rows(open_dataset(dataset, field), field, row_format)
    if isinstance(dataset, Mapping):
        return _rows_of_columns(dataset, field, row_format)
    if hasattr(dataset, "notna") and hasattr(dataset, "to_dict"):
        columns = getattr(dataset, "columns", ())
        row_format.check(columns, field)
        wanted = [name for name in row_format.columns if name in columns]
        return map(_without_nones, dataset[wanted].to_dict(orient="records"))
    names = getattr(dataset, "column_names", None)
    if names:
        row_format.check(names, field)
        wanted = [name for name in row_format.columns if name in names]
        if hasattr(dataset, "to_pylist"):
            return map(_without_nones, dataset.select(wanted).to_pylist())
        return map(_without_nones, dataset.select_columns(wanted).with_format(None))
    try:
        rows = iter(dataset)
    except TypeError:
        raise DataError(
            field,
            _describe(dataset),
            "is not a dataset; pass a datasets.Dataset, rows, columns, a DataFrame, the path of a file or a hub name",
        ) from None
    # A stream of unknown columns comes from Arrow too.
    return map(_without_nones, rows) if hasattr(dataset, "column_names") else rows


def _without_nones(row: Row) -> Row:
    """The row with all its columns, and without what Arrow put into their values."""
    return {name: without_nones(value) for name, value in row.items()}


def _rows_of_columns(table: Mapping[str, Any], field: str, row_format: RowFormat) -> Iterator[Row]:
    if any(hasattr(value, "column_names") for value in table.values()):
        splits = sorted(map(str, table))
        raise DataError(
            field, _describe(table), f'holds the splits {splits}; pass one of them, as in data["{splits[0]}"]'
        )
    row_format.check(table, field)
    columns = {name: table[name] for name in row_format.columns if name in table}
    for name, values in columns.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise DataError(f"{field}[{name!r}]", type(values).__name__, "a mapping must hold one list for each column")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        fix = f"columns differ in length; give each column one value for each {row_format.noun}"
        raise DataError(field, lengths, fix)
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _describe(dataset: object) -> str:
    """A dataset in a few words: its repr could be the whole data."""
    return str(dataset) if isinstance(dataset, str | os.PathLike) else type(dataset).__name__
