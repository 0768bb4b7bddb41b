"""A worker in a process of its own: made of plain data, on a base that it loads by itself, and called by name."""

from __future__ import annotations

import gc
import os
import pickle
import platform
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evollm.algorithms.saved_attributes import accepted_by
from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import AgentFolder, Population
from evollm.errors import ConfigurationError, EvoLLMError, WorkerError, brief, one_line
from evollm.execution.generators import global_generators, set_global_generators
from evollm.execution.worker import Worker, on_cpu
from evollm.llm_envs import DatasetGym
from evollm.version import __version__

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Blueprint:
    """What workers are made of, as data that can be pickled.

    Attributes:
        kind: Class of the agents; a class of one's own has to be importable where the worker is, or be defined in the
            script that runs.
        arguments: Keyword arguments of its constructor for one agent, the base among them by its name or folder.
        env: The gym, with the tokenised rows.
        fingerprint: Digest of the weights of the base.
        agents: For each worker its first members.
        generators: States of the global random generators.
    """

    kind: type[SavableAgent]
    arguments: Mapping[str, Any]
    env: DatasetGym
    fingerprint: str
    agents: Sequence[Sequence[AgentFolder]]
    generators: Mapping[str, Any]

    @classmethod
    def of(cls, agents: Sequence[SavableAgent], env: DatasetGym, places: Sequence[int], count: int) -> Blueprint:
        """The blueprint of workers with these agents.

        Args:
            agents: The agents, on one base.
            env: Their gym.
            places: The worker of each agent.
            count: Number of workers.

        Raises:
            ConfigurationError: The agents have something that other processes cannot have.
        """
        first, base = agents[0], agents[0].base
        if first.accelerator is not None:
            fix = "workers are processes of their own, with a whole base each: leave it out"
            raise ConfigurationError("accelerator", "Accelerator(...)", fix)
        if not base.name:
            fix = "each worker loads the base by itself: model.save_pretrained(folder), and pass the folder"
            raise ConfigurationError("model", "a model without a name", fix)
        if any(agent._mutation_hooks for agent in agents):
            fix = "are called where the agents are, which is in other processes: use an executor in this one"
            raise ConfigurationError("register_mutation_hook", "the agents' hooks", fix)
        arguments: dict[str, Any] = {
            **accepted_by(type(first), first.settings),
            **accepted_by(type(first), first.hyperparameters),
            "model_name": base.name,
            "model_config": dict(base.model_config) or None,
            "archive": None if base.archive is None else base.archive.path,
            "lora_config": base.adapters.config(first.actor_adapter),
            "hp_config": first.hp_config,
        }
        folders = [
            [on_cpu(agent.to_folder()) for agent, where in zip(agents, places, strict=True) if where == place]
            for place in range(count)
        ]
        return cls(type(first), arguments, env, base.weights_fingerprint, folders, global_generators())

    def worker(self, place: int) -> Worker:
        """The worker of a place.

        Raises:
            ConfigurationError: The base cannot be loaded here, or has other weights; or a user's function fails here.
        """
        self.env.try_out()
        with warnings.catch_warnings():
            # Where the arguments come from, all that is to be said of them has been said.
            warnings.simplefilter("ignore")
            like = self.kind(**self.arguments)
        if like.base.weights_fingerprint != self.fingerprint:
            fix = "has other weights here than where the run was started: save the model as it is there, or copy it"
            raise ConfigurationError("model", like.base.name, fix)
        agents = [like.clone() for _ in self.agents[place]]
        for agent, folder in zip(agents, self.agents[place], strict=True):
            agent.load_folder(folder, overwrite_reference_adapter=False)
        worker = Worker(agents, self.env, like)
        like.release()
        set_global_generators(self.generators)
        return worker


@dataclass(frozen=True)
class Outcome:
    """What a call gave: a value, or an error with its traceback as text; and the warnings of evollm in it."""

    value: Any = None
    error: Exception | None = None
    trace: str = ""
    told: Sequence[str] = ()

    def result(self) -> Any:
        """The value. What a worker warns of is warned of here, since nobody reads what its process writes.

        Raises:
            Exception: The error.
        """
        for text in self.told:
            warnings.warn(text, UserWarning, stacklevel=2)
        if self.error is None:
            return self.value
        raise self.error from (None if isinstance(self.error, EvoLLMError) else WorkerError(self.trace))


