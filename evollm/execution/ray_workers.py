"""Workers as actors of Ray, the extra `ray`: on the cards and machines of a cluster, and replaced if they are lost.

The run's own process, the driver, decides, keeps the lineage and writes the run folder. An actor has a base, which it
loads by itself, some members and a copy of the gym. Ray neither restarts an actor nor repeats a call, since both would
lose what the actor knew; `evollm.execution.journal` does both.
"""

from __future__ import annotations

import math
import pickle
import socket
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.errors import ConfigurationError, EvoLLMError, MissingExtraError, WorkerError, brief
from evollm.execution.held_worker import Blueprint, HeldWorker, Home, Outcome
from evollm.execution.journal import Call, NoRoomError, WorkerLost
from evollm.execution.remote_workers import RemoteWorkers
from evollm.execution.spread import SpreadExecutor, first_places
from evollm.llm_envs import DatasetGym

# Seconds in which a cluster must find a place for a worker and start its process; loading the base is not included.
PATIENCE = 300.0
# The same for the place of a lost worker, for which the others wait.
PATIENCE_AGAIN = 60.0
# Seconds in which the machine of an address must answer.
ANSWER = 20.0
# As Ray names them; all other names are the cluster's own.
CPU, GPU, MEMORY = "CPU", "GPU", "memory"


