"""Which paths a run's passes take depends neither on where it was interrupted nor on what ran before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_rows
from peft import LoraConfig
from snapshots import actor_bits

from evollm import DPO, Callback, CheckpointError, PreferenceGym, finetune_llm_preference, replay
from evollm.checkpoints.atomic import MANIFEST, seal
from evollm.checkpoints.steps import STATE
from evollm.models import SharedBase, budget, layers
from evollm.models.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEPS = 6


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise RuntimeError("the machine fell over")


def short_rows() -> list[dict[str, str]]:
    """Pairs of up to 64 tokens."""
    return [{**row, "rejected": row["rejected"][:20]} for row in make_rows(12)]


def mixed_rows() -> list[dict[str, str]]:
    """The same with one in three of 70 to 128 tokens."""
    return [
        {**row, "chosen": row["chosen"] + "!" * 50} if number % 3 == 1 else row
        for number, row in enumerate(short_rows())
    ]


@pytest.fixture
def make_odd_model(make_model):
    """A model that computes rows of more than 130 tokens in another way, as some do to positions of long sequences.

    A packed row of long pairs is such a row, and a plain one of a short pair is not: prompts can be shared in packs of
    short pairs alone.
    """

    def make():
        model = make_model()
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _, __, states: states * (1.5 if states.shape[1] > 130 else 1.0))
        return model

    return make


@pytest.fixture
def run(make_odd_model, make_population, tokenizer, tmp_path):
    """Run, or resume, two agents in a folder of that name."""

    def start(name: str, model=None, *, resume: bool = False, rows=None, callbacks=(), **agents) -> list[DPO]:
        env = PreferenceGym(rows or mixed_rows(), None, tokenizer, data_batch_size_per_gpu=1)
        population = make_population(2, actor_network=model or make_odd_model(), **agents)
        where = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        settings = {"max_steps": STEPS, "checkpoint_steps": 1, "verbose": False, "num_sample_answers": 0, **where}
        return finetune_llm_preference(population, env, callbacks=callbacks, **settings)[0]

    return start


def bits(population: list[DPO]) -> list[str]:
    return [actor_bits(agent) for agent in population]


def test_a_resumed_run_takes_the_paths_of_one_never_interrupted(run) -> None:
    whole = run("whole")
    paths = Engine.of(whole[0].base).paths
    assert {known.longest: known.shared_prompt for known in paths.values()} == {64: True, 128: False}
    for step in range(1, STEPS):
        with pytest.raises(RuntimeError):
            run(f"crashed-{step}", callbacks=[Crash(step + 1)])
        assert bits(run(f"crashed-{step}", resume=True)) == bits(whole), step


def test_a_resume_takes_the_paths_of_its_checkpoint_whatever_a_probe_would_find(run, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run("crashed", callbacks=[Crash(STEPS)])
    edit_state(newest(tmp_path / "crashed"), take_no_tiles)
    resumed = run("crashed", resume=True)
    assert not any(known.tiled_head for known in Engine.of(resumed[0].base).paths.values())


def test_a_run_has_the_bits_of_one_on_a_fresh_base_whatever_ran_before(run, make_odd_model) -> None:
    alone = bits(run("alone", rows=short_rows()))
    model = make_odd_model()
    # Both lengths, another configuration, and agents that are still there.
    before = run("before", model, lora_config=LoraConfig(r=2, target_modules=["k_proj"]))
    again = run("again", model)
    assert bits(run("after", model, rows=short_rows())) == alone
    assert len(before + again) == 4
    paths = Engine.of(SharedBase.of(model)).paths
    assert [known.longest for known in paths.values()] == [64]


def test_replay_takes_the_paths_of_the_run(run, make_odd_model, make_population, tokenizer, tmp_path) -> None:
    winner = run("run")[0]
    env = PreferenceGym(mixed_rows(), None, tokenizer, data_batch_size_per_gpu=1)
    agents = make_population(2, actor_network=make_odd_model())
    result = replay(tmp_path / "run", agents, env, run_dir=tmp_path / "replay", verbose=False)
    assert result.exact
    assert actor_bits(result.agent) == actor_bits(winner)
    # Not what a probe finds here.
    edit_state(newest(tmp_path / "run"), take_no_tiles)
    agents = make_population(2, actor_network=make_odd_model())
    again = replay(tmp_path / "run", agents, env, run_dir=tmp_path / "again", verbose=False).agent
    assert not any(known.tiled_head for known in Engine.of(again.base).paths.values())


def test_a_resumed_run_and_a_replay_recompute_as_the_run_did(
    run, make_odd_model, make_population, tokenizer, tmp_path, monkeypatch
) -> None:
    """Whatever memory is free by then."""
    counts = []
    plain = layers.checkpoint
    monkeypatch.setattr(layers, "checkpoint", lambda *args, **named: counts.append(1) or plain(*args, **named))

    def free(amount: int) -> None:
        counts.clear()
        monkeypatch.setattr(budget, "_free_memory", lambda device: amount)

    free(2**18)
    whole = run("whole")
    assert counts
    with pytest.raises(RuntimeError):
        run("crashed", callbacks=[Crash(2)])
    free(2**40)
    assert bits(run("crashed", resume=True)) == bits(whole)
    assert counts
    free(2**40)
    env = PreferenceGym(mixed_rows(), None, tokenizer, data_batch_size_per_gpu=1)
    agents = make_population(2, actor_network=make_odd_model())
    assert replay(tmp_path / "whole", agents, env, run_dir=tmp_path / "replay", verbose=False).exact
    assert counts
    free(2**40)
    run("fresh")
    assert not counts


DAMAGES = {
    "no state": lambda state: state.pop("engine"),
    "a list": lambda state: state.update(engine=[]),
    "no paths": lambda state: state["engine"].pop("paths"),
    "text for paths": lambda state: state["engine"].update(paths="all"),
    "a number for a path": lambda state: state["engine"].update(paths=[1]),
    "text for a switch": lambda state: state["engine"]["paths"][0].update(stacking="no"),
    "text for a length": lambda state: state["engine"]["paths"][0].update(longest="64"),
    "an unknown field": lambda state: state["engine"]["paths"][0].update(fast=True),
    "no settings": lambda state: state["engine"]["paths"][0].pop("settings"),
    "a list for settings": lambda state: state["engine"]["paths"][0].update(settings=[]),
    "numbers for reasons": lambda state: state["engine"]["paths"][0].update(reasons=[1]),
    "a budget of 0": lambda state: state["engine"]["budgets"][0].__setitem__(3, 0),
    "a short budget": lambda state: state["engine"]["budgets"][0].pop(),
    "text for a budget": lambda state: state["engine"].update(budgets=["abcd"]),
    "text for room": lambda state: state["engine"]["affordable"][0].__setitem__(1, "much"),
    "a number for a way": lambda state: state["engine"].update(answers=[1]),
    "text for its length": lambda state: state["engine"].update(answers=[["padded", "", "64", ""]]),
    "null for budgets": lambda state: state["engine"].update(budgets=None),
}


def edit_state(folder: Path, change) -> None:
    state = json.loads((folder / STATE).read_text())
    change(state)
    (folder / STATE).write_text(json.dumps(state))
    (folder / MANIFEST).unlink()
    seal(folder)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


def take_no_tiles(state) -> None:
    for known in state["engine"]["paths"]:
        known["tiled_head"] = False


def test_a_damaged_engine_state_is_a_checkpoint_error(run) -> None:
    engine = Engine.of(run("run")[0].base)
    good = json.loads(json.dumps(engine.state_dict()))
    for name, damage in DAMAGES.items():
        state = {"engine": json.loads(json.dumps(good))}
        damage(state)
        with pytest.raises(CheckpointError, match="fast paths"):
            engine.load_state_dict(state.get("engine"))
        assert engine.state_dict() == good, name
    engine.load_state_dict(good)
    assert engine.state_dict() == good
