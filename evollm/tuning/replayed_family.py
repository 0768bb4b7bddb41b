"""A winner with two parents somewhere in its ancestry is replayed with all its ancestors, as a run of their own.

The run's search is a list of births, so the executor makes each child as it did in the original run. Each agent learns
by itself, in passes of the shapes that it had among all members of the original run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.errors import ConfigurationError
from evollm.execution.local import LocalExecutor
from evollm.hpo import Birth, Result, SearchPlan, SearchStart
from evollm.hpo.hyperparameters import Value
from evollm.hpo.search import reading_state
from evollm.llm_envs import DatasetGym
from evollm.models.engine import BatchSlot
from evollm.runs import RunRecord
from evollm.runs.events import StepDone

# Only agents with the same values of these hyperparameters share passes through the base.
_STRIDE = ("batch_size", "update_epochs")


def slots_of(record: RunRecord) -> Callable[[int, int], BatchSlot]:
    """From a step and an agent that learnt in it to the agent's place among those that shared its passes."""
    strides = {index: _stride(life.birth.hyperparameters) for index, life in record.lives.items()}
    learners: dict[int, list[int]] = {}
    for entry in record.steps:
        learners.setdefault(entry.step, []).append(entry.agent)

    def slot(step: int, index: int) -> BatchSlot:
        beside = [other for other in learners[step] if strides[other] == strides[index]]
        return BatchSlot(beside.index(index), len(beside))

    return slot


def _stride(values: Mapping[str, Value]) -> tuple[Value | None, ...]:
    return tuple(values.get(name) for name in _STRIDE)


@dataclass(frozen=True)
class Family:
    """The ancestors of a run's winner, for a replay.

    Attributes:
        total: Steps of the replay.
        generations: Each generation's first step and the births of the winner's ancestors in it; the last one has the
            winner alone.
        slots: By step, counted from 1, the slot of each agent by index; empty if the replay is stretched.
    """

    total: int
    generations: Sequence[tuple[int, tuple[Birth, ...]]]
    slots: Mapping[int, Mapping[int, BatchSlot]]

    @classmethod
    def of(cls, record: RunRecord) -> Family | None:
        """The family of a run's winner; None if no ancestor has two parents."""
        assert record.winner is not None
        generations = record.lineage.before(record.winner_step).family(record.winner)
        if all(birth.second_parent is None for _, births in generations for birth in births):
            return None
        if generations[0][0] > 0:
            # Nobody but the first agent learns before the first ancestor begins; it leaves then.
            generations.insert(0, (0, (record.founders[0],)))
        slot, slots = slots_of(record), {}
        ends = [step for step, _ in generations[1:]] + [record.winner_step]
        for (begin, births), end in zip(generations, ends, strict=True):
            for step in range(begin + 1, end + 1):
                slots[step] = {birth.index: slot(step, birth.index) for birth in births}
        return cls(record.winner_step, generations, slots)

    def stretched(self, total: int) -> Family:
        """The family over another number of steps.

        Raises:
            ConfigurationError: There are not enough steps for all generations.
        """
        steps = [round(step * total / self.total) for step, _ in self.generations]
        if len({*steps, total}) <= len(steps):
            fix = f"are too few for the {len(steps)} generations of the winner's two lines of ancestors: take more"
            raise ConfigurationError("max_steps", total, fix)
        births = [births for _, births in self.generations]
        return replace(self, total=total, generations=list(zip(steps, births, strict=True)), slots={})

    def population(self, agents: Sequence[SavableAgent]) -> list[SavableAgent]:
        """The first generation: the given agents by index, or copies, since all begin with the same weights."""
        known = {agent.index: agent for agent in agents}
        wanted = [birth.index for birth in self.generations[0][1]]
        return [known[index] if index in known else agents[0].clone(index) for index in wanted]

    def options(self) -> dict[str, Any]:
        """Options of the loop that make it the replay of a family."""
        return {"search": FamilySearch(self.generations), "evo_steps": self.generations[1][0]}


class FamilySearch:
    """Plans given births at given steps, whatever the results are."""

    def __init__(self, generations: Sequence[tuple[int, tuple[Birth, ...]]]) -> None:
        self._generations = generations
        self._told = 0

    def start(self, start: SearchStart) -> SearchPlan:
        """Plan the first generation."""
        del start
        self._told = 0
        return self._plan()

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        """Plan the next generation."""
        del results
        self._told += 1
        return self._plan()

    def _plan(self) -> SearchPlan:
        (step, births), *later = self._generations[self._told :]
        return SearchPlan(births, later[0][0] - step if later else None)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the generation."""
        return {"told": self._told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        with reading_state():
            self._told = int(state["told"])


class FamilyExecutor(LocalExecutor):
    """Lets each member learn by itself, in its batch slot.

    Args:
        agents: The agents.
        env: Serves the batches.
        slots: By step, counted from 1, the slot of each agent by index.
    """

    def __init__(
        self, agents: Sequence[SavableAgent], env: DatasetGym, slots: Mapping[int, Mapping[int, BatchSlot]]
    ) -> None:
        super().__init__(agents, env)
        self._slots = slots

    def learn(self, done: int, until: int) -> Iterator[StepDone]:
        """Learn step by step; see `Executor.learn`."""
        for step in range(done + 1, until + 1):
            for agent in self.agents:
                agent.slot = self._slots.get(step, {}).get(agent.index)
            yield from super().learn(step - 1, step)

    def close(self) -> None:
        """Remove the slots, so that later passes of the agents compute no other slots; see `Executor.close`."""
        for agent in self.agents:
            agent.slot = None
        super().close()
