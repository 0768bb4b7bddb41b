"""Anything a user hands in -> rows -> preference pairs of text or of chat messages."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from evollm.errors import DataError

Message: TypeAlias = dict[str, Any]
Row: TypeAlias = dict[str, Any]
DroppedRows: TypeAlias = dict[str, list[int]]

REQUIRED_COLUMNS = ("chosen", "rejected")
COLUMNS = ("prompt", *REQUIRED_COLUMNS)
# Names under which other datasets keep the prompt: read past, they would leave pairs without their question.
PROMPT_ALIASES = ("question", "instruction", "query", "input", "prompts", "context")
JSON_LINES_SUFFIXES = (".jsonl", ".json-lines", ".jsonlines", ".ndjson", ".json")
ASSISTANT_MARKER = "\n\nAssistant:"
# Whatever a model is given, not what it answers: a completion cannot start with one of these.
GIVEN_ROLES = frozenset({"system", "developer", "user", "tool"})

SAME_COMPLETIONS = "chosen == rejected"
EMPTY_COMPLETION = "empty completion"
DIFFERENT_PROMPTS = "the two sides have different prompts"
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
        rejected: The other completion.
    """

    row: int
    prompt: str
    chosen: str
    rejected: str

    @property
    def question(self) -> str:
        """The prompt as a person would read it."""
        return self.prompt.strip()


@dataclass(frozen=True)
class ChatPair:
    """A preference pair of chat messages; `prompt + chosen` and `prompt + rejected` are the two conversations.

    Attributes:
        row: Position of the pair's row in the user's dataset.
        prompt: The messages before the completion, at least one.
        chosen: The messages of the preferred completion, at least one.
        rejected: The messages of the other completion, at least one.
    """

    row: int
    prompt: Sequence[Message]
    chosen: Sequence[Message]
    rejected: Sequence[Message]

    @property
    def question(self) -> str:
        """The prompt's last message, as a person would read it."""
        return str(self.prompt[-1]["content"]).strip()


class _UnusableRowError(Exception):
    """Carries the reason why a row cannot become a pair."""


def read_pairs(dataset: object, field: str) -> tuple[list[TextPair | ChatPair], DroppedRows]:
    """Read a dataset's preference pairs and set apart the rows that are not usable.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`, any iterable of mappings, a mapping of columns, a pandas
            `DataFrame`, a pyarrow `Table`, or the path of a JSON-lines file (`.gz` too). The columns `chosen` and
            `rejected` hold strings or lists of `{"role", "content"}` messages; so does `prompt`, which is optional.
        field: What the user calls the dataset, for messages.

    Returns:
        The pairs in the dataset's order, and for each reason the positions of the rows that were dropped.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    rows = read_rows(dataset, field)
    has_prompt = any("prompt" in row for row in rows)
    pairs: list[TextPair | ChatPair] = []
    dropped: DroppedRows = {}
    for number, row in enumerate(rows):
        try:
            pairs.append(_to_pair(number, row, has_prompt))
        except _UnusableRowError as unusable:
            dropped.setdefault(str(unusable), []).append(number)
    return pairs, dropped


def read_rows(dataset: object, field: str) -> list[Row]:
    """The dataset's rows, reduced to the columns that matter here.

    Raises:
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for number, row in enumerate(_iterate_rows(dataset, field)):
        if not isinstance(row, Mapping):
            raise DataError(
                field, f"row {number} is a {type(row).__name__}", "each row must be a mapping with chosen and rejected"
            )
        columns.update(dict.fromkeys(row))
        rows.append({name: row[name] for name in COLUMNS if name in row})
    if not rows:
        raise DataError(field, _describe(dataset), "has no rows; hand in at least one preference pair")
    _require_columns(columns, field)
    return rows


def shared_length(*sequences: Sequence[Any]) -> int:
    """Length of the longest prefix that all the sequences have in common."""
    length = 0
    for first, *others in zip(*sequences, strict=False):
        if any(other != first for other in others):
            break
        length += 1
    return length


# ---------------------------------------------------------------------------------------------------------- containers


