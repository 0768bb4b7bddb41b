"""The arguments of a run, as one checked thing."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evollm.algorithms.dpo import DPO
from evollm.algorithms.settings import require_count
from evollm.errors import ConfigurationError
from evollm.hpo import Mutations, TournamentSelection, check_population
from evollm.llm_envs import PreferenceGym


@dataclass(frozen=True)
class RunOptions:
    """What `finetune_llm_preference` was asked for; it documents each field."""

    num_epochs: int | None
    max_steps: int | None
    evo_steps: int | None
    evaluation_interval: int | None
    checkpoint_steps: int | None
    tournament: TournamentSelection | None
    mutation: Mutations | None
    update_reference_each_epoch: bool
    save_elite: bool
    num_sample_answers: int

    def __post_init__(self) -> None:
        for name in ("num_epochs", "max_steps", "evo_steps", "evaluation_interval", "checkpoint_steps"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        if (self.tournament is None) != (self.mutation is None):
            name = "mutation" if self.mutation is None else "tournament"
            raise ConfigurationError(
                name, None, "evolution needs both a tournament and a mutation; pass both or neither"
            )
        if self.evo_steps is not None and self.tournament is None:
            raise ConfigurationError("evo_steps", self.evo_steps, "needs a tournament and a mutation")
        if not isinstance(self.num_sample_answers, int) or self.num_sample_answers < 0:
            raise ConfigurationError("num_sample_answers", self.num_sample_answers, "must be a whole number >= 0")

    @property
    def evolves(self) -> bool:
        """Whether generations follow each other."""
        return self.tournament is not None


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; a step is one batch for every agent.

    Attributes:
        total: Steps of the run.
        epoch: Steps of an epoch.
        evolve_every: Steps between two evolutions, None: never.
        evaluate_every: Steps between two evaluations, None: never.
        checkpoint_every: Steps between two checkpoints, None: never.
    """

    total: int
    epoch: int
    evolve_every: int | None
    evaluate_every: int | None
    checkpoint_every: int | None

    @classmethod
    def of(cls, options: RunOptions, env: PreferenceGym) -> Schedule:
        """Fill in the defaults: one epoch, evolution and evaluation after each epoch."""
        epoch = len(env)
        limits = [options.max_steps, options.num_epochs and options.num_epochs * epoch]
        evolve_every = (options.evo_steps or epoch) if options.evolves else None
        evaluate_every = options.evaluation_interval or evolve_every or epoch
        return cls(
            total=min([limit for limit in limits if limit is not None], default=epoch),
            epoch=epoch,
            evolve_every=evolve_every,
            evaluate_every=evaluate_every if env.test_pairs else None,
            checkpoint_every=options.checkpoint_steps,
        )

    def evolves_at(self, step: int) -> bool:
        """Whether a generation ends at this step. The last one has no successor."""
        return _due(self.evolve_every, step) and step < self.total

    def evaluates_at(self, step: int) -> bool:
        """Whether the population is scored at this step; always before an evolution and at the end."""
        if self.evaluate_every is None:
            return False
        return _due(self.evaluate_every, step) or self.evolves_at(step) or step == self.total

    def checkpoints_at(self, step: int) -> bool:
        """Whether the population is saved at this step."""
        return _due(self.checkpoint_every, step)


def _due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def check_run(population: Sequence[DPO], env: PreferenceGym, options: RunOptions) -> None:
    """Find what cannot work before any training time is spent.

    Raises:
        ConfigurationError: The population, the environment and the options do not fit together.
    """
    if not population:
        raise ConfigurationError("pop", list(population), "is empty: pass at least one agent")
    if len({id(agent.base) for agent in population}) > 1:
        names = sorted({agent.base.name for agent in population})
        raise ConfigurationError("pop", names, "agents of different bases: build all on one, with DPO.population")
    indices = [agent.index for agent in population]
    if len(set(indices)) != len(indices):
        raise ConfigurationError("index", indices, "two agents have the same number: give each its own index")
    if options.tournament is not None:
        check_population(options.tournament, len(population))
        if not env.test_pairs:
            raise ConfigurationError(
                "test_dataset", None, "evolution needs held-out pairs: pass a test_dataset to the gym"
            )
    longest, limit = env.longest_sequence, population[0].base.max_positions
    if limit is not None and longest > limit:
        raise ConfigurationError(
            "max_context_length",
            longest,
            f"pairs are longer than the base's {limit} positions: pass {limit} to the gym",
        )
    vocabulary = population[0].base.num_embeddings
    if len(env.tokenizer) > vocabulary:
        raise ConfigurationError(
            "tokenizer",
            len(env.tokenizer),
            f"has more tokens than the base's {vocabulary} embeddings: use the base's own",
        )


def check_run_dir(run_dir: Path) -> Path:
    """Refuse a folder that another run has written to.

    Raises:
        ConfigurationError: There is a run in the folder.
    """
    if (run_dir / "config.json").exists():
        raise ConfigurationError("run_dir", str(run_dir), "holds another run: give a new folder, or move that one away")
    return run_dir


def new_run_dir() -> Path:
    """A folder name in `evollm-runs` that says when the run began."""
    return Path("evollm-runs") / datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")


def describe_run(
    population: Sequence[DPO], env: PreferenceGym, options: RunOptions, schedule: Schedule
) -> dict[str, Any]:
    """Everything that a run depends on, as JSON values."""
    first = population[0]
    lora = first.base.config(first.actor_adapter)
    return {
        "base": first.base.name,
        "lora": {name: getattr(lora, name) for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
        | {"target_modules": sorted(lora.target_modules or [])},
        "settings": asdict(first.settings),
        "hp_config": first.hp_config.to_dict() if first.hp_config else None,
        "agents": {agent.index: agent.hyperparameter_values() for agent in population},
        "options": asdict(options),
        "schedule": asdict(schedule),
        "data": {
            "batch_size": env.data_batch_size_per_gpu,
            "reports": [str(report) for report in env.reports.values()],
            "position": env.state_dict(),
        },
        "versions": {name: version(name) for name in ("evollm", "torch", "transformers", "peft", "datasets")}
        | {"python": platform.python_version()},
    }
