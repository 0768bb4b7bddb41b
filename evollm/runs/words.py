"""An algorithm's own words, which a run writes into `config.json`: whoever shows the run needs no list of algorithms.

A run folder may come from somebody else, so all of it is checked: names fit into names of files, and texts are short
and hold nothing that a terminal would obey. Whoever shows a text escapes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

_LONGEST, _MOST, _MOST_DIGITS = 400, 16, 9
# Of a score or a metric; a slash becomes a hyphen in the name of a picture.
_NAME = re.compile(r"[A-Za-z]\w{0,60}(/\w{1,60})?", re.ASCII)
_TAG = re.compile(r"[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?")


@dataclass(frozen=True)
class Score:
    """One number that an evaluation comes to.

    Attributes:
        name: Its name in records.
        label: What it is called in a sentence.
        unit: What it is measured in; "" of a number without unit.
        digits: Decimals that are written.
        is_signed: Whether a plus is written.
        is_share: Whether it is a share of the rows, written in percent in a sentence.
        smaller_is_better: Whether a smaller one is the better one.
        is_shown: Whether it is compared and drawn; the first of these is what a run is judged by.
        heading: What its column in a terminal is called; "": its label.
        in_full: What a model card calls it; "": its label with the unit.

    Raises:
        ValueError: A field is of another type, too long, or holds what no text for a person holds.
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
        if not 2 * self.is_share <= self.digits <= _MOST_DIGITS:
            raise ValueError(f"digits is {self.digits}")

    @property
    def form(self) -> str:
        """How the number is written, as for `format`."""
        return f"{'+' if self.is_signed else ''}.{self.digits}f"

    @property
    def short_form(self) -> str:
        """The same where there is less room: a sign takes that of a digit."""
        return f"+.{max(0, self.digits - 1)}f" if self.is_signed else self.form

    @property
    def title(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Words:
    """What people call an algorithm, its rows and its numbers.

    Attributes:
        name: What it is called.
        noun: What a row of the data is called; an "s" makes it several.
        title: What a model has become by it, for the title of its card.
        method: The method in full.
        tags: Of a model card.
        scores: What evaluations come to, at least one of which is shown.
        curves: The metrics of a step that are drawn, each with its title; one that a run does not report is left out.
        on_scores: Sentences on how the scores are to be read.
        on_training: A sentence on what the metrics of several agents do not allow to say.

    Raises:
        ValueError: A field is of another type, too long, or holds what no text for a person holds.
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
        if max(map(len, (self.tags, self.scores, self.curves))) > _MOST or not self.shown:
            raise ValueError("there are too many words, or no score that is shown")

    @property
    def shown(self) -> tuple[Score, ...]:
        """The scores that are compared and drawn."""
        return tuple(score for score in self.scores if score.is_shown)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Words:
        """Read what `dataclasses.asdict` gave, also after it has been JSON.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        scores = tuple(Score(**score) for score in data["scores"])
        curves = tuple((name, title) for name, title in data["curves"])
        return cls(**{**data, "tags": tuple(data["tags"]), "scores": scores, "curves": curves})


def _check(
    words: Score | Words, pattern: re.Pattern[str], names: Sequence[object], texts: Sequence[object] = ()
) -> None:
    """Refuse plain fields of another type, texts that nobody should read, and names that do not have the pattern."""
    kinds: dict[Any, type] = {"str": str, "int": int, "bool": bool}
    values = [(getattr(words, field.name), kinds[field.type]) for field in fields(words) if field.type in kinds]
    if any(type(value) is not kind for value, kind in values):
        raise ValueError("a field is of another type")
    for text in (*(value for value, kind in values if kind is str), *texts):
        if not isinstance(text, str) or len(text) > _LONGEST or not text.isprintable():
            raise ValueError("a text is too long, or none for a person")
    if not all(isinstance(name, str) and pattern.fullmatch(name) for name in names):
        raise ValueError("a name is none")
