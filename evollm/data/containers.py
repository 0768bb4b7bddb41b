"""Rows of whatever holds them: lists, streams, mappings of columns, and the tables of datasets, pandas and pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from evollm.data.cells import Row, without_nones
from evollm.errors import DataError, EvoLLMError


def rows_in(dataset: object, names: Sequence[str], field: str, noun: str) -> Iterator[object]:
    """The dataset's rows; any exception of the dataset's library becomes a `DataError`."""
    number = 0
    try:
        for number, row in enumerate(_iterate_rows(dataset, names, field, noun), start=1):  # noqa: B007
            yield row
    except EvoLLMError:
        raise
    except Exception as error:
        fix = f"cannot be read beyond its first {number} rows ({type(error).__name__}: {error})"
        raise DataError(field, described(dataset), fix) from error


def columns_of(dataset: Any, field: str) -> list[str] | None:
    """The names of a container's columns; None if the container does not list them.

    Containers are recognised by their methods, so that pandas and pyarrow need not be imported.
    """
    if isinstance(dataset, Mapping):
        if any(hasattr(value, "column_names") for value in dataset.values()):
            splits = sorted(map(str, dataset))
            fix = f'holds the splits {splits}; pass one of them, as in data["{splits[0]}"]'
            raise DataError(field, described(dataset), fix)
        return list(dataset)
    if _is_data_frame(dataset):
        return list(getattr(dataset, "columns", ()))
    return list(getattr(dataset, "column_names", None) or ()) or None


def _is_data_frame(dataset: object) -> bool:
    return hasattr(dataset, "notna") and hasattr(dataset, "to_dict")


def _iterate_rows(dataset: Any, names: Sequence[str], field: str, noun: str) -> Iterable[object]:
    """The rows; a container that lists its columns gives only the columns in `names`."""
    if isinstance(dataset, Mapping):
        return _rows_of_columns(dataset, names, field, noun)
    if _is_data_frame(dataset):
        return map(_without_nones, dataset[list(names)].to_dict(orient="records"))
    if getattr(dataset, "column_names", None):
        if hasattr(dataset, "to_pylist"):
            return map(_without_nones, dataset.select(list(names)).to_pylist())
        return map(_without_nones, dataset.select_columns(list(names)).with_format(None))
    try:
        rows = iter(dataset)
    except TypeError:
        raise DataError(
            field,
            described(dataset),
            "is not a dataset; pass a datasets.Dataset, rows, columns, a DataFrame, the path of a file or a hub name",
        ) from None
    # A stream whose column names are unknown also comes from Arrow.
    return map(_without_nones, rows) if hasattr(dataset, "column_names") else rows


def _without_nones(row: Row) -> Row:
    """The row with all columns, without the None entries that Arrow adds to nested values."""
    return {name: without_nones(value) for name, value in row.items()}


def _rows_of_columns(table: Mapping[str, Any], names: Sequence[str], field: str, noun: str) -> Iterator[Row]:
    columns = {name: table[name] for name in names}
    for name, values in columns.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise DataError(f"{field}[{name!r}]", type(values).__name__, "a mapping must hold one list for each column")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        fix = f"columns differ in length; give each column one value for each {noun}"
        raise DataError(field, lengths, fix)
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def described(dataset: object) -> str:
    """A short name of a dataset, whose repr could print all data."""
    return str(dataset) if isinstance(dataset, str | os.PathLike) else type(dataset).__name__