def _iterate_rows(dataset: Any, field: str) -> Iterable[object]:
    """Containers are told apart by their methods, so that pandas and pyarrow need not be imported."""
    if isinstance(dataset, str | os.PathLike):
        return _read_json_lines(Path(dataset), field)
    if isinstance(dataset, Mapping):
        return _rows_of_columns(dataset, field)
    if hasattr(dataset, "notna") and hasattr(dataset, "to_dict"):
        _require_columns(dataset.columns, field)
        wanted = [name for name in COLUMNS if name in dataset.columns]
        return cast("list[object]", dataset[wanted].to_dict(orient="records"))
    names = getattr(dataset, "column_names", None)
    if names:
        _require_columns(names, field)
        wanted = [name for name in COLUMNS if name in names]
        if hasattr(dataset, "to_pylist"):
            return cast("list[object]", dataset.select(wanted).to_pylist())
        return cast("Iterable[object]", dataset.select_columns(wanted).with_format(None))
    try:
        return cast("Iterable[object]", iter(dataset))
    except TypeError:
        raise DataError(
            field,
            _describe(dataset),
            "is not a dataset; pass a datasets.Dataset, rows, columns, a DataFrame or the path of a JSON-lines file",
        ) from None


def _rows_of_columns(table: Mapping[str, Any], field: str) -> Iterator[Row]:
    if any(hasattr(value, "column_names") for value in table.values()):
        splits = sorted(map(str, table))
        raise DataError(
            field, _describe(table), f'holds the splits {splits}; pass one of them, as in data["{splits[0]}"]'
        )
    _require_columns(table, field)
    columns = {name: table[name] for name in COLUMNS if name in table}
    for name, values in columns.items():
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise DataError(f"{field}[{name!r}]", type(values).__name__, "a mapping must hold one list for each column")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(field, lengths, "columns differ in length; give each column one value for each pair")
    return (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _read_json_lines(path: Path, field: str) -> Iterator[object]:
    if not path.is_file():
        raise DataError(
            field,
            str(path),
            "no such file; pass an existing JSON-lines file, or load a hub dataset with load_dataset()",
        )
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] == [".gz"]
    kind = suffixes[-2:-1] if compressed else suffixes[-1:]
    if not kind or kind[0] not in JSON_LINES_SUFFIXES:
        raise DataError(
            field, str(path), "only JSON-lines files are read (.jsonl, .jsonl.gz); load others with load_dataset()"
        )
    return _parse_json_lines(path, compressed, field)


