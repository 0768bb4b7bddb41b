"""Calls of workers that may be lost: the run goes on with the same result, since all that a worker knows is known here.

Each worker has a place, and the place a journal: the last commit, which `Worker.saved` gave, and the calls since.
A new worker that is made as the first one of the place was, and is called with all of the journal again, has the state
of the lost one, to the bit: `restore` and every later call depend on nothing else. A transport makes each call at most
once, so that only a journal repeats calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from evollm.checkpoints import Population
from evollm.errors import WorkerError, brief

# The name of a method of a worker, and its keyword arguments.
Call: TypeAlias = tuple[str, Mapping[str, Any]]
# Methods that change nothing of a worker.
READS = frozenset({"describe", "changed_text", "members", "export", "exports", "check", "saved"})
# Methods after which a worker has counted no operations that it has not told, and that a commit would lack.
SETTLED = frozenset({"learn_step", "spent"})
# A worker is committed once its journal has so many calls: some ten to twenty steps.
CALLS = 20
# A worker that is lost so often in one call, with all that is repeated before it, is not replaced again.
LOSSES = 5


class WorkerLost(Exception):  # noqa: N818 - an error only if no other worker can take the place
    """A worker is gone: its process was killed, or its machine."""


class Transport(Protocol):
    """Makes workers at places 0, 1, ... and calls them, wherever they are."""

    def start(self, place: int) -> Any:
        """Begin to make a worker, as the first one of this place was made; return what the methods know it by.

        If there is a worker at this place, it is ended first.
        """

    def wait(self, worker: Any) -> None:
        """Wait until a worker is made.

        Raises:
            WorkerLost: It was lost meanwhile.
            EvoLLMError: None can be made.
        """

    def send(self, worker: Any, call: Call) -> Any:
        """Begin a call, which is made at most once; return what `receive` knows it by."""

    def receive(self, pending: Any) -> Any:
        """Wait for a call and return its result, or raise its error.

        Raises:
            WorkerLost: The worker is gone; whether it made the call is not known.
        """

    def close(self) -> None:
        """End all workers."""


class Journal:
    """What a new worker has to be called with, to be as the present one is."""

    def __init__(self) -> None:
        # The calls up to the last `begin`, which keeps what a commit lacks: the run's first agent.
        self._beginning: list[Call] = []
        self._since: list[Call] = []

    def calls(self) -> list[Call]:
        """All calls, in order."""
        return [*self._beginning, *self._since]

    def note(self, call: Call) -> None:
        """Add a call that was made."""
        method = call[0]
        if method in READS:
            return
        if method == "begin":
            self._beginning, self._since = [*self.calls(), call], []
        elif method == "restore":
            # It replaces all that the calls since `begin` have changed.
            self._since = [call]
        else:
            self._since.append(call)

    def commit(self, saved: Population) -> None:
        """Replace the calls since `begin` by the state that they led to."""
        self._since = [("restore", {"saved": saved})]

    @property
    def is_due(self) -> bool:
        """Whether there are so many calls, or calls with agents in them, that a commit is worth its time."""
        methods = {method for method, _ in self._since}
        # A commit has no candidates, which a run makes at its end.
        return "combine" not in methods and (len(self._since) > CALLS or "apply" in methods)


class JournaledCalls:
    """Calls workers, and replaces those that are lost.

    Args:
        transport: Makes and calls the workers.
        count: Number of workers.

    Raises:
        EvoLLMError: A worker cannot be made.
    """

    def __init__(self, transport: Transport, count: int) -> None:
        self._transport = transport
        self._journals = [Journal() for _ in range(count)]
        self._workers = [transport.start(place) for place in range(count)]
        # Whether no call has failed, nor was one broken off.
        self.intact = True
        for place, worker in enumerate(self._workers):
            try:
                transport.wait(worker)
            except WorkerLost as error:
                self._repeated(place, None, error)

    def call(self, method: str, arguments: Sequence[Mapping[str, Any] | None]) -> list[Any]:
        """Call a method of each worker at the same time; see `evollm.execution.spread.Workers.call`.

        Raises:
            WorkerError: A worker was lost and cannot be replaced.
            Exception: The first error of a worker.
        """
        self.intact = False
        calls: list[Call | None] = [None if own is None else (method, own) for own in arguments]
        pending = [call and self._transport.send(self._workers[place], call) for place, call in enumerate(calls)]
        results: list[Any] = []
        errors: list[Exception] = []
        for place, (one, call) in enumerate(zip(pending, calls, strict=True)):
            try:
                results.append(call and self._received(place, one, call))
            except Exception as error:
                # The others are waited for: no call may still be going on when the next one is made.
                errors.append(error)
            else:
                if call is not None:
                    self._journals[place].note(call)
        if errors:
            raise errors[0]
        self.intact = True
        if method in SETTLED:
            self._commit()
        return results

    def _commit(self) -> None:
        """Commit the workers whose journals are due; a worker's state is its own, so that others need not be."""
        due = [journal.is_due for journal in self._journals]
        if not any(due):
            return
        found = self.call("saved", [{} if one else None for one in due])
        for journal, saved in zip(self._journals, found, strict=True):
            if saved is not None:
                journal.commit(saved)

    def _received(self, place: int, pending: Any, call: Call) -> Any:
        try:
            return self._transport.receive(pending)
        except WorkerLost as error:
            return self._repeated(place, call, error)

    def _repeated(self, place: int, call: Call | None, error: WorkerLost) -> Any:
        """Put a new worker at a place, let it do what the lost one did, and return what the last call gives."""
        for _ in range(LOSSES):
            why = brief(str(error)) or "nobody knows why"
            warnings.warn(
                f"worker {place} was lost, and another one goes on from its last commit, with the same result: {why}",
                UserWarning,
                stacklevel=4,
            )
            try:
                worker = self._workers[place] = self._transport.start(place)
                self._transport.wait(worker)
                result = None
                for one in [*self._journals[place].calls(), *([call] if call else [])]:
                    result = self._transport.receive(self._transport.send(worker, one))
                return result
            except WorkerLost as again:
                error = again
        raise WorkerError(
            f"worker {place} was lost {LOSSES + 1} times {f'in {call[0]}' if call else 'as it began'}. If its memory "
            "is short, use fewer workers on a machine, or a smaller micro_batch_size_per_gpu; the run resumes from its "
            f"last checkpoint. The last time: {brief(str(error))}"
        ) from error
