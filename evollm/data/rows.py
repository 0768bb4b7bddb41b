"""Anything a user hands in -> rows -> texts or chat messages, whatever the rows are for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from evollm.data.files import open_dataset
from evollm.errors import DataError

Message: TypeAlias = dict[str, Any]
Row: TypeAlias = dict[str, Any]
DroppedRows: TypeAlias = dict[str, list[int]]

# Names under which other datasets keep the prompt: read past, they would leave rows without their question.
PROMPT_ALIASES = ("question", "instruction", "query", "input", "prompts", "context")
# Whatever a model is given, not what it answers: a completion cannot start with one of these.
GIVEN_ROLES = frozenset({"system", "developer", "user", "tool"})

EMPTY_COMPLETION = "empty completion"
MALFORMED_MESSAGES = "malformed messages"
NO_PROMPT_MESSAGE = "no message before the completion"
MIXED_KINDS = "text and messages mixed"
INVALID_UNICODE = "text that is not valid Unicode"


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
    """

    row: int
    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message] | None = None

    @property
    def question(self) -> str:
        """The prompt's last message, as a person would read it."""
        return str(self.prompt[-1]["content"]).strip()

    @property
    def completions(self) -> tuple[Sequence[Message], ...]:
        """The one or two completions, the chosen one first."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)


@dataclass(frozen=True)
class RowFormat:
    """Which columns the rows of a dataset have, and what a row becomes.

    Attributes:
        noun: What a row becomes, for messages.
        columns: The columns that are read, as far as they are there.
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
        fix = self.fault(seen)
        if fix:
            raise DataError(field, f"columns {seen}", fix)


class UnusableRowError(Exception):
    """Carries the reason why a row cannot be used."""


def read_dataset(dataset: object, field: str, row_format: RowFormat) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read a dataset and set apart the rows that are not usable.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, any iterable of mappings, a mapping of columns, a pandas
            `DataFrame`, a pyarrow `Table`, the path of a JSON-lines (`.gz` too), Parquet or CSV file, or the name of a
            dataset on the hub: see `open_dataset`.
        field: What the user calls the dataset, for messages.
        row_format: What its rows look like.

    Returns:
        What the rows hold, in the dataset's order, and for each reason the positions of the rows that were dropped.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    rows = _read_rows(dataset, field, row_format)
    columns = set().union(*rows)
    found: list[TextPair | ChatPair] = []
    dropped: DroppedRows = {}
    for number, row in enumerate(rows):
        try:
            found.append(row_format.read(number, row, columns))
        except UnusableRowError as unusable:
            dropped.setdefault(str(unusable), []).append(number)
    return found, dropped


def _read_rows(dataset: object, field: str, row_format: RowFormat) -> list[Row]:
    """The dataset's rows, reduced to the columns that matter here."""
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, row in enumerate(_iterate_rows(dataset, field, row_format)):
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


# ---------------------------------------------------------------------------------------------------------- containers


def _iterate_rows(dataset: Any, field: str, row_format: RowFormat) -> Iterable[object]:
    """Containers are told apart by their methods, so that pandas and pyarrow need not be imported."""
    if isinstance(dataset, str | os.PathLike):
        return _iterate_rows(open_dataset(dataset, field), field, row_format)
    if isinstance(dataset, Mapping):
        return _rows_of_columns(dataset, field, row_format)
    if hasattr(dataset, "notna") and hasattr(dataset, "to_dict"):
        row_format.check(dataset.columns, field)
        wanted = [name for name in row_format.columns if name in dataset.columns]
        return cast("list[object]", dataset[wanted].to_dict(orient="records"))
    names = getattr(dataset, "column_names", None)
    if names:
        row_format.check(names, field)
        wanted = [name for name in row_format.columns if name in names]
        if hasattr(dataset, "to_pylist"):
            return cast("list[object]", dataset.select(wanted).to_pylist())
        return cast("Iterable[object]", dataset.select_columns(wanted).with_format(None))
    try:
        return cast("Iterable[object]", iter(dataset))
    except TypeError:
        raise DataError(
            field,
            _describe(dataset),
            "is not a dataset; pass a datasets.Dataset, rows, columns, a DataFrame, the path of a file or a hub name",
        ) from None


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
    return type(dataset).__name__


# --------------------------------------------------------------------------------------------------------------- cells


def cell(row: Row, name: str) -> str | list[Message]:
    """The text or the messages in a column; raises `UnusableRowError`."""
    value = row.get(name)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        raise UnusableRowError(f"{name} is missing")
    if isinstance(value, str):
        _require_unicode(value)
        return str(value)
    if isinstance(value, list | tuple | np.ndarray):  # parquet read by pandas gives arrays of messages
        return [_message(item) for item in value]
    raise UnusableRowError(f"{name} is neither text nor messages")


def _message(value: object) -> Message:
    # Arrow fills the keys that only other messages have with None.
    message = {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else {}
    role, content = message.get("role"), message.get("content")
    if not (isinstance(role, str) and role and isinstance(content, str)):
        raise UnusableRowError(MALFORMED_MESSAGES)
    _require_unicode(content)
    return message


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no tokenizer takes
        raise UnusableRowError(INVALID_UNICODE) from None


def require_text(*completions: Sequence[Message] | str) -> None:
    """Raise unless each completion says something."""
    for completion in completions:
        text = completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
        if not text.strip():
            raise UnusableRowError(EMPTY_COMPLETION)
