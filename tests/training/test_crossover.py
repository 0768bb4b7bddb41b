"""Children of two parents in real runs."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig
from snapshots import actor_bits
from two_workers import TwoWorkers

from evollm import (
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
    replay,
)
from evollm.algorithms.agent import ACTOR, REFERENCE
from evollm.checkpoints.agent import read_agent_folder
from evollm.errors import CheckpointError
from evollm.execution import worker as worker_module
from evollm.execution.worker import Worker
from evollm.hpo import Birth, Result, SearchPlan, SearchStart
from evollm.models.engine import BatchSlot
from evollm.report.family_tree import family_tree, tree_picture
from evollm.runs import read_run
from evollm.training import carry_out

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-3, 1e-2), beta=RLParameter(0.05, 0.5))


class Crash(Callback):
    def on_step(self, event) -> None:
        if event.step == 5:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def made(make_population, tokenizer):
    def make(size: int = 4, **agents: Any):
        env = PreferenceGym(make_rows(16), make_rows(6, 50), tokenizer, data_batch_size_per_gpu=4)
        # So that of four members three go through the base together and one by itself.
        return make_population(size, **{"hp_config": HP_CONFIG, "token_budget": 600, **agents}), env

    return make


@pytest.fixture
def run(made, tmp_path):
    def start(name: str, *, resume: bool = False, agents: Any = None, **changes: Any) -> dict[str, object]:
        arguments = {
            "tournament": TournamentSelection(2, True, 4, rand_seed=3),
            "mutation": Mutations(0.1, 0.9, rand_seed=5, crossover=0.7),
            "max_steps": 8,
            "evo_steps": 2,
            "checkpoint_steps": 1,
            "verbose": False,
            "num_sample_answers": 0,
            "resume_from_checkpoint" if resume else "run_dir": tmp_path / name,
            **changes,
        }
        tuned, _ = finetune_llm_preference(*made(**(agents or {})), **arguments)
        return {
            "actors": [actor_bits(agent) for agent in tuned],
            "agents": [(agent.index, agent.steps, agent.hyperparameter_values(), agent.fitness) for agent in tuned],
            **{file: Path(tmp_path, name, file).read_text() for file in ("lineage.jsonl", "metrics.jsonl")},
        }

    return start


DORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM")


@pytest.mark.filterwarnings("ignore:.*members go one by one")
@pytest.mark.parametrize("agents", [{}, {"lora_config": DORA}], ids=["LoRA", "DoRA"])
def test_a_run_with_crossover_is_killed_and_resumed_bit_for_bit(run, tmp_path, agents) -> None:
    run = partial(run, agents=agents)
    whole = run("whole")
    born = [birth for births in read_run(tmp_path / "whole").generations for birth in births]
    assert any(birth.second_parent is not None for birth in born)
    with pytest.raises(RuntimeError):
        run("killed", callbacks=[Crash()])
    assert run("killed", resume=True) == whole


class Crossing:
    """Two generations of children with two parents; all founders are ancestors of the last member."""

    fresh = False

    def start(self, start: SearchStart) -> SearchPlan:
        self.told, self.config, self.values = 0, start.hp_config, start.founders[0].hyperparameters
        return SearchPlan(tuple(start.founders), 2)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        self.told += 1
        first, second, third, *_ = results
        if self.told == 1 and self.fresh:
            births = [first.kept(), *(Birth.fresh(index, {**self.values, "lr": 9e-3 / index}) for index in (10, 11))]
        elif self.told == 1:
            births = [first.kept(), third.crossed(10, second, self.config, weight=0.25), second.child(11, {"lr": 5e-3})]
        elif self.told == 2:
            births = [second.crossed(12, third, self.config), third.kept(), first.child(13, {"beta": 0.2})]
        else:
            births = [second.crossed(14, first, self.config)]
        return SearchPlan(tuple(births), 2 if self.told < 3 else None)

    def state_dict(self) -> dict[str, int]:
        return {"told": self.told}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.told = state["told"]


class FreshCrossing(Crossing):
    fresh = True


@pytest.fixture
def crossed(run, tmp_path):
    """A run whose last member wins, since of equal evaluations the later one does."""

    def start(search: Any = Crossing, **changes: Any) -> Path:
        settings = {"tournament": None, "mutation": None, "fitness": lambda evaluation: 0.0, **changes}
        run("run", search=search(), **settings)
        return tmp_path / "run"

    return start


def test_a_winner_with_two_parents_is_replayed_bit_for_bit(crossed, made, tmp_path, monkeypatch) -> None:
    folder = crossed()
    record = read_run(folder)
    assert record.winner == 14
    ancestors = [sorted(birth.index for birth in births) for _, births in record.lineage.family(14)]
    assert ancestors == [[1, 2], [10, 11], [11, 12], [14]]
    learn_all, slots = worker_module.learn_all, []

    def watched(agents, batch):
        slots.append({agent.index: agent.slot for agent in agents})
        return learn_all(agents, batch)

    monkeypatch.setattr(worker_module, "learn_all", watched)
    result = replay(folder, *made(1), run_dir=tmp_path / "again", verbose=False)
    assert result.exact
    # With more threads bits depend on the shapes of passes, which are those among all members of the run.
    for step, found in enumerate(slots, start=1):
        present = [line.agent for line in record.steps if line.step == step]
        assert found == {index: BatchSlot(present.index(index), len(present)) for index in found}
    assert result.agent.index == 14
    assert result.agent.slot is None
    assert result.schedule == record.schedule
    assert {line.agent for line in read_run(tmp_path / "again").steps} == {1, 2, 10, 11, 12, 14}


def test_such_a_replay_that_was_interrupted_goes_on(crossed, made, tmp_path, monkeypatch) -> None:
    folder, learn_all, steps = crossed(), worker_module.learn_all, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return learn_all(*args)

    monkeypatch.setattr(worker_module, "learn_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replay(folder, *made(1), run_dir=tmp_path / "again", verbose=False)
    assert replay(folder, *made(1), resume_from_checkpoint=tmp_path / "again", verbose=False).exact
    assert len(steps) == 8


def test_two_parents_that_began_afresh_are_replayed_from_the_beginning_of_the_run(crossed, made, tmp_path) -> None:
    """With a learning rate that falls to the end of the run, which comes after the winner's evaluation."""
    evaluated = []

    def best_at_step_8(evaluation):
        # A trial before training, four members three times, and the last one twice.
        evaluated.append(evaluation)
        return float(len(evaluated) == 1 + 4 + 3 + 3 + 1)

    falls = {"lr_scheduler_type": "cosine"}
    folder = crossed(FreshCrossing, agents=falls, fitness=best_at_step_8, max_steps=10)
    assert (read_run(folder).winner, read_run(folder).winner_step) == (14, 8)
    assert replay(folder, *made(1, **falls), run_dir=tmp_path / "again", verbose=False).exact
    assert {line.agent for line in read_run(tmp_path / "again").steps} == {0, 10, 11, 12, 14}


