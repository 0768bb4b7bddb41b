"""A run as plain data: its records, and the lives of its agents as derived from the lineage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evollm.hpo import AnyEvaluation, Birth, Fitness, Recipe, is_finite
from evollm.runs.events import Candidate, Evolved, Placed, SampleAnswer, WorkerLoss
from evollm.runs.lineage import HyperparameterSchedule, Lineage
from evollm.runs.spent import Spent
from evollm.runs.words import Words

# The end of a truncated answer.
CUT = "…"


@dataclass(frozen=True)
class StepLine:
    """The metrics of one agent at one step; they may be NaN or infinite."""

    step: int
    agent: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Scored:
    """One agent at one evaluation.

    Attributes:
        step: Steps done.
        generation: Evolutions done.
        agent: The agent's index.
        scores: Scores on the held-out rows by name; empty for a diverged agent.
        fitness: The agent's fitness.
        rows: Number of rows, if only a decision of the search on fewer rows needed the evaluation; None: all rows.
        pairs: The evaluation row by row, None if it was not recorded or not read.
    """

    step: int
    generation: int
    agent: int
    scores: Mapping[str, float]
    fitness: Fitness
    rows: int | None = None
    pairs: AnyEvaluation | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        step: Steps done.
        best: Index of the winner.
        best_step: Steps done at the winner's evaluation; fewer than `step` if an earlier evaluation was the best.
        runner_up: Index of the second fittest agent, None if there is none.
        split: The held-out split of the scores: `final`, `test` (by which agents were selected), or "" for none.
        scores: Scores by name for the roles `before`, `after` and `runner_up`, as far as they were recorded.
        pairs: The evaluations row by row, for the same roles.
        samples: Answers before and after tuning; a truncated answer ends in `CUT`.
        stopped: Why the run ended before its last step; "" if it did not.
        candidates: The adapters that were made of the best agents after the last step.
    """

    step: int
    best: int
    best_step: int
    runner_up: int | None
    split: str
    scores: Mapping[str, Mapping[str, float]]
    pairs: Mapping[str, AnyEvaluation] = field(repr=False)
    samples: Sequence[SampleAnswer]
    stopped: str = ""
    candidates: Sequence[Candidate] = ()

    @property
    def made_of(self) -> Recipe | None:
        """How the result was made, if it is a candidate; None: it is an agent as it was trained."""
        return next((one.recipe for one in self.candidates if one.won), None)


@dataclass(frozen=True)
class Timing:
    """Time and memory at an event.

    Attributes:
        kind: `start`, `baseline`, `step`, `evaluation`, `evolution`, `checkpoint` or `end`.
        step: Steps done.
        seconds: Seconds since the event before.
        resident_bytes: Resident memory of the process at the event.
        cuda_peak_bytes: Peak of the allocated CUDA memory so far, None on other devices.
    """

    kind: str
    step: int
    seconds: float
    resident_bytes: int
    cuda_peak_bytes: int | None


@dataclass(frozen=True)
class Life:
    """An agent from its birth to the evolution that removed it.

    Attributes:
        birth: The agent's parent, mutations and hyperparameters.
        generations: The agent's first and last generation.
        steps: The steps done at the agent's birth, and when it was removed or the run ended.
        diverged: Whether a fitness of the agent was not finite, or it stopped learning.
    """

    birth: Birth
    generations: tuple[int, int]
    steps: tuple[int, int]
    diverged: bool


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder; see `evollm.runs.read_run`.

    Attributes:
        path: The run folder.
        config: Settings of the run.
        words: The words of the run's algorithm.
        lineage: Founders and evolutions.
        steps: Metrics of each agent and step, ordered by step.
        evaluations: Scores of each agent and evaluation, ordered by step.
        ended: The end of the run, None if the run has not ended.
        timings: Time and memory of each event, in their order; empty if they were not recorded.
        spent: The step and what the run had spent, at each evaluation and at the end; empty if it was not recorded.
        placements: Which worker held which members from which step on; empty of a run in one place.
        losses: The workers that were lost.
    """

    path: Path
    config: Mapping[str, Any]
    words: Words
    lineage: Lineage
    steps: Sequence[StepLine] = field(repr=False)
    evaluations: Sequence[Scored] = field(repr=False)
    ended: Ended | None
    timings: Sequence[Timing] = field(repr=False)
    spent: Sequence[tuple[int, Spent]] = field(default=(), repr=False)
    placements: Sequence[Placed] = field(default=(), repr=False)
    losses: Sequence[WorkerLoss] = ()

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
        """The births of each generation; a kept agent has a birth in each of its generations."""
        return (self.founders, *(evolution.plan.births for evolution in self.evolutions))

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Steps done at the beginning of each generation, and at the end of the last."""
        return (0, *(evolution.step for evolution in self.evolutions), self.last_step)

    @cached_property
    def winner(self) -> int | None:
        """Index of the best agent; while the run has not ended, that of its best evaluation, if any is finite."""
        if self.ended is not None:
            return self.ended.best
        return None if self.winning_evaluation is None else self.winning_evaluation.agent

    @cached_property
    def winner_step(self) -> int:
        """Steps done at the evaluation by which the winner is the best agent; without one, all steps."""
        if self.ended is not None:
            return self.ended.best_step
        return self.last_step if self.winning_evaluation is None else self.winning_evaluation.step

    @property
    def winner_generation(self) -> int:
        """The generation of the winner's evaluation."""
        return len(self.lineage.before(self.winner_step).evolutions)

    @cached_property
    def winning_evaluation(self) -> Scored | None:
        """The winner's evaluation; while the run has not ended, the best so far, and the later one of equals."""
        if self.ended is not None:
            place = (self.ended.best_step, self.ended.best)
            found = [scored for scored in self.evaluations if (scored.step, scored.agent) == place]
            return max(found, key=lambda scored: (scored.rows is None, -(scored.rows or 0)), default=None)
        finite = [scored for scored in self.evaluations if scored.rows is None and is_finite(scored.fitness)]
        return max(finite, key=lambda scored: (scored.fitness, scored.step), default=None)

    @cached_property
    def latest_evaluation(self) -> tuple[Scored, ...]:
        """Every agent at the last evaluation; of an agent that was then evaluated on more rows, these."""
        last = max((scored.step for scored in self.evaluations), default=0)
        return tuple({scored.agent: scored for scored in self.evaluations if scored.step == last}.values())

    @cached_property
    def lives(self) -> Mapping[int, Life]:
        """All agents of the run by their index, in the order of birth."""
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
        """The lives of the winner's ancestors and of the winner, oldest first; empty without a winner."""
        line: list[Life] = []
        index = self.winner
        while index is not None and index in self.lives:
            line.append(self.lives[index])
            index = self.lives[index].birth.parent
        return tuple(reversed(line))

    @property
    def schedule(self) -> HyperparameterSchedule:
        """The hyperparameters over the winner's ancestry, one entry for each change; empty without a winner."""
        return [] if self.winner is None else self.lineage.before(self.winner_step).schedule(self.winner)

    @cached_property
    def line_ends(self) -> Mapping[int, int]:
        """For each agent of `line`, by index, the step at which its child of the line was born, or the winner won."""
        ends = [*(life.steps[0] for life in self.line[1:]), self.winner_step]
        return {life.birth.index: end for life, end in zip(self.line, ends, strict=False)}

    @cached_property
    def line_evaluations(self) -> tuple[Scored, ...]:
        """The evaluations of the winner's line: those of each of its agents until its child on the line was born."""
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
