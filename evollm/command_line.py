"""Commands that evollm prints for the user to run: each is quoted, so that it can be pasted into a shell."""

from __future__ import annotations

import json
import os
import re
import shlex

# Paths that YAML reads as strings without quotation marks.
_PLAIN = re.compile(r"/[\w./-]*", re.ASCII)


def command(*words: str | os.PathLike[str]) -> str:
    """Return a shell command that calls evollm.

    Args:
        *words: The command's name, options, paths and settings.
    """
    return shlex.join(["evollm", *map(str, words)])


def place(path: str | os.PathLike[str]) -> str:
    """Return a path as an argument; a leading `-` or `~`, which begins an option or a home directory, gets a `./`."""
    text = str(path)
    return f"./{text}" if text.startswith(("-", "~")) else text


def setting(name: str, path: str | os.PathLike[str]) -> str:
    """Return `name=path` as an argument, quoted where YAML would read the path as something else than a string."""
    text = str(path)
    return f"{name}={text if _PLAIN.fullmatch(text) else json.dumps(place(text), ensure_ascii=False)}"
