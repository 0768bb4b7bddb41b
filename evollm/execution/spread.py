"""Members spread over several workers, wherever these are: in this process, in others, or on other machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evollm.checkpoints import AgentFolder, Population, read_population, write_population
from evollm.checkpoints.agent import write_agent_folder
from evollm.checkpoints.export import main_writes
from evollm.errors import ConfigurationError
from evollm.execution.executor import BEST_SO_FAR, Arrays, Description, Member
from evollm.execution.placement import placed
from evollm.execution.worker import Learnt
from evollm.execution.workers import Call, LosableWorkers, Workers
from evollm.hpo import AnswerPair, AnswerSampling, AnyEvaluation, Birth, Recipe
from evollm.models.reference_cache import ReferenceCache
from evollm.runs.events import Placed, SampleAnswer, StepDone, WorkerLoss


def first_places(indices: Sequence[int], count: int) -> list[int]:
    """The worker of each agent of a run that begins; the first worker holds the first agent."""
    return placed([Birth.fresh(index, {}) for index in indices], {}, count)


class SpreadExecutor:
    """An executor over any workers: it knows who is where, and decides who moves when the members change.

    Args:
        workers: The workers.
        indices: The agents' indices, in their order.
    """

    def __init__(self, workers: Workers, indices: Sequence[int]) -> None:
        self.processes = workers.processes
        self._workers = workers
        self._losable = workers if isinstance(workers, LosableWorkers) else None
        self._described = workers.describe()
        # The worker of each member, in the order of the members, and of each candidate.
        self._places = dict(zip(indices, first_places(indices, workers.count), strict=True))
        self._candidates: dict[int, int] = {}
        # The worker with the copy of the best agent so far.
        self._best: int | None = None
        # What the workers said of their members after the last step; None: they have to be asked.
        self._known: dict[int, Member] | None = None
        # Operations of steps that the run has not asked for yet.
        self._spent: Counter[str] = Counter()
        # The next step, and what the run has not been told yet of who is where.
        self._next = 1
        self._news: list[Placed | WorkerLoss] = []
        self._placed: Placed | None = None

    def describe(self) -> Description:
        """Describe the population and the data; see `Executor.describe`."""
        return self._described

    def changed_text(self, noted: Mapping[str, Any]) -> str:
        """Say which text has changed; see `Executor.changed_text`."""
        return str(self._ask(0, "changed_text", noted=noted))

    def members(self) -> list[Member]:
        """Return the members in order; see `Executor.members`."""
        known = self._known or {one.index: one for part in self._call("members") for one in part}
        return [known[index] for index in self._places]

    def begin(self, births: Sequence[Birth] | None, *, moving_references: bool) -> None:
        """Begin a run; see `Executor.begin`."""
        if births is not None:
            # Before anything is released.
            self._ask(0, "check", births=births)
        self._workers.open()
        first = self._exports([next(iter(self._places))])
        shared = {"moving_references": moving_references, "first": next(iter(first.values()))}
        if births is None:
            self._call("begin", [{"births": None, **shared}] * self._workers.count)
            self._note_places()
            return
        parts, places = self._divided(births)
        # Only children by crossover have second parents, and the first members have none.
        arguments = [{"births": part, "arriving": arriving, **shared} for part, arriving, _ in parts]
        self._call("begin", arguments)
        self._places, self._known = places, None
        self._note_places()

    def learn(self, done: int, until: int) -> Iterator[StepDone]:
        """Learn step by step; see `Executor.learn`."""
        for step in range(done + 1, until + 1):
            self._next = step
            self._leave_lost()
            learnt: list[Learnt] = self._call("learn_step", [{"step": step}] * self._workers.count)
            self._known = {one.index: one for part in learnt for one in part.members}
            for part in learnt:
                self._spent.update(part.spent)
            found = {index: metrics for part in learnt for index, metrics in part.done.metrics.items()}
            metrics = {index: found[index] for index in self._places if index in found}
            self._note_losses()
            self._next = step + 1
            yield replace(learnt[0].done, metrics=metrics)

    def evaluate(
        self,
        split: str,
        indices: Sequence[int] | None = None,
        *,
        kl: bool = False,
        answers: AnswerSampling | None = None,
        rows: int | None = None,
    ) -> dict[int, AnyEvaluation]:
        """Evaluate members on a split; see `Executor.evaluate`."""
        asked = {"split": split, "indices": indices, "kl": kl, "answers": answers, "rows": rows}
        found = {
            index: one for part in self._call("evaluate", [asked] * self._workers.count) for index, one in part.items()
        }
        wanted = self._places if indices is None else indices
        return {index: found[index] for index in wanted if index in found}

    def compared_answers(
        self, split: str, indices: Sequence[int], asked: AnswerSampling, *, rows: int | None = None
    ) -> dict[int, list[AnswerPair]]:
        """The answers of members and of their references; see `Judges.compared_answers`."""
        arguments = {"split": split, "indices": indices, "asked": asked, "rows": rows}
        found = self._call("compared_answers", [arguments] * self._workers.count)
        return {index: one for part in found for index, one in part.items()}

    def keep_best(self, index: int) -> None:
        """Copy a member as the best so far; see `Executor.keep_best`."""
        self._call("keep_best", [{"index": index}] * self._workers.count)
        self._best = self._places[index]

    def combine(self, index: int, recipe: Recipe) -> None:
        """Make a candidate, on the worker of its first agent; see `Combines.combine`."""
        place = self._where(recipe.agents[0])
        elsewhere = [number for number in dict.fromkeys(recipe.agents) if self._where(number) != place]
        self._ask(place, "combine", index=index, recipe=recipe, arriving=self._exports(elsewhere))
        self._candidates[index] = place

    def discard(self, indices: Sequence[int]) -> None:
        """Free candidates; see `Combines.discard`."""
        here = [[index for index in indices if self._candidates[index] == place] for place in self._all]
        self._call("discard", [{"indices": part} if part else None for part in here])
        for index in indices:
            del self._candidates[index]

    def spent(self) -> dict[str, int]:
        """The operations of all workers since the last call; see `Executor.spent`."""
        found, self._spent = self._spent, Counter()
        if not found:
            for part in self._call("spent"):
                found.update(part)
        return dict(found)

    def note_scores(self, scores: Mapping[int, float]) -> None:
        """Add each member's score to its history; see `Executor.note_scores`."""
        self._call("note_scores", [{"scores": scores}] * self._workers.count)

    def apply(self, births: Sequence[Birth]) -> None:
        """Replace the members with those of a plan; see `Executor.apply`."""
        parents = {parent for birth in births for parent in birth.parents}
        if not parents <= self._places.keys():
            fix = f"the plan was made for others, with the parents {sorted(parents)}: plan this population anew"
            raise ConfigurationError("population", list(self._places), fix)
        # On one worker, before any changes: whether an agent can have these values does not depend on the worker.
        self._ask(0, "check", births=births)
        self._change(births)

    def _change(self, births: Sequence[Birth]) -> None:
        """Let the workers carry out a plan; none of its members is with a worker that is lost for good."""
        lost = [] if self._losable is None else list(self._losable.lost)
        parts, self._places = self._divided(births, closed=lost)
        names = ("births", "arriving", "second_parents")
        self._call("apply", [dict(zip(names, part, strict=True)) for part in parts])
        self._known = None
        if self._losable is not None and lost:
            stay = [place for place in self._all if place not in lost]
            if self._best in lost:
                self._ask(stay[0], "hold_best", folder=self._exports([BEST_SO_FAR])[BEST_SO_FAR])
                self._best = stay[0]
            self._losable.retire(lost)
            self._places = {index: stay.index(place) for index, place in self._places.items()}
            self._best = None if self._best is None else stay.index(self._best)
        self._note_places()

    def _leave_lost(self) -> None:
        """Divide the members of workers that are lost for good among the others, as they are."""
        if self._losable is not None and self._losable.lost:
            self._change([Birth(one.index, one.index, (), False, one.hyperparameters) for one in self.members()])

    def whereabouts(self) -> list[Placed | WorkerLoss]:
        """Return what is new of who is where; see `Spreads.whereabouts`."""
        self._note_losses()
        found, self._news = self._news, []
        return found

    def _note_places(self) -> None:
        homes = self._workers.homes()
        here = [[index for index, place in self._places.items() if place == one] for one in self._all]
        if self._placed is None or (self._placed.homes, self._placed.members) != (homes, here):
            self._placed = Placed(self._next, homes, here)
            self._news.append(self._placed)

    def _note_losses(self) -> None:
        losses = [] if self._losable is None else self._losable.losses()
        if losses:
            self._news += [replace(loss, step=self._next) for loss in losses]
            self._note_places()

    def _divided(
        self, births: Sequence[Birth], closed: Collection[int] = frozenset()
    ) -> tuple[list[tuple[list[Birth], dict[int, AgentFolder], dict[int, AgentFolder]]], dict[int, int]]:
        """For each worker its births and the exports of parents and second parents elsewhere; and all new places."""
        stopped = {member.index for member in self.members() if member.diverged}
        found = placed(births, self._places, self._workers.count, stopped, closed)
        sent = [
            [
                (birth.index, parent)
                for birth, place in zip(births, found, strict=True)
                if (parent := getattr(birth, role)) is not None and self._places[parent] != place
            ]
            for role in ("parent", "second_parent")
        ]
        exports = self._exports(list(dict.fromkeys(parent for role in sent for _, parent in role)))
        places = {birth.index: place for birth, place in zip(births, found, strict=True)}
        parts = []
        for place in self._all:
            first, second = (
                {index: exports[parent] for index, parent in role if places[index] == place} for role in sent
            )
            parts.append(([birth for birth in births if places[birth.index] == place], first, second))
        return parts, places

    def save(self, folder: Path, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a checkpoint, which does not depend on the number of workers; see `Executor.save`."""
        parts: list[Population] = self._call("saved")
        main_writes(lambda: write_population(folder, self._joined(parts, state, arrays), self._base_name))

    def _joined(self, parts: Sequence[Population], state: Mapping[str, Any], arrays: Arrays) -> Population:
        """What a checkpoint has of all workers together."""
        by_index = {agent.attributes["index"]: agent for part in parts for agent in part.agents}
        known = ReferenceCache()
        for part in reversed(parts):
            known.update(part.reference_logprobs)
        where = {
            "workers": self._workers.count,
            "places": list(self._places.values()),
            "best_place": self._best,
            # Each worker has measured the memory of its own device.
            "engines": [part.state["engine"] for part in parts],
        }
        return replace(
            parts[0],
            agents=[by_index[index] for index in self._places],
            state={**state, **parts[0].state, **where},
            arrays=arrays,
            reference_logprobs=known,
            best_so_far=next((part.best_so_far for part in parts if part.best_so_far is not None), None),
        )

    def load(self, folder: Path) -> None:
        """Restore a checkpoint, of any executor; see `Executor.load`."""
        saved = read_population(folder)
        indices = [agent.attributes["index"] for agent in saved.agents]
        # Members go where they were if there are as many workers, since roundings depend on who is together.
        same = saved.state.get("workers") == self._workers.count
        places = saved.state["places"] if same else first_places(indices, self._workers.count)
        self._best = (saved.state["best_place"] if same else 0) if saved.best_so_far is not None else None
        self._places, self._known = dict(zip(indices, places, strict=True)), None
        self._next = int(saved.state.get("step", 0)) + 1
        engines = saved.state.get("engines") if same else None
        parts = []
        for place in self._all:
            agents = [agent for agent in saved.agents if self._places[agent.attributes["index"]] == place]
            best = saved.best_so_far if place == self._best else None
            state = saved.state if engines is None else {**saved.state, "engine": engines[place]}
            parts.append({"saved": replace(saved, agents=agents, best_so_far=best, state=state)})
        self._call("restore", parts)
        self._news.clear()
        self._placed = None
        self._note_places()

    def save_agent(self, index: int, folder: Path) -> None:
        """Write one agent; see `Executor.save_agent`."""
        agent = self._exports([index])[index]
        main_writes(lambda: write_agent_folder(folder, agent, self._base_name))

    def answers(self, index: int, split: str, count: int) -> list[SampleAnswer]:
        """Answer prompts before and after tuning; see `Executor.answers`."""
        return list(self._ask(self._where(index), "answers", index=index, split=split, count=count))

    def agent(self, index: int) -> Any:
        """Return one live agent; see `Executor.agent`."""
        return self._workers.agents({index: self._where(index)})[0]

    def population(self) -> list[Any]:
        """Return the members as live agents; see `Executor.population`."""
        return self._workers.agents(self._places)

    def close(self) -> None:
        """Free what only the run needed; see `Executor.close`."""
        self._workers.close()

    @property
    def _all(self) -> range:
        return range(self._workers.count)

    @property
    def _base_name(self) -> str:
        return str(self._described.config["base"])

    def _where(self, index: int) -> int:
        """The worker that holds a member, a candidate or the best agent so far."""
        if index == BEST_SO_FAR and self._best is not None:
            return self._best
        return self._candidates[index] if index in self._candidates else self._places[index]

    def _call(self, method: str, arguments: Sequence[Call] | None = None) -> list[Any]:
        """Call a method of all workers, by default without arguments."""
        return self._workers.call(method, [{}] * self._workers.count if arguments is None else arguments)

    def _ask(self, place: int, method: str, **arguments: Any) -> Any:
        """Call a method of one worker."""
        return self._call(method, [arguments if one == place else None for one in self._all])[place]

    def _exports(self, indices: Sequence[int]) -> dict[int, AgentFolder]:
        """Agents as plain data, by index."""
        wanted = [[index for index in indices if self._where(index) == place] for place in self._all]
        if not indices:
            return {}
        found = self._call("exports", [{"indices": part} if part else None for part in wanted])
        return {index: folder for part in found for index, folder in (part or {}).items()}
