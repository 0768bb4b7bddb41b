"""Runs that compare members on a part of the selection rows."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from conftest import make_rows
from nonfinite import break_token, marked
from plain_executor import PlainExecutor
from snapshots import actor_bits

from evollm import Callback, HyperparameterConfig, PreferenceGym, RLParameter, finetune_llm_preference, replay
from evollm.algorithms import ALGORITHMS
from evollm.hpo import Racing
from evollm.report import read_run
from evollm.report.page import render
from evollm.training.spending import Prices

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-1), beta=RLParameter(0.05, 0.5))
ROWS = 24


class Watch(Callback):
    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_evaluation(self, event) -> None:
        self.events.append(event)

    def on_end(self, event) -> None:
        self.ended = event


class Crash(Callback):
    def on_step(self, event) -> None:
        if event.step == 5:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def made(make_population, tokenizer):
    def make(size: int = 6, hp_config: HyperparameterConfig = HP_CONFIG, rows: int = ROWS):
        env = PreferenceGym(make_rows(16), make_rows(rows, 50), tokenizer, data_batch_size_per_gpu=4)
        return make_population(size, hp_config=hp_config), env

    return make


@pytest.fixture
def run(made, tmp_path):
    def start(name: str = "run", resume: bool = False, **changes: Any) -> Watch:
        watch = Watch()
        folder = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        length = {"max_steps": 16, "evo_steps": 2, "checkpoint_steps": 1, "num_sample_answers": 0, "verbose": False}
        settings = {"search": Racing(first_rows=8), "callbacks": [watch], **length, **folder, **changes}
        watch.agents, _ = finetune_llm_preference(*made(), **settings)
        return watch

    return start


def test_members_are_compared_on_growing_parts_of_the_rows_and_all_decide_the_winner(run, tmp_path) -> None:
    watch = run()
    assert [(one.step, len(one.fitnesses), one.rows) for one in watch.events] == [(2, 6, 8), (4, 2, 16), (16, 1, None)]
    assert [len(next(iter(one.evaluations.values()))) for one in watch.events] == [8, 16, ROWS]
    assert (watch.ended.best_step, watch.ended.step) == (16, 16)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    told = {(line["step"], line.get("rows")) for line in lines if line["kind"] == "evaluation"}
    assert told == {(2, 8), (4, 16), (16, None)}
    record = read_run(tmp_path / "run")
    assert record.winning_evaluation.step == 16
    assert "8 to 24 pairs" in render(record)[0]


def test_a_part_of_the_rows_has_the_numbers_that_all_rows_have_and_grows_by_rows(made) -> None:
    (agent,), env = made(1)
    agent.learn(env.next_batch())
    whole = agent.evaluate(env)
    parts = {rows: agent.evaluate(env, rows=rows) for rows in (8, 16, ROWS, 99)}
    drawn = {rows: positions_of(env, rows) for rows in parts}
    for rows, part in parts.items():
        assert len(part) == min(rows, ROWS)
        assert np.allclose(part.chosen_logratios, whole.chosen_logratios[drawn[rows]], atol=1e-5)
        assert np.allclose(part.rejected_logratios, whole.rejected_logratios[drawn[rows]], atol=1e-5)
    assert set(drawn[8]) < set(drawn[16]) < set(drawn[ROWS])
    # Not simply the first ones, which may be alike in data that are sorted.
    assert drawn[8] != list(range(8))


def positions_of(env: PreferenceGym, rows: int) -> list[int]:
    return sorted(int(position) for positions, _ in env.eval_batches("test", rows=rows) for position in positions)


def test_a_best_evaluation_on_few_rows_is_not_the_best_of_the_run(run) -> None:
    """A fitness that falls as training goes on would be best at the first rung."""
    watch = run(fitness=lambda evaluation: -len(evaluation))
    assert (watch.ended.best_step, watch.ended.best) == (16, watch.agents[0].index)


def test_a_race_is_killed_between_its_rungs_and_resumed_bit_for_bit_and_replayed(run, made, tmp_path) -> None:
    def of(name: str, watch: Watch) -> dict[str, object]:
        files = {file: (tmp_path / name / file).read_text() for file in ("lineage.jsonl", "metrics.jsonl")}
        return {"actors": [actor_bits(agent) for agent in watch.agents], **files}

    settings = {"search": Racing(first_rows=8, reduction_factor=2, heirs=1)}
    whole = of("whole", run("whole", **settings))
    with pytest.raises(RuntimeError):
        run("killed", callbacks=[Crash()], **settings)
    assert of("killed", run("killed", resume=True, **settings)) == whole
    agents, env = made(1)
    assert replay(tmp_path / "whole", agents, env, run_dir=tmp_path / "again", verbose=False).exact


def test_evaluations_that_are_asked_for_are_on_all_rows(run) -> None:
    watch = run(evaluation_interval=4)
    assert [(one.step, one.rows) for one in watch.events] == [(2, 8), (4, None), (8, None), (12, None), (16, None)]


def test_a_race_in_a_budget_trains_its_last_member_to_the_end(run) -> None:
    begun = []
    for budget in (1.5, 1.8, 2.5):
        watch = run(f"budget-{budget}", budget=budget)
        assert watch.ended.step == 16
        assert watch.ended.spent.runs <= budget
        begun.append(len(watch.events[0].fitnesses))
    assert begun == sorted(set(begun))


def half_a_step(record) -> float:
    """The most by which a run with rows of one length may exceed its budget, in runs of one agent."""
    going = [line.agent for line in record.steps if line.step == record.last_step]
    epochs = [record.lives[index].birth.hyperparameters.get("update_epochs", 1) for index in going]
    one_run = record.spent[-1][1].one_run
    return sum(epochs) / 2 * one_run["training"] / record.config["schedule"]["total"] / sum(one_run.values())


@pytest.mark.parametrize(
    ("budget", "changes"),
    [
        (1.6, {"evaluation_interval": 3}),
        (1.6, {"evaluation_interval": 1}),
        (2.5, {"update_epochs": [1, 4, 3, 4, 2, 4]}),
        (3.0, {"update_epochs": [1, 4, 3, 4, 2, 4], "evo_steps": 8}),
    ],
    ids=["asked for", "after each step", "epochs that differ", "before the first rung"],
)
def test_a_budget_that_ends_a_race_before_a_rung_is_kept(made, tmp_path, budget, changes) -> None:
    """The plan of the race knows neither these evaluations nor the epochs of others than the first agent."""
    config = HyperparameterConfig(lr=RLParameter(1e-4, 1e-1), update_epochs=RLParameter(1, 4, dtype=int))
    agents, env = made(hp_config=config, rows=64)
    for agent, number in zip(agents, changes.pop("update_epochs", [1] * 6), strict=True):
        agent.set_hyperparameters({"update_epochs": number})
    finetune_llm_preference(
        agents, env, max_steps=16, search=Racing(first_rows=8, reduction_factor=2), budget=budget,
        run_dir=tmp_path / "run", num_sample_answers=0, verbose=False, **{"evo_steps": 4, **changes},
    )  # fmt: skip
    record = read_run(tmp_path / "run")
    assert record.last_step < 16
    assert record.ended.stopped == f"no further step fits in budget={budget:g}"
    assert budget - 0.3 < record.spent[-1][1].runs <= budget + half_a_step(record)
    # What has won was evaluated on all rows, and has its numbers on each of them.
    assert record.winning_evaluation.rows is None
    assert len(record.winning_evaluation.pairs) == 64
    latest = {one.agent: len(one.pairs) for one in record.latest_evaluation}
    assert latest.keys() == {one.agent for one in record.steps if one.step == record.last_step}
    assert latest[max(record.latest_evaluation, key=lambda one: one.rows or 64).agent] == 64
    assert f"{budget:g}" in render(record)[0]


@pytest.mark.parametrize("evo_steps", [4, 8])
def test_a_budget_keeps_back_what_the_evaluations_after_the_last_step_cost(
    made, monkeypatch, tmp_path, evo_steps
) -> None:
    """Those of all members on the rows of the next rung, and that of the best one on all rows."""
    kept_back, fits_a_step = {}, Prices.fits_a_step

    def noted(prices, account, step, learners, budget, evaluations):
        kept_back[step + 1] = evaluations
        return fits_a_step(prices, account, step, learners, budget, evaluations)

    monkeypatch.setattr(Prices, "fits_a_step", noted)
    config = HyperparameterConfig(lr=RLParameter(1e-4, 1e-1), update_epochs=RLParameter(1, 4, dtype=int))
    (agents, env), watch = made(hp_config=config), Watch()
    for agent, number in zip(agents, (1, 4, 3, 4, 2, 4), strict=True):
        agent.set_hyperparameters({"update_epochs": number})
    finetune_llm_preference(
        agents, env, max_steps=16, search=Racing(first_rows=8, reduction_factor=2), budget=2.5, evo_steps=evo_steps,
        run_dir=tmp_path / "run", num_sample_answers=0, verbose=False, callbacks=[watch],
    )  # fmt: skip
    last = [one for one in watch.events if one.step == watch.ended.step]
    assert [one.rows is None for one in last] == [False, True]
    assert watch.ended.step < 16
    assert kept_back[watch.ended.step] == sum(len(one.fitnesses) * (one.rows or ROWS) / ROWS for one in last)


@pytest.mark.filterwarnings("ignore:left out")
def test_the_rows_of_an_evaluation_on_fewer_rows_that_left_some_out_are_read_back(
    make_population, make_model, tokenizer, tmp_path
) -> None:
    rows = marked(make_rows(ROWS, 50), dict.fromkeys(range(0, ROWS, 2), "chosen"))
    env = PreferenceGym(make_rows(16), rows, tokenizer, data_batch_size_per_gpu=4)
    agents = make_population(6, hp_config=HP_CONFIG, actor_network=break_token(make_model(), tokenizer))
    finetune_llm_preference(
        agents, env, max_steps=6, evo_steps=2, search=Racing(first_rows=8),
        run_dir=tmp_path / "run", num_sample_answers=0, verbose=False,
    )  # fmt: skip
    usable = [position for position in positions_of(env, 8) if position % 2]
    assert 0 < len(usable) < 8
    found = [one for one in read_run(tmp_path / "run").evaluations if one.rows == 8]
    assert [len(one.pairs) for one in found] == [len(usable)] * 6


def test_what_cannot_evaluate_a_part_of_the_rows_decides_on_all(run, monkeypatch) -> None:
    """An executor, or an algorithm of one's own, from before there were such plans."""
    watch = run("executor", executor=PlainExecutor)
    assert [(one.step, one.rows) for one in watch.events] == [(2, None), (4, None), (16, None)]
    known = ALGORITHMS["dpo"]

    def evaluate(agents, env, split, reference):
        return known.evaluate(agents, env, split, reference)

    monkeypatch.setitem(ALGORITHMS, "dpo", dataclasses.replace(known, evaluate=evaluate))
    assert [one.rows for one in run("algorithm").events] == [None, None, None]