class RayTransport:
    """A `Transport` to actors of Ray.

    Args:
        address: Address of a cluster; None: the one that `ray.init` finds, or a new one on this machine, which ends
            with the run.
        patience: Most seconds to wait for a place in the cluster.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigurationError: There is no cluster at the address.
    """

    def __init__(self, address: str | None = None, patience: float = PATIENCE) -> None:
        self._ray = ray = ray_module()
        connected = connect(ray, address)
        self._patience = patience
        self._actor = ray.remote(HeldWorker)
        self._resources: Mapping[str, float] = {}
        self._blueprint: Any = None
        self._count = 0
        self._actors: dict[int, Any] = {}
        self._homes: dict[int, Home] = {}
        # An executor that is dropped before its run begins is not closed by the run.
        self._end = weakref.finalize(self, _end, ray, connected, self._actors)
        errors = ray.exceptions
        self._losses = (
            *(errors.RayActorError, errors.ObjectLostError, errors.OutOfMemoryError),
            *(errors.WorkerCrashedError, errors.NodeDiedError),
        )

    def room(self, count: int | None, members: int, resources: Mapping[str, float] | None) -> int:
        """Choose the resources of each worker, and the number of workers; see `checked_count`.

        Args:
            count: The number that is asked for; None: one for each member, as far as there is room.
            members: Number of members.
            resources: What each worker needs, by Ray's names, such as `{"CPU": 2, "GPU": 0.5}`; None: one CPU, and one
                GPU if the cluster has any.

        Raises:
            ConfigurationError: The cluster has too little room.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        self._resources = default_resources(nodes) if resources is None else resources
        self._count = checked_count(count, members, self._resources, nodes)
        return self._count

    def make(self, blueprint: Blueprint) -> None:
        """Say what the workers are made of.

        Raises:
            ConfigurationError: It cannot be pickled.
        """
        try:
            # Ray itself would hand out arrays that cannot be written to.
            self._blueprint = self._ray.put(self._ray.cloudpickle.dumps(blueprint))
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            fix = f"agents and gym cannot be sent to another process: {brief(str(error))}"
            raise ConfigurationError("executor", "ray", fix) from error

    def start(self, place: int) -> _Starting:
        """Start an actor, which then loads its base; see `Transport.start`."""
        if place in self._actors:
            # It may have been unreachable only.
            self._ray.kill(self._actors.pop(place))
        actor = self._actors[place] = self._actor.options(**options_of(self._resources)).remote()
        return self._built(place, actor)

    def lodge(self, place: int, host: _Starting) -> _Starting:
        """Let an actor make the worker of a place beside its own; see `Transport.lodge`."""
        if place in self._actors:
            self._ray.kill(self._actors.pop(place))
        return self._built(place, host.actor)

    def _built(self, place: int, actor: Any) -> _Starting:
        return _Starting(place, actor, actor.home.remote(), actor.build.remote(self._blueprint, place))

    def wait(self, worker: _Starting) -> None:
        """Wait until an actor has its base; see `Transport.wait`."""
        # A lodged worker has room, and its host may have a long call to end.
        patience = self._patience if worker.place not in self._homes else min(self._patience, PATIENCE_AGAIN)
        lodged = worker.actor is not self._actors.get(worker.place)
        try:
            home: Home = self._received(worker.home, timeout=None if lodged else patience)
        except self._ray.exceptions.GetTimeoutError:
            # It must not begin, and take room, later.
            self._ray.kill(self._actors.pop(worker.place))
            raise NoRoomError(
                f"worker {worker.place} has found no room in the cluster for {patience:.0f} s (it needs "
                f"{_words(self._resources)}, and free is {_words(self._ray.available_resources())})"
            ) from None
        self._homes[worker.place] = home
        check_versions(home, Home.present())
        try:
            self.receive(worker.built)
        except EvoLLMError as error:
            fix = f"worker {worker.place}, on {home.machine}, cannot begin: {error}"
            raise ConfigurationError("workers", self._count, fix) from error

    def send(self, worker: _Starting, call: Call) -> Any:
        """Begin a call; see `Transport.send`."""
        return worker.actor.call.remote(worker.place, *call)

    def receive(self, pending: Any) -> Any:
        """Wait for a call; see `Transport.receive`."""
        outcome: Outcome = self._received(pending)
        return outcome.result()

    def _received(self, pending: Any, timeout: float | None = None) -> Any:
        try:
            return self._ray.get(pending, timeout=timeout)
        except self._losses as error:
            if getattr(error, "actor_init_failed", False):
                fix = "install evollm with the extra ray on all machines"
                raise WorkerError(f"a worker cannot be made ({fix}): {_last_line(error)}") from error
            raise WorkerLost(_why(error)) from None
        except self._ray.exceptions.RayTaskError as error:
            # Errors of the worker itself are in its answers, so this one is in what was sent.
            raise WorkerError(f"what was sent to a worker cannot be read there: {_last_line(error)}") from error

    def where(self, worker: _Starting) -> tuple[str, int]:
        """The machine and the process of a worker; see `Transport.where`."""
        home = self._homes[worker.place]
        return home.machine, home.pid

    def dismiss(self, worker: _Starting) -> None:
        """End a worker; see `Transport.dismiss`."""
        if worker.place in self._actors:
            self._ray.kill(self._actors.pop(worker.place))
        else:
            worker.actor.dismiss.remote(worker.place)

    def close(self) -> None:
        """End all actors, and the cluster if it was started for them."""
        self._end()


@dataclass(frozen=True)
class _Starting:
    """An actor, and what it gives once it is there, and once it has its base."""

    place: int
    actor: Any
    home: Any
    built: Any


def ray_module() -> Any:
    """Ray.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module("ray")
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "executor='ray'") from error


def connect(ray: Any, address: str | None) -> bool:
    """Connect this process to a cluster, unless it is connected to one.

    Returns:
        Whether it was not; disconnecting ends a cluster that was started here.

    Raises:
        ConfigurationError: There is no cluster at the address.
    """
    if ray.is_initialized():
        return False
    try:
        _reach(address)
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        fix = f"Ray cannot be reached or started there: {brief(str(error))}"
        raise ConfigurationError("ray_address", address, fix) from error
    return True