def test_a_replay_with_two_parents_is_stretched_but_not_to_less_than_its_generations(crossed, made, tmp_path) -> None:
    folder = crossed()
    result = replay(folder, *made(1), max_steps=12, run_dir=tmp_path / "longer", verbose=False)
    assert result.exact is None
    assert [evolution.step for evolution in read_run(tmp_path / "longer").evolutions] == [3, 6, 9]
    with pytest.raises(ConfigurationError, match="too few for the 4 generations"):
        replay(folder, *made(1), max_steps=3, run_dir=tmp_path / "shorter", verbose=False)


def test_members_of_two_workers_have_children_together(run, crossed, tmp_path) -> None:
    crossed()
    spread = {"search": Crossing(), "tournament": None, "mutation": None, "fitness": lambda evaluation: 0.0}
    run("spread", executor=TwoWorkers, **spread)
    here, there = (read_agent_folder(tmp_path / name / "elite").adapter(ACTOR).tensors for name in ("run", "spread"))
    # Members of different workers share no passes, so roundings differ.
    for name, tensor in here.items():
        torch.testing.assert_close(tensor, there[name], rtol=0, atol=1e-5)


def test_a_child_has_the_mean_of_both_adapters_and_all_else_of_the_first_parent(made) -> None:
    agents, env = made(3)
    worker = Worker(agents, env)
    births = [Birth(agent.index, agent.index, (), False, agent.hyperparameter_values()) for agent in agents]
    worker.begin(births, moving_references=False)
    assert len(list(worker.learn(0, 2))) == 2
    first, second = worker.export(1), worker.export(0)
    values = worker.agent(1).hyperparameter_values()
    # Both parents leave, and the second one's object is used again before the child is made.
    worker.apply([Birth(5, 0, (), False, values), Birth(6, 1, (), False, values, second_parent=0, weight=0.75)])
    child = worker.export(6)
    means = child.adapter(ACTOR).tensors
    for name, tensor in means.items():
        mine, other = (folder.adapter(ACTOR).tensors[name] for folder in (first, second))
        torch.testing.assert_close(tensor, 0.75 * mine + 0.25 * other, rtol=1e-6, atol=1e-8)
        assert not torch.equal(mine, other)
    for name, tensor in child.adapter(REFERENCE).tensors.items():
        assert torch.equal(tensor, first.adapter(REFERENCE).tensors[name])
    moments = [folder.optimizer["state"] for folder in (child, first)]
    assert all(torch.equal(moments[0][key]["exp_avg"], moments[1][key]["exp_avg"]) for key in moments[1])
    assert child.attributes == {**first.attributes, "index": 6}
    # The other child of agent 0 is agent 0.
    assert all(
        map(torch.equal, worker.export(5).adapter(ACTOR).tensors.values(), second.adapter(ACTOR).tensors.values())
    )


