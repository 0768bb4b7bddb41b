"""The interface between a run, which decides, and an executor, which holds the agents.

A run knows agents by their indices. Run and executor exchange only plain data: indices, births, hyperparameters,
metrics, evaluations, paths and JSON values. An executor may therefore hold its agents in this process, in other
processes or on other machines. `evollm.execution.local` is the default of `finetune` and `tune`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evollm.errors import ConfigurationError, DivergedError
from evollm.hpo import AnswerPair, AnswerSampling, AnyEvaluation, Birth, HyperparameterConfig, Recipe
from evollm.hpo.hyperparameters import to_lower
from evollm.runs.events import Placed, SampleAnswer, StepDone, WorkerLoss

Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]
# The index by which `evaluate`, `save_agent`, `answers` and `agent` name the copy that `keep_best` made.
BEST_SO_FAR = -1
# The indices of candidates that `Combines.combine` makes: this one and smaller ones.
FIRST_CANDIDATE = -2


@dataclass(frozen=True)
class Member:
    """An agent as plain data, for the run.

    Attributes:
        index: The agent's index, unique over a run.
        hyperparameters: The agent's values by name.
        steps: Batches that the agent's weights have learnt from, batches of its ancestors included.
        num_tokens: Tokens that the agent's weights have learnt from, tokens of its ancestors included.
        diverged: Whether the loss or gradient has become NaN or infinite; a diverged agent stops learning.
    """

    index: int
    hyperparameters: Mapping[str, float]
    steps: int
    num_tokens: int
    diverged: bool


@dataclass(frozen=True)
class Costs:
    """Floating-point operations that one agent needs, by the formula of `evollm.models.flops`.

    Attributes:
        training: Learning once from each training row, its reference known.
        evaluation: The evaluation on each held-out split, `test` and `final`, the reference known.
        references: The reference's log-probs of each split, `train`, `test` and `final`; 0 without a reference.
        kl: Measuring `Evaluation.kl` on `test`: another pass of the agent and one of the reference.
        adapter: The share of `evaluation["test"]` that is due to the adapter and grows with its rank.
        mismatched: The reference's log-probs of other answers that a pass over the training rows needs, anew in each.
    """

    training: int
    evaluation: Mapping[str, int]
    references: Mapping[str, int]
    kl: int = 0
    adapter: int = 0
    mismatched: int = 0


@dataclass(frozen=True)
class Description:
    """An executor's description of the population and the data, given before the run begins.

    Attributes:
        config: Settings for `config.json`, which a resumed run must share, as JSON values.
        rows: Number of rows of each split, `train`, `test` and `final`; 0: there is no such split.
        epoch: Batches of an epoch.
        costs: What one agent needs for the rows of each split.
        hp_config: The hyperparameters that may change, with their bounds; None if none may.
        trust_remote_code: Whether the base runs remote code, which a resuming command must allow again.
        unlearnable: Error text for a run in which no member can learn from any row.
        takes_rows: Whether the algorithm can evaluate on fewer rows than all.
    """

    config: Mapping[str, Any]
    rows: Mapping[str, int]
    epoch: int
    costs: Costs
    hp_config: HyperparameterConfig | None
    trust_remote_code: bool
    unlearnable: str
    takes_rows: bool = True


class Agreement(Protocol):
    """How the processes of one run agree on values; `evollm.processes.Processes` implements this protocol.

    All processes call these methods in the same order. A run's only process is its main process.
    """

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""

    def from_main(self, value: Any) -> Any:
        """Return the main process's value in every process; JSON values only."""

    def largest(self, value: int) -> int:
        """Return the largest value of all processes."""

    def wait(self) -> None:
        """Block until every process has made this call."""


