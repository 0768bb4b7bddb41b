"""Which warnings are shown while a command runs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evollm.commands.launch import say_warning
from evollm.errors import one_line

_VERBOSITY = "TRANSFORMERS_VERBOSITY"


@contextmanager
def own_warnings_only() -> Iterator[None]:
    """Show evollm's warnings as one line each, and none of other libraries.

    A user of the command line can do nothing about the others'. Environment variables show them all:
    `PYTHONWARNINGS=default` and `TRANSFORMERS_VERBOSITY=warning`.
    """
    if _VERBOSITY not in os.environ:
        # transformers reads the variable when it is imported, which is slow and so not done here.
        os.environ[_VERBOSITY] = "error"
        if "transformers" in sys.modules:
            from transformers.utils import logging

            logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning, in place of `warnings.showwarning`, if evollm's code gave it or the user asked for all."""
    if sys.warnoptions or _issuer().partition(".")[0] == "evollm":
        say_warning(f"evollm: warning: {one_line(str(message))}")


def _issuer() -> str:
    """The module whose code called `warnings.warn`: with a stacklevel, a warning's file is that of a caller."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "warnings", "_py_warnings"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))
