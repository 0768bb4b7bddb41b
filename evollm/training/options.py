"""The arguments of a run, as one checked thing."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evollm.algorithms import Algorithm
from evollm.algorithms.fit import check_base, check_gym
from evollm.algorithms.saving import SavableAgent
from evollm.algorithms.settings import check_evolution
from evollm.checkpoints.atomic import check_replaceable, is_locked_folder
from evollm.checkpoints.population import has_populations
from evollm.checks import boolean, optional_whole_number, usable_path, whole_number
from evollm.command_line import command, place, setting
from evollm.errors import ConfigurationError
from evollm.hpo import Mutations, Search, TournamentSearch, TournamentSelection, search_of
from evollm.hpo.search import describe_search
from evollm.llm_envs import DatasetGym
from evollm.models.fingerprints import computing_settings
from evollm.own_files import check_can_be_made, inside
from evollm.runs import read_config
from evollm.runs.events import Callback
from evollm.runs.folder import CHECKPOINTS, CONFIG, ELITE, METRICS, RUN_FILES, no_run
from evollm.version import __version__


@dataclass(frozen=True)
class RunOptions:
    """What `finetune_llm_preference` or `finetune_llm_sft` was asked for; they document each field."""

    num_epochs: int | None
    max_steps: int | None
    evo_steps: int | None
    evaluation_interval: int | None
    checkpoint_steps: int | None
    keep_last: int | None
    tournament: TournamentSelection | None
    mutation: Mutations | None
    search: Search | str | None
    update_reference_each_epoch: bool
    save_elite: bool
    num_sample_answers: int

    def __post_init__(self) -> None:
        for name in ("num_epochs", "max_steps", "evo_steps", "evaluation_interval", "keep_last"):
            object.__setattr__(self, name, optional_whole_number(name, getattr(self, name), 1))
        object.__setattr__(
            self, "checkpoint_steps", optional_whole_number("checkpoint_steps", self.checkpoint_steps, 0)
        )
        object.__setattr__(self, "num_sample_answers", whole_number("num_sample_answers", self.num_sample_answers, 0))
        for name in ("update_reference_each_epoch", "save_elite"):
            boolean(name, getattr(self, name))
        for name, kind in (("tournament", TournamentSelection), ("mutation", Mutations)):
            if not isinstance(getattr(self, name), kind | None):
                raise ConfigurationError(name, getattr(self, name), f"must be {kind.__name__}(...) or None")
        if (self.tournament is None) != (self.mutation is None):
            name = "mutation" if self.mutation is None else "tournament"
            raise ConfigurationError(
                name,
                None,
                "evolution needs tournament=TournamentSelection(...) and mutation=Mutations(...), or neither",
            )
        if self.search is not None:
            if self.tournament is not None:
                fix = "is a search of its own, and so are tournament and mutation: leave one of the two out"
                raise ConfigurationError("search", self.search, fix)
            object.__setattr__(self, "search", search_of(self.search))
        if self.evo_steps is not None and not self.evolves:
            raise ConfigurationError("evo_steps", self.evo_steps, "needs a tournament and a mutation, or a search")

    @property
    def evolves(self) -> bool:
        """Whether a search decides who goes on."""
        return self.tournament is not None or self.search is not None

    def strategy(self) -> Search | None:
        """The search, None where there is none."""
        if self.tournament is not None and self.mutation is not None:
            return TournamentSearch(self.tournament, self.mutation)
        return None if self.search is None else search_of(self.search)


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; a step is one batch for every agent.

    Attributes:
        total: Steps of the run.
        epoch: Steps of an epoch.
        evolve_every: Steps between two decisions of the search, as the user asked for them; None: there is no search.
        evaluate_every: Steps between two evaluations, None: never.
        checkpoint_every: Steps between two checkpoints, 0: never.
    """

    total: int
    epoch: int
    evolve_every: int | None
    evaluate_every: int | None
    checkpoint_every: int

    @classmethod
    def of(cls, options: RunOptions, env: DatasetGym) -> Schedule:
        """Fill in the defaults: one epoch; evolution, evaluation and a checkpoint after each epoch."""
        epoch = len(env)
        limits = [options.max_steps, options.num_epochs and options.num_epochs * epoch]
        evolve_every = (options.evo_steps or epoch) if options.evolves else None
        evaluate_every = options.evaluation_interval or evolve_every or epoch
        return cls(
            total=min([limit for limit in limits if limit is not None], default=epoch),
            epoch=epoch,
            evolve_every=evolve_every,
            evaluate_every=evaluate_every if env.test_pairs else None,
            checkpoint_every=options.checkpoint_steps
            if options.checkpoint_steps is not None
            else evolve_every or epoch,
        )

    def evaluates_at(self, step: int, *, decides: bool) -> bool:
        """Whether the population is scored at this step; always before a decision (`decides`) and at the end."""
        if self.evaluate_every is None:
            return False
        return _due(self.evaluate_every, step) or decides or step == self.total

    def checkpoints_at(self, step: int) -> bool:
        """Whether the population is saved at this step; at the end in any case, unless there are no checkpoints."""
        return bool(self.checkpoint_every) and (_due(self.checkpoint_every, step) or step == self.total)


