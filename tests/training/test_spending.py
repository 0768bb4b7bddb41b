"""What a run has spent: counted right for members that stop, resumes and several workers, and shown."""

from __future__ import annotations

import io
import math

import pytest
import rich.console
from conftest import make_rows
from two_workers import TwoWorkers

from evollm import Callback, PreferenceGym, finetune_llm_preference, finetune_llm_sft, tune
from evollm.data.samples import Batch
from evollm.runs import read_run
from evollm.runs.spent import KINDS, Spent
from evollm.tracking import Console


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
