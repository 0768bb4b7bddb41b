"""The time that chat templates write: now, or when a run began, so that a resumed run has the same texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from evollm.errors import ConfigurationError

# What templates call; transformers gives them one that reads the clock, and lets nobody give them another.
_FUNCTION = "strftime_now"
_CALL = re.compile(rf"""\b{_FUNCTION}\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
_MOMENT: ContextVar[datetime | None] = ContextVar("moment", default=None)


def moment() -> datetime:
    """The time that templates write here."""
    # The local one, as transformers has it.
    return _MOMENT.get() or datetime.now()


@contextmanager
def at(when: datetime | None) -> Iterator[None]:
    """Inside the block templates write this time; None: changes nothing."""
    token = _MOMENT.set(when or _MOMENT.get())
    try:
        yield
    finally:
        _MOMENT.reset(token)


def template_arguments(template: object) -> dict[str, Any]:
    """What `apply_chat_template` needs for a template that writes the time: itself with that time; else nothing."""
    if not (isinstance(template, str) and writes_time(template)):
        return {}
    when = moment()
    return {"chat_template": _CALL.sub(lambda call: json.dumps(when.strftime(call["format"])), template)}


def writes_time(template: object) -> bool:
    """Whether a chat template writes the time, so that its texts are others on another day."""
    return isinstance(template, str) and _FUNCTION in template


def given_moment(name: str, value: datetime | str | None) -> datetime:
    """The time that an argument states; now if it is None.

    Raises:
        ConfigurationError: It is something else.
    """
    if value is None:
        return moment()
    found = value if isinstance(value, datetime) else read_moment(value)
    if found is None:
        raise ConfigurationError(name, value, "must be a time, such as '2026-11-26T18:30:00'")
    return found


def read_moment(text: object) -> datetime | None:
    """The time that a run folder states; None if it states none."""
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
