"""What a run has spent: counted right for members that stop, resumes and several workers, and shown."""

from __future__ import annotations

import io
import math
import re

import pytest
import rich.console
from conftest import make_rows
from two_workers import TwoWorkers

from evollm import Callback, ConfigurationError, PreferenceGym, finetune_llm_preference, finetune_llm_sft, replay, tune
from evollm.data.samples import Batch
from evollm.execution.executor import Costs
from evollm.hpo import Birth, SearchPlan, SuccessiveHalving
from evollm.runs import read_run
from evollm.runs.spent import KINDS, Spent
from evollm.tracking import Console
from evollm.training.schedule import Schedule
from evollm.training.spending import Account, Prices
from evollm.tuning.tune import validate


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise RuntimeError("the machine fell over")


class Break(Callback):
    """Makes an agent diverge in the second step."""

    def __init__(self, agent) -> None:
        self.agent = agent

    def on_step(self, event) -> None:
        if event.step == 1:
            next(iter(self.agent.actor_parameters())).data.fill_(math.nan)


@pytest.fixture
def env(tokenizer) -> PreferenceGym:
    final = make_rows(4, 20)
    return PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=final)


@pytest.fixture
def run(env, tmp_path):
    """Run, or resume, agents in a folder of that name, and return what they have spent."""

    def start(agents, name: str = "run", *, resume: bool = False, **changes) -> Spent:
        env.load_state_dict({**env.state_dict(), "epoch": 0, "index": 0})
        arguments = {"verbose": False, "num_sample_answers": 1, "save_elite": False, **changes}
        finetune_llm_preference(
            agents, env, **{"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}, **arguments
        )
        return read_run(tmp_path / name).spent[-1][1]

    return start


def of(agent, pairs, *, training: bool = False) -> int:
    return agent.base.flops.of(Batch(pairs), agent.actor_adapter, training=training)


@pytest.mark.parametrize("max_steps", [6, 5, 2])
def test_one_agent_by_itself_spends_one_run(run, make_agent, env, max_steps) -> None:
    agent = make_agent()
    spent = run([agent], max_steps=max_steps, evaluation_interval=2)
    assert spent.runs == pytest.approx(1, abs=0 if max_steps == 6 else 0.01)
    assert spent.by_kind.keys() == set(KINDS)
    assert spent.member_steps == max_steps
    assert spent.operations["evaluation"] == -(-max_steps // 2) * of(agent, env.test_pairs)
    assert spent.operations["final"] == 2 * of(agent, env.final_pairs)
    if max_steps == 6:
        assert spent.operations["training"] == 2 * of(agent, env.train_pairs, training=True)
        assert spent.operations["references"] == of(agent, env.all_pairs)


def test_only_members_that_learn_are_counted(run, make_population, env) -> None:
    agents = make_population(4)
    agents[1].set_hyperparameters({"lr": 2e-3})
    steps = {"max_steps": 6, "evo_steps": 3}
    spent = run(agents, search="successive_halving", callbacks=[Break(agents[1])], **steps)
    # Agent 1 learns once and makes one step that diverges; half of the four leave after an epoch.
    assert spent.member_steps == 3 * 3 + 2 + 2 * 3
    once = of(agents[0], env.train_pairs, training=True)
    assert 4 * once < spent.operations["training"] < (3 + 1 + 2) * once
    assert spent.operations["evaluation"] == (3 + 2) * of(agents[0], env.test_pairs)
    assert spent.operations["final"] == 3 * of(agents[0], env.final_pairs)
    assert spent.one_run["training"] == pytest.approx(2 * once, rel=0.01)


def test_a_resumed_run_and_one_on_two_workers_spend_the_same(run, make_population, tmp_path) -> None:
    options = {"max_steps": 6, "evo_steps": 2, "checkpoint_steps": 1, "search": "successive_halving"}
    whole = run(make_population(4), "whole", **options)
    assert run(make_population(4), "spread", executor=TwoWorkers, **options) == whole
    with pytest.raises(RuntimeError, match="fell over"):
        run(make_population(4), "killed", callbacks=[Crash(5)], **options)
    assert run(make_population(4), "killed", resume=True, **options) == whole
    files = [(tmp_path / name / "spent.jsonl").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]
    assert [step for step, _ in read_run(tmp_path / "whole").spent] == [2, 4, 6, 6]


def test_moving_references_are_counted_for_every_member_and_epoch(run, make_population, env) -> None:
    agents = make_population(2)
    agents[1].set_hyperparameters({"lr": 2e-3})
    spent = run(agents, num_epochs=2, update_reference_each_epoch=True)
    # The second epoch's references differ; those of the held-out pairs stay the first ones.
    train, others = of(agents[0], env.train_pairs), of(agents[0], env.test_pairs + env.final_pairs)
    assert spent.operations["references"] == (1 + 2) * train + others
    assert spent.one_run["references"] == 2 * train + others


def test_without_a_reference_none_is_counted(make_sft, sft_gym, tmp_path) -> None:
    agent = make_sft(update_epochs=2)
    finetune_llm_sft([agent], sft_gym, run_dir=tmp_path / "run", verbose=False, num_sample_answers=0)
    spent = read_run(tmp_path / "run").spent[-1][1]
    assert spent.operations["references"] == 0
    assert spent.operations["training"] == 2 * of(agent, sft_gym.train_pairs, training=True)
    assert spent.runs == 1


@pytest.mark.usefixtures("drawn_reports")
def test_what_was_spent_is_said_and_returned(make_model, tokenizer, tmp_path) -> None:
    printed = io.StringIO()
    console = Console(rich.console.Console(file=printed, width=200, emoji=False))
    result = tune(
        make_model(), make_rows(30), tokenizer=tokenizer, population=3, num_epochs=1, run_dir=tmp_path / "run",
        verbose=False, callbacks=[console], generations=2, num_sample_answers=0,
    )  # fmt: skip
    assert f"Spent {result.spent}" in printed.getvalue()
    assert str(result.spent).startswith(f"{result.spent.runs:.2f} runs of one agent: training ")
    assert 1 < result.spent.runs < 3
    assert f"It spent {result.spent}." in result.report.read_text()
    assert read_run(result.run_dir).spent[-1][1] == result.spent


LONG = {"max_steps": 12, "evo_steps": 2, "search": "successive_halving", "checkpoint_steps": 1}


@pytest.mark.parametrize("budget", [0.7, 1.0, 1.2])
def test_a_budget_ends_the_run_after_the_last_step_that_fits(run, make_population, env, tmp_path, budget) -> None:
    spent = run(make_population(4), budget=budget, keep_last=None, **LONG)
    record = read_run(tmp_path / "run")
    going = len([line for line in record.steps if line.step == record.last_step])
    step = going * of(make_population(1)[0], env.train_pairs, training=True) / 3 / sum(spent.one_run.values())
    # Within a step on both sides; a batch's tokens differ from the mean by some tenths.
    assert budget - 1.5 * step < spent.runs < budget + step
    assert record.last_step < 12
    assert record.ended.step == record.last_step
    assert record.ended.stopped == f"no further step fits in budget={budget:g}"
    assert record.latest_evaluation[0].step == record.last_step
    assert (tmp_path / f"run/checkpoints/step-{record.last_step:06d}").is_dir()


def test_a_budget_of_one_run_lets_one_agent_make_all_steps(run, make_agent, tmp_path) -> None:
    assert run([make_agent()], budget=1.0, max_steps=5).member_steps == 5
    assert run([make_agent()], "half", budget=0.5, max_steps=12).member_steps == 3, "references are whole"


@pytest.mark.parametrize(("test", "final"), [(40, 0), (40, 40), (40, 2), (3, 0)])
@pytest.mark.parametrize("interval", [6, 3])
def test_a_budget_of_one_run_holds_whatever_the_held_out_splits(
    make_agent, tokenizer, tmp_path, test, final, interval
) -> None:
    """References of the selection rows are computed once, by the score before training if that is on these rows."""
    env = PreferenceGym(
        make_rows(12), make_rows(test, 12), tokenizer, data_batch_size_per_gpu=4,
        final_dataset=make_rows(final, 60) if final else None,
    )  # fmt: skip
    finetune_llm_preference(
        [make_agent()], env, budget=1.0, max_steps=6, evaluation_interval=interval, num_sample_answers=0,
        verbose=False, run_dir=tmp_path / "run",
    )  # fmt: skip
    record = read_run(tmp_path / "run")
    assert (record.last_step, record.ended.stopped) == (6, "")
    assert record.spent[-1][1].runs == pytest.approx(1)


def test_a_killed_run_ends_where_its_budget_would_have_ended_it(run, make_population, tmp_path) -> None:
    whole = run(make_population(4), "whole", budget=1.5, **LONG)
    with pytest.raises(RuntimeError, match="fell over"):
        run(make_population(4), "killed", budget=1.5, callbacks=[Crash(3)], **LONG)
    assert run(make_population(4), "killed", resume=True, budget=1.5, **LONG) == whole
    for name in ("metrics.jsonl", "lineage.jsonl", "spent.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for changed in ({"budget": 2.0}, {"max_steps": 14}):
        with pytest.raises(ConfigurationError, match="the run began with others"):
            run(make_population(4), "whole", resume=True, **{"budget": 1.5, **LONG, **changed})


def test_more_member_steps_extend_a_run_to_the_bits_of_one_that_had_them(run, make_population, tmp_path) -> None:
    run(make_population(4), "whole", max_member_steps=14, **LONG)
    # Four members make two steps; a third one of the two that would go on does not fit.
    assert run(make_population(4), "short", max_member_steps=9, **LONG).member_steps == 8
    assert not read_run(tmp_path / "short").evolutions
    assert run(make_population(4), "short", resume=True, max_member_steps=14, **LONG).member_steps == 14
    for name in ("metrics.jsonl", "lineage.jsonl"):
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_hours_end_a_run_and_count_over_a_resume(run, make_agent, monkeypatch, tmp_path) -> None:
    now = iter(range(0, 10**6, 600))
    monkeypatch.setattr("evollm.training.limits.time.monotonic", lambda: next(now))
    spent = run([make_agent()], max_hours=1, max_steps=12, checkpoint_steps=1)
    assert 1 < spent.member_steps < 6
    more = run([make_agent()], resume=True, max_hours=2, max_steps=12, checkpoint_steps=1)
    assert spent.member_steps < more.member_steps < 12


@pytest.mark.parametrize(
    "limit",
    [
        {"budget": 0.01},
        {"max_member_steps": 3},
        {"budget": 0.01, "max_hours": 1e3},
        {"max_member_steps": 3, "budget": 100},
        {"budget": 0},
        {"max_hours": -1},
        {"budget": math.nan},
    ],
)
def test_limits_that_allow_no_step_are_refused_by_the_name_of_the_first_that_was_hit(
    run, make_population, limit
) -> None:
    class Closed(Callback):
        closed = False

        def close(self) -> None:
            self.closed = True

    callback = Closed()
    (name, value), *_ = limit.items()
    with pytest.raises(ConfigurationError, match=f"^{name}="):
        run(make_population(4), callbacks=[callback], **LONG, **limit)
    assert callback.closed or not value > 0


def test_a_limit_that_is_hit_at_the_last_step_has_stopped_nothing(run, make_population, tmp_path) -> None:
    run(make_population(2), max_steps=3, max_member_steps=6)
    assert read_run(tmp_path / "run").ended.stopped == ""
    run(make_population(2), "short", max_steps=3, max_member_steps=5)
    assert read_run(tmp_path / "short").ended.stopped == "no further step fits in max_member_steps=5"


def test_a_search_is_told_the_budget_alone(run, make_population) -> None:
    told = []

    class Note(SuccessiveHalving):
        def start(self, start):
            told.append(start.budget)
            return super().start(start)

    run(make_population(2), **{**LONG, "search": Note(), "max_steps": 3, "evo_steps": 2})
    run(make_population(2), "budget", budget=2.0, **{**LONG, "search": Note(), "max_steps": 3, "evo_steps": 2})
    assert told[0] is None
    assert told[1].run_steps == 3
    assert told[1].member_steps > 3
    assert 0 < told[1].evaluation < 3


def test_a_run_that_its_budget_has_ended_is_replayed_bit_for_bit(run, make_population, env, tmp_path) -> None:
    run(make_population(4), max_member_steps=14, save_elite=True, **LONG)
    env.load_state_dict({**env.state_dict(), "epoch": 0, "index": 0})
    again = replay(tmp_path / "run", make_population(4), env, run_dir=tmp_path / "again", verbose=False)
    assert again.exact
    assert read_run(tmp_path / "again").last_step == read_run(tmp_path / "run").last_step < 12


def test_a_step_fits_by_half_with_the_evaluations_and_scores_after_it() -> None:
    costs = Costs(400, {"test": 30, "final": 50}, {"train": 200, "test": 30, "final": 50})
    prices = Prices(costs, Schedule(8, 4, None, 4, 0), "final", update_epochs=1, moving=False)
    learners = [{"update_epochs": 1}, {"update_epochs": 2}]
    # Two epochs, two evaluations, references of all rows, scores before and after.
    assert sum(prices.one_run(Account(), 0).values()) == 800 + 60 + 280 + 100
    # After the first epoch a step costs (1 + 2) x 100, and needs its evaluations and two final scores.
    for evaluations, needed in ((2, 150 + 60 + 100), (2.5, 150 + 75 + 100)):
        for missing in (0, 1):
            account = Account({"evaluation": 1240 - needed + missing}, 4, 400)
            assert prices.fits_a_step(account, 4, learners, 1.0, evaluations) is not bool(missing)


def test_a_plan_and_a_search_by_tune_know_the_budget(make_model, tokenizer, tmp_path) -> None:
    arguments = {"population": 3, "num_epochs": 2, "budget": 1.25, "verbose": False, "num_sample_answers": 0}
    arguments["search"] = "tournament"
    said = validate(make_model(), make_rows(30), tokenizer=tokenizer, **arguments)
    assert "budget: at most 1.25 runs of one agent, which may end the run earlier" in said
    result = tune(make_model(), make_rows(30), tokenizer=tokenizer, run_dir=tmp_path / "run", **arguments)
    assert 1.1 < result.spent.runs < 1.35


def step_of(agent, env, members: int) -> int:
    return members * of(agent, env.train_pairs, training=True) // 3


def test_a_guard_on_the_kl_is_paid_for(run, make_agent, make_population, env, tmp_path) -> None:
    guards = {"max_kl": 1e6}
    agent = make_agent()
    spent = run([agent], max_steps=6, evaluation_interval=2, guards=guards)
    reference = agent.base.flops.of(Batch(env.test_pairs), agent.adapter("reference"))
    assert spent.operations["evaluation"] == 3 * (2 * of(agent, env.test_pairs) + reference)
    assert spent.runs == pytest.approx(1)
    spent = run(make_population(4), "four", budget=1.5, evaluation_interval=1, guards=guards, **LONG)
    assert read_run(tmp_path / "four").last_step < 12
    assert spent.runs <= 1.5 + step_of(agent, env, 1) / sum(spent.one_run.values())


def test_candidates_are_paid_for_before_they_are_made(run, make_population, env, tmp_path) -> None:
    merge = {"combinations": ["cat", "svd"], "factors": [0.5, 1.5, 2.0]}
    agents = make_population(4)
    for agent in agents:
        agent.set_hyperparameters({"lr": 1e-3 * (1 + agent.index)})
    spent = run(agents, budget=2.0, merge=merge, max_steps=12)
    record = read_run(tmp_path / "run")
    assert record.last_step < 12
    assert len(record.ended.candidates) >= 5
    assert spent.runs <= 2.0 + step_of(agents[0], env, 4) / sum(spent.one_run.values())


def test_one_agent_makes_all_steps_of_one_run_and_a_second_score_is_made_where_it_fits(
    make_agent, tokenizer, tmp_path
) -> None:
    """The best evaluation is the first one, so that there is another agent to score, which is the last one."""
    for many, name in ((4, "few"), (40, "many")):
        env = PreferenceGym(
            make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=make_rows(many, 20)
        )
        scores = iter(range(100, 0, -1))
        finetune_llm_preference(
            [make_agent()], env, budget=1.0, max_steps=6, evaluation_interval=2, fitness=lambda _, it=scores: next(it),
            num_sample_answers=0, verbose=False, run_dir=tmp_path / name,
        )  # fmt: skip
        record = read_run(tmp_path / name)
        assert (record.last_step, record.ended.best_step, record.ended.stopped) == (6, 2, "")
        assert (record.ended.runner_up is None) == (name == "many")
        assert record.spent[-1][1].runs < 1.1


class Growing:
    """A search that doubles its members at its first decision, after two steps."""

    def start(self, start) -> SearchPlan:
        self.told = 0
        return SearchPlan(tuple(start.founders), 2)

    def tell(self, results) -> SearchPlan:
        self.told += 1
        kept = [result.kept() for result in results]
        values = dict(results[0].hyperparameters)
        fresh = [Birth.fresh(10 * self.told + number, {**values, "lr": 2e-3 + number * 1e-4}) for number in range(2)]
        return SearchPlan((*kept, *fresh), None)

    def state_dict(self) -> dict[str, int]:
        return {"told": self.told}

    def load_state_dict(self, state) -> None:
        self.told = state["told"]


@pytest.mark.parametrize("checkpoint_steps", [1, 100])
def test_members_that_a_decision_would_add_are_paid_for(run, make_population, tmp_path, checkpoint_steps) -> None:
    options = {"max_steps": 4, "evo_steps": 2, "checkpoint_steps": checkpoint_steps}
    run(make_population(2), "whole", search=Growing(), max_member_steps=8, **options)
    # Two members have made two steps: a step of two fits, and one of four does not.
    spent = run(make_population(2), "short", search=Growing(), max_member_steps=7, **options)
    record = read_run(tmp_path / "short")
    assert (spent.member_steps, record.last_step, len(record.evolutions)) == (4, 2, 0)
    assert record.ended.stopped == "no further step fits in max_member_steps=7"
    assert (tmp_path / "short/checkpoints/step-000002").is_dir()
    # The search has not been told of the decision that was not made.
    assert (
        run(make_population(2), "short", resume=True, search=Growing(), max_member_steps=8, **options).member_steps == 8
    )
    for name in ("metrics.jsonl", "lineage.jsonl"):
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_rehearsal_counts_the_steps_that_fit_in_the_limits(make_model, tokenizer) -> None:
    arguments = {"tokenizer": tokenizer, "population": 2, "num_epochs": 10, "verbose": False, "evo_steps": 10}

    def said(**limits) -> str:
        settings = {"search": "tournament", **arguments, "data_batch_size_per_gpu": 4, **limits}
        return validate(make_model(), make_rows(30), **settings).splitlines()[-1]

    assert "fit in its limits" not in said()
    # A race that its budget holds is not said to end early.
    assert "fit in its limits" not in said(search="racing", budget=1.9)
    assert "for the 7 steps that fit in its limits" in said(max_member_steps=15)
    (fitting,) = re.findall(r"for the (\d+) steps that fit in its limits", said(budget=1.0))
    # Half of 60 steps, less the evaluations and scores of the second agent.
    assert 24 <= int(fitting) <= 30
    assert "about 1 second" in said(max_hours=1e-9) or "about 0" in said(max_hours=1e-9)
