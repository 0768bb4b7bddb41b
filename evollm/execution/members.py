"""Members over processes: each process of torch.distributed holds the base and a share of the members.

A process trains its members on whole batches by itself, without any traffic of gradients. Every process runs the run
and makes the same decisions, for which they exchange metrics, evaluations and the adapters of members that move.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.checks import nearest_name
from evollm.errors import ConfigurationError
from evollm.execution.alike import check_alike
from evollm.execution.description import describe
from evollm.execution.executor import Agreement, Description, Executor, ExecutorFactory
from evollm.execution.local import LocalExecutor
from evollm.execution.spread import SpreadExecutor, first_places
from evollm.execution.wire import error_from_bytes, error_to_bytes, from_bytes, to_bytes
from evollm.execution.worker import Worker
from evollm.execution.workers import CHANGING, FOR_MAIN, Call
from evollm.llm_envs import DatasetGym
from evollm.models.engine import Engine
from evollm.processes import Processes, uses_deepspeed
from evollm.runs.events import WorkerHome

DATA, MEMBERS, AUTO = "data", "members", "auto"
PARALLEL = (DATA, MEMBERS, AUTO)


def check_parallel(parallel: object, executor: ExecutorFactory) -> str:
    """Refuse an unknown way to compute in several processes, and one where an executor of one's own decides that.

    Raises:
        ConfigurationError: `parallel` is none of `PARALLEL`, or `executor` is another one than the default.
    """
    if parallel not in PARALLEL:
        near = nearest_name(parallel, PARALLEL) if isinstance(parallel, str) else None
        fix = f"must be one of {', '.join(map(repr, PARALLEL))}" + (f"; {near!r} is the nearest" if near else "")
        raise ConfigurationError("parallel", parallel, fix)
    if parallel == MEMBERS and executor is not LocalExecutor:
        fix = "the given executor decides where members are: leave one of the two out"
        raise ConfigurationError("parallel", parallel, fix)
    return str(parallel)


def executor_of(parallel: str, factory: ExecutorFactory, agents: Sequence[SavableAgent]) -> ExecutorFactory:
    """The executor for a way to compute in several processes.

    Args:
        parallel: One of `PARALLEL`; "auto": members if there are at least as many as processes and nothing is sharded.
        factory: The given executor.
        agents: The agents.

    Raises:
        ConfigurationError: Members cannot be divided because the base or the moments are sharded.
    """
    if factory is not LocalExecutor:
        return factory
    processes = Processes.present()
    together = data_executor if processes.size > 1 else factory
    if parallel == DATA:
        return together
    sharded = any(agent.base.is_sharded or uses_deepspeed(agent.accelerator) for agent in agents)
    if parallel == AUTO:
        spreads = 1 < processes.size <= len(agents) and not sharded
        return members_executor if spreads else together
    if sharded:
        fix = "the base or the moments are sharded, so that all processes must compute together: take 'data'"
        raise ConfigurationError("parallel", parallel, fix)
    return members_executor if processes.size > 1 else together


def data_executor(agents: Sequence[SavableAgent], env: DatasetGym) -> Executor:
    """The executor with all agents in this process; agents and rows must be those of all other processes.

    Raises:
        ConfigurationError: The processes have other agents or other data.
    """
    check_alike(Processes.present(), agents, env, describe(agents[0], env))
    return LocalExecutor(agents, env)


def members_executor(agents: Sequence[SavableAgent], env: DatasetGym) -> Executor:
    """The executor that spreads the agents over all processes; call it in each of them with the same agents."""
    return SpreadExecutor(ProcessWorkers(agents, env), [agent.index for agent in agents])


class ProcessWorkers:
    """One worker in each process; see `evollm.execution.workers.Workers`.

    Args:
        agents: All agents, the same in every process. When the run begins, those of other processes are released.
        env: The gym, the same in every process.

    Raises:
        ConfigurationError: The processes have other agents or other data.
    """

    def __init__(self, agents: Sequence[SavableAgent], env: DatasetGym) -> None:
        self._processes = Processes.present()
        self.processes: Agreement = self._processes
        self._described = describe(agents[0], env)
        check_alike(self._processes, agents, env, self._described)
        said = self._processes.of_all(to_bytes([platform.node(), os.getpid()]))
        self._homes = [WorkerHome(rank, *from_bytes(data)) for rank, data in enumerate(said)]
        self._given = {agent.index: agent for agent in agents}
        places = first_places(list(self._given), self.count)
        own = [agent for agent, place in zip(agents, places, strict=True) if place == self._processes.rank]
        self._worker = Worker(own, env, like=agents[0])
        # Agents for the caller of the run by index, until the members change: those of other workers are copies.
        self._live = dict(self._given)
        # An agent to make these copies of, if the worker has none left.
        self._like: SavableAgent | None = None

    @property
    def count(self) -> int:
        """The number of processes."""
        return self._processes.size

    def describe(self) -> Description:
        """The description of all agents."""
        return self._described

    def open(self) -> None:
        """Release the agents of other processes."""
        own = [id(agent) for agent in self._worker.agents]
        for agent in self._given.values():
            if id(agent) not in own:
                agent.release()
        self._given.clear()
        self._live.clear()

    def call(self, method: str, arguments: Sequence[Call]) -> list[Any]:
        """Call a method of the own worker; what it returns, or its error, is sent to all processes."""
        if method in CHANGING:
            self._live.clear()
        given = arguments[self._processes.rank]
        value, said, failed = None, b"", None
        if given is not None:
            try:
                with Processes().bound():
                    value = getattr(self._worker, method)(**given)
                said = _VALUE + to_bytes(value) if value is not None else b""
            except Exception as error:
                failed, said = error, _ERROR + error_to_bytes(error)
        large = method in FOR_MAIN
        every = self._processes.of_all(said if failed or not large else b"")
        for rank, data in enumerate(every):
            if data[:1] == _ERROR:
                own = rank == self._processes.rank
                raise failed if own and failed is not None else error_from_bytes(data[1:])
        if large:
            every = self._processes.for_main(said) or [b""] * self.count
        return [
            value if rank == self._processes.rank else from_bytes(data[1:]) if data else None
            for rank, data in enumerate(every)
        ]

    def agents(self, places: Mapping[int, int]) -> list[Any]:
        """Live agents in every process: the own worker's, and copies of the others'."""
        missing = [index for index in places if index not in self._live]
        wanted = [[index for index in missing if places[index] == place] for place in range(self.count)]
        parts = self.call("exports", [{"indices": part} if part else None for part in wanted]) if missing else []
        for place, part in enumerate(parts):
            for index, folder in (part or {}).items():
                here = place == self._processes.rank
                self._live[index] = self._worker.agent(index) if here else self._worker.copy_of(folder, self._like)
        return [self._live[index] for index in places]

    def homes(self) -> list[WorkerHome]:
        """Where the processes are."""
        return self._homes

    def close(self) -> None:
        """Close the own worker."""
        if not self._worker.agents:
            self._like = self._worker.spare()
        self._worker.close()
        # Each process measured what its own passes need; from here on all have to measure alike.
        Engine.of(self._worker.base).budgets.clear()


_VALUE, _ERROR = b"v", b"e"
