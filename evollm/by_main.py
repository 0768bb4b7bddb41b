"""What users' functions compute is computed by the main process alone, and sent to the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from evollm.errors import ConfigurationError, EvoLLMError


class Main(Protocol):
    """The processes that share a computation; `evollm.processes.Processes` implements this protocol."""

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that computes."""

    def from_main(self, value: Any) -> Any:
        """Return the main process's value in every process; JSON values only."""


def computed_by_main(processes: Main, compute: Callable[[], Any], what: str) -> Any:
    """The main process's result, in every process: a user's function may say other things in others, or fail there.

    Args:
        processes: All of them call this at the same point.
        compute: Returns JSON values.
        what: The name of what is called, for the message of an error.

    Raises:
        Exception: The call has failed in the main process; in the others a `ConfigurationError` comes with the same
            fields, and any other error as an `EvoLLMError` with its text.
    """
    if processes.size == 1:
        return compute()
    said: dict[str, Any] = {}
    failed: Exception | None = None
    if processes.is_main:
        try:
            said["value"] = compute()
        except Exception as error:
            failed = error
            if isinstance(error, ConfigurationError):
                said["refused"] = [error.field, str(error.value), error.fix]
            else:
                said["failed"] = f"{type(error).__name__}: {error}"
    said = processes.from_main(said)
    if failed is not None:
        raise failed
    if "refused" in said:
        raise ConfigurationError(*said["refused"])
    if "failed" in said:
        raise EvoLLMError(f"{what} has failed in the main process: {said['failed']}")
    return said["value"]
