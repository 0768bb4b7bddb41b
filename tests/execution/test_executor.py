from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from two_workers import TwoWorkers

from evollm import (
    Callback,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.algorithms import DPO
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
    assert len(spread[0].base.adapters) == len(spread) + len(references)
