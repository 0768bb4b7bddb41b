"""What happens during a run, as events of plain data, and the callbacks that are told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evollm.hpo import AnyEvaluation, Birth, EvolutionPlan, Fitness


@dataclass(frozen=True)
class RunStarted:
    """Everything is checked; no batch has been served yet.

    Attributes:
        run_dir: The run folder.
        config: Settings of the run as JSON values.
        founders: The agents of the first generation.
        total_steps: Steps of the whole run; a step is one batch for every agent.
        step: Steps done before, 0 unless the run is resumed.
        evolutions: Those carried out before.
        held_out: How many rows there are of each held-out split, `test` and `final`.
    """

    run_dir: Path
    config: Mapping[str, Any]
    founders: Sequence[Birth]
    total_steps: int
    step: int = 0
    evolutions: Sequence[Evolved] = ()
    held_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BaselineScored:
    """The first agent has been scored before training; a resumed run has that score already.

    Attributes:
        split: The pairs, `final` or `test`.
        score: What it makes of each of them.
    """

    split: str
    score: AnyEvaluation


@dataclass(frozen=True)
class StepDone:
    """Every agent has learnt from one batch.

    Attributes:
        step: Steps done.
        epoch: Epochs done.
        metrics: What `learn` returned, by agent; a diverged agent is missing.
        attention: What attention was computed by, in words.
    """

    step: int
    epoch: int
    metrics: Mapping[int, Mapping[str, float]]
    attention: str = ""


@dataclass(frozen=True)
class Evaluated:
    """Every agent has been scored on the same pairs.

    Attributes:
        step: Steps done.
        generation: Evolutions done.
        evaluations: What each agent makes of each held-out pair or example; a diverged agent is missing.
        fitnesses: The fitness of every agent, not finite for a diverged one.
        best: Index of the fittest agent.
        agents: Hyperparameters of every agent.
    """

    step: int
    generation: int
    evaluations: Mapping[int, AnyEvaluation]
    fitnesses: Mapping[int, Fitness]
    best: int
    agents: Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Evolved:
    """A plan has been carried out.

    Attributes:
        step: Steps done.
        plan: Who came from whom, and what mutated.
    """

    step: int
    plan: EvolutionPlan


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
    """What the model says to one prompt before and after tuning; an answer that was cut ends in an ellipsis.

    Attributes:
        prompt: The prompt, or the last message of a conversation.
        before: The answer before.
        after: The answer after.
        turns: Role and text of each message of a conversation; none of a prompt that is text.
    """

    prompt: str
    before: str
    after: str
    turns: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class RunEnded:
    """The run is over.

    Attributes:
        step: Steps done.
        best: Index of the fittest agent.
        best_path: Folder of its checkpoint, None when it was not to be saved.
        split: The pairs of the two scores, `final` or `test`; "" when there are none.
        before: Score of the first agent before training.
        after: Score of the fittest agent.
        samples: Answers before and after.
        runner_up: Index of the agent that came second, None when there is no other that could be scored.
        runner_up_score: Its score.
    """

    step: int
    best: int
    best_path: Path | None
    split: str
    before: AnyEvaluation | None
    after: AnyEvaluation | None
    samples: Sequence[SampleAnswer]
    runner_up: int | None = None
    runner_up_score: AnyEvaluation | None = None


class Callback:
    """Override what you want to hear of. Callbacks are called in the order in which they were given."""

    def on_start(self, event: RunStarted) -> None:
        """The run begins."""

    def on_baseline(self, event: BaselineScored) -> None:
        """What training begins with has been scored."""

    def on_step(self, event: StepDone) -> None:
        """A step is done."""

    def on_evaluation(self, event: Evaluated) -> None:
        """The population has been scored."""

    def on_evolution(self, event: Evolved) -> None:
        """A generation has given way to the next."""

    def on_checkpoint(self, event: Checkpointed) -> None:
        """The population has been saved."""

    def on_end(self, event: RunEnded) -> None:
        """The run is over."""

    def close(self) -> None:
        """Release files and threads; called once however the run ends, also after an error."""
