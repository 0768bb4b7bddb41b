"""Members over processes: each process of torch.distributed, or each group of them, holds a share of the members.

A process trains its members on whole batches by itself, without any traffic of gradients; the processes of a group
divide each batch of their members, as `evollm.processes` has it. Every process runs the run and makes the same
decisions, for which they exchange metrics, evaluations and the adapters of members that move.

Who takes part in a collective operation:

- Inside a worker's method (`Processes.bound`) the group: sums of gradients, log-probs and expert loads, agreement on
  token budgets and passes, the gathering of layers that FSDP2 shards, what reward functions say.
- Everywhere else all processes: the comparison of agents and data, results of calls, fitnesses, plans and signals,
  checkpoints, and, before the run, the loading of the base.
"""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.checks import nearest_name, whole_number
from evollm.errors import ConfigurationError
from evollm.execution.alike import check_alike, check_functions
from evollm.execution.arrivals import Arrivals
from evollm.execution.description import describe
from evollm.execution.executor import Agreement, Description, Executor, ExecutorFactory
from evollm.execution.local import LocalExecutor
from evollm.execution.spread import SpreadExecutor, first_places
from evollm.execution.wire import error_from_bytes, error_to_bytes, from_bytes, to_bytes
from evollm.execution.worker import Worker
from evollm.execution.workers import CHANGING, FOR_MAIN, Call
from evollm.llm_envs import DatasetGym
from evollm.models.engine import Engine
from evollm.processes import Processes, launch_store, uses_deepspeed
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


def check_processes_per_worker(processes_per_worker: object, parallel: str, processes: int) -> int:
    """Refuse groups that the processes cannot be divided into, or that hold no members together.

    One process by itself divides nothing, so that the settings of several train in it, too.

    Args:
        processes_per_worker: Processes that hold members together.
        parallel: One of `PARALLEL`.
        processes: The number of processes.

    Raises:
        ConfigurationError: `processes_per_worker` is no divisor of the number of processes, or above 1 where members
            are not divided.
    """
    size = whole_number("processes_per_worker", processes_per_worker, 1)
    if size > 1 and parallel != MEMBERS:
        fix = f"is for parallel={MEMBERS!r}, where a group of processes holds members together: add it, or take 1"
        raise ConfigurationError("processes_per_worker", size, fix)
    if processes > 1 and processes % size:
        fits = [str(one) for one in range(1, processes + 1) if processes % one == 0]
        fix = f"must divide the {processes} processes into equal groups: take {', '.join(fits[:-1])} or {fits[-1]}"
        raise ConfigurationError("processes_per_worker", size, fix)
    return size


def executor_of(
    parallel: str, factory: ExecutorFactory, agents: Sequence[SavableAgent], processes_per_worker: int = 1
) -> ExecutorFactory:
    """The executor for a way to compute in several processes.

    Args:
        parallel: One of `PARALLEL`; "auto": members if there are at least as many as processes and nothing is sharded.
        factory: The given executor.
        agents: The agents.
        processes_per_worker: Processes that hold members together.

    Raises:
        ConfigurationError: Members cannot be divided because the base or the moments are sharded over all processes.
    """
    if factory is not LocalExecutor:
        return factory
    processes = Processes.present()
    together = data_executor if processes.size > 1 else factory
    if parallel == DATA:
        return together
    by_zero = any(uses_deepspeed(agent.accelerator) for agent in agents)
    sharded = by_zero or any(agent.base.is_sharded for agent in agents)
    if parallel == AUTO:
        spreads = 1 < processes.size <= len(agents) and not sharded
        return members_executor if spreads else together
    if by_zero:
        fix = "the base or the moments are sharded by DeepSpeed over all processes, which must compute together: take "
        raise ConfigurationError("parallel", parallel, f"{fix}'data', or FSDP with processes_per_worker=2")
    if sharded and processes_per_worker == 1:
        fix = "the base is sharded, so that processes must compute together: take 'data', or processes_per_worker=2"
        raise ConfigurationError("parallel", parallel, fix)
    if processes_per_worker >= processes.size:
        return together
    if processes_per_worker == 1:
        return members_executor
    return partial(members_executor, processes_per_worker=processes_per_worker)


def data_executor(agents: Sequence[SavableAgent], env: DatasetGym) -> Executor:
    """The executor with all agents in this process; agents and rows must be those of all other processes.

    Raises:
        ConfigurationError: The processes have other agents or other data.
    """
    check_alike(Processes.present(), agents, env, describe(agents[0], env))
    return LocalExecutor(agents, env)


