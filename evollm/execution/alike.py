"""What the processes of a run must have in common: they make the same decisions, each by itself."""

from __future__ import annotations

from collections.abc import Sequence

from evollm.algorithms.agent import ACTOR
from evollm.algorithms.saving import SavableAgent
from evollm.errors import ConfigurationError
from evollm.execution.executor import Description
from evollm.execution.wire import from_bytes, to_bytes
from evollm.llm_envs import DatasetGym
from evollm.models.fingerprints import adapter_fingerprint
from evollm.processes import Processes


def check_alike(processes: Processes, agents: Sequence[SavableAgent], env: DatasetGym, described: Description) -> None:
    """Refuse other agents, another base or other data than those of the main process, in all processes alike.

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
        "settings": config["settings"],
    }
    what = {
        "pop": f"has other agents (indices, hyperparameters or {ACTOR} adapters)",
        "actor_network": "has another base",
        "env": "has other rows, another order of them or another batch size",
        "settings": "has other settings of its agents",
    }
    every = [from_bytes(data) for data in processes.of_all(to_bytes(own))]
    for rank, theirs in enumerate(every):
        for field, said in theirs.items():
            if said != every[0][field]:
                fix = f"{what[field]} than process 0: make them from the same files, arguments and seeds in all"
                raise ConfigurationError(field, f"process {rank}", fix)


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
