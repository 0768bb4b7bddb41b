from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import make_rows
from own_answers import population

from evollm import (
    DPO,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
    tune,
)
from evollm.cli import main
from evollm.execution import ray_workers
from evollm.execution.ray_workers import RayTransport
from evollm.runs import read_run
from evollm.training import finetune

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster
HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster with two CPUs on this machine, which all tests use."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends a test that hangs."""

    def late(*_: Any) -> None:
        raise TimeoutError("five minutes have gone by")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def two_machines(in_time) -> Iterator[Callable[[int], bool]]:
    """A cluster of two nodes with a CPU each, on this machine; ends the second one if a process is there."""
    if ray.is_initialized():
        ray.shutdown()
    # A machine that is gone is missed after a second.
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 5}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": health}
    machines = Cluster(initialize_head=True, head_node_args=head)
    second = machines.add_node(num_cpus=1)
    machines.wait_for_nodes()
    ray.init(address=machines.address, log_to_driver=False, logging_level="ERROR")

    ((raylet,),) = [found for kind, found in second.all_processes.items() if kind == "raylet"]

    def stop_with(process: int) -> bool:
        found = {child.pid for child in psutil.Process(raylet.process.pid).children(recursive=True)}
        if process in found:
            # At once, as all that is on a machine: until Ray has removed the node, the process could do its step.
            psutil.Process(process).kill()
            machines.remove_node(second, allow_graceful=False)
        return process in found

    yield stop_with
    ray.shutdown()
    machines.shutdown()


@pytest.fixture
def run(model_folder, lora, tokenizer, tmp_path) -> Callable[..., list[DPO]]:
    """Run a population of four in a folder of that name."""

    def start(name: str, before: Callable[[], object] = lambda: None, **changes: Any) -> list[DPO]:
        env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)
        agents = DPO.population(
            4, model_name=str(model_folder), lora_config=lora, lr=1e-3, hp_config=HP_CONFIG, max_grad_norm=1.0
        )
        before()
        arguments = {"max_steps": 5, "evo_steps": 2, "verbose": False, "num_sample_answers": 1, **changes}
        arguments["tournament"] = TournamentSelection(2, True, 4, rand_seed=3)
        arguments["mutation"] = Mutations(0.2, 0.8, rand_seed=5)
        return finetune_llm_preference(agents, env, run_dir=tmp_path / name, **arguments)[0]

    return start


def lineage(folder: Path) -> list[dict[str, Any]]:
    """Who came from whom with which values; fitnesses carry the rounding of the passes."""
    lines = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "fitnesses"} for line in lines]


def weights(population: list[DPO]) -> list[torch.Tensor]:
    return [torch.cat([one.detach().flatten() for one in agent.actor_parameters()]) for agent in population]


