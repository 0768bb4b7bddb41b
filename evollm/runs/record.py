"""A run as plain data: what was recorded, and who descends from whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evollm.hpo import AnyEvaluation, Birth, Fitness, is_finite, rank
from evollm.runs.events import Evolved, SampleAnswer
from evollm.runs.lineage import Lineage, Schedule
from evollm.runs.words import Words

# What a text ends in that goes on.
CUT = "…"


@dataclass(frozen=True)
class StepLine:
    """What one agent reported of one step; metrics that are not finite are NaN or infinite."""

    step: int
    agent: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Scored:
    """One agent at one evaluation.

    Attributes:
        step: Steps done.
        generation: Evolutions done.
        agent: Its index.
        scores: Means over the held-out pairs by name; none of a diverged agent.
        fitness: What it was selected by.
        pairs: What the means are made of, None where it was not kept.
    """

    step: int
    generation: int
    agent: int
    scores: Mapping[str, float]
    fitness: Fitness
    pairs: AnyEvaluation | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        step: Steps done.
        best: Index of the winner.
        runner_up: Index of the agent that came second, None if there is none.
        split: The pairs of the final score: `final`, `test` if they are those of the selection, "" if there are none.
        scores: Means by name, of `before`, `after` and `runner_up`, as far as they are known.
        pairs: What the means are made of, by the same names.
        samples: Answers before and after; one that was cut ends in `CUT`.
    """

    step: int
    best: int
    runner_up: int | None
    split: str
    scores: Mapping[str, Mapping[str, float]]
    pairs: Mapping[str, AnyEvaluation] = field(repr=False)
    samples: Sequence[SampleAnswer]


@dataclass(frozen=True)
class Timing:
    """What came to pass between two events, named after the later one.

    Attributes:
        kind: `start`, `baseline`, `step`, `evaluation`, `evolution`, `checkpoint` or `end`.
        step: Steps done.
        seconds: Since the event before.
        resident_bytes: Memory of the process at the event.
        cuda_peak_bytes: The most that was allocated on CUDA at once so far, None on other devices.
    """

    kind: str
    step: int
    seconds: float
    resident_bytes: int
    cuda_peak_bytes: int | None


@dataclass(frozen=True)
class Life:
    """An agent from its birth to the evolution that did not keep it.

    Attributes:
        birth: Its parent, mutations and hyperparameters.
        generations: The first and the last generation that it is in.
        steps: After how many steps it was born, and after how many it left or the run ended.
        diverged: Whether it has no finite fitness, or stopped learning.
    """

    birth: Birth
    generations: tuple[int, int]
    steps: tuple[int, int]
    diverged: bool


@dataclass(frozen=True)
class RunRecord:
    """All that a run folder says of its run; see `evollm.runs.read_run`.

    Attributes:
        path: The run folder.
        config: Settings of the run.
        words: Those of its algorithm.
        lineage: Who came from whom.
        steps: Ordered by step.
        evaluations: Ordered by step.
        ended: None while the run has not ended.
        timings: Where time and memory went, in their order; none of a run that was not timed.
    """

    path: Path
    config: Mapping[str, Any]
    words: Words
    lineage: Lineage
    steps: Sequence[StepLine] = field(repr=False)
    evaluations: Sequence[Scored] = field(repr=False)
    ended: Ended | None
    timings: Sequence[Timing] = field(repr=False)

    @property
    def founders(self) -> Sequence[Birth]:
        """The first generation."""
        return self.lineage.founders

    @property
    def evolutions(self) -> Sequence[Evolved]:
        """The evolutions in their order."""
        return self.lineage.evolutions

    @property
    def last_step(self) -> int:
        """Steps done."""
        return max((line.step for line in self.steps), default=0)

    @cached_property
    def generations(self) -> tuple[Sequence[Birth], ...]:
        """The births of each generation; of a kept agent there is one in every generation."""
        return (self.founders, *(evolution.plan.births for evolution in self.evolutions))

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Steps done at the beginning of each generation, and at the end of the last."""
        return (0, *(evolution.step for evolution in self.evolutions), self.last_step)

    @cached_property
    def winner(self) -> int | None:
        """Index of the best agent; of a run that has not ended, the best of its last evaluation."""
        if self.ended is not None:
            return self.ended.best
        latest = self.latest_evaluation
        ranking = rank([scored.fitness for scored in latest])
        return latest[ranking[0]].agent if latest and is_finite(latest[ranking[0]].fitness) else None

    @cached_property
    def latest_evaluation(self) -> tuple[Scored, ...]:
        """Every agent at the last evaluation."""
        last = max((scored.step for scored in self.evaluations), default=0)
        return tuple(scored for scored in self.evaluations if scored.step == last)

    @cached_property
    def lives(self) -> Mapping[int, Life]:
        """Every agent that there was, by its index, in the order of birth."""
        first: dict[int, tuple[int, Birth]] = {}
        last: dict[int, int] = {}
        for generation, births in enumerate(self.generations):
            for birth in births:
                first.setdefault(birth.index, (generation, birth))
                last[birth.index] = generation
        return {
            index: Life(
                birth=birth,
                generations=(generation, last[index]),
                steps=(self.boundaries[generation], self.boundaries[last[index] + 1]),
                diverged=index in self._diverged,
            )
            for index, (generation, birth) in first.items()
        }

    @cached_property
    def line(self) -> tuple[Life, ...]:
        """The winner and its ancestors, founder first: the schedule of hyperparameters that made it.

        Each life's `steps[0]` is the step after which its hyperparameters began. Empty without a winner.
        """
        line: list[Life] = []
        index = self.winner
        while index is not None and index in self.lives:
            line.append(self.lives[index])
            index = self.lives[index].birth.parent
        return tuple(reversed(line))

    @property
    def schedule(self) -> Schedule:
        """The hyperparameters of the winner's line, wherever they changed; empty without a winner."""
        return [] if self.winner is None else self.lineage.schedule(self.winner)

    @cached_property
    def line_ends(self) -> Mapping[int, int]:
        """Of each agent of `line` the step after which it gave way to its heir, or the run ended."""
        heirs = [life.steps[0] for life in self.line[1:]]
        return {
            life.birth.index: end
            for life, end in zip(self.line, [*heirs, *(life.steps[1] for life in self.line[-1:])], strict=True)
        }

    @cached_property
    def line_evaluations(self) -> tuple[Scored, ...]:
        """The winner's line at each evaluation, each agent of it while it was on the line."""
        return tuple(
            scored
            for scored in self.evaluations
            if scored.agent in self.line_ends
            and scored.step <= self.line_ends[scored.agent]
            and scored.step > (self.lives[scored.agent].steps[0] or -1)
        )

    @cached_property
    def _diverged(self) -> frozenset[int]:
        by_fitness = {scored.agent for scored in self.evaluations if not is_finite(scored.fitness)}
        by_fitness |= {
            index
            for evolution in self.evolutions
            for index, fitness in evolution.plan.fitnesses.items()
            if not is_finite(fitness)
        }
        learnt = {line.agent for line in self.steps if line.step == self.last_step}
        present = {birth.index for birth in self.generations[-1]}
        born_now = bool(self.evolutions) and self.evolutions[-1].step == self.last_step
        return frozenset(by_fitness | (set() if born_now else present - learnt))
