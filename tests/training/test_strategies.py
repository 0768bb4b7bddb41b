"""Real runs of `tune` with every strategy that has a name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from quick_page import quick_page
from simulated import NAMES
from snapshots import actor_bits

import evollm
from evollm import Callback, ConfigurationError, finetune_llm_preference
from evollm.execution.local import LocalExecutor
from evollm.report import write
from evollm.runs import read_run

BOUNDS = {"lr": [1e-4, 1e-1], "beta": [0.05, 0.5]}
STEPS, EVERY = 8, 2


class Crash(Callback):
    def on_step(self, event) -> None:
        if event.step == 6:
            raise RuntimeError("the machine fell over")


class Poison(Callback):
    """Makes the second agent diverge in the first step."""

    def on_start(self, event) -> None:
        agent = self.executor.population()[1]
        self.index = agent.index
        next(iter(agent.actor_parameters())).data.fill_(math.nan)


@pytest.fixture
def tune(make_model, tokenizer, tmp_path, monkeypatch):
    """Tune with a strategy, or resume, in a folder of that name."""
    monkeypatch.setattr(write, "render", quick_page)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, make_rows(30))))

    def start(name: str, folder: str, *, resume: bool = False, **changes: Any) -> Any:
        arguments = {
            "population": 4,
            "generations": STEPS // EVERY,
            "evo_steps": EVERY,
            "checkpoint_steps": 1,
            "data_batch_size_per_gpu": 4,
            "lora_config": {"r": 2, "target_modules": ["q_proj"]},
            "lr": 1e-3,
            "lr_scheduler_type": "cosine",
            "hp_config": BOUNDS,
            "sampling": "latin_hypercube",
            "num_sample_answers": 0,
            "verbose": False,
            "resume_from_checkpoint" if resume else "run_dir": tmp_path / folder,
            **changes,
        }
        return evollm.tune(make_model(), str(tmp_path / "rows.jsonl"), tokenizer=tokenizer, search=name, **arguments)

    return start


def end(result: Any) -> dict[str, object]:
    agents = [result.best, *result.population]
    return {
        "actors": [actor_bits(agent) for agent in agents],
        "agents": [(agent.index, agent.steps, agent.hyperparameter_values(), agent.fitness) for agent in agents],
        **{name: Path(result.run_dir, name).read_text() for name in ("lineage.jsonl", "metrics.jsonl", "spent.jsonl")},
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_every_strategy_is_killed_resumed_and_replayed(name, tune, make_model, tokenizer, tmp_path) -> None:
    whole = tune(name, "whole")
    with pytest.raises(RuntimeError):
        tune(name, "killed", callbacks=[Crash()])
    # From the checkpoint after step 5, between two decisions.
    assert end(tune(name, "killed", resume=True)) == end(whole)
    record = read_run(whole.run_dir)
    assert bool(record.evolutions) == (name not in ("random", "grid"))
    for life in record.lives.values():
        assert all(low <= life.birth.hyperparameters[one] <= high for one, (low, high) in BOUNDS.items())
    again = evollm.replay(
        whole.run_dir, model=make_model(), tokenizer=tokenizer, run_dir=tmp_path / "again", verbose=False
    )
    assert again.exact


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_goes_on_with_a_member_that_is_nan_and_others_of_one_fitness(name, tune) -> None:
    poison = Poison()

    def executor(agents, env):
        poison.executor = LocalExecutor(agents, env)
        return poison.executor

    result = tune(name, "run", callbacks=[poison], executor=executor, fitness=lambda evaluation: 0.5)
    record = read_run(result.run_dir)
    assert (record.last_step, record.ended.stopped) == (STEPS, "")
    assert poison.index not in {life.birth.index for life in record.line}
    assert not result.best.diverged
    assert sum(agent.diverged for agent in result.population) == (
        poison.index in [one.index for one in result.population]
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_strategy_exceeds_a_budget_by_more_than_a_rung(name, tune) -> None:
    # An evaluation costs more than a step, so that one which is not paid for would show.
    dear = {"test_data": make_rows(24, 100), "guards": {"max_kl": 1e6}, "merge": {"factors": [1.5]}}
    # A run by itself has one evaluation beside a race, and eight beside other searches.
    budget = 4.0 if name == "racing" else 2.0
    result = tune(name, "run", budget=budget, generations=8, **dear)
    record, spent = read_run(result.run_dir), result.spent
    # Four members, and each of their steps costs as much as the longest rows.
    rung = EVERY * 4 * spent.one_run["training"] / (8 * EVERY) / sum(spent.one_run.values())
    assert spent.runs < budget + rung / EVERY
    if record.last_step < 8 * EVERY:
        assert record.ended.stopped == f"no further step fits in budget={budget:g}"
        assert spent.runs > budget - rung - record.spent[-1][1].by_kind["evaluation"]


@pytest.mark.parametrize("name", NAMES)
def test_a_population_of_one_is_refused_or_trained_on(name, tune, make_population, gym, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="one agent does not evolve"):
        tune(name, "run", population=1)
    arguments = {"max_steps": 4, "evo_steps": 2, "num_sample_answers": 0, "verbose": False, "run_dir": tmp_path / "run"}
    config = evollm.HyperparameterConfig(lr=evollm.RLParameter(*BOUNDS["lr"]))
    agents = make_population(1, hp_config=config)
    refused = ""
    try:
        population, _ = finetune_llm_preference(agents, gym, search=name, **arguments)
    except ConfigurationError as error:
        refused = str(error)
    if refused:
        assert "agent" in refused
        assert not (tmp_path / "run/config.json").exists()
    else:
        assert [(agent.index, agent.steps) for agent in population] == [(0, 4)]
