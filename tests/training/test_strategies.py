"""A real run with every strategy that has a name: killed, resumed and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from simulated import NAMES
from snapshots import actor_bits

from evollm import Callback, HyperparameterConfig, PreferenceGym, RLParameter, finetune_llm_preference, replay
from evollm.runs import read_run

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-1), beta=RLParameter(0.05, 0.5))


class Crash(Callback):
    def on_step(self, event) -> None:
        if event.step == 6:
            raise RuntimeError("the machine fell over")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_every_strategy_is_killed_resumed_and_replayed(name, make_population, tokenizer, tmp_path) -> None:
    def made(size: int) -> tuple[list[Any], PreferenceGym]:
        env = PreferenceGym(make_rows(16), make_rows(4, 50), tokenizer, data_batch_size_per_gpu=4)
        return make_population(size, hp_config=HP_CONFIG, sampling="latin_hypercube"), env

    def run(folder: str, **changes: Any) -> dict[str, object]:
        length = {"max_steps": 8, "evo_steps": 2, "checkpoint_steps": 1}
        quiet = {"verbose": False, "num_sample_answers": 0}
        agents, _ = finetune_llm_preference(*made(4), search=name, **length, **quiet, **changes)
        return {
            "actors": [actor_bits(agent) for agent in agents],
            "agents": [(agent.index, agent.steps, agent.hyperparameter_values(), agent.fitness) for agent in agents],
            **{file: Path(tmp_path, folder, file).read_text() for file in ("lineage.jsonl", "metrics.jsonl")},
        }

    whole = run("whole", run_dir=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run("killed", run_dir=tmp_path / "killed", callbacks=[Crash()])
    # From the checkpoint after step 5, between two decisions.
    assert run("killed", resume_from_checkpoint=tmp_path / "killed") == whole
    assert bool(read_run(tmp_path / "whole").evolutions) == (name not in ("random", "grid"))
    assert replay(tmp_path / "whole", *made(1), run_dir=tmp_path / "again", verbose=False).exact
