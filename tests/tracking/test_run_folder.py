from __future__ import annotations

import json
import sys
from importlib.metadata import version

import pytest
import torch
from conftest import make_rows

from evollm import Callback, MissingExtraError, PreferenceGym, finetune_llm_preference


def read(path) -> list[dict]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class Break(Callback):
    def __init__(self, agent) -> None:
        self.agent = agent

    def on_step(self, event) -> None:
        with torch.no_grad():
            self.agent.actor_parameters()[0].fill_(float("nan"))


def test_the_run_folder_holds_config_metrics_lineage_and_elite(make_population, tokenizer, tmp_path) -> None:
    env = PreferenceGym(
        make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=make_rows(4, 30)
    )
    population = make_population(2)
    finetune_llm_preference(population, env, run_dir=tmp_path / "run", verbose=False, callbacks=[Break(population[1])])
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.json",
        "elite",
        "lineage.jsonl",
        "metrics.jsonl",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["schedule"]["total"] == 3
    assert config["lora"]["r"] == 4
    assert config["versions"]["torch"] == version("torch")
    lines = read(folder / "metrics.jsonl")
    assert [line["kind"] for line in lines].count("step") == 2 * 2 + 1
    assert [line["kind"] for line in lines].count("evaluation") == 2
    assert [line["kind"] for line in lines].count("end") == 1
    diverged = [line for line in lines if line["agent" if "agent" in line else "best"] == 1]
    assert diverged[-1]["fitness"] == ["nan"]
    end = lines[-1]
    assert (end["split"], end["best"], end["before_accuracy"]) == ("final", 0, 0.5)
    assert len(end["samples"]) == 3


def test_tensorboard_files_are_written(make_agent, gym, tmp_path) -> None:
    finetune_llm_preference(
        [make_agent()],
        gym,
        max_steps=2,
        run_dir=tmp_path / "run",
        verbose=False,
        tensorboard=True,
        num_sample_answers=0,
    )
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"agent_0/loss", "agent_0/rewards/margins", "agent_0/eval_accuracy"} <= set(accumulator.Tags()["scalars"])


def test_a_missing_tracker_is_named_with_its_extra_before_training(make_agent, gym, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    agent = make_agent()
    with pytest.raises(MissingExtraError, match=r'pip install "evollm\[wandb\]"'):
        finetune_llm_preference([agent], gym, run_dir=tmp_path / "run", verbose=False, wb=True)
    assert agent.steps == 0
