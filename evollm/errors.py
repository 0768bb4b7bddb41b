"""The errors that evollm raises.

Each message names the field, the value it had and what to do about it. All of them descend from
[`EvoLLMError`][evollm.errors.EvoLLMError], and those about a bad argument are `ValueError`s too.
"""

from __future__ import annotations

from unicodedata import category

# Of a value, in characters: the rest of the message must stay in sight. A text may be a path, or the names of columns.
_LONGEST = 400
_LONGEST_OBJECT = 90
# Of what to do about it, which may quote a library or a path.
_LONGEST_FIX = 600
# Of another library's reason.
_LONGEST_REASON = 200


class EvoLLMError(Exception):
    """Base class of every error that evollm raises on purpose."""


class ConfigurationError(EvoLLMError, ValueError):
    """An argument has a value that cannot work.

    Args:
        field: The argument or attribute at fault, as the user wrote it.
        value: The value that it had.
        fix: What is wrong with it and what to write instead.
    """

    def __init__(self, field: str, value: object, fix: str) -> None:
        super().__init__(one_line(f"{field}={_described(value)}: {_cut(fix, _LONGEST_FIX)}"))
        self.field = field
        self.value = value
        self.fix = fix


def one_line(text: str) -> str:
    """The text without line breaks, and without characters that a terminal would obey."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)


def shown(text: str) -> str:
    """The text with its lines, and without characters that a terminal would obey."""
    return "".join(repr(char)[1:-1] if category(char) == "Cc" and char not in "\n\t" else char for char in text)


def brief(text: str) -> str:
    """What another library says, in one line and as far as a person would read it."""
    line = one_line(text)
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


def _described(value: object) -> str:
    """The value as Python writes it, as far as a person would read it."""
    try:
        text = repr(value)
    except Exception:  # Numbers of thousands of digits, and objects that are not finished, have no text.
        text = f"a {type(value).__name__}"
    return _cut(text, _LONGEST if isinstance(value, str) else _LONGEST_OBJECT)


def _cut(text: str, longest: int) -> str:
    """The text, without its middle if it is long."""
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 4 :]}"


class DataError(ConfigurationError):
    """A dataset cannot be turned into preference pairs or examples, or holds what is meant for another stage."""


class CheckpointError(EvoLLMError):
    """A checkpoint folder is missing, incomplete or does not fit."""


class DivergedError(EvoLLMError):
    """Every agent of the population has a loss, gradient or fitness that is not finite."""


class MissingExtraError(EvoLLMError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: The distribution that is missing.
        extra: The extra of evollm that brings it.
        purpose: What it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f'{purpose} needs the package {package}: pip install "evollm[{extra}]"')
        self.package = package
        self.extra = extra