def _parse_json_lines(path: Path, compressed: bool, field: str) -> Iterator[object]:
    try:
        with gzip.open(path) if compressed else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parse_object(line, number, path, field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(field, str(path), f"is not a whole gzip file ({error}); fetch or compress it again") from None


def _parse_object(line: bytes, number: int, path: Path, field: str) -> object:
    try:
        value = json.loads(line.decode("utf-8-sig"))  # some editors put a byte-order mark in front
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise DataError(field, str(path), f"line {number} is not valid JSON ({error}); correct or remove it") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(field, str(path), f"line {number} holds a {kind}; JSON lines have one object on each line")
    return value


def _require_columns(columns: Iterable[str], field: str) -> None:
    seen = list(columns)
    missing = [name for name in REQUIRED_COLUMNS if name not in seen]
    if missing:
        raise DataError(
            field,
            f"columns {seen}",
            f"lacks {' and '.join(missing)}; rename its columns to chosen and rejected (and prompt, if there is one)",
        )
    alias = next((name for name in PROMPT_ALIASES if name in seen and "prompt" not in seen), None)
    if alias is not None:
        raise DataError(field, f"columns {seen}", f"has a column {alias!r} that would not be used; rename it to prompt")


def _describe(dataset: object) -> str:
    """A dataset in a few words: its repr could be the whole data."""
    return type(dataset).__name__


# ---------------------------------------------------------------------------------------------------------------- rows


def _to_pair(number: int, row: Row, has_prompt: bool) -> TextPair | ChatPair:
    chosen, rejected = (_normalise(row, name) for name in REQUIRED_COLUMNS)
    prompt = _normalise(row, "prompt") if has_prompt else None
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        return _text_pair(number, prompt, chosen, rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _chat_pair(number, prompt, chosen, rejected)
    raise _UnusableRowError(MIXED_KINDS)


def _normalise(row: Row, name: str) -> str | list[Message]:
    value = row.get(name)
    if value is None or (isinstance(value, float) and np.isnan(value)):
        raise _UnusableRowError(f"{name} is missing")
    if isinstance(value, str):
        _require_unicode(value)
        return str(value)
    if isinstance(value, list | tuple | np.ndarray):  # parquet read by pandas gives arrays of messages
        return [_message(item) for item in value]
    raise _UnusableRowError(f"{name} is neither text nor messages")


def _message(value: object) -> Message:
    # Arrow fills the keys that only other messages have with None.
    message = {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else {}
    role, content = message.get("role"), message.get("content")
    if not (isinstance(role, str) and role and isinstance(content, str)):
        raise _UnusableRowError(MALFORMED_MESSAGES)
    _require_unicode(content)
    return message


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and no tokenizer takes
        raise _UnusableRowError(INVALID_UNICODE) from None


# ------------------------------------------------------------------------------------------------------------- strings


def _text_pair(row: int, prompt: str | None, chosen: str, rejected: str) -> TextPair:
    _require_two_completions(chosen, rejected, (chosen, rejected))
    if prompt is None:
        prompt = _implicit_prompt(chosen, rejected)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        _require_two_completions(chosen, rejected, (chosen, rejected))
    return TextPair(row, prompt, chosen, rejected)


def _require_two_completions(chosen: object, rejected: object, texts: Iterable[str]) -> None:
    if chosen == rejected:
        raise _UnusableRowError(SAME_COMPLETIONS)
    if not all(text.strip() for text in texts):
        raise _UnusableRowError(EMPTY_COMPLETION)


def _implicit_prompt(chosen: str, rejected: str) -> str:
    if ASSISTANT_MARKER not in chosen and ASSISTANT_MARKER not in rejected:
        return chosen[: _boundary(chosen, rejected)]
    prompt, other = ("".join(text.rpartition(ASSISTANT_MARKER)[:2]) for text in (chosen, rejected))
    if prompt != other:
        raise _UnusableRowError(DIFFERENT_PROMPTS)
    return prompt


def _boundary(chosen: str, rejected: str) -> int:
    """Where the common prefix of two texts ends, without cutting a word or leaving nothing to complete."""
    end = shared_length(chosen, rejected)
    if end == min(len(chosen), len(rejected)):
        end = len(chosen[:end].rstrip())  # one text continues the other: give its last word back to both
        while end and not chosen[end - 1].isspace():
            end -= 1
    elif _is_word(chosen[end]) or _is_word(rejected[end]):
        while end and _is_word(chosen[end - 1]):
            end -= 1
    return end - 1 if chosen[:end].endswith(" ") else end


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


# ------------------------------------------------------------------------------------------------------------ messages


def _chat_pair(
    row: int, prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> ChatPair:
    explicit = prompt if isinstance(prompt, list) else []
    chosen, rejected = (_without_prefix(side, explicit) for side in (chosen, rejected))
    _require_two_completions(chosen, rejected, map(_joined_content, (chosen, rejected)))
    given = _shared_messages(chosen, rejected, only_given=bool(explicit))
    full_prompt = [*explicit, *chosen[:given]]
    chosen, rejected = chosen[given:], rejected[given:]
    if any(side[0]["role"] in GIVEN_ROLES for side in (chosen, rejected)):
        raise _UnusableRowError(DIFFERENT_PROMPTS)
    _require_two_completions(chosen, rejected, map(_joined_content, (chosen, rejected)))
    if isinstance(prompt, str) and not any(message["role"] == "user" for message in full_prompt):
        raise _UnusableRowError(MIXED_KINDS)
    if not full_prompt:
        raise _UnusableRowError(NO_PROMPT_MESSAGE)
    return ChatPair(row, full_prompt, chosen, rejected)


def _without_prefix(messages: list[Message], prefix: list[Message]) -> list[Message]:
    return messages[len(prefix) :] if messages[: len(prefix)] == prefix else messages


def _shared_messages(chosen: list[Message], rejected: list[Message], only_given: bool) -> int:
    """How many leading messages belong to the prompt: one at least stays on each side."""
    shared = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not only_given:
        return shared
    answers = (number for number, message in enumerate(chosen[:shared]) if message["role"] not in GIVEN_ROLES)
    return next(answers, shared)


def _joined_content(messages: Iterable[Message]) -> str:
    return "".join(message["content"] for message in messages)