def _due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def check_run(population: Sequence[SavableAgent], env: DatasetGym, options: RunOptions, algorithm: Algorithm) -> None:
    """Find what cannot work before any training time is spent.

    Raises:
        ConfigurationError: The population, the environment and the options do not fit together.
    """
    _check_types(population, env, algorithm)
    if len({id(agent.base) for agent in population}) > 1:
        names = sorted({agent.base.name for agent in population})
        raise ConfigurationError("pop", names, "agents of different bases: build all on one, with DPO.population")
    indices = [agent.index for agent in population]
    if len(set(indices)) != len(indices):
        raise ConfigurationError("index", indices, "two agents have the same number: give each its own index")
    if options.update_reference_each_epoch and any(agent.adapter("reference") is None for agent in population):
        raise ConfigurationError(
            "update_reference_each_epoch", True, "the reference is the base itself: use_separate_reference_adapter=True"
        )
    if options.evolves:
        if not env.test_pairs:
            raise ConfigurationError(
                "test_dataset", None, "evolution needs held-out rows: pass a test_dataset to the gym"
            )
        _check_evolution(population, options, Schedule.of(options, env))
    check_base(population[0].base, env)


def _check_types(population: Sequence[SavableAgent], env: DatasetGym, algorithm: Algorithm) -> None:
    if not isinstance(population, Sequence) or not population:
        raise ConfigurationError("pop", population, "must be a list of at least one agent: [agent]")
    for agent in population:
        if not isinstance(agent, algorithm.agent):
            wanted = f"is not a {algorithm.agent.__name__} agent, which {algorithm.loop} tunes"
            raise ConfigurationError("pop", type(agent).__name__, f"{wanted}; of a wrapper pass what it wraps")
    check_gym(env, algorithm.gym, algorithm.loop)


def _check_evolution(population: Sequence[SavableAgent], options: RunOptions, schedule: Schedule) -> None:
    if schedule.evolve_every is not None and schedule.evolve_every >= schedule.total:
        if options.evo_steps is None:
            fix = "evolution comes between epochs: use at least 2, or give evo_steps"
            raise ConfigurationError("num_epochs", options.num_epochs or 1, fix)
        fix = f"the run ends after {schedule.total} steps, before it could evolve: lower evo_steps, or raise num_epochs"
        raise ConfigurationError("evo_steps", options.evo_steps, fix)
    config = population[0].hp_config
    for agent in population:
        if agent.hp_config != config:
            raise ConfigurationError(
                "hp_config", agent.hp_config, f"agent {agent.index}'s differs from the first agent's"
            )
        check_evolution(config, agent.hyperparameters, agent.settings)