def test_a_second_parent_that_is_elsewhere_or_of_another_rank_is_refused(made) -> None:
    agents, env = made(2)
    one, other = Worker(agents[:1], copy.copy(env)), Worker(agents[1:], env)
    values = agents[0].hyperparameter_values()
    births = [Birth(2, 0, (), False, values, second_parent=1)]
    for worker in (one, other):
        worker.begin(None, moving_references=False)
    with pytest.raises(ConfigurationError, match="second_parent=1: of agent 2 is with another worker"):
        one.apply(births)
    wider = made(1, lora_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    with pytest.raises(ConfigurationError, match="other rank"):
        one.apply(births, second_parents={2: Worker(*wider).export(0)})
    assert [agent.index for agent in one.agents] == [0]
    one.apply(births, second_parents={2: other.export(1)})
    assert [agent.index for agent in one.agents] == [2]
    with pytest.raises(ConfigurationError, match="crossover"):
        carry_out([Birth(3, 2, (), False, values, second_parent=1)], one.agents)


def test_agents_that_begin_with_other_adapters_are_refused_before_training(made, tmp_path) -> None:
    agents, env = made(3)
    base = agents[0].base
    tensors = base.adapters.export(agents[2].actor_adapter).tensors
    base.adapters.load(agents[2].actor_adapter, {name: tensor + 1 for name, tensor in tensors.items()})
    settings = {"tournament": TournamentSelection(2, True, 3), "evo_steps": 1, "max_steps": 2, "verbose": False}
    with pytest.raises(
        ConfigurationError, match=r"crossover=0\.5: needs agents that begin with equal adapters, and agent 2"
    ):
        finetune_llm_preference(
            agents, env, mutation=Mutations(crossover=0.5), run_dir=tmp_path / "refused", **settings
        )
    assert not (tmp_path / "refused").exists()


def test_the_family_tree_has_both_parents(crossed, tmp_path) -> None:
    folder = crossed()
    nodes = {(node.generation, node.birth.index): node for node in family_tree(read_run(folder))}
    child = nodes[1, 10]
    assert (child.parent_row, child.second_row) == (nodes[0, 2].row, nodes[0, 1].row)
    assert child.origin.startswith("\N{MULTIPLICATION SIGN} agent 1, ")
    # It has a child as a second parent alone, and so has heirs.
    assert not nodes[2, 12].culled
    assert "Family tree" in tree_picture(read_run(folder)).alt
    path = folder / "lineage.jsonl"
    path.write_text(path.read_text().replace('"second_parent": 1', '"second_parent": 99'))
    with pytest.raises(CheckpointError, match="lineage"):
        read_run(folder)
