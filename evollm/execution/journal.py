"""Calls of workers that may be lost: the run goes on with the same result, since all that a worker knows is known here.

Each worker has a place, and the place a journal: the last commit, which `Worker.saved` gave, and the calls since.
A new worker that is made as the first one of the place was, and is called with all of the journal again, has the state
of the lost one, to the bit: `restore` and every later call depend on nothing else. A transport makes each call at most
once, so that only a journal repeats calls.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

from evollm.checkpoints import Population
from evollm.errors import WorkerError, brief
from evollm.runs.events import WorkerHome, WorkerLoss

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


class NoRoomError(WorkerError):
    """No room was found for a worker in time."""


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
            NoRoomError: There is no place where it could be.
            EvoLLMError: None can be made.
        """

    def lodge(self, place: int, host: Any) -> Any:
        """As `start`, but in the process of the worker `host`, beside it."""

    def where(self, worker: Any) -> tuple[str, int]:
        """The machine of a worker that is made, and the number of its process there."""

    def dismiss(self, worker: Any) -> None:
        """End a worker that holds nothing any more; `host` of a lodged one is left alone."""

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

    Each worker has a place. One that is lost and finds no room any more is lodged in the process of another one, so
    that nothing is lost with it; its members should leave it then, and it be retired.

    Args:
        transport: Makes and calls the workers.
        count: Number of workers.

    Raises:
        EvoLLMError: A worker cannot be made.
    """

    def __init__(self, transport: Transport, count: int) -> None:
        self._transport = transport
        # By place; the places of retired workers are missing.
        self._journals = {place: Journal() for place in range(count)}
        self._workers = {place: transport.start(place) for place in range(count)}
        self._homes: dict[int, WorkerHome] = {}
        # Places whose worker is in the process of another one, and the place of that.
        self._lodged: dict[int, int] = {}
        # Losses since they were asked for, and whether no call has failed, nor was one broken off.
        self._losses: list[WorkerLoss] = []
        self.intact = True
        for place, worker in self._workers.items():
            try:
                self._made(place, worker)
            except WorkerLost as error:
                self._repeated(place, None, error)
            except NoRoomError as error:
                raise WorkerError(f"{error}. Free some, or use fewer workers") from error

    @property
    def places(self) -> list[int]:
        """The places of the present workers, in their order."""
        return list(self._workers)

    @property
    def lodged(self) -> list[int]:
        """The places of workers without a process of their own."""
        return list(self._lodged)

    def homes(self) -> list[WorkerHome]:
        """Where the present workers are."""
        return [self._homes[place] for place in self._workers]

    def losses(self) -> list[WorkerLoss]:
        """The losses since the last call; their steps are 0."""
        found, self._losses = self._losses, []
        return found

    def retire(self, places: Sequence[int]) -> None:
        """End workers that hold nothing any more."""
        for place in places:
            self._transport.dismiss(self._workers.pop(place))
            self._lodged.pop(place, None)
            del self._journals[place]

    def call(self, method: str, arguments: Sequence[Mapping[str, Any] | None]) -> list[Any]:
        """Call a method of each worker at the same time; see `evollm.execution.workers.Workers.call`.

        Raises:
            WorkerError: A worker was lost and cannot be replaced.
            Exception: The first error of a worker.
        """
        self.intact = False
        calls: list[Call | None] = [None if own is None else (method, own) for own in arguments]
        places = self.places
        pending = [
            call and self._transport.send(self._workers[place], call) for place, call in zip(places, calls, strict=True)
        ]
        results: list[Any] = []
        errors: list[Exception] = []
        for place, one, call in zip(places, pending, calls, strict=True):
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
        due = [journal.is_due for journal in self._journals.values()]
        if not any(due):
            return
        found = self.call("saved", [{} if one else None for one in due])
        for journal, saved in zip(self._journals.values(), found, strict=True):
            if saved is not None:
                journal.commit(saved)

    def _received(self, place: int, pending: Any, call: Call) -> Any:
        try:
            return self._transport.receive(pending)
        except WorkerLost as error:
            return self._repeated(place, call, error)

    def _made(self, place: int, worker: Any) -> Any:
        """Wait until a worker is made, and note it."""
        self._workers[place] = worker
        self._transport.wait(worker)
        self._homes[place] = WorkerHome(place, *self._transport.where(worker))
        return worker

    def _repeated(self, place: int, call: Call | None, error: WorkerLost) -> Any:
        """Put a new worker at a place, let it do what the lost one did, and return what the last call gives."""
        began, home, first = time.monotonic(), self._homes.get(place, WorkerHome(place, "", 0)), _reason(error)
        for _ in range(LOSSES):
            warnings.warn(
                f"worker {place} was lost, and another one goes on from its last commit, with the same result: "
                f"{_reason(error)}",
                UserWarning,
                stacklevel=4,
            )
            try:
                worker = self._anew(place)
                result = None
                for one in [*self._journals[place].calls(), *([call] if call else [])]:
                    result = self._transport.receive(self._transport.send(worker, one))
            except WorkerLost as again:
                error = again
            else:
                seconds, replaced = time.monotonic() - began, place not in self._lodged
                self._losses.append(WorkerLoss(0, home, seconds, first, replaced))
                return result
        raise WorkerError(
            f"worker {place} was lost {LOSSES + 1} times {f'in {call[0]}' if call else 'as it began'}. If its memory "
            "is short, use fewer workers on a machine, or a smaller micro_batch_size_per_gpu; the run resumes from its "
            f"last checkpoint. The last time: {brief(str(error))}"
        ) from error

    def _anew(self, place: int) -> Any:
        """A new worker for a place, where there is room for one, else in the process of another one.

        Raises:
            WorkerLost: It was lost, too.
            WorkerError: There is neither room for it nor another worker.
        """
        if place not in self._lodged:
            try:
                return self._made(place, self._transport.start(place))
            except NoRoomError as error:
                hosts = self._hosts(place)
                if not hosts:
                    raise _no_worker_left(error) from error
                warnings.warn(
                    f"{error}: its members go on with the {len(hosts)} other worker{'s' if len(hosts) > 1 else ''}, "
                    "from its last commit. Who shares passes changes, and with it roundings",
                    UserWarning,
                    stacklevel=5,
                )
        for host in self._hosts(place):
            self._lodged[place] = host
            with suppress(WorkerLost):
                return self._made(place, self._transport.lodge(place, self._workers[host]))
        # The others have been lost meanwhile, and left their room.
        self._lodged.pop(place, None)
        try:
            return self._made(place, self._transport.start(place))
        except NoRoomError as error:
            raise _no_worker_left(error) from error

    def _hosts(self, place: int) -> list[int]:
        """Places of the other workers that have processes of their own, those with the fewest lodgers first."""
        lodgers = list(self._lodged.values())
        others = [one for one in self._workers if one != place and one not in self._lodged]
        return sorted(others, key=lodgers.count)


def _no_worker_left(error: NoRoomError) -> WorkerError:
    fix = "the run resumes from its last checkpoint, on as many workers as there are then"
    return WorkerError(f"no worker is left: {error}; {fix}")


def _reason(error: WorkerLost) -> str:
    return brief(str(error)) or "nobody knows why"
