"""Evolve a population on the shipped pairs: what `evollm demo` does."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from evollm.algorithms import DPO
from evollm.checks import usable_path, whole_number
from evollm.demo.model import demo_model
from evollm.errors import CheckpointError, ConfigurationError
from evollm.hpo import HyperparameterConfig, Mutations, RLParameter, TournamentSelection
from evollm.llm_envs import PreferenceGym
from evollm.models.precision import AUTO, DTYPES
from evollm.models.pretrained import load_tokenizer
from evollm.own_files import inside, read_bytes, replace_bytes
from evollm.runs.folder import STARTED
from evollm.training import finetune_llm_preference
from evollm.training.options import new_run_dir

SPLITS = ("train", "selection", "final")
BATCH_SIZE = 6
STEPS_PER_GENERATION = 3
# Enough to tell agents apart; each costs a forward pass for every agent and generation.
SELECTION_PAIRS = 24


def demo_pairs(split: str) -> list[dict[str, Any]]:
    """The shipped preference pairs, as chat messages; `make_pairs.py` says how they were made.

    Args:
        split: `train`, `selection` or `final`; no prompt is in two of them.
    """
    text = files("evollm.demo").joinpath("pairs").joinpath(f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def run_demo(
    population: int = 4,
    generations: int = 3,
    run_dir: str | Path | None = None,
    seed: int = 42,
    resume_from_checkpoint: str | Path | None = None,
    dtype: str = AUTO,
) -> tuple[list[DPO], list[float]]:
    """Teach a 135M-parameter model to answer briefly, and find the hyperparameters for it.

    Args:
        population: Number of agents, at least 2.
        generations: Number of generations, at least 2, with an evolution between each two.
        run_dir: Run folder, by default a new one in `evollm-runs`.
        seed: Seeds data order, adapters and evolution.
        resume_from_checkpoint: Folder of a demo that was interrupted, to go on with it.
        dtype: Type of the base, as for `DPO`.

    Returns:
        What `finetune_llm_preference` returns.
    """
    # Before the model is converted and loaded, which takes a while.
    whole_number("population", population, 2)
    whole_number("generations", generations, 2)
    whole_number("seed", seed, 0)
    run_dir = usable_path("run_dir", run_dir) if run_dir is not None else new_run_dir()
    begins = resume_from_checkpoint is None and not (run_dir / "config.json").exists()
    agents, env = _agents_and_env(population, seed, dtype)
    if begins:
        run_dir.mkdir(parents=True, exist_ok=True)
        # The type that was taken: another machine may be fastest in another.
        taken = str(agents[0].base.network.dtype).removeprefix("torch.")
        started = {"population": population, "generations": generations, "seed": seed, "dtype": taken}
        replace_bytes(inside(run_dir, STARTED), (json.dumps(started) + "\n").encode())
    return finetune_llm_preference(
        agents,
        env,
        max_steps=generations * STEPS_PER_GENERATION,
        evo_steps=STEPS_PER_GENERATION,
        tournament=TournamentSelection(tournament_size=2, elitism=True, population_size=population, rand_seed=seed),
        mutation=Mutations(no_mutation=0.2, rl_hp=0.8, rand_seed=seed),
        run_dir=run_dir if resume_from_checkpoint is None else None,
        resume_from_checkpoint=resume_from_checkpoint,
    )


def _agents_and_env(population: int, seed: int, dtype: str) -> tuple[list[DPO], PreferenceGym]:
    folder = str(demo_model())
    tokenizer = load_tokenizer(folder)
    train, selection, final = (demo_pairs(split) for split in SPLITS)
    env = PreferenceGym(
        train,
        selection[:SELECTION_PAIRS],
        tokenizer,
        data_batch_size_per_gpu=BATCH_SIZE,
        seed=seed,
        final_dataset=final,
    )
    agents = DPO.population(
        population,
        env.observation_space,
        env.action_space,
        model_name=folder,
        dtype=dtype,
        lr=8e-5,
        beta=0.1,
        nll_alpha=0.5,
        max_grad_norm=1.0,
        hp_config=HyperparameterConfig(
            lr=RLParameter(min=2e-5, max=2e-4),
            beta=RLParameter(min=0.05, max=0.5),
            nll_alpha=RLParameter(min=0.2, max=2),
        ),
        gradient_checkpointing=False,
        seed=seed,
    )
    return agents, env


def demo_agents_and_env(run_dir: str | Path) -> tuple[list[DPO], PreferenceGym]:
    """Agents and gym as a run of the demo had them when it began.

    Raises:
        ConfigurationError: The folder holds no run of the demo.
    """
    started = _started(run_dir)
    return _agents_and_env(started["population"], started["seed"], started["dtype"])


def is_demo(run_dir: str | Path) -> bool:
    """Whether a folder is that of a run of the demo."""
    return (usable_path("run_dir", run_dir) / STARTED).is_file()


def resume_demo(run_dir: str | Path) -> tuple[list[DPO], list[float]]:
    """Go on with a demo that was interrupted.

    Raises:
        ConfigurationError: The folder holds no run of the demo.
    """
    started = _started(run_dir)
    return run_demo(started["population"], started["generations"], None, started["seed"], run_dir, started["dtype"])


def _started(run_dir: str | Path) -> dict[str, Any]:
    try:
        started = json.loads(read_bytes(inside(usable_path("run_dir", run_dir), STARTED)))
        if started["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {started['dtype']!r}")
        numbers = {name: whole_number(name, started[name], 0) for name in ("population", "generations", "seed")}
        return {**numbers, "dtype": started["dtype"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, CheckpointError) as error:
        fix = f"is no run of the demo ({error})"
        raise ConfigurationError("run_dir", str(run_dir), fix) from error