def _reach(address: str | None) -> None:
    """Connect to the port of an address, where Ray itself would try again for minutes without a word.

    Raises:
        OSError: Nobody answers there.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


def default_resources(nodes: list[Mapping[str, float]]) -> Mapping[str, float]:
    """What a worker needs by default on these nodes: without a GPU of its own it would compute on a CPU."""
    return MappingProxyType({CPU: 1.0, GPU: 1.0} if any(node.get(GPU) for node in nodes) else {CPU: 1.0})


def checked_count(
    count: int | None, members: int, resources: Mapping[str, float], nodes: list[Mapping[str, float]]
) -> int:
    """The number of workers.

    Args:
        count: The number that is asked for; None: one for each member, as far as there is room.
        members: Number of members.
        resources: What each worker needs.
        nodes: What each node of the cluster has, whether or not it is in use.

    Raises:
        ConfigurationError: There is no room for so many, or a value is none.
    """
    for name, value in resources.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise ConfigurationError(f"resources_per_worker.{name}", value, "must be a number, and not below 0")
        if value > 1 and value != int(value):
            raise ConfigurationError(f"resources_per_worker.{name}", value, "above 1, Ray has whole numbers only")
    needs = {name: value for name, value in resources.items() if value}
    enough = max(members, count or 0)
    room = sum(
        # Fractions such as a tenth are inexact, and ten of them are one.
        min((math.floor(node.get(name, 0.0) / value + 1e-6) for name, value in needs.items()), default=enough)
        for node in nodes
    )
    wanted = min(members, room) if count is None else count
    if not 1 <= wanted <= room:
        has = "; ".join(_words(node) for node in nodes)
        known = f"the cluster has room for {room} (nodes: {has})"
        fix = f"each needs {_words(needs)}, and {known}: ask for less, or add nodes"
        raise ConfigurationError("workers", count, fix)
    return wanted


def options_of(resources: Mapping[str, float]) -> dict[str, Any]:
    """The options of an actor that needs these resources."""
    own = {name: value for name, value in resources.items() if name not in (CPU, GPU, MEMORY)}
    return {
        "num_cpus": resources.get(CPU, 0),
        "num_gpus": resources.get(GPU, 0),
        "memory": resources.get(MEMORY),
        "resources": own,
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": "SPREAD",
    }


def check_versions(there: Home, here: Home) -> None:
    """Refuse a worker whose packages differ from those of the run's own process.

    Raises:
        ConfigurationError: One of them differs.
    """
    for name, own in here.versions.items():
        found = there.versions.get(name)
        if found != own:
            fix = f"{there.machine} has {name} {found} and {here.machine} has {own}: install the same on all machines"
            raise ConfigurationError("workers", there.machine, fix)


def _words(resources: Mapping[str, float]) -> str:
    """Resources in words, without those that Ray adds for itself."""
    shown = {name: value for name, value in resources.items() if not name.startswith(("node:", "accelerator_type:"))}
    sizes = {name: shown.pop(name) for name in (MEMORY, "object_store_memory") if name in shown}
    words = [f"{value:g} {name}" for name, value in sorted(shown.items())]
    words += [f"{sizes[MEMORY] / 2**30:.1f} GiB of memory"] if MEMORY in sizes else []
    return ", ".join(words) or "nothing"


def _why(error: Exception) -> str:
    """Ray's message without the ids that it lists in lines of their own."""
    return " ".join(line for line in str(error).splitlines() if not line.startswith("\t"))


def _last_line(error: Exception) -> str:
    return brief((str(error).strip().splitlines() or [type(error).__name__])[-1])


def _end(ray: Any, connected: bool, actors: dict[int, Any]) -> None:
    if not ray.is_initialized():
        return
    for actor in actors.values():
        ray.kill(actor)
    actors.clear()
    if connected:
        ray.shutdown()


def ray_executor(
    agents: Sequence[SavableAgent],
    env: DatasetGym,
    *,
    workers: int | None = None,
    resources_per_worker: Mapping[str, float] | None = None,
    ray_address: str | None = None,
) -> SpreadExecutor:
    """An executor whose members are on workers of a Ray cluster; `finetune_llm_preference` documents the arguments.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigurationError: The cluster has too little room, a worker cannot load the base or has other packages, or the
            agents cannot be made elsewhere.
        WorkerError: A worker has found no room in the cluster in time, or is out of memory.
    """
    transport = RayTransport(ray_address)
    try:
        indices = [agent.index for agent in agents]
        count = transport.room(workers, len(agents), resources_per_worker)
        transport.make(Blueprint.of(agents, env, first_places(indices, count), count))
        return SpreadExecutor(RemoteWorkers(agents, env, transport, count), indices)
    except BaseException:
        transport.close()
        raise
