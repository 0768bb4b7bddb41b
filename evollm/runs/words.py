"""The names, labels and units of an algorithm, which a run writes into `config.json` for reports, cards and consoles.

A run folder may come from another person, so everything is checked: names can be parts of file names, and texts are
short and without control characters. Code that shows a text as HTML, Markdown or rich markup has to escape it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_MAX_CHARACTERS, _MAX_ENTRIES, _MAX_DIGITS = 400, 16, 9
# The name of a score or a metric; the slash of a name becomes a hyphen in the file name of its picture.
_NAME = re.compile(r"[A-Za-z]\w{0,60}(/\w{1,60})?", re.ASCII)
_TAG = re.compile(r"[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?")


@dataclass(frozen=True)
class Score:
    """How one score of an evaluation is named and written.

    Attributes:
        name: The score's name in records.
        label: The score's name in sentences.
        unit: The unit; "" for none.
        digits: Digits after the decimal point.
        is_signed: Whether a positive score is written with a plus sign.
        is_share: Whether the score is a share of the rows, which sentences give in percent.
        smaller_is_better: Whether smaller scores are better.
        is_shown: Whether the score is compared and drawn; the first such score is the one in the headline.
        heading: The heading of the score's column in a terminal; "": the label.
        in_full: The score's name in a model card; "": the label with the unit.

    Raises:
        ValueError: A field has another type, is too long, or has control characters.
    """

    name: str
    label: str
    unit: str = ""
    digits: int = 3
    is_signed: bool = False
    is_share: bool = False
    smaller_is_better: bool = False
    is_shown: bool = True
    heading: str = ""
    in_full: str = ""

    def __post_init__(self) -> None:
        _check(self, _NAME, [self.name])
        if not 2 * self.is_share <= self.digits <= _MAX_DIGITS:
            raise ValueError(f"digits is {self.digits}")

    @property
    def format_spec(self) -> str:
        """The format specification of the score."""
        return f"{'+' if self.is_signed else ''}.{self.digits}f"

    @property
    def short_format_spec(self) -> str:
        """The format specification for narrow places: a signed score has one digit less."""
        return f"+.{max(0, self.digits - 1)}f" if self.is_signed else self.format_spec

    @property
    def title(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Words:
    """How an algorithm, its rows and its scores are named in reports, model cards and terminals.

    Attributes:
        name: The algorithm's short name.
        noun: The singular of the noun for a row of the data; an "s" makes the plural.
        title: The participle in the title of a model card, such as "tuned on preferences".
        method: The algorithm's full name.
        tags: The tags of a model card.
        scores: The scores of an evaluation; at least one of them is shown.
        curves: The metrics of a step that are drawn, each with a title; metrics that a run lacks are left out.
        on_scores: Sentences that explain how the scores are read.
        on_training: A sentence that says which training metrics of different agents cannot be compared.

    Raises:
        ValueError: A field has another type, is too long, or has control characters.
    """

    name: str
    noun: str
    title: str
    method: str
    tags: tuple[str, ...]
    scores: tuple[Score, ...]
    curves: tuple[tuple[str, str], ...]
    on_scores: str = ""
    on_training: str = ""

    def __post_init__(self) -> None:
        _check(self, _TAG, self.tags)
        _check(self, _NAME, [name for name, _ in self.curves], [title for _, title in self.curves])
        if max(map(len, (self.tags, self.scores, self.curves))) > _MAX_ENTRIES or not self.shown:
            raise ValueError("there are too many tags, scores or curves, or no score that is shown")

    @property
    def shown(self) -> tuple[Score, ...]:
        """The scores that are compared and drawn."""
        return tuple(score for score in self.scores if score.is_shown)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Words:
        """Read the dict of `dataclasses.asdict`, also after a round trip through JSON.

        Raises:
            KeyError, TypeError, ValueError: `data` is not such a dict.
        """
        scores = tuple(Score(**score) for score in data["scores"])
        curves = tuple((name, title) for name, title in data["curves"])
        return cls(**{**data, "tags": tuple(data["tags"]), "scores": scores, "curves": curves})


def _check(
    words: Score | Words, pattern: re.Pattern[str], names: Sequence[object], texts: Sequence[object] = ()
) -> None:
    """Check the types of the plain fields, the length and the characters of all texts, and the pattern of the names."""
    types: dict[Any, type] = {"str": str, "int": int, "bool": bool}
    values = [(getattr(words, field.name), types[field.type]) for field in fields(words) if field.type in types]
    if any(type(value) is not expected for value, expected in values):
        raise ValueError("a field has the wrong type")
    for text in (*(value for value, _ in values if isinstance(value, str)), *texts):
        if not isinstance(text, str) or len(text) > _MAX_CHARACTERS or not text.isprintable():
            raise ValueError("a text is too long, or has control characters")
    if not all(isinstance(name, str) and pattern.fullmatch(name) for name in names):
        raise ValueError("a name has characters that no name may have")
