"""The seam between a run, which decides, and what holds the agents: plain data in both directions.

A run knows agents by their indices. What crosses is indices, births, hyperparameters, metrics, evaluations, paths and
values of JSON, so an executor may hold its agents in this process, in others or on other machines.
`evollm.execution.local` is the one that `finetune` and `tune` take unless they are given another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evollm.errors import ConfigurationError, DivergedError
from evollm.hpo import AnyEvaluation, Birth, HyperparameterConfig
from evollm.runs.events import SampleAnswer, StepDone

Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Member:
    """An agent, as far as a run knows it.

    Attributes:
        index: Unique over a run.
        hyperparameters: Its values by name.
        steps: Batches that its weights have learnt from, those of its ancestors included.
        num_tokens: Tokens of these.
        diverged: Whether its loss or gradient has become NaN or infinite; it learns no more.
    """

    index: int
    hyperparameters: Mapping[str, float]
    steps: int
    num_tokens: int
    diverged: bool


@dataclass(frozen=True)
class Description:
    """What a run is told of the population and its data before it begins.

    Attributes:
        config: What `config.json` notes and a resumed run must have in common, as JSON values.
        rows: Rows of each split, `train`, `test` and `final`; 0: there is no such split.
        epoch: Batches of an epoch.
        hp_config: Which hyperparameters may change, and within which bounds; None if none may.
        trust_remote_code: Whether the base runs code of its own, which a command that goes on must allow again.
        unlearnable: What to say of rows when no member can learn from any.
    """

    config: Mapping[str, Any]
    rows: Mapping[str, int]
    epoch: int
    hp_config: HyperparameterConfig | None
    trust_remote_code: bool
    unlearnable: str


class Agreement(Protocol):
    """How several processes that make the same run stay together; `evollm.processes.Processes` is one.

    All processes ask in the same order. A run in one process is its own main process.
    """

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""

    def from_main(self, value: Any) -> Any:
        """The main process's value, JSON values only."""

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""

    def wait(self) -> None:
        """Go on when all have come here."""


class Executor(Protocol):
    """Holds the agents of a run and does what the run decides. A class needs these methods, and no base class.

    A run calls `describe` and `members` first, then `begin`, for a resumed run `load`, and `close` however it ends.
    The members have an order, that of the births of the last `begin` or `apply`.

    Attributes:
        processes: How the processes of the run agree; `evollm.processes.Processes.present()` unless it has its own.
    """

    processes: Agreement

    def describe(self) -> Description:
        """Say what the population and its data are."""

    def changed_text(self, noted: Mapping[str, Any]) -> str:
        """Say in words which text is the first that differs from those that a run noted as `config["data"]`."""

    def members(self) -> Sequence[Member]:
        """Return the members as they are now, in their order."""

    def begin(self, births: Sequence[Birth] | None, *, moving_references: bool) -> None:
        """Begin a run with these members; nothing that ran before on the same base plays a part any more.

        Args:
            births: Who begins, as for `apply`; None: all agents, and there will be no others.
            moving_references: After every epoch each actor becomes its agent's reference. Scores stay relative to the
                reference that the first agent has now.

        Raises:
            ConfigurationError: No agent can have such values; nothing has been changed.
        """

    def learn(self, done: int, until: int) -> Iterator[StepDone]:
        """Let every member that has not diverged learn from one batch after another.

        The run may change its mind, or members, after each step: the next one begins when it is asked for.

        Args:
            done: Steps that the run has done.
            until: The last step to do.

        Returns:
            An iterator that gives each step when it is done.
        """

    def evaluate(self, split: str, indices: Sequence[int] | None = None) -> dict[int, AnyEvaluation]:
        """Score members on a held-out split.

        Args:
            split: `test` or `final`.
            indices: Whom to score; None: all that have not diverged.

        Returns:
            What each makes of each row, by index.
        """

    def note_scores(self, scores: Mapping[int, float]) -> None:
        """Note the first component of each member's fitness in its history, which children inherit."""

    def apply(self, births: Sequence[Birth]) -> None:
        """Make the members those of a plan: kept, children, or fresh as the run's first agent was at its beginning.

        One that is kept under its own index takes the values of its birth.

        Raises:
            ConfigurationError: No agent can have such values, or a parent is no member; nothing has been changed.
        """

    def save(self, folder: Path, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Write a checkpoint: all members, all that later steps depend on, and what the run adds.

        `evollm.checkpoints.write_population` writes one, whole or not at all. Of several processes the main one writes.

        Args:
            folder: Where to.
            state: The run's own state as JSON values, for `population.json`.
            arrays: What JSON is too narrow for.

        Raises:
            OSError, EvoLLMError: It could not be written.
        """

    def load(self, folder: Path) -> None:
        """Go on as `save` found everything, the members included.

        Raises:
            CheckpointError: The folder is damaged.
        """

    def save_agent(self, index: int, folder: Path) -> None:
        """Write one member as `save_checkpoint` does.

        Raises:
            OSError, EvoLLMError: It could not be written.
        """

    def answers(self, index: int, split: str, count: int) -> list[SampleAnswer]:
        """Answer some prompts of a split as before tuning and as the member does now.

        Args:
            index: The member.
            split: `test` or `final`.
            count: How many prompts at most.

        Returns:
            The answers; none in processes beside the main one, unless they had to go along.
        """

    def population(self) -> list[Any]:
        """Return the members as live agents, for whoever began the run; the run itself does nothing with them."""

    def close(self) -> None:
        """Give back what the run alone needed; the agents stay."""


# Makes an executor of agents and gym, which are checked.
ExecutorFactory: TypeAlias = Callable[[Sequence[Any], Any], Executor]


def check_executor(executor: object) -> None:
    """Refuse what is no executor.

    Raises:
        ConfigurationError: A method is missing.
    """
    missing = ["processes"] if not hasattr(executor, "processes") else []
    for name, declared in vars(Executor).items():
        # Inherited from the protocol it would do nothing.
        inherited = getattr(type(executor), name, None) is declared
        if not name.startswith("_") and (inherited or not callable(getattr(executor, name, None))):
            missing.append(name)
    if missing:
        fix = f"makes what lacks {', '.join(missing)}: see evollm.execution.executor.Executor"
        raise ConfigurationError("executor", type(executor).__name__, fix)


def check_going(members: Sequence[Member]) -> None:
    """Refuse to go on when nobody learns any more.

    Raises:
        DivergedError: Every member has diverged.
    """
    if not all(member.diverged for member in members):
        return
    lower = " or ".join(name for name in ("lr", "beta") if name in members[0].hyperparameters)
    values = ", ".join(f"agent {member.index}: {dict(member.hyperparameters)}" for member in members)
    raise DivergedError(f"every agent's loss or gradient is not finite; lower {lower} ({values})")
