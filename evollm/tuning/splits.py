"""Held-out splits of a dataset, divided by prompt: no prompt is in two splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from evollm.data.pairs import ChatPair, TextPair
from evollm.data.rows import RowFormat, Rows, read_each, read_rows
from evollm.errors import DataError

SHARE = 0.1
FEWEST = 2
# More rows rank agents hardly better, and each row costs a forward pass per agent and generation.
MOST = 300


@dataclass(frozen=True)
class Splits:
    """The rows of one dataset, divided; each row keeps its position in the dataset.

    Attributes:
        train: The rows to learn from.
        parts: The held-out splits, as many as `hold_out` was called for.
    """

    train: Rows
    parts: Sequence[Rows]


@dataclass(frozen=True)
class SetSplits:
    """The rows of several datasets, divided; each row keeps its position in its dataset.

    Attributes:
        train: The rows to learn from, by the names of the sets.
        parts: The held-out splits, each by the names of the sets that have rows in it.
    """

    train: Mapping[str, Rows]
    parts: Sequence[Mapping[str, Rows]]


def hold_out(dataset: object, row_format: RowFormat, parts: int, seed: int) -> Splits:
    """Hold out rows by prompt.

    Prompts are sorted by a digest of seed and text, so that a split does not depend on the order of the rows. A split
    takes prompts, each with all its rows, until it has a tenth of the usable rows, but at least 2 and at most 300.
    Unusable rows stay in the training split, whose report counts them.

    Args:
        dataset: Rows in any form that a gym takes as `train_dataset`.
        row_format: Format of the rows.
        parts: How many splits to hold out.
        seed: Seed of the order of the prompts.

    Raises:
        DataError: The dataset cannot be read, or has too few prompts to divide.
    """
    rows = read_rows(dataset, "data", row_format)
    taken = _taken(list(_prompts(rows, "data", row_format)), row_format.noun, parts, seed)
    apart = {place for places in taken for place in places}
    return Splits(rows.part([place for place in range(len(rows)) if place not in apart]), [*map(rows.part, taken)])


def hold_out_of_sets(sets: Mapping[str, object], row_format: RowFormat, parts: int, seed: int) -> SetSplits:
    """Hold out rows of several datasets by prompt, as `hold_out` does from all rows together, whatever their weights.

    Raises:
        DataError: A dataset cannot be read, or there are too few prompts to divide.
    """
    read = {name: read_rows(dataset, f"data.{name}", row_format) for name, dataset in sets.items()}
    prompts = [prompt for name, rows in read.items() for prompt in _prompts(rows, f"data.{name}", row_format)]
    held_out = [set(places) for places in _taken(prompts, row_format.noun, parts, seed)]
    apart = {place for places in held_out for place in places}
    train: dict[str, Rows] = {}
    found: list[dict[str, Rows]] = [{} for _ in held_out]
    start = 0
    for name, rows in read.items():
        numbers = range(start, start + len(rows))
        start += len(rows)
        train[name] = rows.part([place - numbers.start for place in numbers if place not in apart])
        for part, places in zip(found, held_out, strict=True):
            own = [place - numbers.start for place in numbers if place in places]
            if own:
                part[name] = rows.part(own)
        if len(rows) and not len(train[name]):
            fix = "were all held out, and none is left to learn from: add rows to the set, or give test_data"
            raise DataError(f"data.{name}", f"{len(rows)} rows", fix)
    return SetSplits(train, found)


def _prompts(rows: Rows, field: str, row_format: RowFormat) -> Iterator[str | None]:
    """The key of each row's prompt; None for unusable rows."""
    return (None if isinstance(pair, str) else _prompt(pair) for _, pair in read_each(rows, field, row_format))


def _taken(prompts: Sequence[str | None], noun: str, parts: int, seed: int) -> list[list[int]]:
    """The places of the rows of each held-out split, in order, from each row's prompt."""
    by_prompt: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if prompt is not None:
            by_prompt.setdefault(prompt, []).append(place)
    usable = sum(map(len, by_prompt.values()))
    size = min(max(round(SHARE * usable), FEWEST), MOST)
    digests = {prompt: hashlib.blake2b(f"{seed} {prompt}".encode()).digest() for prompt in by_prompt}
    waiting = [by_prompt[prompt] for prompt in sorted(by_prompt, key=digests.__getitem__)]
    held_out: list[list[int]] = [[] for _ in range(parts)]
    for taken in held_out:
        while waiting and len(taken) < size:
            taken.extend(waiting.pop(0))
    if sum(map(len, waiting)) < usable / 2 or any(len(taken) < size for taken in held_out):
        fix = (
            f"are too few to set {parts} x {size} {noun}s apart by prompt: hand in more, or test_data and final_data "
            "of your own, or false for a score that you do without (evolution needs test_data)"
        )
        raise DataError("data", f"{usable} usable {noun}s with {len(by_prompt)} prompts", fix)
    return [sorted(taken) for taken in held_out]


def _prompt(pair: TextPair | ChatPair) -> str:
    """The key of a row's prompt; rows with the same prompt have the same key."""
    if isinstance(pair, TextPair):
        # A plain text for language modelling has no prompt, so the whole text stands for the prompt.
        return pair.prompt.strip() or pair.chosen
    return json.dumps(pair.prompt, sort_keys=True, default=str)
