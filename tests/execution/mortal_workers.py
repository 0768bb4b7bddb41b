"""Workers that die: real ones in this process, to which everything goes as a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from evollm.execution.held_worker import Blueprint, HeldWorker
from evollm.execution.journal import WorkerLost
from evollm.execution.remote_workers import RemoteWorkers
from evollm.execution.spread import SpreadExecutor, first_places


class MortalTransport:
    """A transport whose worker dies before or after a call if `dies(place, method)` says so: "before", "after", ""."""

    def __init__(self, blueprint: Blueprint, dies: Callable[[int, str], str]) -> None:
        self.blueprint = pickle.dumps(blueprint)
        self.dies = dies
        self.deaths = 0
        self.made: list[int] = []

    def start(self, place: int) -> list[Any]:
        self.made.append(place)
        return [place, HeldWorker()]

    def wait(self, worker: list[Any]) -> None:
        worker[1].build(self.blueprint, worker[0]).result()

    def send(self, worker: list[Any], call: tuple[str, Any]) -> bytes | None:
        place, held = worker
        dies = self.dies(place, call[0]) if held else ""
        if dies == "before" or held is None:
            worker[1] = None
            return None
        answer = pickle.dumps(held.call(*pickle.loads(pickle.dumps(call))))
        if dies == "after":
            worker[1] = None
            return None
        return answer

    def receive(self, pending: bytes | None) -> Any:
        if pending is None:
            self.deaths += 1
            raise WorkerLost("its process was killed")
        return pickle.loads(pending).result()

    def close(self) -> None:
        """Nothing is left to end."""


def mortal_executor(dies: Callable[[int, str], str], made: list[MortalTransport] | None = None, count: int = 2) -> Any:
    """Makes executors whose workers die as `dies` says; the transports go into `made`."""

    def make(agents, env):
        indices = [agent.index for agent in agents]
        transport = MortalTransport(Blueprint.of(agents, env, first_places(indices, count), count), dies)
        if made is not None:
            made.append(transport)
        return SpreadExecutor(RemoteWorkers(agents, env, transport, count), indices)

    return make
