from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_rows
from two_workers import TwoInOneProcess, TwoWorkers

from evollm import (
    DPO,
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.checkpoints import read_population
from evollm.data.samples import Batch
from evollm.execution.executor import FIRST_CANDIDATE, Executor
from evollm.execution.local import LocalExecutor
from evollm.execution.spread import SpreadExecutor
from evollm.execution.wire import from_bytes, to_bytes
from evollm.execution.worker import Worker
from evollm.hpo import Birth, Recipe
from evollm.models import budget
from evollm.models.engine import Engine
from evollm.models.flops import EVALUATION, REFERENCES
from evollm.processes import Processes
from evollm.report.where import where_it_ran
from evollm.runs import read_run

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5))


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def run(make_population, tokenizer, tmp_path):
    """Run, or resume, a population of four in a folder of that name."""

    def start(name: str, *, resume: bool = False, **changes) -> list[DPO]:
        env = PreferenceGym(
            make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=make_rows(4, 20)
        )
        arguments = {
            "max_steps": 7,
            "evo_steps": 2,
            "checkpoint_steps": 1,
            "verbose": False,
            "num_sample_answers": 1,
            "resume_from_checkpoint" if resume else "run_dir": tmp_path / name,
            **changes,
        }
        if "search" not in arguments:
            arguments["tournament"] = TournamentSelection(2, True, 4, rand_seed=3)
            arguments["mutation"] = Mutations(0.2, 0.8, rand_seed=5)
        return finetune_llm_preference(make_population(4, hp_config=HP_CONFIG), env, **arguments)[0]

    return start


def lineage(folder: Path) -> list[dict]:
    """Who came from whom with which values; fitnesses carry the rounding of the passes."""
    lines = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "fitnesses"} for line in lines]


def weights(population: list[DPO]) -> list[torch.Tensor]:
    return [torch.cat([one.detach().flatten() for one in agent.actor_parameters()]) for agent in population]


