"""All agents of a run in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.checkpoints import read_population, write_population
from evollm.checkpoints.export import main_writes
from evollm.execution.executor import Agreement, Arrays, Description, Member
from evollm.execution.worker import Worker
from evollm.hpo import AnyEvaluation, Birth
from evollm.llm_envs import DatasetGym
from evollm.processes import Processes
from evollm.runs.events import SampleAnswer, StepDone


class LocalExecutor:
    """One worker in this process; of several processes each has one with all agents, and shares the rows of a batch."""

    def __init__(self, agents: Sequence[SavableAgent], env: DatasetGym) -> None:
        self.processes: Agreement = Processes.present()
        self._worker = Worker(agents, env)

    def describe(self) -> Description:
        """Say what the population and its data are."""
        return self._worker.describe()

    def changed_text(self, noted: Mapping[str, Any]) -> str:
        """Say which text is the first other one."""
        return self._worker.env.changed_text(noted)

    def members(self) -> list[Member]:
        """Return the members as they are now."""
        return self._worker.members()

    def begin(self, births: Sequence[Birth] | None, *, moving_references: bool) -> None:
        """Begin a run with these members."""
        self._worker.begin(births, moving_references=moving_references)

    def learn(self, done: int, until: int) -> Iterator[StepDone]:
        """Let the members learn step by step."""
        return self._worker.learn(done, until)

    def evaluate(self, split: str, indices: Sequence[int] | None = None) -> dict[int, AnyEvaluation]:
        """Score members on a split."""
        return self._worker.evaluate(split, indices)

    def note_scores(self, scores: Mapping[int, float]) -> None:
        """Note the members' scores."""
        self._worker.note_scores(scores)

    def apply(self, births: Sequence[Birth]) -> None:
        """Make the members those of a plan."""
        self._worker.check(births)
        self._worker.apply(births)

    def save(self, folder: Path, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a checkpoint."""
        # In all processes: each may hold a part.
        saved = self._worker.saved()
        saved = replace(saved, state={**state, **saved.state}, arrays=arrays)
        main_writes(lambda: write_population(folder, saved, self._worker.base.name))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self._worker.load(read_population(folder))

    def save_agent(self, index: int, folder: Path) -> None:
        """Write one member."""
        self._worker.agent(index).save_checkpoint(str(folder))

    def answers(self, index: int, split: str, count: int) -> list[SampleAnswer]:
        """Answer some prompts before and after."""
        return self._worker.answers(index, split, count)

    def population(self) -> list[SavableAgent]:
        """Return the agents themselves."""
        return self._worker.agents

    def close(self) -> None:
        """Give the fixed reference back."""
        self._worker.close()
