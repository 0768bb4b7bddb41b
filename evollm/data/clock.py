"""The time that chat templates write: now, or the start of a run, so that a resumed run renders the same texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from evollm.errors import ConfigurationError

# The function that templates call. transformers' own reads the clock and cannot be replaced, so calls are rewritten.
_FUNCTION = "strftime_now"
_CALL = re.compile(rf"""\b{_FUNCTION}\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
_MOMENT: ContextVar[datetime | None] = ContextVar("moment", default=None)


def moment() -> datetime:
    """The time that templates write: that of the enclosing `at`, else now."""
    # Local time without a zone, as in transformers.
    return _MOMENT.get() or datetime.now()


@contextmanager
def at(when: datetime | None) -> Iterator[None]:
    """Templates write this time inside the block; None leaves the time as it is."""
    token = _MOMENT.set(when or _MOMENT.get())
    try:
        yield
    finally:
        _MOMENT.reset(token)


def template_arguments(template: object) -> dict[str, Any]:
    """For a template that writes the time, the `chat_template` argument with the time filled in; else no argument."""
    if not (isinstance(template, str) and writes_time(template)):
        return {}
    when = moment()
    return {"chat_template": _CALL.sub(lambda call: json.dumps(when.strftime(call["format"])), template)}


def writes_time(template: object) -> bool:
    """Whether a chat template writes the time, so that it renders other texts on another day."""
    return isinstance(template, str) and _FUNCTION in template


def given_moment(name: str, value: datetime | str | None) -> datetime:
    """The time in an argument, a `datetime` or its ISO 8601 text; `moment()` for None.

    Raises:
        ConfigurationError: The value is neither; the message has the argument's name.
    """
    if value is None:
        return moment()
    found = value if isinstance(value, datetime) else read_moment(value)
    if found is None:
        raise ConfigurationError(name, value, "must be a time, such as '2026-11-26T18:30:00'")
    return found


def read_moment(text: object) -> datetime | None:
    """The time in an ISO 8601 text, as run folders hold it; None for anything else."""
    try:
        return datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