@pytest.mark.parametrize(
    "changes",
    [{}, {"search": "successive_halving"}, {"update_reference_each_epoch": True}],
    ids=["tournament", "halving", "moving references"],
)
def test_members_on_two_workers_end_as_on_one_and_go_on_when_killed(run, tmp_path, changes) -> None:
    whole = run("local", **changes)
    spread = run("spread", executor=TwoWorkers, **changes)
    assert [agent.index for agent in spread] == [agent.index for agent in whole]
    assert lineage(tmp_path / "spread") == lineage(tmp_path / "local")
    # Members of different workers share no passes, so roundings differ.
    for here, there in zip(weights(whole), weights(spread), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    with pytest.raises(RuntimeError, match="fell over"):
        run("killed", executor=TwoWorkers, callbacks=[Crash(4)], **changes)
    resumed = run("killed", resume=True, executor=TwoWorkers, **changes)
    assert all(map(torch.equal, weights(resumed), weights(spread)))
    for name in ("lineage.jsonl", "metrics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()
    ended = [read_run(tmp_path / name).ended for name in ("local", "spread")]
    assert ended[0].best == ended[1].best
    # Nothing is left but the members' adapters and their references.
    references = {agent.adapter("reference") for agent in spread}
    assert len(spread[0].base.adapters.names) == len(spread) + len(references)


def test_a_run_that_goes_on_in_one_process_says_so(run, tmp_path) -> None:
    run("run", executor=TwoWorkers, max_steps=3)
    run("run", resume=True, max_steps=5)
    found = where_it_ran(read_run(tmp_path / "run"))
    assert found is not None
    assert found["text"].endswith("In steps 4 to 5 all members were in one process.")
    assert all(row["held"].endswith("to 3)") or row["held"].endswith("(step 3)") for row in found["rows"])


def test_a_checkpoint_has_members_go_where_they_were(make_population, gym, tmp_path) -> None:
    def executor():
        return TwoWorkers(make_population(3, hp_config=HP_CONFIG), copy.copy(gym))

    begun, resumed = executor(), executor()
    values = begun.members()[0].hyperparameters
    for one in (begun, resumed):
        one.begin([Birth(index, index, (), False, values) for index in range(3)], moving_references=False)
    begun.apply([Birth(index, index, (), False, values) for index in (1, 0)])
    begun.save(tmp_path / "step-000001", {"step": 1}, {})
    resumed.load(tmp_path / "step-000001")
    resumed.save(tmp_path / "step-000002", {"step": 1}, {})
    for name in ("step-000001", "step-000002"):
        assert read_population(tmp_path / name).state["places"] == [1, 0]
    begun.close()
    resumed.close()


def test_candidates_are_made_of_members_of_two_workers(run, tmp_path) -> None:
    found = []
    for name, executor in (("local", LocalExecutor), ("spread", TwoWorkers)):
        run(name, executor=executor, merge={"finalists": 3, "greedy": True}, max_steps=4)
        found.append(read_run(tmp_path / name).ended.candidates)
    assert [(one.recipe, one.won) for one in found[0]] == [(one.recipe, one.won) for one in found[1]]
    assert any(len(one.recipe.agents) > 2 for one in found[0])
    for here, there in zip(*found, strict=True):
        assert here.scores == pytest.approx(there.scores, abs=1e-4)


def test_a_worker_takes_members_in_hands_them_over_and_begins_again_from_none(make_population, gym) -> None:
    agents = make_population(3, hp_config=HP_CONFIG)
    base, values = agents[0].base, agents[0].hyperparameter_values()
    one, other = Worker(agents[:2], copy.copy(gym)), Worker(agents[2:], copy.copy(gym))
    first = one.export(0)
    begun = first.adapter("actor").tensors
    base.adapters.load(agents[2].actor_adapter, {name: tensor + 1 for name, tensor in begun.items()})
    births = [Birth(0, 0, (), False, {**values, "lr": 2e-3}), Birth(1, 1, (), False, values)]
    one.begin(births, moving_references=False, first=first)
    other.begin([Birth(2, 2, (), False, values)], moving_references=False, first=first)
    assert [agent.lr for agent in one.agents] == [2e-3, 1e-3]
    for worker in (one, other):
        assert [done.step for done in worker.learn(0, 2)] == [1, 2]
    # Agent 0 moves as it is, agent 3 is a child of it, and its worker is left without members.
    (moved,) = weights([one.agent(0)])
    kept = Birth(0, 0, (), False, one.members()[0].hyperparameters)
    other.apply([kept, Birth(3, 0, (), False, {**values, "lr": 3e-3})], {0: one.export(0), 3: one.export(0)})
    one.apply([])
    assert [(member.index, member.steps) for member in other.members()] == [(0, 2), (3, 2)]
    assert all(torch.equal(weight, moved) for weight in weights(other.agents))
    assert other.agent(3).lr == 3e-3
    assert one.members() == []
    assert [done.metrics for done in one.learn(2, 3)] == [{}]
    assert one.evaluate("test") == {}
    # It comes back, and fresh agents begin as the run's first one did, whoever makes them.
    one.apply([kept, Birth.fresh(4, values)], {0: other.export(0)})
    other.apply([Birth.fresh(5, values)])
    assert torch.equal(weights([one.agent(0)])[0], moved)
    for agent in (one.agent(4), other.agent(5)):
        fresh = base.adapters.export(agent.actor_adapter).tensors
        assert all(torch.equal(begun[name], fresh[name]) for name in begun)
        assert agent.steps == 0
    other.apply([])
    for worker in (one, other):
        worker.close()
    # Two actors, and the reference that all share.
    assert len(base.adapters.names) == 3


def test_other_processes_can_copy_a_candidate_of_another_rank(make_population, gym) -> None:
    agents = make_population(2, hp_config=HP_CONFIG)
    worker = Worker(agents, gym)
    worker.begin(None, moving_references=False)
    worker.learn_step(1)
    worker.combine(FIRST_CANDIDATE, Recipe((agents[0].index, agents[1].index), "cat"))
    candidate = worker.agent(FIRST_CANDIDATE)
    copied = worker.copy_of(from_bytes(to_bytes(worker.export(FIRST_CANDIDATE))))
    before, after = (one.base.adapters.config(one.actor_adapter).r for one in (agents[0], copied))
    assert after > before
    batch = Batch(gym.test_pairs)
    for here, there in zip(candidate.logratios(batch), copied.logratios(batch), strict=True):
        np.testing.assert_array_equal(here, there)


def test_a_worker_that_is_restored_without_members_takes_in_any(make_population, gym) -> None:
    agents = make_population(2, hp_config=HP_CONFIG)
    values = agents[0].hyperparameter_values()
    one, other = Worker(agents[:1], copy.copy(gym)), Worker(agents[1:], copy.copy(gym))
    first = one.export(0)
    one.begin([Birth(0, 0, (), False, values)], moving_references=False, first=first)
    other.begin([Birth(1, 1, (), False, values)], moving_references=False, first=first)
    saved = one.saved()
    export = other.export(1)
    # In the checkpoint the worker has no members; then the one comes that it had before.
    other.restore(replace(saved, agents=[]))
    other.apply([Birth(1, 1, (), False, values)], {1: export})
    assert [member.index for member in other.members()] == [1]


def test_each_worker_goes_on_with_what_it_measured_itself(make_population, gym, tmp_path) -> None:
    def executor() -> TwoWorkers:
        made = TwoWorkers(make_population(2, hp_config=HP_CONFIG), gym)
        made.begin(None, moving_references=False)
        return made

    before, after = executor(), executor()
    paths = {"paths": [], "affordable": []}
    for number, worker in enumerate(before._workers.workers):
        worker._engine = SimpleNamespace(state_dict={**paths, "budgets": [[True, True, True, 7 + number]]}.copy)
    before.save(tmp_path / "step-000001", {"step": 1}, {})
    loaded = []
    for worker in after._workers.workers:
        worker._engine = SimpleNamespace(load_state_dict=loaded.append)
    after.load(tmp_path / "step-000001")
    assert [state["budgets"][0][-1] for state in loaded] == [7, 8]


def test_values_that_no_agent_can_have_change_nobody(make_population, gym) -> None:
    for make in (LocalExecutor, TwoWorkers):
        agents = make_population(4, hp_config=HP_CONFIG)
        values = agents[0].hyperparameter_values()
        executor = make(agents, gym)
        executor.begin(
            [Birth(agent.index, agent.index, (), False, values) for agent in agents], moving_references=False
        )
        before = executor.members()
        with pytest.raises(ConfigurationError, match=r"lr=-1\.0"):
            executor.apply([Birth.fresh(4, values), Birth.fresh(5, {**values, "lr": -1.0})])
        assert executor.members() == before
        executor.close()


def test_first_members_that_no_agent_can_be_are_refused_before_agents_are_released(make_population, gym) -> None:
    opened = []

    class Watched(TwoInOneProcess):
        def open(self):
            opened.append(True)

    agents = make_population(2, hp_config=HP_CONFIG)
    executor = SpreadExecutor(Watched(agents, gym), [0, 1])
    births = [Birth(agent.index, agent.index, (), False, {"lr": -1.0, "beta": 0.1}) for agent in agents]
    with pytest.raises(ConfigurationError, match=r"lr=-1\.0"):
        executor.begin(births, moving_references=False)
    assert not opened
    executor.close()


class Half(Executor):
    def __init__(self, agents, env) -> None:
        self.processes = Processes()

    def describe(self) -> None: ...


A_CLASS = "must be a class or a function from agents and gym"


@pytest.mark.parametrize(
    ("executor", "fix"),
    [
        *[("rey", A_CLASS), (3, A_CLASS), (None, A_CLASS)],
        (Half, "makes what lacks changed_text, members, begin, learn"),
        (lambda agents, env: agents, "makes what lacks processes, describe"),
    ],
)
def test_what_makes_no_executor_is_refused(run, tmp_path, executor, fix) -> None:
    with pytest.raises(ConfigurationError, match=rf"executor=.*{fix}"):
        run("run", executor=executor)
    assert not (tmp_path / "run").exists()


def test_a_card_computes_references_and_scores_of_many_rows_at_a_time(monkeypatch, gym, make_population) -> None:
    """As on a card, on a CPU: three batches of 4 rows have their references computed two batches at a time."""
    sizes: dict[str, list[int]] = {}
    logprobs = Engine.logprobs

    def noted(engine, items, options, kind=EVALUATION):
        sizes.setdefault(kind, []).append(len(items[0].batch))
        return logprobs(engine, items, options, kind)

    monkeypatch.setattr(Engine, "logprobs", noted)
    agents = make_population(2)
    for rows, references, scored in ((None, [4, 4, 4], 4), (8, [8, 4], 6)):
        monkeypatch.setattr(budget, "_ROWS_AT_A_TIME", {} if rows is None else {"cpu": rows})
        worker = Worker(agents, copy.copy(gym))
        worker.base.reference_cache.clear()
        steps = list(worker.learn(0, 3))
        assert sizes.pop(REFERENCES) == references
        assert [len(step.metrics) for step in steps] == [2] * 3
        worker.evaluate("test")
        assert max(sizes.pop(EVALUATION)) == scored
        sizes.clear()
