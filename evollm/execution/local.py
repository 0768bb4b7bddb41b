"""The executor that holds all agents of a run in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import read_population, write_population
from evollm.checkpoints.export import main_writes
from evollm.execution.executor import Agreement, Arrays
from evollm.execution.worker import Worker
from evollm.llm_envs import DatasetGym
from evollm.processes import Processes


class LocalExecutor(Worker):
    """An executor with one worker. Each of several processes holds all agents and computes a share of each batch."""

    def __init__(self, agents: Sequence[SavableAgent], env: DatasetGym) -> None:
        super().__init__(agents, env)
        self.processes: Agreement = Processes.present()

    def spent(self) -> dict[str, int]:
        """The operations of the main process, which another device may differ from; see `Executor.spent`.

        Limits depend on them, and all processes have to end at the same step.
        """
        found: dict[str, int] = self.processes.from_main(super().spent())
        return found

    def save(self, folder: Path, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a checkpoint; see `Executor.save`."""
        # Every process must call `saved`, because each may hold a shard of the state.
        saved = self.saved()
        saved = replace(saved, state={**state, **saved.state}, arrays=arrays)
        main_writes(lambda: write_population(folder, saved, self.base.name))

    def load(self, folder: Path) -> None:
        """Restore a checkpoint; see `Executor.load`."""
        self.restore(read_population(folder))

    def save_agent(self, index: int, folder: Path) -> None:
        """Write one agent; see `Executor.save_agent`."""
        self.agent(index).save_checkpoint(str(folder))

    def population(self) -> list[SavableAgent]:
        """Return the agents."""
        return self.agents