class Executor(Protocol):
    """Holds the agents of a run and does what the run decides. A class needs these methods, and no base class.

    A run calls `describe` and `members`, then `begin`, then `load` if the run resumes, and `close` at the end, also
    after an error. The members have the order of the births of the last `begin` or `apply`.

    Attributes:
        processes: How the processes of the run agree, by default `evollm.processes.Processes.present()`.
    """

    processes: Agreement

    def describe(self) -> Description:
        """Describe the population and the data."""

    def changed_text(self, noted: Mapping[str, Any]) -> str:
        """Say in words which training or held-out text first differs from `noted`, the saved `config["data"]`."""

    def members(self) -> Sequence[Member]:
        """Return the present members, in order."""

    def begin(self, births: Sequence[Birth] | None, *, moving_references: bool) -> None:
        """Begin a run with the members of `births`, and clear all state of earlier runs on the same base.

        Args:
            births: The first members, as for `apply`; None: all agents, for the whole run.
            moving_references: Whether each actor becomes its agent's reference after every epoch. Scores stay relative
                to the present reference of the first agent.

        Raises:
            ConfigurationError: A birth has hyperparameters that no agent can have; no agent has been changed.
        """

    def learn(self, done: int, until: int) -> Iterator[StepDone]:
        """Train every member that has not diverged, one batch per step.

        The iterator is lazy, so that the run may stop or change members after each step: the next step begins when the
        run asks for the next item.

        Args:
            done: Steps that the run has done.
            until: The last step to do.

        Returns:
            An iterator over the finished steps.
        """

    def evaluate(
        self,
        split: str,
        indices: Sequence[int] | None = None,
        *,
        kl: bool = False,
        answers: AnswerSampling | None = None,
        rows: int | None = None,
    ) -> dict[int, AnyEvaluation]:
        """Evaluate members on a held-out split.

        Args:
            split: `test` or `final`.
            indices: Members to evaluate; None: all members that have not diverged.
            kl: Measure `Evaluation.kl` too; asked for only if a guard bounds it.
            answers: Sample answers for `Evaluation.answer_lengths`; asked for only if a guard bounds them.
            rows: Evaluate on this many rows, the same for all; asked for only if a plan of the search has `rows`.

        Returns:
            The evaluation of each member by index, with values for each row.
        """

    def keep_best(self, index: int) -> None:
        """Copy a member as the best of the run so far, in place of the copy before; `save` and `load` include the copy.

        The run reads the copy once, at its end, by the index `BEST_SO_FAR`.
        """

    def spent(self) -> dict[str, int]:
        """Return the floating-point operations since the last call, or since `begin`, by what they were made for.

        The kinds are `training`, `evaluation`, `references` and `probe`; see `evollm.models.flops`. With several
        workers each operation is counted once: workers that share no base compute references each by itself.
        """

    def note_scores(self, scores: Mapping[int, float]) -> None:
        """Add the first component of each member's fitness to the member's history, which children inherit."""

    def apply(self, births: Sequence[Birth]) -> None:
        """Replace the members with those of a plan: kept members, children, and fresh copies of the run's first agent.

        A fresh member copies the first agent as it was when the run began. A kept member takes the hyperparameters of
        its birth. A child with a second parent has the mean of both actors; all else is the first parent's.

        Raises:
            ConfigurationError: A birth has hyperparameters that no agent can have, a parent is no member, or two
                parents' actors have no mean; no agent has been changed.
        """

    def save(self, folder: Path, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a checkpoint: all members, all other state that later steps depend on, and the run's own state.

        `evollm.checkpoints.write_population` writes a checkpoint atomically. Only the main process writes.

        Args:
            folder: Folder of the checkpoint.
            state: The run's own state as JSON values, for `population.json`.
            arrays: The run's own arrays, which are not saved as JSON.

        Raises:
            OSError, EvoLLMError: The checkpoint could not be written.
        """

    def load(self, folder: Path) -> None:
        """Restore the members and all other state that `save` wrote.

        Raises:
            CheckpointError: The folder is damaged.
        """

    def save_agent(self, index: int, folder: Path) -> None:
        """Write one member as an agent's `save_checkpoint` does.

        Raises:
            OSError, EvoLLMError: The member could not be written.
        """

    def answers(self, index: int, split: str, count: int) -> list[SampleAnswer]:
        """Generate answers to some prompts of a split, before tuning and with the member's present weights.

        Args:
            index: Index of the member.
            split: `test` or `final`.
            count: Most prompts to answer.

        Returns:
            The answers; an empty list outside the main process, unless a sharded base makes all processes generate.
        """

    def agent(self, index: int) -> Any:
        """Return one live agent for the caller of the run; the run itself does not use live agents."""

    def population(self) -> list[Any]:
        """Return the members as live agents for the caller of the run."""

    def close(self) -> None:
        """Free the memory that only the run needed; the agents stay usable."""


class Combines(Executor, Protocol):
    """An executor that can also make candidates of its agents, which the option `merge` of a run needs."""

    def combine(self, index: int, recipe: Recipe) -> None:
        """Make a candidate, which `evaluate`, `save_agent`, `answers` and `agent` then know by this index.

        Args:
            index: `FIRST_CANDIDATE` or below.
            recipe: How it is made; its first agent gives hyperparameters, reference and counters.

        Raises:
            ConfigurationError: The actors cannot be combined; nothing has been changed.
        """

    def discard(self, indices: Sequence[int]) -> None:
        """Free candidates."""


class Judges(Executor, Protocol):
    """An executor that can also generate answers to be judged, which the option `judge` of a run needs."""

    def compared_answers(
        self, split: str, indices: Sequence[int], asked: AnswerSampling, *, rows: int | None = None
    ) -> dict[int, list[AnswerPair]]:
        """Generate answers of members, and of the reference that each member's scores are relative to.

        Args:
            split: `test` or `final`, which these members have just been evaluated on.
            indices: The members.
            asked: What is generated.
            rows: The rows of that evaluation; None: all.

        Returns:
            For each member the answers to the first prompts of the evaluated rows, in the order of the rows.
        """


class Spreads(Executor, Protocol):
    """An executor that also says on which workers the members are, for the records of a run."""

    def whereabouts(self) -> list[Placed | WorkerLoss]:
        """Return what is new since the last call, in order."""


# Makes an executor from checked agents and a checked gym.
ExecutorFactory: TypeAlias = Callable[[Sequence[Any], Any], Executor]


def check_executor(executor: object) -> None:
    """Refuse an object that lacks the attribute or a method of `Executor`.

    Raises:
        ConfigurationError: `processes` or a method is missing.
    """
    missing = ["processes"] if not hasattr(executor, "processes") else []
    for name, declared in vars(Executor).items():
        # A method inherited from the protocol has no body.
        inherited = getattr(type(executor), name, None) is declared
        if not name.startswith("_") and (inherited or not callable(getattr(executor, name, None))):
            missing.append(name)
    if missing:
        fix = f"makes what lacks {', '.join(missing)}: see evollm.execution.executor.Executor"
        raise ConfigurationError("executor", type(executor).__name__, fix)


def check_going(members: Sequence[Member]) -> None:
    """Refuse to continue a run in which no member can learn.

    Raises:
        DivergedError: Every member has diverged.
    """
    if not all(member.diverged for member in members):
        return
    lower = to_lower(members[0].hyperparameters)
    values = ", ".join(f"agent {member.index}: {dict(member.hyperparameters)}" for member in members)
    raise DivergedError(f"every agent's loss or gradient is not finite; lower {lower} ({values})")
