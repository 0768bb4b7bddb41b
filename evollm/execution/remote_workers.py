"""The workers of a run in other processes, seen from the one process that decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import AgentFolder
from evollm.execution.description import describe
from evollm.execution.executor import Agreement, Description
from evollm.execution.journal import JournaledCalls, Transport
from evollm.execution.worker import live_copy
from evollm.execution.workers import CHANGING
from evollm.llm_envs import DatasetGym
from evollm.processes import Processes
from evollm.runs.events import WorkerHome, WorkerLoss


class RemoteWorkers:
    """`evollm.execution.workers.Workers` over a transport: the workers are elsewhere, and replaced if they are lost.

    Live agents are copies on the base of the agents that the run was given, which itself computes nothing.

    Args:
        agents: The agents that the run was given.
        env: Their gym.
        transport: Makes and calls the workers.
        count: Number of workers.
    """

    def __init__(self, agents: Sequence[SavableAgent], env: DatasetGym, transport: Transport, count: int) -> None:
        self.processes: Agreement = Processes()
        self._like = agents[0]
        self._env = env
        self._transport = transport
        self._calls = JournaledCalls(transport, count)
        # The live agents since the last change, and after the end the members as folders.
        self._live: dict[int, SavableAgent] = {}
        self._folders: dict[int, AgentFolder] = {}
        self._members: list[Any] | None = None

    @property
    def count(self) -> int:
        """The number of present workers."""
        return len(self._calls.places)

    @property
    def lost(self) -> list[int]:
        """See `LosableWorkers.lost`."""
        places = self._calls.places
        return [places.index(place) for place in self._calls.lodged]

    def retire(self, numbers: Sequence[int]) -> None:
        """See `LosableWorkers.retire`."""
        places = self._calls.places
        self._calls.retire([places[number] for number in numbers])

    def homes(self) -> list[WorkerHome]:
        """Where the workers are."""
        return self._calls.homes()

    def losses(self) -> list[WorkerLoss]:
        """See `LosableWorkers.losses`."""
        return self._calls.losses()

    def describe(self) -> Description:
        """Describe the population and its data."""
        return describe(self._like, self._env)

    def open(self) -> None:
        """Do nothing: the workers are there."""

    def call(self, method: str, arguments: Sequence[Mapping[str, Any] | None]) -> list[Any]:
        """Call a method of the workers; see `JournaledCalls.call`."""
        if method == "members" and self._members is not None:
            return self._members
        if method in CHANGING:
            self._live.clear()
        return self._calls.call(method, arguments)

    def agents(self, places: Mapping[int, int]) -> list[SavableAgent]:
        """Copies of agents as live ones, the same object for the same agent."""
        missing = [index for index in places if index not in self._live]
        folders = self._folders if missing and self._folders else self._exported(missing, places)
        for index in missing:
            self._live[index] = live_copy(folders[index], self._like)
        return [self._live[index] for index in places]

    def _exported(self, indices: Sequence[int], places: Mapping[int, int]) -> dict[int, AgentFolder]:
        wanted = [[index for index in indices if places[index] == place] for place in range(self.count)]
        if not indices:
            return {}
        found = self.call("exports", [{"indices": part} if part else None for part in wanted])
        return {index: folder for part in found for index, folder in (part or {}).items()}

    def close(self) -> None:
        """Keep the members, and end the workers."""
        if self._calls.intact:
            # After an error of the run nobody may want the members, and it must not be hidden by another one.
            with suppress(Exception):
                self._members = self.call("members", [{}] * self.count)
                parts = self.call("saved", [{}] * self.count)
                self._folders = {folder.attributes["index"]: folder for part in parts for folder in part.agents}
        self._transport.close()
