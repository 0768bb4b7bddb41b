"""The hub: asked where it answers, and otherwise its cache alone, without minutes of new attempts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from evollm.errors import brief

# Of a connection that was refused at once, in seconds: names may take a moment after a machine has woken.
_WAIT = 0.5
_ABSENT = frozenset({"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"})


@contextmanager
def hub_or_cache(name: str | os.PathLike[str]) -> Iterator[str | None]:
    """Take what a name stands for from the cache alone where the hub cannot be reached.

    The libraries that ask it try again six times for each file, which takes them 23 s. Here it is asked once before,
    with the timeout `HF_HUB_ETAG_TIMEOUT` (10 s); an answer that is slow to come is left to them.

    Args:
        name: A path, which nothing is asked for if it exists, or a name on the hub.

    Yields:
        Why the hub is not asked, None where it is.
    """
    why = None if Path(name).exists() else unreachable()
    with ExitStack() as afterwards:
        if why is not None:
            import huggingface_hub.constants  # noqa: PLC0415 - slow to import

            _set_offline(huggingface_hub.constants, afterwards)
            datasets = sys.modules.get("datasets")
            if datasets is not None:
                _set_offline(datasets.config, afterwards)
        yield why


def _set_offline(settings: Any, afterwards: ExitStack) -> None:
    """Both libraries read it at each request."""
    afterwards.callback(setattr, settings, "HF_HUB_OFFLINE", settings.HF_HUB_OFFLINE)
    settings.HF_HUB_OFFLINE = True


def unreachable() -> str | None:
    """Why the hub cannot be asked; None where it can."""
    from huggingface_hub import constants, get_session  # noqa: PLC0415 - slow to import

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    for wait in (_WAIT, 0):
        try:
            get_session().head(constants.ENDPOINT, timeout=float(constants.HF_HUB_ETAG_TIMEOUT))
            return None
        except Exception as error:  # Of whichever library makes the request: their classes have these names.
            kind = type(error).__name__
            if not (isinstance(error, OSError) or kind.startswith(("Connect", "Proxy"))):
                return None
            reason = brief(str(error)) or kind
            if "Timeout" in kind:
                break
            time.sleep(wait)
    return f"{constants.ENDPOINT} cannot be reached ({reason})"


def is_absence(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the cache lacks something."""
    while error is not None:
        if type(error).__name__ in _ABSENT:
            return True
        error = error.__cause__ or error.__context__
    return False
