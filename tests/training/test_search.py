from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_examples, make_rows
from snapshots import actor_bits

from evollm import (
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
    replay,
)
from evollm.checkpoints import read_agent_folder, save_llm_checkpoint
from evollm.execution import worker as worker_module
from evollm.hpo import Birth, Evaluation, Result, SearchPlan, SearchStart, TournamentSearch
from evollm.models.reference_cache import ReferenceCache
from evollm.report import read_run
from evollm.report.family_tree import family_tree

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-1), beta=RLParameter(0.05, 0.5))
STEPS = 7


class Scripted:
    """A search that keeps to a script: fewer and more members, fresh ones, children, uneven intervals.

    Args:
        first: The first plan instead of its own.
        change: Changes the births of its second plan.
    """

    def __init__(self, first: SearchPlan | None = None, change: Callable[[list[Birth]], Any] = list) -> None:
        self.first, self.change = first, change

    def start(self, start: SearchStart) -> SearchPlan:
        self.told: list[list[Result]] = []
        self.values = dict(start.founders[0].hyperparameters)
        second = Birth.fresh(1, {**self.values, "lr": 2e-3})
        return self.first or SearchPlan((start.founders[0], second, Birth.fresh(7, self.values)), 2)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        self.told.append(list(results))
        members = {result.index: result for result in results}
        scripts = {
            (0, 1, 7): lambda: [
                members[1].kept(),
                members[7].child(8, {"lr": 3e-3}),
                Birth.fresh(9, {**self.values, "lr": 5e-3}),
                Birth.fresh(10, self.values),
                members[7].kept(elite=True),
            ],
            (1, 8, 9, 10, 7): lambda: [
                members[9].kept(),
                members[9].child(11, {"lr": 2e-3 * len(self.told), "beta": 0.2}),
            ],
            (9, 11): lambda: [members[11].child(12, {"lr": 6e-3})],
        }
        births = scripts[tuple(members)]()
        births = self.change(births) if len(births) == 5 else births
        return SearchPlan(tuple(births), len(births) - 1 or None)

    def state_dict(self) -> dict[str, Any]:
        return {"told": len(self.told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.told = [[]] * state["told"]


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def made(make_population, tokenizer):
    """Three agents and a gym of four batches, the same ones every time."""

    def make(size: int = 3, **agents):
        env = PreferenceGym(make_rows(16), make_rows(4, 50), tokenizer, data_batch_size_per_gpu=4)
        return make_population(size, hp_config=HP_CONFIG, **agents), env

    return make


@pytest.fixture
def run(made, tmp_path):
    def start(name: str, resume: bool = False, size: int = 3, **changes):
        arguments = {
            "max_steps": STEPS,
            "evo_steps": 2,
            "checkpoint_steps": 1,
            "search": Scripted(),
            "verbose": False,
            "num_sample_answers": 0,
            "resume_from_checkpoint" if resume else "run_dir": tmp_path / name,
        }
        return finetune_llm_preference(*made(size), **{**arguments, **changes})[0]

    return start


def end(folder: Path, population) -> dict[str, object]:
    return {
        "actors": [actor_bits(agent) for agent in population],
        "agents": [(agent.index, agent.steps, agent.hyperparameter_values(), agent.fitness) for agent in population],
        **{name: (folder / name).read_text() for name in ("lineage.jsonl", "metrics.jsonl")},
    }


def learners(folder: Path) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "step":
            found.setdefault(line["step"], []).append(line["agent"])
    return found


def test_members_come_and_go_as_the_search_plans_and_it_is_told_when_it_asked_to_be(run, tmp_path) -> None:
    search = Scripted()
    population = run("run", search=search)
    first, second, last = [0, 1, 7], [1, 8, 9, 10, 7], [9, 11]
    # Due after 2 steps, then after 4 more, then after 1: at step 7 there is nobody to decide for.
    assert learners(tmp_path / "run") == {1: first, 2: first, **dict.fromkeys(range(3, 7), second), 7: last}
    assert [[result.index for result in told] for told in search.told] == [first, second]
    assert [[result.steps for result in told] for told in search.told] == [[2, 2, 2], [6, 6, 4, 4, 6]]
    assert [agent.index for agent in population] == last
    assert [agent.lr for agent in population] == [5e-3, 4e-3]
    # Nothing is left of those who went, nor more references than one.
    assert len(population[0].base.adapters.names) == 3


def test_a_search_is_told_the_evaluations_also_after_a_resume(run) -> None:
    first, second = Scripted(), Scripted()
    with pytest.raises(RuntimeError):
        run("run", search=first, callbacks=[Crash(3)])
    run("run", search=second, resume=True)
    for then, now in zip(first.told[0], second.told[0], strict=True):
        assert then.fitness == now.fitness == (then.evaluation.accuracy, then.evaluation.mean_margin)
        assert then.evaluation.equals(now.evaluation)
        assert then.equals(replace(now, index=99))
        assert not then.equals(replace(now, evaluation=Evaluation([0.0], [0.0])))


def test_a_run_whose_population_grows_and_shrinks_resumes_bit_for_bit(run, tmp_path) -> None:
    whole = end(tmp_path / "whole", run("whole"))
    for step in (3, 6):
        with pytest.raises(RuntimeError):
            run(f"crashed-{step}", callbacks=[Crash(step + 1)])
        population = run(f"crashed-{step}", resume=True)
        assert end(tmp_path / f"crashed-{step}", population) == whole
        assert len(population[0].base.adapters.names) == 3


def test_a_fresh_agent_begins_as_the_first_one_did(run, made, tmp_path) -> None:
    """With the adapter and the reference of the beginning, and no moments: as one by itself on the same batches."""
    run("run", max_steps=6)
    (agent,), env = made(1)
    agent.set_hyperparameters({"lr": 5e-3})
    for _ in range(2):
        env.next_batch()
    for _ in range(4):
        agent.learn(env.next_batch())
    saved = read_agent_folder(tmp_path / "run/checkpoints/step-000006/agent-9")
    alone = agent.base.adapters.export(agent.actor_adapter).tensors
    assert all(torch.allclose(saved.adapter("actor").tensors[name], alone[name], atol=1e-6) for name in alone)
    reference = agent.base.adapters.export(agent.adapter("reference")).tensors
    assert all(torch.equal(saved.adapter("reference").tensors[name], reference[name]) for name in reference)
    assert saved.attributes["steps"] == 4


def test_a_line_that_began_with_a_fresh_agent_is_replayed_bit_for_bit_and_told(
    run, made, tmp_path, monkeypatch
) -> None:
    (best,) = run("run", max_steps=8)
    handed, update = [], ReferenceCache.update
    monkeypatch.setattr(ReferenceCache, "update", lambda cache, other: handed.append(other) or update(cache, other))
    agents, env = made(1)
    again = replay(tmp_path / "run", agents, env, run_dir=tmp_path / "again", verbose=False)
    assert again.exact
    # Roundings of a reference log-prob are those of the batch in which the run first met the pair.
    assert len(handed) == 1
    assert [(step, values["lr"]) for step, values in again.schedule] == [(0, 5e-3), (4, 4e-3), (5, 6e-3)]
    assert set(learners(tmp_path / "again")) == set(range(1, 7))
    # The report's tree, and the card.
    record = read_run(tmp_path / "run")
    nodes = {(node.generation, node.birth.index): node for node in family_tree(record)}
    assert [len(births) for births in record.generations] == [3, 5, 2, 1]
    assert [life.birth.index for life in record.line] == [9, 11, 12]
    fresh = nodes[1, 9]
    assert (fresh.origin, fresh.parent_row, fresh.on_line) == ("fresh", None, True)
    assert (nodes[0, 0].origin, nodes[1, 1].origin, nodes[2, 9].origin) == ("founder", "kept", "kept")
    assert nodes[0, 0].culled
    save_llm_checkpoint(best, tmp_path / "card", run_dir=tmp_path / "run")
    rows = [line.split("|")[1:3] for line in (tmp_path / "card/README.md").read_text().splitlines()]
    assert [" 1 ", " 9 "] in rows, "the line's first generation is the one in which it began"
    assert [" 3 ", " 12 "] in rows


def test_a_supervised_run_takes_a_search(make_sft_population, tokenizer, tmp_path) -> None:
    env = SFTGym(make_examples(8), make_examples(4, 50), tokenizer, data_batch_size_per_gpu=4)
    population, _ = finetune_llm_sft(
        make_sft_population(4, hp_config=HyperparameterConfig(lr=HP_CONFIG["lr"])),
        env,
        max_steps=3,
        evo_steps=1,
        search="successive_halving",
        run_dir=tmp_path / "run",
        verbose=False,
        num_sample_answers=0,
    )
    assert [len(found) for found in learners(tmp_path / "run").values()] == [4, 2, 1]
    assert len(population) == 1


def test_tournament_by_its_name_is_tournament_and_mutation(run, tmp_path) -> None:
    named = end(tmp_path / "named", run("named", search="tournament", max_steps=3))
    seeds = {"search": None, "tournament": TournamentSelection(2, True, 3), "mutation": Mutations()}
    assert end(tmp_path / "seeds", run("seeds", max_steps=3, **seeds)) == named


def impossible(births: list[Birth]) -> list[Birth]:
    return [*births, Birth.fresh(11, {**births[0].hyperparameters, "lr": -1.0})]


def test_a_plan_that_cannot_be_carried_out_is_refused_before_anybody_is_changed(run, monkeypatch) -> None:
    carried_out, carry_out = [], worker_module.carry_out
    noted = lambda births, *rest: carried_out.append(births) or carry_out(births, *rest)  # noqa: E731
    monkeypatch.setattr(worker_module, "carry_out", noted)
    with pytest.raises(ConfigurationError, match=r"lr=-1\.0"):
        run("run", search=Scripted(change=impossible))
    assert len(carried_out) == 1, "the founders' alone"
    with pytest.raises(ConfigurationError, match=r"agent 2.*has used"):
        run("run", resume=True, search=Scripted(change=lambda births: [Birth.fresh(2, births[0].hyperparameters)]))
    # The checkpoint before the decision is as good as ever.
    assert [agent.index for agent in run("run", resume=True)] == [9, 11]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": "annealing"}, "search='annealing'.*known are racing, tournament, successive_halving"),
        ({"search": "sucessive-halving"}, "nearest is 'successive_halving'"),
        ({"search": object()}, "lacks start, tell, state_dict, load_state_dict"),
        ({"search": TournamentSearch}, "is a class: pass an object"),
        ({"tournament": TournamentSelection(2, True, 3), "mutation": Mutations()}, "leave one of the two out"),
        ({"search": TournamentSearch(TournamentSelection())}, "population_size=4.*3 agents"),
        ({"search": Scripted(SearchPlan((), 1))}, "has no births"),
        ({"search": Scripted(SearchPlan((Birth(0, 1, (), False, {}),), 1))}, "a value for each of lr"),
        ({"search": "successive_halving", "size": 1}, "there is one agent"),
    ],
)
def test_a_search_that_cannot_work_is_refused_before_it_trains(run, tmp_path, changes, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run("run", **changes)
    assert not (tmp_path / "run/config.json").exists()


def test_a_resume_with_another_search_is_refused(run) -> None:
    run("run", max_steps=3)
    with pytest.raises(ConfigurationError, match=r"options.search.name: 'Scripted' then, 'SuccessiveHalving' now"):
        run("run", resume=True, search="successive_halving")


def test_fresh_agents_of_a_resumed_run_are_not_made_from_other_weights(run, made, make_model, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run("run", callbacks=[Crash(2)])
    agents, env = made(3)
    for agent in agents:
        agent.base.adapters.load(
            agent.actor_adapter, {k: v + 1 for k, v in agent.base.adapters.export(agent.actor_adapter).tensors.items()}
        )
    arguments = {"max_steps": STEPS, "evo_steps": 2, "checkpoint_steps": 1, "search": Scripted(), "verbose": False}
    with pytest.raises(ConfigurationError, match="begin with other weights"):
        finetune_llm_preference(agents, env, **arguments, num_sample_answers=0, resume_from_checkpoint=tmp_path / "run")


@pytest.mark.parametrize("name", ["random", "grid"])
def test_a_search_that_never_decides_may_be_shorter_than_its_interval(run, tmp_path, name) -> None:
    run("run", search=name, max_steps=2, evo_steps=5)
    assert read_run(tmp_path / "run").last_step == 2
    run("epoch", search=name, max_steps=None, evo_steps=None, num_epochs=1)
    with pytest.raises(ConfigurationError, match="before it could evolve"):
        run("other", search="pbt", max_steps=2, evo_steps=5)


def test_a_resume_with_another_named_fitness_is_refused(run, tmp_path) -> None:
    run("run", max_steps=3, fitness="log_loss")
    assert read_run(tmp_path / "run").config["fitness"] == "log_loss"
    for other, now in (("accuracy", "'accuracy'"), (None, "'accuracy_mean_margin'"), (lambda one: one.accuracy, None)):
        with pytest.raises(ConfigurationError, match=f"fitness: 'log_loss' then, {now} now"):
            run("run", resume=True, max_steps=3, fitness=other)
    run("run", resume=True, max_steps=3, fitness="log_loss")
