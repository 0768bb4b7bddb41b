from __future__ import annotations

import errno
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows
from safetensors.numpy import save

from evollm import Callback, CheckpointError, PreferenceGym, finetune_llm_preference, finetune_llm_sft
from evollm.hpo import Evaluation
from evollm.runs import lines
from evollm.runs.evaluations import evaluations_to_bytes, read_evaluations


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
        "evaluations",
        "final.safetensors",
        "lineage.jsonl",
        "metrics.jsonl",
        "spent.jsonl",
        "timing.jsonl",
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
    assert end["runner_up"] is None


class StopAt(Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise self.error


def test_every_evaluation_and_the_final_score_are_kept_pair_by_pair(make_population, tokenizer, tmp_path) -> None:
    final = make_rows(5, 30)
    env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=final)
    population = make_population(3)
    population[2].set_hyperparameters({"lr": 5e-3})
    broken = Break(population[1])
    finetune_llm_preference(
        population, env, num_epochs=2, run_dir=tmp_path / "run", verbose=False, callbacks=[broken], num_sample_answers=0
    )
    lines = read(tmp_path / "run/metrics.jsonl")
    for step in (3, 6):
        found = read_evaluations(tmp_path / f"run/evaluations/step-{step:06d}.safetensors")
        assert sorted(found) == ["agent-0", "agent-2"], "a diverged agent has no results"
        for index in (0, 2):
            (line,) = [
                line
                for line in lines
                if line["kind"] == "evaluation" and (line["step"], line["agent"]) == (step, index)
            ]
            assert len(found[f"agent-{index}"].margins) == 6
            assert found[f"agent-{index}"].scores == {"accuracy": line["accuracy"], "mean_margin": line["mean_margin"]}
    found, end = read_evaluations(tmp_path / "run/final.safetensors"), lines[-1]
    assert sorted(found) == ["after", "before", "runner_up"]
    assert {end["best"], end["runner_up"]} == {0, 2}
    for name, evaluation in found.items():
        assert len(evaluation.margins) == 5
        assert evaluation.mean_margin == end[f"{name}_mean_margin"]
    for name, role in (("after", "best"), ("runner_up", "runner_up")):
        again = population[end[role]].evaluate(env, "final")
        np.testing.assert_allclose(found[name].margins, again.margins, atol=1e-4)
    assert abs(found["after"].mean_margin - found["runner_up"].mean_margin) > 1e-2


def test_an_sft_run_keeps_its_log_probs(make_sft_population, sft_gym, tmp_path) -> None:
    finetune_llm_sft(make_sft_population(2), sft_gym, run_dir=tmp_path / "run", verbose=False, num_sample_answers=0)
    found = read_evaluations(tmp_path / "run/evaluations/step-000003.safetensors")
    end = read(tmp_path / "run/metrics.jsonl")[-1]
    assert found[f"agent-{end['best']}"].loss == pytest.approx(end["after_loss"], rel=1e-5)
    assert found[f"agent-{end['runner_up']}"].loss == pytest.approx(end["runner_up_loss"], rel=1e-5)


def test_times_are_kept_apart_from_what_equal_runs_share_and_cut_back_by_a_resume(make_agent, gym, tmp_path) -> None:
    folder, quiet = tmp_path / "run", {"verbose": False, "num_sample_answers": 0}
    again = {"num_epochs": 2, "evaluation_interval": 1, "checkpoint_steps": 2, **quiet}
    with pytest.raises(RuntimeError):
        finetune_llm_preference(
            [make_agent()], gym, run_dir=folder, callbacks=[StopAt(4, RuntimeError("crash"))], **again
        )
    assert [(line["kind"], line["step"]) for line in read(folder / "timing.jsonl")] == [
        *[("start", 0), ("baseline", 0), ("step", 1), ("evaluation", 1), ("step", 2), ("evaluation", 2)],
        *[("checkpoint", 2), ("step", 3), ("evaluation", 3), ("step", 4)],
    ]
    (folder / "final.safetensors").write_bytes(b"of a run that goes on")
    with pytest.raises(RuntimeError):
        finetune_llm_preference(
            [make_agent()], gym, resume_from_checkpoint=folder, callbacks=[StopAt(3, RuntimeError("crash"))], **again
        )
    lines = read(folder / "timing.jsonl")
    assert [(line["kind"], line["step"]) for line in lines][-3:] == [("checkpoint", 2), ("start", 2), ("step", 3)]
    assert sorted(path.name for path in (folder / "evaluations").iterdir()) == [
        "step-000001.safetensors",
        "step-000002.safetensors",
    ]
    assert not (folder / "final.safetensors").exists()
    assert all(line["seconds"] >= 0 and line["resident_bytes"] > 2**20 for line in lines)


def test_a_full_disk_costs_evaluations_and_not_the_run(make_agent, gym, tmp_path, monkeypatch) -> None:
    replace = lines.replace_bytes

    def replace_unless_tensors(path: Path, content: bytes) -> None:
        if path.name.endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, content)

    monkeypatch.setattr(lines, "replace_bytes", replace_unless_tensors)
    with pytest.warns(UserWarning, match=r"records of .*run cannot be written: .*No space left"):
        finetune_llm_preference([make_agent()], gym, run_dir=tmp_path / "run", verbose=False, save_elite=False)
    assert read(tmp_path / "run/metrics.jsonl")[-1]["kind"] == "end"


def test_a_damaged_file_of_evaluations_is_named(tmp_path) -> None:
    path = tmp_path / "step-000003.safetensors"
    for content in (b"", b"no tensors", evaluations_to_bytes({"a": Evaluation([1.0], [2.0])})[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step-000003\.safetensors cannot be read"):
            read_evaluations(path)
    path.write_bytes(save({"a/chosen_logratios": np.zeros(2)}))
    with pytest.raises(CheckpointError, match="holds no evaluation of 'a'"):
        read_evaluations(path)


def test_numbers_that_are_not_finite_come_back_from_a_file(tmp_path) -> None:
    path = tmp_path / "one.safetensors"
    path.write_bytes(evaluations_to_bytes({"a": Evaluation([np.nan, np.inf], [0.0, -np.inf])}))
    np.testing.assert_equal(read_evaluations(path)["a"].chosen_logratios, [np.nan, np.inf])
