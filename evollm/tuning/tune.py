"""Tuning in one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evollm.algorithms.saving import SavableAgent
from evollm.errors import MissingExtraError
from evollm.models.loading.precision import names_dtype
from evollm.pace import progress_told
from evollm.processes import Processes
from evollm.report import write_report
from evollm.runs import HyperparameterSchedule, Lineage
from evollm.runs.events import Callback, Evolved, RunEnded, RunStarted
from evollm.tuning.arguments_file import write_tune_arguments
from evollm.tuning.describe import describe
from evollm.tuning.rehearsal import rehearse
from evollm.tuning.setup import Request, Setup, request_of, set_up


@dataclass(frozen=True)
class TuneResult:
    """What a run has found.

    Attributes:
        best: The fittest agent.
        population: All agents of the last generation.
        fitnesses: For each of them the first component of its last fitness.
        run_dir: The run folder.
        schedule: What made the best agent: (step, hyperparameters) of its line wherever they changed, from step 0, or
            from the birth of a fresh agent on.
        report: The page `report.html` in the run folder; None without the extra `report`.
    """

    best: SavableAgent
    population: list[Any]
    fitnesses: list[float]
    run_dir: Path
    schedule: HyperparameterSchedule
    report: Path | None


def tune(
    model: Any,
    data: Any,
    *,
    tokenizer: Any | None = None,
    test_data: Any | None = None,
    final_data: Any | None = None,
    algorithm: str = "dpo",
    population: int = 8,
    generations: int | None = None,
    start_from: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> TuneResult:
    """Tune a model on preference pairs and find the hyperparameters for it, in one call.

    This puts the public pieces together: `PreferenceGym`, `DPO.population`, `TournamentSelection`, `Mutations`,
    `finetune_llm_preference`, or those for SFT. Every further keyword argument goes to the pieces that have a parameter
    of that name, so `lr=1e-4, tournament_size=3, num_epochs=3, run_dir="my-run"` reach the agents, the tournament and
    the loop. `hp_config`, `lora_config` and `model_config` may be mappings of plain values, as in a YAML file:
    `hp_config={"lr": [1e-6, 1e-4]}`, `lora_config={"r": 8}`, `model_config={"dtype": "bfloat16"}`.

    Defaults that differ from the pieces': lr 5e-5, nll_alpha 0.2, max_grad_norm 1, 2 epochs. Without an `hp_config`,
    lr, beta and nll_alpha (for SFT: lr) evolve within a factor of 5 of their start values.

    Args:
        model: Hub name or folder, or a loaded model.
        data: Rows to learn from: whatever `PreferenceGym` takes as `train_dataset`.
        tokenizer: By default the model's own.
        test_data: Rows that agents are selected by. None: a tenth of the rows, at least 2 and at most 300, is set apart
            by prompt, so that no prompt is in two splits, and always the same for the same `seed`. False: none.
        final_data: Rows for the final score, which nothing is selected by. None: another tenth, set apart likewise. One
            agent by itself gets none unless you give them, since its `test_data` selects nothing. False: none.
        algorithm: `dpo`, or `sft` for rows with a completion instead of two sides.
        population: Number of agents; 1 is an ordinary run without evolution.
        generations: How many there are at most, all of the same length but the last, with an evolution between each
            two: 8. With `evo_steps`, the steps of each, it says how long the run is.
        start_from: Folder of an agent, or of a run whose best agent is taken, such as one with the algorithm `sft`. All
            agents begin with its adapter, whose weights become their reference.
        **settings: Parameters of the pieces, by name; unknown ones are refused. Those of a `search` given by its name,
            such as `reduction_factor`, are among them.

    Raises:
        ConfigurationError: Something cannot work, found before any training; an unknown name with the nearest known.
        DataError: A dataset cannot be read, or is too small to be divided.
        CheckpointError: `start_from`, or the run to resume, cannot be read.
        DivergedError: Every agent's loss or gradient has become NaN or infinite.
    """
    request = request_of(
        model,
        data,
        tokenizer=tokenizer,
        test_data=test_data,
        final_data=final_data,
        algorithm=algorithm,
        population=population,
        generations=generations,
        start_from=start_from,
        **settings,
    )
    # Rows may take a while, too.
    with progress_told(request.settings.get("verbose", True)):
        setup = set_up(request)
    return _run(request, setup)


def validate(model: Any, data: Any, **settings: Any) -> str:
    """Load and check everything that `tune` would, with the same arguments and errors, and write nothing.

    A run to go on with is taken up as far as its checkpoint. Then all agents learn from a few rows, to see how long
    that takes; a `model` that was handed in keeps its weights.

    Returns:
        What `tune` would do: pairs, agents, steps, generations, bounds; and about how long it would take.
    """
    setup = set_up(request_of(model, data, **settings))
    return "\n".join([describe(setup), rehearse(setup)])


def _run(request: Request, setup: Setup) -> TuneResult:
    notes = _Notes(_resolved(request, setup))
    setup.run.callbacks.append(notes)
    population, fitnesses = setup.run.train()
    run_dir = setup.run.paths.run_dir
    return TuneResult(
        best=next(agent for agent in population if agent.index == notes.ended.best),
        population=population,
        fitnesses=fitnesses,
        run_dir=run_dir,
        schedule=notes.schedule,
        report=_write_report(run_dir, setup.loop.get("verbose", True)) if Processes.present().is_main else None,
    )


def _write_report(run_dir: Path, verbose: bool) -> Path | None:
    """Write the page that shows a run, or say why there is none: what has been trained must reach the caller."""
    try:
        return write_report(run_dir)
    except MissingExtraError as error:
        if verbose:
            print(f"no report: {error}")
    except Exception as error:  # Whatever the library that draws raises.
        warnings.warn(f"no report: {type(error).__name__}: {error}", UserWarning, stacklevel=4)
    return None


def _resolved(request: Request, setup: Setup) -> dict[str, Any]:
    """The keyword arguments that give this run again, with the intervals that were worked out."""
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__ if name != "settings"}
    # Of the settings None is kept: some have another default.
    given = {name: value for name, value in fields.items() if value is not None}
    lengths: dict[str, Any] = {
        name: setup.loop[name] for name in ("num_epochs", "max_steps", "evo_steps") if name in setup.loop
    }
    asked: dict[str, Any] = {**given, **request.settings, **lengths}
    loaded = setup.agents[0].base.model_config.get("dtype")
    if loaded is not None and not names_dtype(request.settings.get("model_config")):
        # What was measured here may be otherwise elsewhere.
        asked["dtype"] = loaded
    not_kept = ("run_dir", "resume_from_checkpoint", "generations")
    return {name: value for name, value in asked.items() if name not in not_kept}


class _Notes(Callback):
    """Keeps what was asked for in the run folder, and what came of it for the caller, in every process."""

    started: RunStarted
    ended: RunEnded

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._asked = asked
        self._evolutions: list[Evolved] = []

    @property
    def schedule(self) -> HyperparameterSchedule:
        """What made the best agent; from memory, since the main process alone writes files."""
        return Lineage(self.started.founders, self._evolutions).schedule(self.ended.best)

    def on_start(self, event: RunStarted) -> None:
        """Note the run folder and what happened before."""
        self.started = event
        self._evolutions = list(event.evolutions)
        # Of a resumed run too: it may have become longer, and it is that one which is resumed next.
        if Processes.present().is_main:
            write_tune_arguments(event.run_dir, self._asked)

    def on_evolution(self, event: Evolved) -> None:
        """Note who came from whom."""
        self._evolutions.append(event)

    def on_end(self, event: RunEnded) -> None:
        """Note the best agent."""
        self.ended = event
