"""What a run over several workers needs of them, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from evollm.execution.executor import Agreement, Description
from evollm.runs.events import WorkerHome, WorkerLoss

# Keyword arguments of a worker's method; None: the method is not called.
Call = Mapping[str, Any] | None


# Methods after which agents are others than before, so that live copies made of them are stale. A copy that is dropped
# frees its adapters.
CHANGING = frozenset({"begin", "restore", "apply", "learn_step", "keep_best", "hold_best", "combine", "note_scores"})
# Methods whose results only the process that writes needs, since they hold all members.
FOR_MAIN = frozenset({"saved"})


class Workers(Protocol):
    """The workers of a run, wherever they are; all but `call` and `agents` is bookkeeping.

    A worker is an `evollm.execution.worker.Worker`. Those of a new run hold the agents by `first_places`; one without
    members is made with `like`, any of the agents.

    Attributes:
        processes: How the processes agree in which the run itself is: one process, or all that make the same decisions.
    """

    processes: Agreement

    @property
    def count(self) -> int:
        """The number of workers."""

    def describe(self) -> Description:
        """The description of the whole population and its data, before the run begins."""

    def open(self) -> None:
        """Called once when the run begins, before the first call of `Worker.begin`."""

    def call(self, method: str, arguments: Sequence[Call]) -> list[Any]:
        """Call a method of the workers, each with its own keyword arguments.

        What is given and returned is plain data: numbers, texts, lists, mappings, tensors, NumPy arrays, dataclasses of
        these, LoRA configurations and reference caches.

        Args:
            method: Name of a method of `Worker`.
            arguments: For each worker the keyword arguments, or None if it is not called.

        Returns:
            What each worker returned, in the order of the workers; None of those that were not called, and, of a method
            in `FOR_MAIN`, of those elsewhere, in a process that is not the main one.

        Raises:
            Exception: An error of a worker, in every process of `processes` alike; of several that of the first worker.
        """

    def agents(self, places: Mapping[int, int]) -> list[Any]:
        """Live agents for the caller of the run, in the process that calls, in every process of `processes`.

        It is called until the members change, and after `close`, too; the same index gives the same agent then.

        Args:
            places: The worker that holds each agent, by index.
        """

    def homes(self) -> Sequence[WorkerHome]:
        """Where each worker is, in the order of the workers; asked for after `open`."""

    def close(self) -> None:
        """Close every worker (`Worker.close`). Also called after an error, when other processes may be gone."""


@runtime_checkable
class LosableWorkers(Workers, Protocol):
    """Workers some of which may be lost for good, so that there are fewer of them from then on."""

    @property
    def lost(self) -> Sequence[int]:
        """Workers that have no process of their own any more: they can be called, but should hold no members."""

    def retire(self, numbers: Sequence[int]) -> None:
        """End workers that hold nothing any more; the others are numbered anew, in their order."""

    def losses(self) -> list[WorkerLoss]:
        """The losses since the last call; their steps are those of the caller."""
