"""Configurations in YAML: every key is a parameter of `evollm.tune`.

The rules are those of YAML 1.2, so that nothing is read as something else than it looks like: `1e-5` is a number, only
`true` and `false` are booleans (`no`, `off` and `on` are texts), `010` is ten, and a date is a text. A key that comes
twice, an anchor and a tag are refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evollm.checks import expanded
from evollm.errors import ConfigurationError

_MAP, _INT, _FLOAT, _BOOL, _NULL = (f"tag:yaml.org,2002:{name}" for name in ("map", "int", "float", "bool", "null"))
_SCALARS = {
    _NULL: r"~|null|Null|NULL|",
    _BOOL: r"true|True|TRUE|false|False|FALSE",
    _INT: r"[-+]?[0-9]+",
    _FLOAT: r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
# By a part of PyYAML's message: what to write instead of what mostly causes it.
_HINTS = {
    "'\\t'": ": indent with spaces, not with tabs",
    "mapping values are not allowed": ": indent the keys of a mapping alike, and put a text with a colon into "
    "quotation marks",
    "escape": ": put a path with \\ into single quotation marks",
    "cannot start any token": ": put the text into quotation marks",
    "could not find expected ':'": ": a line is key: value",
}
_DATA_FILES = (".jsonl", ".json", ".ndjson", ".gz", ".csv", ".parquet")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader with the scalars of YAML 1.2, without anchors, keys that are no text and keys that come twice."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - PyYAML declares it so

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(None, None, "anchors are not read: write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def read_mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} is no name", key_node.start_mark)
            if key in found:
                raise yaml.MarkedYAMLError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def read_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)


for _tag, _pattern in _SCALARS.items():
    # None: whatever its first character. The first pattern that matches wins, so integers come before other numbers.
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)
_Loader.add_constructor(_MAP, _Loader.read_mapping)
_Loader.add_constructor(_INT, _Loader.read_int)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keyword arguments of `evollm.tune` that a file holds, with those of a command line instead of its own.

    Args:
        path: A YAML file with a mapping.
        overrides: `key=value` each; a dotted key such as `lora_config.r=8` reaches into a mapping, and the value is
            read as YAML.

    Raises:
        ConfigurationError: The file cannot be read, or an override has no place.
    """
    try:
        text = Path(expanded(path)).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError("config", str(path), f"cannot be read: {_unread(str(path), error)}") from error
    return override(parse_config(text, str(path)), overrides)


def parse_config(text: str, where: str) -> dict[str, Any]:
    """A configuration from its text; `where` says where it is from.

    Raises:
        ConfigurationError: It is not YAML, or no mapping.
    """
    config = _parse(text, where)
    if not isinstance(config, dict):
        fix = "must hold a mapping: lines such as lr: 1e-5, with a space behind the colon"
        raise ConfigurationError("config", where, fix)
    return config


def override(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration with some values replaced; see `read_config`.

    Raises:
        ConfigurationError: One is not `key=value`, or reaches into what is no mapping.
    """
    found = copy.deepcopy(dict(config))
    for text in overrides:
        key, separator, value = text.partition("=")
        names = key.strip().split(".")
        if not separator or not all(names):
            fix = "must be key=value, such as lr=1e-5 or lora_config.r=8"
            if not separator and Path(text).suffix in _DATA_FILES:
                fix = f"must be key=value: data={text}"
            raise ConfigurationError("override", text, fix)
        place = found
        for depth, name in enumerate(names[:-1], start=1):
            if place.get(name) is None:
                place[name] = {}
            place = place[name]
            if not isinstance(place, dict):
                fix = f"{'.'.join(names[:depth])} is {place!r} and no mapping: give it a whole value instead"
                raise ConfigurationError("override", text, fix)
        place[names[-1]] = _parse(value, text, "override")
    return found


def _parse(text: str, where: str, field: str = "config") -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if Path(where).suffix in _DATA_FILES:
            raise ConfigurationError(field, where, f"is data and no configuration: give data={where}") from None
        raise ConfigurationError(field, where, f"is not valid YAML: {_reason(error)}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigurationError(field, where, f"cannot be read as YAML: {error}") from None


def _reason(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = str(getattr(error, "problem", None) or error).strip()
    return place + problem + next((hint for part, hint in _HINTS.items() if part in problem), "")


def _unread(path: str, error: Exception) -> str:
    """Why a file cannot be read, and what to do."""
    if "=" in path and isinstance(error, FileNotFoundError):
        return "it is a value and no file: give a YAML file first, or --recipe NAME (evollm recipes lists them)"
    if isinstance(error, IsADirectoryError):
        return "it is a folder: give a YAML file"
    if isinstance(error, UnicodeDecodeError):
        return f"it is no text in UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8"
    return str(error)
