"""Offline use of the Hugging Face hub: if it cannot be reached, its cache is used without minutes of retries."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from evollm.errors import brief

# Seconds before the one retry, since name resolution may fail at first after a machine has woken.
_WAIT = 0.5
_ABSENT = frozenset({"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"})


@contextmanager
def hub_or_cache(name: str | os.PathLike[str]) -> Iterator[str | None]:
    """Set huggingface_hub and datasets offline inside the block if the hub cannot be reached.

    The two libraries retry six times for each file, which takes 23 s. This function sends one request before, with the
    timeout `HF_HUB_ETAG_TIMEOUT` (10 s).

    Args:
        name: A name on the hub, or a path; for an existing path no request is sent.

    Yields:
        The reason why the hub cannot be reached, None if it can.
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
    """Set HF_HUB_OFFLINE, which both libraries read at each request, until `afterwards` is closed."""
    afterwards.callback(setattr, settings, "HF_HUB_OFFLINE", settings.HF_HUB_OFFLINE)
    settings.HF_HUB_OFFLINE = True


def unreachable() -> str | None:
    """Return the reason why the hub cannot be reached; None if it can."""
    from huggingface_hub import constants, get_session  # noqa: PLC0415 - slow to import

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    for wait in (_WAIT, 0):
        try:
            get_session().head(constants.ENDPOINT, timeout=float(constants.HF_HUB_ETAG_TIMEOUT))
            return None
        except Exception as error:  # requests and httpx have different classes with these names
            kind = type(error).__name__
            if not (isinstance(error, OSError) or kind.startswith(("Connect", "Proxy"))):
                return None
            reason = brief(str(error)) or kind
            if "Timeout" in kind:
                break
            time.sleep(wait)
    return f"{constants.ENDPOINT} cannot be reached ({reason})"


def is_absence(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, means that a file is not in the cache."""
    while error is not None:
        if type(error).__name__ in _ABSENT:
            return True
        error = error.__cause__ or error.__context__
    return False