def members_executor(agents: Sequence[SavableAgent], env: DatasetGym, processes_per_worker: int = 1) -> Executor:
    """The executor that spreads the agents over all processes; call it in each of them with the same agents."""
    return SpreadExecutor(ProcessWorkers(agents, env, processes_per_worker), [agent.index for agent in agents])


class ProcessWorkers:
    """One worker in each process or group of processes; see `evollm.execution.workers.Workers`.

    All processes of a group have the same worker and make the same calls of it; what counts is what it returns in the
    first of them.

    Args:
        agents: All agents, the same in every process. When the run begins, those of other workers are released.
        env: The gym, the same in every process.
        processes_per_worker: Processes that hold a worker together, a divisor of their number.

    Raises:
        ConfigurationError: The processes have other agents or other data, or a user's function fails in one that calls
            it for its members.
    """

    def __init__(self, agents: Sequence[SavableAgent], env: DatasetGym, processes_per_worker: int = 1) -> None:
        self._processes = Processes.present()
        self._per_worker, self._place = processes_per_worker, self._processes.rank // processes_per_worker
        self.processes: Agreement = self._processes
        self._described = describe(agents[0], env)
        check_alike(self._processes, agents, env, self._described)
        said = self._processes.of_all(to_bytes([platform.node(), os.getpid()]))
        self._homes = [WorkerHome(place, *from_bytes(data)) for place, data in enumerate(self._of_workers(said))]
        self._group = self._processes.in_groups(processes_per_worker)
        check_functions(self._processes, env, self._group)
        self._arrivals = self._new_arrivals()
        self._given = {agent.index: agent for agent in agents}
        places = first_places(list(self._given), self.count)
        own = [agent for agent, place in zip(agents, places, strict=True) if place == self._place]
        with self._group.bound():
            self._worker = Worker(own, env, like=agents[0])
        # Agents for the caller of the run by index, until the members change: those of other workers are copies.
        self._live = dict(self._given)
        # An agent to make these copies of, if the worker has none left.
        self._like: SavableAgent | None = None

    @property
    def count(self) -> int:
        """The number of processes, or of their groups."""
        return self._processes.size // self._per_worker

    def describe(self) -> Description:
        """The description of all agents."""
        return self._described

    def open(self) -> None:
        """Release the agents of other workers, and shard a sharded base over the own group."""
        if self._worker.base.layers.regroup is not None:
            self._worker.base.layers.regroup(self._group)
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
        given = arguments[self._place]
        value, said, failed = None, b"", None
        if given is not None:
            try:
                with self._group.bound():
                    value = getattr(self._worker, method)(**given)
                if self._group.is_main and value is not None:
                    said = _VALUE + to_bytes(value)
            except Exception as error:
                failed, said = error, _ERROR + error_to_bytes(error)
        if not self._arrivals.note(failed=failed is not None) and failed is not None:
            # The launcher ends the others when this process has ended.
            raise failed
        large = method in FOR_MAIN
        every = self._processes.of_all(said if failed or not large else b"")
        for rank, data in enumerate(every):
            if data[:1] == _ERROR:
                own = rank == self._processes.rank
                raise failed if own and failed is not None else error_from_bytes(data[1:])
        if large:
            every = self._processes.for_main(said) or [b""] * self._processes.size
        return [
            value if place == self._place and self._group.is_main else from_bytes(data[1:]) if data else None
            for place, data in enumerate(self._of_workers(every))
        ]

    def _of_workers(self, said: Sequence[bytes]) -> Sequence[bytes]:
        """Of what each process has said what counts: that of the first one of each group."""
        return said[:: self._per_worker]

    def _new_arrivals(self) -> Arrivals:
        if self._group.size == 1:
            return Arrivals(None, 0, 1)
        name = f"evollm {self._processes.from_main(uuid.uuid4().hex)} {self._place}"
        return Arrivals(launch_store(name), self._group.rank, self._group.size)

    def agents(self, places: Mapping[int, int]) -> list[Any]:
        """Live agents in every process: the own worker's, and copies of the others'."""
        missing = [index for index in places if index not in self._live]
        wanted = [[index for index in missing if places[index] == place] for place in range(self.count)]
        parts = self.call("exports", [{"indices": part} if part else None for part in wanted]) if missing else []
        for place, part in enumerate(parts):
            for index, folder in (part or {}).items():
                here = place == self._place
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
