"""What other libraries say while a command runs, and what of it is shown."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from evollm.errors import one_line

_VERBOSITY = "TRANSFORMERS_VERBOSITY"


@contextmanager
def own_warnings_only() -> Iterator[None]:
    """Show evollm's warnings as one line each, and none of other libraries.

    Nothing that these say can be acted on by somebody who typed a command. Who asks for it sees all:
    `PYTHONWARNINGS=default` and `TRANSFORMERS_VERBOSITY=warning`.
    """
    if _VERBOSITY not in os.environ:
        # transformers, which is slow to import, reads it when it is.
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
        print(f"evollm: warning: {one_line(str(message))}", file=sys.stderr)


def _issuer() -> str:
    """The module whose code called `warnings.warn`; the file in a warning is that of any of its callers."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "warnings", "_py_warnings"):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__"))