def test_members_on_two_ray_workers_end_as_on_one_also_if_a_worker_is_killed_in_a_step(
    cluster, run, tmp_path, monkeypatch
) -> None:
    whole = run("local")
    spread = run("spread", executor="ray", workers=2)
    assert [agent.index for agent in spread] == [agent.index for agent in whole]
    assert lineage(tmp_path / "spread") == lineage(tmp_path / "local")
    # Members of different workers share no passes, so roundings differ.
    for here, there in zip(weights(whole), weights(spread), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-6)

    send, killed = RayTransport.send, []

    def send_and_kill(self: RayTransport, worker: Any, call: tuple[str, Any]) -> Any:
        if worker.place != 1 or call[1].get("step") != 4 or killed:
            return send(self, worker, call)
        killed.append(self.where(worker)[1])
        pending = send(self, worker, call)
        os.kill(killed[0], signal.SIGKILL)
        return pending

    monkeypatch.setattr(RayTransport, "send", send_and_kill)
    with pytest.warns(UserWarning, match="worker 1 was lost"):
        mortal = run("mortal", executor="ray", workers=2)
    assert killed
    assert all(map(torch.equal, weights(mortal), weights(spread)))
    for name in ("lineage.jsonl", "metrics.jsonl"):
        assert (tmp_path / "mortal" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()


@pytest.mark.parametrize("algorithm", ["grpo", "kto"])
def test_members_that_learn_from_own_or_unpaired_answers_end_on_ray_as_here(
    cluster, algorithm, model_folder, lora, tokenizer, tmp_path
) -> None:
    # By itself in this file: a worker cannot import a module of the tests.
    def shortness(completions: list[str]) -> list[float]:
        return [-float(len(completion)) for completion in completions]

    def train(name: str, **changes: Any) -> list[Any]:
        agents, env = population(algorithm, model_folder, lora, tokenizer, shortness)
        search = {"tournament": TournamentSelection(2, True, 4, rand_seed=3), "mutation": Mutations(0.2, rand_seed=5)}
        arguments = {"max_steps": 4, "evo_steps": 2, "verbose": False, "num_sample_answers": 0, **search, **changes}
        return finetune(agents, env, run_dir=tmp_path / name, **arguments)[0]

    here, there = train("here"), train("there", executor="ray", workers=2)
    assert lineage(tmp_path / "there") == lineage(tmp_path / "here")
    for one, other in zip(weights(here), weights(there), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("here", "there")
    ]
    scores = [{line["kind"]: line for line in found} for found in lines]
    if algorithm == "grpo":
        assert scores[0]["step"]["reward"] == scores[1]["step"]["reward"]


def test_reward_functions_that_workers_cannot_call_are_refused_before_the_run(
    cluster, model_folder, lora, tokenizer, tmp_path, monkeypatch
) -> None:
    here = os.getpid()

    def at_home(completions: list[str]) -> list[float]:
        if os.getpid() != here:
            raise RuntimeError("no key of the judge")
        return [0.0] * len(completions)

    elsewhere = types.ModuleType("module_of_the_user")
    exec("def reward(completions):\n    return [0.0] * len(completions)", elsewhere.__dict__)
    monkeypatch.setitem(sys.modules, "module_of_the_user", elsewhere)
    for reward, said in [
        (
            at_home,
            r"worker 0, on .*, cannot begin: reward_functions=.*at_home raised RuntimeError: no key of the judge",
        ),
        (elsewhere.reward, r"cannot begin: env=.*No module named 'module_of_the_user'.*installed there"),
    ]:
        agents, env = population("grpo", model_folder, lora, tokenizer, reward)
        with pytest.raises(ConfigurationError, match=said):
            finetune(agents, env, max_steps=2, executor="ray", workers=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_cluster_cannot_do_is_said_before_the_run(cluster, run, model_folder, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match=r"workers=3: each needs 1 CPU, and the cluster has room for 2"):
        run("few", executor="ray", workers=3)
    with pytest.raises(ConfigurationError, match=r"workers=2: worker 0, on .*, cannot begin: .*model.*"):
        run("none", before=lambda: shutil.rmtree(model_folder), executor="ray")
    assert not any((tmp_path / name).exists() for name in ("few", "none"))


def test_tune_has_a_cluster_of_its_own_for_one_run(model_folder, lora, tmp_path) -> None:
    if ray.is_initialized():
        ray.shutdown()
    result = tune(
        str(model_folder),
        make_rows(16),
        population=2,
        lora_config=lora,
        max_steps=2,
        executor="ray",
        workers=1,
        resources_per_worker={"CPU": 1},
        ray_address="local",
        run_dir=tmp_path / "run",
        num_sample_answers=0,
        verbose=False,
    )
    assert result.best.base.name == str(model_folder)
    assert not ray.is_initialized()


CONFIG = """
data: rows.jsonl
population: 2
generations: 2
num_epochs: 1
data_batch_size_per_gpu: 8
lr: 1e-4
lora_config:
  r: 2
  target_modules: [q_proj]
num_sample_answers: 0
"""


def test_the_command_line_trains_on_ray_and_goes_on(model_folder, tmp_path, monkeypatch, capsys) -> None:
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    Path("run.yaml").write_text(CONFIG)
    command = ["train", "run.yaml", f"model={model_folder}"]
    assert main([*command, "run_dir=here"]) == 0
    on_ray = ["executor=ray", "workers=2", "resources_per_worker.CPU=1", "ray_address=local"]
    assert main([*command, "run_dir=there", *on_ray]) == 0
    assert lineage(tmp_path / "there") == lineage(tmp_path / "here")
    assert not ray.is_initialized()
    assert main(["resume", "there", "num_epochs=2", "ray_address=local"]) == 0
    record = read_run("there")
    assert len(record.steps) > len(read_run("here").steps)
    assert [home.worker for home in record.placements[-1].homes] == [0, 1]
    assert "evollm: " not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:worker . was lost")
def test_a_machine_that_is_gone_in_the_middle_of_a_run_changes_nothing_but_roundings(
    two_machines, run, tmp_path, monkeypatch
) -> None:
    whole = run("whole", executor="ray", workers=2)
    monkeypatch.setattr(ray_workers, "PATIENCE_AGAIN", 3.0)
    send, gone = RayTransport.send, set()

    def send_and_stop(self: RayTransport, worker: Any, call: tuple[str, Any]) -> Any:
        pending = send(self, worker, call)
        process = self.where(worker)[1]
        if call[1].get("step") == 4 and not gone and two_machines(process):
            gone.add(process)
        return pending

    monkeypatch.setattr(RayTransport, "send", send_and_stop)
    with pytest.warns(UserWarning, match=r"has found no room .*: its members go on with the 1 other worker"):
        fewer = run("fewer", executor="ray", workers=2)
    assert [agent.index for agent in fewer] == [agent.index for agent in whole]
    assert lineage(tmp_path / "fewer") == lineage(tmp_path / "whole")
    for one, other in zip(weights(whole), weights(fewer), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    before, after = (
        [line for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 4]
        for name in ("whole", "fewer")
    )
    assert before == after
    record = read_run(tmp_path / "fewer")
    (loss,) = record.losses
    assert (loss.step, loss.replaced) == (4, False)
    assert gone == {loss.home.process}
    assert [len(placed.homes) for placed in record.placements] == [2, 2, 2, 1]