@dataclass(frozen=True)
class RunPaths:
    """Where a run writes.

    Attributes:
        run_dir: The run folder.
        checkpoints: Folder for checkpoints of the population.
        elite: Folder for the fittest agent.
    """

    run_dir: Path
    checkpoints: Path
    elite: Path

    @classmethod
    def of(cls, run_dir: object, checkpoints: object, elite: object, resume: object = None) -> RunPaths:
        """Fill in the defaults and refuse folders that hold something else.

        Raises:
            ConfigurationError: No path, a folder with another run, a folder to resume that holds none, or one in which
                nothing but an agent may lie.
            CheckpointError: The settings of the run to resume are damaged.
        """
        if resume is not None:
            folder = usable_path("resume_from_checkpoint", resume)
            if run_dir is not None and usable_path("run_dir", run_dir).resolve() != folder.resolve():
                raise ConfigurationError("run_dir", str(run_dir), "is not the run to resume: leave it out")
            if not (folder / CONFIG).is_file():
                fix = f"{no_run(folder)}. A run that ended before it had one is begun anew, as run_dir"
                raise ConfigurationError("resume_from_checkpoint", str(folder), fix)
            # Files of something else would be written over: a model has a config.json, too.
            read_config(folder, "resume_from_checkpoint")
        else:
            folder = new_run_dir() if run_dir is None else usable_path("run_dir", run_dir)
        check_can_be_made("run_dir", folder / "config.json")
        paths = cls(
            run_dir=folder,
            checkpoints=inside(folder, CHECKPOINTS)
            if checkpoints is None
            else usable_path("checkpoint_path", checkpoints),
            elite=inside(folder, ELITE) if elite is None else usable_path("elite_path", elite),
        )
        paths.check_apart()
        check_can_be_made("checkpoint_path", paths.checkpoints / CHECKPOINTS)
        check_replaceable("elite_path", paths.elite)
        if resume is None:
            paths.check_new()
        return paths

    def resume(self, *settings: str) -> str:
        """The command that goes on with the run, if a command began it; places outside its folder are named anew.

        Args:
            *settings: What it must be told besides.
        """
        own = self.run_dir.resolve()
        apart = {"checkpoint_path": self.checkpoints.absolute(), "elite_path": self.elite.absolute()}
        outside = [setting(name, path) for name, path in apart.items() if own not in path.resolve().parents]
        return command("resume", place(self.run_dir), *outside, *settings)

    def check_apart(self) -> None:
        """Refuse places of which one would be replaced with the other.

        Raises:
            ConfigurationError: The best agent's folder holds the run or its checkpoints, or lies among these, or the
                checkpoints have no folder of their own.
        """
        elite, run_dir, checkpoints = (path.resolve() for path in (self.elite, self.run_dir, self.checkpoints))
        if checkpoints == run_dir:
            raise ConfigurationError("checkpoint_path", str(self.checkpoints), "must be a folder of its own")
        if elite in (run_dir, *run_dir.parents, checkpoints, *checkpoints.parents) or checkpoints in elite.parents:
            raise ConfigurationError("elite_path", str(self.elite), "must be a folder of its own")

    def check_new(self) -> None:
        """Refuse to begin a run where there is one, or among files of somebody else's.

        A run that did not get to its first step leaves nothing to lose: its folder may be used again.

        Raises:
            ConfigurationError: Something lies there that would be lost.
        """
        found = [name for name in RUN_FILES if os.path.lexists(self.run_dir / name)]
        if found and not is_locked_folder(self.run_dir):
            fix = f"holds {found[0]}, which evollm did not write and would replace: give a new folder"
            raise ConfigurationError("run_dir", str(self.run_dir), fix)
        metrics = self.run_dir / METRICS
        if (self.run_dir / ELITE).exists() or (metrics.exists() and metrics.stat().st_size > 0):
            fix = f"holds another run: resume it ({self.resume()}, or resume_from_checkpoint), or give a new folder"
            raise ConfigurationError("run_dir", str(self.run_dir), fix)
        if has_populations(self.checkpoints):
            fix = "holds checkpoints of another run, which would be taken for this one's: give another folder"
            field = "run_dir" if self.checkpoints == self.run_dir / CHECKPOINTS else "checkpoint_path"
            raise ConfigurationError(field, str(self.checkpoints), fix)


def new_run_dir() -> Path:
    """A folder name in `evollm-runs` that says when the run began."""
    return Path("evollm-runs") / datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")


def check_callbacks(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Refuse what is no callback.

    Raises:
        ConfigurationError: Something in the list, or the list itself, is something else.
    """
    if not isinstance(callbacks, Sequence) or not all(isinstance(item, Callback) for item in callbacks):
        raise ConfigurationError("callbacks", callbacks, "must be a list of instances of children of evollm.Callback")
    return callbacks


def describe_run(
    population: Sequence[SavableAgent], env: DatasetGym, options: RunOptions, schedule: Schedule
) -> dict[str, Any]:
    """What a run is made of, as JSON values."""
    first = population[0]
    asked = {name: getattr(options, name) for name in options.__dataclass_fields__ if name != "search"}
    asked |= {name: asdict(asked[name]) for name in ("tournament", "mutation") if asked[name] is not None}
    if options.search is not None:
        asked["search"] = describe_search(options.search)
    return {
        "algorithm": first.algorithm,
        "words": asdict(first.words),
        "base": first.base.name,
        "base_dtype": str(first.base.network.dtype),
        "base_fingerprint": first.base.weights_fingerprint,
        "device": str(first.device),
        "lora": computing_settings(first.base.config(first.actor_adapter)),
        "settings": asdict(first.settings),
        "hp_config": first.hp_config.to_dict() if first.hp_config else None,
        "agents": {agent.index: agent.hyperparameter_values() for agent in population},
        "options": asked,
        "schedule": asdict(schedule),
        "data": {
            "batch_size": env.batch_size,
            "noun": env.row_format.noun,
            "form": env.form,
            "reports": [str(report) for report in env.reports.values()],
            "fingerprint": env.fingerprint,
            "digests": env.digests,
            "written_at": env.written_at.isoformat(),
            "position": env.state_dict(),
        },
        # Its own from the code that runs, which need not be installed.
        "versions": {"evollm": __version__}
        | {name: version(name) for name in ("torch", "transformers", "peft", "datasets")}
        | {"python": platform.python_version()},
    }