@dataclass(frozen=True)
class Home:
    """Where a worker is, and the versions of the packages there that the bits of a run depend on."""

    machine: str
    pid: int
    versions: Mapping[str, str]

    @classmethod
    def present(cls) -> Home:
        """That of this process."""
        # evollm's version comes from the imported code, which may run without being installed.
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
        return cls(platform.node(), os.getpid(), {"evollm": __version__, **versions})


class HeldWorker:
    """Workers that are called by their places and the names of their methods; they know what their caller has told.

    There is one, and for a while another one beside it, on a base of its own, if that has no other process any more.
    Each finds the global random generators as it has left them.
    """

    def __init__(self) -> None:
        self._workers: dict[int, Worker] = {}
        # The place of the last call, and the generators of the others.
        self._present: int | None = None
        self._generators: dict[int, Mapping[str, Any]] = {}
        self._told: set[str] = set()

    def home(self) -> Home:
        """Where this worker is."""
        return Home.present()

    def build(self, blueprint: bytes, place: int) -> Outcome:
        """Make the worker of a place. This is no constructor, whose time would be that of a cluster without room.

        Args:
            blueprint: A pickled `Blueprint`; only from the process that started this one.
            place: Place of the worker.
        """

        def build() -> None:
            self._turn_to(place)
            self._workers[place] = _unpickled(blueprint).worker(place)

        return outcome(build)

    def call(self, place: int, method: str, arguments: Mapping[str, Any]) -> Outcome:
        """Call a method of the worker of a place; agents that it returns are copied to the CPU."""

        def call() -> Any:
            self._turn_to(place)
            return _plain(getattr(self._workers[place], method)(**arguments))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = outcome(call)
        told = [str(one.message) for one in caught if _is_own(one)]
        new = [text for text in dict.fromkeys(told) if text not in self._told]
        self._told.update(new)
        return replace(found, told=new)

    def dismiss(self, place: int) -> None:
        """Forget the worker of a place, whose members are elsewhere."""
        worker = self._workers.pop(place, None)
        self._generators.pop(place, None)
        if worker is not None:
            worker.close()
        del worker
        # A base lies in cycles.
        gc.collect()

    def _turn_to(self, place: int) -> None:
        if place == self._present:
            return
        if self._present in self._workers:
            self._generators[self._present] = global_generators()
        if place in self._generators:
            set_global_generators(self._generators.pop(place))
        self._present = place


def outcome(function: Callable[[], Any]) -> Outcome:
    """What a function gives, or its error."""
    try:
        return Outcome(function())
    except Exception as error:
        return Outcome(error=_portable(error), trace=traceback.format_exc())


def _unpickled(blueprint: bytes) -> Blueprint:
    try:
        found: Blueprint = pickle.loads(blueprint)
    except Exception as error:  # Whatever importing a user's module raises.
        reason = brief(f"{type(error).__name__}: {error}")
        fix = f"cannot be made in another process ({reason}): define what they use in the script that runs, or in a "
        raise ConfigurationError("env", "gym and agents", f"{fix}module that is installed there, too") from error
    return found


def _is_own(warning: warnings.WarningMessage) -> bool:
    """Whether evollm has warned a user; other libraries have their own ways to be silenced."""
    return issubclass(warning.category, UserWarning) and Path(warning.filename).is_relative_to(_PACKAGE)


def _plain(value: Any) -> Any:
    if isinstance(value, AgentFolder):
        return on_cpu(value)
    if isinstance(value, Population):
        return replace(value, agents=[on_cpu(agent) for agent in value.agents])
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def _portable(error: Exception) -> Exception:
    """The error, or one with its text where it cannot be pickled."""
    where = platform.node()
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        fix = "use fewer workers for each card, or a smaller micro_batch_size_per_gpu"
        return WorkerError(f"a worker on {where} is out of memory: {fix} ({one_line(str(error))})")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return WorkerError(f"a worker on {where} failed: {type(error).__name__}: {one_line(str(error))}")
    return error
