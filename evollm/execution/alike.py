"""What the processes of a run must have in common: they make the same decisions, each by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evollm.algorithms.agent import ACTOR
from evollm.algorithms.saving import SavableAgent
from evollm.errors import ConfigurationError
from evollm.execution.executor import Description
from evollm.execution.wire import from_bytes, to_bytes
from evollm.llm_envs import DatasetGym
from evollm.models.fingerprints import adapter_fingerprint
from evollm.processes import Processes


def check_alike(processes: Processes, agents: Sequence[SavableAgent], env: DatasetGym, described: Description) -> None:
    """Refuse other agents, another base, other data or packages than those of the main process, in all processes alike.

    Raises:
        ConfigurationError: A process has others.
    """
    config = described.config
    adapters = [agent.base.adapters.export(agent.actor_adapter) for agent in agents]
    own = {
        "pop": [
            [agent.index, agent.hyperparameter_values(), adapter_fingerprint(adapter.config, adapter.tensors)]
            for agent, adapter in zip(agents, adapters, strict=True)
        ],
        "actor_network": [config["base_fingerprint"], config["base_dtype"]],
        "env": [env.fingerprint, env.batch_size, env.state_dict()],
        "env.own_settings": env.own_settings,
        "settings": config["settings"],
        "versions": [f"{name} {found}" for name, found in config["versions"].items() if name != "python"],
    }
    what = {
        "pop": f"has other agents (indices, hyperparameters or {ACTOR} adapters)",
        "actor_network": "has another base",
        "env": "has other rows, another order of them or another batch size",
        "env.own_settings": "has other settings of the gym, such as reward weights,",
        "settings": "has other settings of its agents",
        "versions": "has other packages",
    }
    for rank, field, _, _ in _differing(processes, own):
        same = "make them from the same files, arguments and seeds in all"
        fix = "install the same in all" if field == "versions" else same
        raise ConfigurationError(field, f"process {rank}", f"{what[field]} than process 0: {fix}")


def check_same_options(processes: Processes, options: Mapping[str, Any]) -> None:
    """Refuse options that differ between processes, which would wait for each other in vain, in all processes alike.

    Args:
        processes: All processes.
        options: Values by the names of arguments, as JSON.

    Raises:
        ConfigurationError: One has another value than in the main process.
    """
    for rank, name, value, first in _differing(processes, options):
        raise ConfigurationError(name, value, f"in process {rank}, and {first!r} in process 0: give all the same")


def _differing(processes: Processes, own: Mapping[str, Any]) -> Iterator[tuple[int, str, Any, Any]]:
    """The values that differ from the main process's: (rank, name, its value, the main process's)."""
    every = [from_bytes(data) for data in processes.of_all(to_bytes(own))]
    for rank, theirs in enumerate(every):
        for name in dict.fromkeys([*every[0], *theirs]):
            if theirs.get(name) != every[0].get(name):
                yield rank, name, theirs.get(name), every[0].get(name)


def check_functions(processes: Processes, env: DatasetGym, group: Processes) -> None:
    """Refuse users' functions that fail where they are called, which is in each group of processes, in all alike.

    Args:
        processes: All processes.
        env: The gym with the functions.
        group: The processes that hold members together with this one.

    Raises:
        ConfigurationError: A function fails in a process.
    """
    said = b""
    try:
        with group.bound():
            env.try_out()
    except ConfigurationError as error:
        said = to_bytes([error.field, str(error.value), error.fix])
    for rank, failed in enumerate(processes.of_all(said)):
        if failed:
            field, value, fix = from_bytes(failed)
            raise ConfigurationError(field, value, f"in process {rank}, which calls it for its members, {fix}")
