"""`tune`, which makes and runs a whole tuning run in one call, and `validate`."""

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
from evollm.runs.spent import Spent
from evollm.tuning.arguments_file import write_tune_arguments
from evollm.tuning.describe import describe
from evollm.tuning.rehearsal import rehearse
from evollm.tuning.request import Request, request_of
from evollm.tuning.setup import Setup, set_up


@dataclass(frozen=True)
class TuneResult:
    """The result of `tune`.

    Attributes:
        best: The fittest agent, as it was at the best evaluation of the run. Unless that was the last evaluation, it is
            not one of `population`.
        population: All agents of the last generation.
        fitnesses: For each agent of `population` the first component of its last fitness.
        run_dir: The run folder.
        schedule: The hyperparameters of the best agent and its ancestors, as (step, hyperparameters) at each change,
            from step 0, or from the birth of the fresh agent that the best agent descends from.
        report: Path of `report.html` in the run folder; None without the extra `report`.
        spent: What the run has spent: floating-point operations by kind, and in runs of one agent.
    """

    best: SavableAgent
    population: list[Any]
    fitnesses: list[float]
    run_dir: Path
    schedule: HyperparameterSchedule
    report: Path | None
    spent: Spent | None = None


def tune(
    model: Any,
    data: Any,
    *,
    tokenizer: Any | None = None,
    test_data: Any | None = None,
    final_data: Any | None = None,
    algorithm: str = "dpo",
    population: int = 4,
    generations: int | None = None,
    start_from: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> TuneResult:
    """Tune a model on preference pairs and find good hyperparameters for this model, in one call.

    `tune` calls `PreferenceGym`, `DPO.population`, a strategy of `evollm.hpo` and `finetune_llm_preference`, or their
    SFT counterparts. Every further keyword argument goes to each function with a parameter of that name, so
    `lr=1e-4, error_rate=0.1, num_epochs=3, run_dir="my-run"` reach the agents, the strategy and the loop.
    `hp_config`, `lora_config` and `model_config` may be mappings of plain values, as in a YAML file:
    `hp_config={"lr": [1e-6, 1e-4]}`, `lora_config={"r": 8}`, `model_config={"dtype": "bfloat16"}`.

    Defaults that differ from those of the called functions: lr 1e-4, nll_alpha 0.2, max_grad_norm 1, 2 epochs,
    `search="racing"`, `sampling="latin_hypercube"` and, for preferences, `fitness="margin_over_std"`. A setting that
    one search alone has, such as `tournament_size`, chooses that search. Without an `hp_config`, lr, beta and nll_alpha
    (for SFT: lr) are searched within a factor of 5 of their start values.

    Args:
        model: Hub name or folder, or a loaded model.
        data: Rows to learn from, in any form that `PreferenceGym` takes as `train_dataset`.
        tokenizer: The tokenizer, by default the model's own.
        test_data: Rows that agents are selected by. None: a tenth of the rows, at least 2 and at most 300, is held out
            by prompt, so that no prompt is in two splits; the same `seed` gives the same split. False: none.
        final_data: Rows for the final score, which select no agent. None: another tenth, held out likewise; with one
            agent, no rows, since `test_data` then selects no agent. False: none.
        algorithm: `dpo`, `sft` for rows with one completion instead of two, `kto` for rows with one and a label,
            or `grpo` for prompts, with `reward_functions` that score the answers.
        population: Number of agents; 1 is an ordinary run without a search.
        generations: Most generations, by default 4 of a race and else 8, with a decision of the search between each
            two; all have the same length but the last. With `evo_steps`, the run has `generations` x `evo_steps` steps.
        start_from: Folder of an agent, or of a run whose best agent is used, for example of an `sft` run. All agents
            begin with the weights of this adapter, and these weights are also their reference.
        **settings: Parameters of the called functions, by name, and of a `search` given by name, such as
            `reduction_factor`; unknown names are refused.

    Raises:
        ConfigurationError: An argument is invalid; raised before any training. For an unknown name the message suggests
            the nearest known name.
        DataError: A dataset cannot be read, or is too small to be divided.
        CheckpointError: `start_from`, or the run to resume, cannot be read.
        DivergedError: Every agent's loss or gradient has become NaN or infinite, and none was evaluated before.
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
    # Loading rows may be slow too, so progress is shown from here.
    with progress_told(request.settings.get("verbose", True) and Processes.launched().is_main):
        setup = set_up(request)
    return _run(request, setup)


def validate(model: Any, data: Any, **settings: Any) -> str:
    """Load and check everything that `tune` would, with the same arguments and errors, and write nothing.

    The checkpoint of a run to resume is loaded. Then all agents learn from a few rows, to measure the time of a step;
    the weights of a loaded `model` do not change.

    Returns:
        A text with the pairs, agents, steps, generations and bounds of the run, and an estimate of the time.
    """
    setup = set_up(request_of(model, data, **settings))
    return "\n".join([describe(setup), rehearse(setup)])


def _run(request: Request, setup: Setup) -> TuneResult:
    notes = _Notes(_resolved(request, setup))
    setup.run.callbacks.append(notes)
    population, fitnesses = setup.run.train()
    run_dir = setup.run.paths.run_dir
    return TuneResult(
        best=setup.run.best,
        population=population,
        fitnesses=fitnesses,
        run_dir=run_dir,
        schedule=notes.schedule,
        report=_write_report(run_dir, setup.loop.get("verbose", True)) if Processes.present().is_main else None,
        spent=notes.ended.spent,
    )


def _write_report(run_dir: Path, verbose: bool) -> Path | None:
    """Write the report of a run; a failure is only printed or warned of, so that the caller gets the trained agents."""
    try:
        return write_report(run_dir)
    except MissingExtraError as error:
        if verbose:
            print(f"no report: {error}")
    except Exception as error:  # Whatever the library that draws raises.
        warnings.warn(f"no report: {type(error).__name__}: {error}", UserWarning, stacklevel=4)
    return None


def _resolved(request: Request, setup: Setup) -> dict[str, Any]:
    """The keyword arguments of `tune` that repeat this run, with the computed intervals."""
    fields = {name: getattr(request, name) for name in request.__dataclass_fields__ if name != "settings"}
    # None is dropped only from the fields of `Request`, since the default of a setting may differ from None.
    given = {name: value for name, value in fields.items() if value is not None}
    lengths: dict[str, Any] = {
        name: setup.loop[name] for name in ("num_epochs", "max_steps", "evo_steps") if name in setup.loop
    }
    asked: dict[str, Any] = {**given, **request.settings, **lengths}
    loaded = setup.agents[0].base.model_config.get("dtype")
    if loaded is not None and not names_dtype(request.settings.get("model_config")):
        # The measurements behind dtype="auto" may differ on another machine, so the chosen dtype is recorded.
        asked["dtype"] = loaded
    # A run goes on with other processes, too.
    not_kept = ("run_dir", "resume_from_checkpoint", "generations", "accelerator")
    return {name: value for name, value in asked.items() if name not in not_kept}


class _Notes(Callback):
    """Writes the arguments of `tune` to the run folder, and keeps events for `TuneResult` in every process."""

    started: RunStarted
    ended: RunEnded

    def __init__(self, asked: Mapping[str, Any]) -> None:
        self._asked = asked
        self._evolutions: list[Evolved] = []

    @property
    def schedule(self) -> HyperparameterSchedule:
        """The schedule of the best agent, from events in memory, since only the main process writes files."""
        lineage = Lineage(self.started.founders, self._evolutions)
        return lineage.before(self.ended.best_step).schedule(self.ended.best)

    def on_start(self, event: RunStarted) -> None:
        """Note the run folder and the evolutions before a resumed run."""
        self.started = event
        self._evolutions = list(event.evolutions)
        # A resumed run writes its arguments too: the run may be longer now, and a later resume must use the new length.
        if Processes.present().is_main:
            write_tune_arguments(event.run_dir, self._asked)

    def on_evolution(self, event: Evolved) -> None:
        """Note the parents of the new generation."""
        self._evolutions.append(event)

    def on_end(self, event: RunEnded) -> None:
        """Note the best agent."""
        self.ended = event
