"""The errors that evollm raises.

Each message names the field, its value and the fix. All errors are subclasses of
[`EvoLLMError`][evollm.errors.EvoLLMError]; those about an invalid argument are `ValueError`s, too.
"""

from __future__ import annotations

from unicodedata import category

from typing_extensions import Self

# The largest lengths of the parts of a message, in characters: a string such as a path, another value, the fix, and the
# reason of another library.
_MAX_TEXT = 400
_MAX_VALUE = 90
_MAX_FIX = 600
_MAX_REASON = 200


class EvoLLMError(Exception):
    """Base class of every error that evollm raises on purpose."""


class ConfigurationError(EvoLLMError, ValueError):
    """An argument has an invalid value.

    Args:
        field: The argument or attribute, as the user wrote it.
        value: Its value.
        fix: The reason why the value is invalid, and what to write instead.
    """

    def __init__(self, field: str, value: object, fix: str) -> None:
        try:
            shown_value = repr(value)
        except Exception:  # repr fails for an int of thousands of digits, and for objects that are not initialised
            shown_value = f"a {type(value).__name__}"
        shown_value = _cut(shown_value, _MAX_TEXT if isinstance(value, str) else _MAX_VALUE)
        super().__init__(one_line(f"{field}={shown_value}: {_cut(fix, _MAX_FIX)}"))
        self.field = field
        self.value = value
        self.fix = fix

    def __reduce__(self) -> tuple[type[Self], tuple[str, object, str]]:
        # An exception is pickled with its message as the only argument, unless it says otherwise.
        return type(self), (self.field, self.value, self.fix)


def one_line(text: str) -> str:
    """Return the text on one line, with control characters escaped."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def shown(text: str) -> str:
    """Return the text with control characters escaped, except line breaks and tabs."""
    return "".join(repr(char)[1:-1] if category(char) == "Cc" and char not in "\n\t" else char for char in text)


def brief(text: str) -> str:
    """Return another library's message on one line of at most 200 characters and an ellipsis."""
    line = one_line(text)
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}..."


def _cut(text: str, length: int) -> str:
    """Return a text with its middle left out if it is longer than `length` characters."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 4 :]}"


class DataError(ConfigurationError):
    """A dataset cannot be read as preference pairs or examples, or has the columns of the other kind of rows."""


class CheckpointError(EvoLLMError):
    """A checkpoint folder is missing, incomplete or does not fit."""


class DivergedError(EvoLLMError):
    """Every agent of the population has a loss, gradient or fitness that is not finite."""


class WorkerError(EvoLLMError):
    """A worker of a run, in another process or on another machine, has failed or was lost and cannot be replaced."""


class MissingExtraError(EvoLLMError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: The distribution that is missing.
        extra: The extra of evollm that installs it.
        purpose: The feature that needs it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs the package {package}: pip install "evollm[{extra}]"')
        self.package = package
        self.extra = extra
        self._purpose = purpose

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        return type(self), (self.package, self.extra, self._purpose)
