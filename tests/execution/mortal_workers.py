"""Workers that die: real ones in this process, to which everything goes as a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeAlias

from evollm.execution.held_worker import Blueprint, HeldWorker
from evollm.execution.journal import NoRoomError, WorkerLost
from evollm.execution.remote_workers import RemoteWorkers
from evollm.execution.spread import SpreadExecutor, first_places

# A place, and a process: the worker in it, None if there is no room for it, nothing if it is dead.
Mortal: TypeAlias = tuple[int, list[Any]]


class MortalTransport:
    """A transport whose worker dies before or after a call if `dies(place, method)` says so: "before", "after", "".

    There is room for new workers at the beginning, and for so many later on.
    """

    def __init__(self, blueprint: Blueprint, dies: Callable[[int, str], str], count: int, room: int = 1000) -> None:
        self.blueprint = pickle.dumps(blueprint)
        self.dies = dies
        self.deaths = 0
        self.room = count + room
        self.made: list[int] = []
        self.dismissed: list[int] = []

    def start(self, place: int) -> Mortal:
        self.made.append(place)
        return place, [HeldWorker() if len(self.made) <= self.room else None]

    def lodge(self, place: int, host: Mortal) -> Mortal:
        return place, host[1]

    def wait(self, worker: Mortal) -> None:
        place, process = worker
        if not process:
            raise WorkerLost("it is dead")
        if process[0] is None:
            raise NoRoomError(f"worker {place} has found no room")
        process[0].build(self.blueprint, place).result()

    def where(self, worker: Mortal) -> tuple[str, int]:
        return "here", id(worker[1])

    def dismiss(self, worker: Mortal) -> None:
        place, process = worker
        self.dismissed.append(place)
        for held in process:
            held.dismiss(place)

    def send(self, worker: Mortal, call: tuple[str, Any]) -> bytes | None:
        place, process = worker
        dies = self.dies(place, call[0]) if process else "before"
        answer = b"" if dies == "before" else pickle.dumps(process[0].call(place, *pickle.loads(pickle.dumps(call))))
        if dies:
            process.clear()
        return None if dies else answer

    def receive(self, pending: bytes | None) -> Any:
        if pending is None:
            self.deaths += 1
            raise WorkerLost("its process was killed")
        return pickle.loads(pending).result()

    def close(self) -> None:
        """Nothing is left to end."""


def mortal_executor(
    dies: Callable[[int, str], str], made: list[MortalTransport] | None = None, count: int = 2, room: int = 1000
) -> Any:
    """Makes executors whose workers die as `dies` says; the transports go into `made`."""

    def make(agents, env):
        indices = [agent.index for agent in agents]
        transport = MortalTransport(Blueprint.of(agents, env, first_places(indices, count), count), dies, count, room)
        if made is not None:
            made.append(transport)
        return SpreadExecutor(RemoteWorkers(agents, env, transport, count), indices)

    return make
