"""A run in which every agent diverges ends with the best one that it had, if it had one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from snapshots import digest
from two_workers import TwoWorkers

from evollm import (
    Callback,
    DivergedError,
    HyperparameterConfig,
    PreferenceGym,
    RLParameter,
    finetune_llm_preference,
    replay,
)
from evollm.checkpoints import read_agent_folder
from evollm.execution.local import LocalExecutor
from evollm.hpo import Racing
from evollm.report import read_run
from evollm.report.page import render

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-1))


class Break(Callback):
    """Breaks every agent after a step, so that it diverges in the next one; notes all agents at each evaluation."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.bits: dict[tuple[int, int], str] = {}
        self.fitnesses: dict[tuple[int, int], tuple[float, ...]] = {}

    def on_evaluation(self, event) -> None:
        self.fitnesses |= {(event.step, index): one for index, one in event.fitnesses.items() if event.rows is None}
        self.bits |= {
            (event.step, agent.index): bits_of(agent.base.adapters.export(agent.actor_adapter))
            for agent in self.executor.population()
        }

    def on_step(self, event) -> None:
        if event.step == self.step:
            for agent in self.executor.population():
                next(iter(agent.actor_parameters())).data.fill_(math.nan)


@pytest.fixture
def run(make_population, tokenizer, tmp_path):
    def start(broken_after: int, *, size: int = 6, name: str = "run", resume: bool = False, **changes: Any) -> Break:
        watch, factory = Break(broken_after), changes.pop("executor", LocalExecutor)

        def executor(agents, env):
            watch.executor = factory(agents, env)
            return watch.executor

        env = PreferenceGym(make_rows(16), make_rows(24, 50), tokenizer, data_batch_size_per_gpu=4)
        length = {"max_steps": 16, "num_sample_answers": 1, "verbose": False, "checkpoint_steps": 1}
        folder = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        population = make_population(size, hp_config=HP_CONFIG)
        settings = {"callbacks": [watch], "executor": executor, **length, **folder, **changes}
        finetune_llm_preference(population, env, **settings)
        return watch

    return start


RACE = {"search": Racing(first_rows=8), "evo_steps": 2}


@pytest.mark.parametrize(
    ("broken_after", "rung", "changes"),
    [
        (5, 4, RACE),
        (3, 2, RACE),
        (15, 8, {**RACE, "budget": 3.0}),
        (5, None, {**RACE, "evaluation_interval": 3}),
        (5, 4, {**RACE, "executor": TwoWorkers}),
        (5, None, {"search": "pbt", "evo_steps": 2}),
        (5, None, {"size": 1, "evaluation_interval": 2}),
        (5, None, {"size": 1, "evaluation_interval": 2, "merge": {"factors": [0.5]}}),
    ],
    ids=[
        "after the last rung", "between rungs", "in the last step", "all rows before", "two workers", "evolution",
        "one agent", "candidates",
    ],
)  # fmt: skip
def test_the_best_agent_of_a_run_in_which_all_diverge_is_its_result(run, tmp_path, broken_after, rung, changes) -> None:
    with pytest.warns(UserWarning, match=rf"ends at step {broken_after + 1}, and the result is agent .*lower lr"):
        watch = run(broken_after, **changes)
    record = read_run(tmp_path / "run")
    place = (record.ended.best_step, record.winner)
    # Of evaluations on all rows the best one, else that of the last rung.
    if rung is None:
        assert place == max(watch.fitnesses, key=lambda place: (watch.fitnesses[place], place[0]))
    else:
        assert place[0] == rung
    assert elite_bits(tmp_path / "run") == watch.bits[place] or record.ended.made_of is not None
    assert (record.ended.step, record.ended.stopped) == (broken_after + 1, "no agent is left that has not diverged")
    assert record.ended.runner_up is None
    assert math.isfinite(record.ended.scores["after"]["accuracy"])
    assert (record.winning_evaluation.step, record.winning_evaluation.agent) == place
    assert "no agent is left" in render(record)[0]
    assert record.spent[-1][1].runs <= changes.get("budget", 99)


def elite_bits(folder: Path) -> str:
    return bits_of(read_agent_folder(folder / "elite").adapter("actor"))


def bits_of(adapter: Any) -> str:
    return digest([adapter.tensors[name] for name in sorted(adapter.tensors)])


def test_a_fitness_that_is_never_finite_again_ends_a_run_with_the_best(run, tmp_path) -> None:
    calls = iter([1.0] * 7 + [math.nan] * 99)
    with pytest.warns(UserWarning, match="ends at step 4, .* after step 2: no agent has a finite fitness"):
        run(99, fitness=lambda evaluation: next(calls), search="pbt", evo_steps=2)
    assert read_run(tmp_path / "run").ended.best_step == 2


def test_without_an_evaluation_before_it_is_an_error(run, tmp_path) -> None:
    for number, changes in enumerate((RACE, {"size": 1})):
        with pytest.raises(DivergedError, match="lower lr"):
            run(1, name=str(number), **changes)
        assert not (tmp_path / f"{number}/elite").exists()


@pytest.mark.filterwarnings("ignore:the run ends at step")
def test_such_a_run_is_resumed_at_its_end_and_replayed(run, make_population, tokenizer, tmp_path) -> None:
    watch = run(5, **RACE)
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    run(99, resume=True, **{**RACE, "max_steps": 20})
    assert elite_bits(tmp_path / "run") == watch.bits[4, read_run(tmp_path / "run").winner]
    again = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert again == [json.loads(line) for line in lines.splitlines()]
    env = PreferenceGym(make_rows(16), make_rows(24, 50), tokenizer, data_batch_size_per_gpu=4)
    found = replay(
        tmp_path / "run", make_population(1, hp_config=HP_CONFIG), env, run_dir=tmp_path / "again", verbose=False
    )
    assert found.exact
