"""Children of two parents in real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from snapshots import actor_bits

from evollm import (
    Callback,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
    replay,
)
from evollm.hpo import Result, SearchPlan, SearchStart
from evollm.runs import read_run

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
    def start(name: str, *, resume: bool = False, **changes: Any) -> dict[str, object]:
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
        agents, _ = finetune_llm_preference(*made(), **arguments)
        return {
            "actors": [actor_bits(agent) for agent in agents],
            "agents": [(agent.index, agent.steps, agent.hyperparameter_values(), agent.fitness) for agent in agents],
            **{file: Path(tmp_path, name, file).read_text() for file in ("lineage.jsonl", "metrics.jsonl")},
        }

    return start


def test_a_run_with_crossover_is_killed_and_resumed_bit_for_bit(run, tmp_path) -> None:
    whole = run("whole")
    born = [birth for births in read_run(tmp_path / "whole").generations for birth in births]
    assert any(birth.second_parent is not None for birth in born)
    with pytest.raises(RuntimeError):
        run("killed", callbacks=[Crash()])
    assert run("killed", resume=True) == whole


class Crossing:
    """Two generations of children with two parents; the last one has all founders among its ancestors."""

    def start(self, start: SearchStart) -> SearchPlan:
        self.told, self.config = 0, start.hp_config
        return SearchPlan(tuple(start.founders), 2)

    def tell(self, results: Sequence[Result]) -> SearchPlan:
        self.told += 1
        first, second, third, *_ = results
        if self.told == 1:
            births = (first.kept(), third.crossed(10, second, self.config, weight=0.25), second.child(11, {"lr": 5e-3}))
        elif self.told == 2:
            births = (second.crossed(12, first, self.config), third.kept(), first.child(13, {"beta": 0.2}))
        else:
            births = (third.kept(), first.crossed(14, second, self.config), second.kept())
            births = births[1:2]
        return SearchPlan(births, 2 if self.told < 3 else None)

    def state_dict(self) -> dict[str, int]:
        return {"told": self.told}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.told = state["told"]


def test_a_winner_with_two_parents_is_replayed_bit_for_bit(run, made, tmp_path) -> None:
    run("run", search=Crossing(), tournament=None, mutation=None, fitness=lambda evaluation: 0.0)
    record = read_run(tmp_path / "run")
    assert record.winner == 14
    ancestors = [sorted(birth.index for birth in births) for _, births in record.lineage.family(14)]
    assert ancestors == [[0, 1, 2], [0, 10, 11], [11, 12], [14]]
    result = replay(tmp_path / "run", *made(1), run_dir=tmp_path / "again", verbose=False)
    assert result.exact