def test_patience_ends_a_race_too(run) -> None:
    watch = run(fitness=lambda evaluation: 1.0, early_stopping_patience=2)
    # All rows are scored after each `evo_steps` then.
    assert [(one.step, one.rows) for one in watch.events] == [(2, 8), (4, 16), (6, None), (8, None), (10, None)]
    assert "early_stopping_patience" in watch.ended.stopped


def test_a_race_that_ended_at_a_rung_and_goes_on_decides_on_the_rows_of_its_plan(run) -> None:
    def survivors(watch: Watch) -> list[list[int]]:
        return [sorted(one.fitnesses) for one in watch.events if one.step > 2]

    def fitness(evaluation):
        """On all rows the order is the other way round."""
        return evaluation.mean_margin * (1 if len(evaluation) < ROWS else -1)

    settings = {"search": Racing(first_rows=8, error_rate=0), "fitness": fitness}
    whole = run("whole", **settings)
    short = run("short", max_member_steps=12, **settings)
    assert short.ended.step == 2
    longer = run("short", resume=True, max_member_steps=1000, **settings)
    assert survivors(longer) == survivors(whole)


def test_a_race_that_a_limit_ended_and_that_is_resumed_with_the_same_limits_keeps_its_records(run, tmp_path) -> None:
    """The best member is evaluated on all rows at the end, which no checkpoint has."""
    settings = {"search": Racing(first_rows=8), "max_member_steps": 12}

    def records() -> dict[str, Any]:
        folder = tmp_path / "run"
        kinds = [json.loads(line)["kind"] for line in (folder / "timing.jsonl").read_text().splitlines()]
        files = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "spent.jsonl", "lineage.jsonl")}
        rows = {path.name: path.read_bytes() for path in (folder / "evaluations").iterdir()}
        return {**files, **rows, "timing": sorted(kind for kind in kinds if kind not in ("start", "end"))}

    watch = run(**settings)
    assert [(one.step, len(one.fitnesses), one.rows) for one in watch.events] == [(2, 6, 8), (2, 1, None)]
    before = records()
    again = run(resume=True, **settings)
    assert [(one.step, len(one.fitnesses), one.rows) for one in again.events] == [(2, 1, None)]
    assert records() == before
    # What goes on has the records of a run that was longer from the beginning.
    run(resume=True, **{**settings, "max_member_steps": 1000})
    run("whole", search=settings["search"], max_member_steps=1000)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_where_not_even_two_fit_one_trains_alone(run) -> None:
    watch = run(budget=1.1)
    assert (watch.ended.step, [len(one.fitnesses) for one in watch.events]) == (16, [1])
    assert watch.ended.spent.runs <= 1.1
