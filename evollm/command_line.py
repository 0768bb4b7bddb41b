"""Commands that are printed to be typed: each can be pasted into a shell, whatever its folders are called."""

from __future__ import annotations

import json
import os
import re
import shlex

# A path that YAML reads as the text that it is.
_PLAIN = re.compile(r"/[\w./-]*", re.ASCII)


def command(*words: str | os.PathLike[str]) -> str:
    """A command of evollm as a shell takes it.

    Args:
        *words: The name of the command, options, paths, settings.
    """
    return shlex.join(["evollm", *map(str, words)])


def place(path: str | os.PathLike[str]) -> str:
    """A path as an argument: not one that begins like an option, or like somebody's home."""
    text = str(path)
    return f"./{text}" if text.startswith(("-", "~")) else text


def setting(name: str, path: str | os.PathLike[str]) -> str:
    """`name=path` as an argument: a text, whatever YAML would make of the path."""
    text = str(path)
    return f"{name}={text if _PLAIN.fullmatch(text) else json.dumps(place(text), ensure_ascii=False)}"
