"""The events of a run as plain data, and the base class of callbacks, which receive them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evollm.hpo import AnyEvaluation, Birth, EvolutionPlan, Fitness, Recipe
from evollm.runs.spent import Spent


@dataclass(frozen=True)
class RunStarted:
    """All settings are checked, and no batch has been served yet.

    Attributes:
        run_dir: The run folder.
        config: Settings of the run as JSON values.
        founders: The agents of the first generation.
        total_steps: Steps of the whole run; a step is one batch for every agent.
        step: Steps done before, 0 unless the run is resumed.
        evolutions: Evolutions carried out before, none unless the run is resumed.
        held_out: Number of rows of each held-out split, `test` and `final`.
        evaluated_rows: Rows of the last evaluation before; None: all rows, or there was none.
    """

    run_dir: Path
    config: Mapping[str, Any]
    founders: Sequence[Birth]
    total_steps: int
    step: int = 0
    evolutions: Sequence[Evolved] = ()
    held_out: Mapping[str, int] = field(default_factory=dict)
    evaluated_rows: int | None = None


@dataclass(frozen=True)
class BaselineScored:
    """The first agent has been evaluated before training; a resumed run has no such event.

    Attributes:
        split: The held-out split, `final` or `test`.
        score: The evaluation, row by row.
    """

    split: str
    score: AnyEvaluation


@dataclass(frozen=True)
class StepDone:
    """Every agent has learnt from one batch.

    Attributes:
        step: Steps done.
        epoch: Epochs done.
        metrics: The metrics of `learn`, by agent; a diverged agent is missing.
        attention: Description of the attention implementation that was used.
    """

    step: int
    epoch: int
    metrics: Mapping[int, Mapping[str, float]]
    attention: str = ""


@dataclass(frozen=True)
class Evaluated:
    """Every agent has been evaluated on the same rows, or at the end of a run the best one alone on all rows.

    Attributes:
        step: Steps done.
        generation: Evolutions done.
        evaluations: The evaluation of each agent, row by row; a diverged agent is missing.
        fitnesses: The fitness of each agent, not finite for a diverged one.
        best: Index of the fittest agent.
        agents: Hyperparameters of each agent.
        spent: What the run has spent so far, this evaluation included.
        rows: Number of rows, if only a decision of the search on fewer rows needed it; None: all rows.
    """

    step: int
    generation: int
    evaluations: Mapping[int, AnyEvaluation]
    fitnesses: Mapping[int, Fitness]
    best: int
    agents: Mapping[int, Mapping[str, float]]
    spent: Spent | None = None
    rows: int | None = None


@dataclass(frozen=True)
class Evolved:
    """An evolution has been carried out.

    Attributes:
        step: Steps done.
        plan: The next generation, with parents and mutations.
    """

    step: int
    plan: EvolutionPlan


@dataclass(frozen=True)
class WorkerHome:
    """Where a worker is.

    Attributes:
        worker: Number of the worker, for people; it keeps it as long as the run goes on.
        machine: Name of the machine.
        process: Number of the process on it; of the first one, if several hold the worker together.
    """

    worker: int
    machine: str
    process: int


@dataclass(frozen=True)
class Placed:
    """The members of a run over several workers are divided among them.

    Attributes:
        step: The first step for which they are where they are.
        homes: The workers.
        members: Indices of the members of each worker.
    """

    step: int
    homes: Sequence[WorkerHome]
    members: Sequence[Sequence[int]]


@dataclass(frozen=True)
class WorkerLoss:
    """A worker was lost, and what it held goes on elsewhere.

    Attributes:
        step: The step that was being done, or was to come next.
        home: Where the worker was.
        seconds: Seconds that the run has waited until another one had done again what was lost.
        why: What is known of the reason.
        replaced: Whether another process has taken its place; else other workers take in its members.
    """

    step: int
    home: WorkerHome
    seconds: float
    why: str
    replaced: bool


@dataclass(frozen=True)
class Checkpointed:
    """The population has been saved.

    Attributes:
        step: Steps done.
        path: Folder with one subfolder for each agent.
    """

    step: int
    path: Path


@dataclass(frozen=True)
class SampleAnswer:
    """The model's answers to one prompt before and after tuning; a truncated answer ends in an ellipsis.

    Attributes:
        prompt: The prompt, or the last message of a conversation.
        before: The answer before tuning.
        after: The answer after tuning.
        turns: Role and text of each message of a conversation; empty for a prompt that is a string.
    """

    prompt: str
    before: str
    after: str
    turns: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Candidate:
    """An adapter that was made of the best agents after the last step, evaluated on the selection rows.

    Attributes:
        recipe: How it was made.
        scores: Its scores by name.
        difference: Its score minus that of the best agent, by the score that candidates are compared with.
        p_value: One-sided p-value of the paired comparison with the best agent; NaN if it cannot win.
        won: Whether it is the run's result.
    """

    recipe: Recipe
    scores: Mapping[str, float]
    difference: float
    p_value: float
    won: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, but for numbers that are not finite."""
        return {**asdict(self), "recipe": {**asdict(self.recipe), "agents": list(self.recipe.agents)}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Candidate:
        """Read the result of `to_dict`, in which numbers that are not finite may be strings."""
        recipe = data["recipe"]
        return cls(
            recipe=Recipe(
                tuple(map(int, recipe["agents"])),
                str(recipe["combination"]),
                float(recipe["factor"]),
                float(recipe["density"]),
                int(recipe["seed"]),
            ),
            scores={str(name): float(value) for name, value in data["scores"].items()},
            difference=float(data["difference"]),
            p_value=float(data["p_value"]),
            won=bool(data["won"]),
        )


@dataclass(frozen=True)
class RunEnded:
    """The run is over.

    Attributes:
        step: Steps done.
        best: Index of the fittest agent.
        best_step: Steps done at the fittest agent's evaluation: fewer than `step` if an earlier evaluation was better.
        best_path: Folder of the fittest agent's checkpoint, None if it was not saved.
        split: The held-out split of the scores, `final` or `test`; "" if there is none.
        before: Evaluation of the first agent before training.
        after: Evaluation of the fittest agent.
        samples: Answers before and after tuning.
        runner_up: Index of the second fittest agent, None if no other agent has a finite fitness. If an earlier
            evaluation was the best, it is the fittest agent at the end, whose index may be that of `best`.
        runner_up_score: Evaluation of the second fittest agent.
        stopped: Why the run ended before its last step; "" if it did not.
        spent: What the run has spent.
        candidates: The adapters that were made of the best agents after the last step. If one of them has won, `after`,
            `samples` and the checkpoint are its, and `best` is the agent that it was made of first.
    """

    step: int
    best: int
    best_step: int
    best_path: Path | None
    split: str
    before: AnyEvaluation | None
    after: AnyEvaluation | None
    samples: Sequence[SampleAnswer]
    runner_up: int | None = None
    runner_up_score: AnyEvaluation | None = None
    stopped: str = ""
    spent: Spent | None = None
    candidates: Sequence[Candidate] = ()

    @property
    def made_of(self) -> Recipe | None:
        """How the result was made, if it is a candidate; None: it is an agent as it was trained."""
        return next((one.recipe for one in self.candidates if one.won), None)


class Callback:
    """Receives the events of a run: override the methods that you need.

    The callbacks of a run are called in the order in which they were given.
    """

    def on_start(self, event: RunStarted) -> None:
        """The run begins."""

    def on_baseline(self, event: BaselineScored) -> None:
        """The first agent has been evaluated before training."""

    def on_step(self, event: StepDone) -> None:
        """A step is done."""

    def on_evaluation(self, event: Evaluated) -> None:
        """The population has been evaluated."""

    def on_evolution(self, event: Evolved) -> None:
        """The population has been replaced by the next generation."""

    def on_placement(self, event: Placed) -> None:
        """The members are on other workers than before; only of a run over several of them."""

    def on_loss(self, event: WorkerLoss) -> None:
        """A worker was lost, and its members go on."""

    def on_checkpoint(self, event: Checkpointed) -> None:
        """The population has been saved."""

    def on_end(self, event: RunEnded) -> None:
        """The run is over."""

    def close(self) -> None:
        """Release files and threads; called once when the run ends, also after an error."""
