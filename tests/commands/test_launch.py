from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist
from command_runs import SHORT

from evollm.checkpoints import read_population
from evollm.cli import main
from evollm.commands import launch
from evollm.commands.remarks import own_warnings_only
from evollm.commands.resume import elsewhere
from evollm.processes import Processes
from evollm.runs import read_run

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "evollm")
CONFIG = """
model: model
data: strings.jsonl
population: 2
generations: 2
num_epochs: 1
lr: 1e-4
lora_config:
  r: 2
  target_modules: [q_proj]
num_sample_answers: 0
"""


@pytest.fixture
def together(workplace, warm_python) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in two processes."""
    Path("run.yaml").write_text(CONFIG)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [warm_python, *TORCHRUN, *arguments]
        return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)

    return run


def own_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("evollm: ")]


def lineage(folder: str) -> list[dict]:
    """Who came from whom with which values; fitnesses carry the rounding of the passes."""
    lines = [json.loads(line) for line in Path(folder, "lineage.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "fitnesses"} for line in lines]


def test_train_runs_in_processes_of_a_launcher_and_the_main_one_speaks(together) -> None:
    assert main(["train", "run.yaml", "data_batch_size_per_gpu=8", "run_dir=alone"]) == 0
    for parallel in ("members", "data"):
        folder = f"run-{parallel}"
        done = together("train", "run.yaml", "data_batch_size_per_gpu=4", f"parallel={parallel}", f"run_dir={folder}")
        assert done.returncode == 0, done.stderr[-9000:]
        assert done.stdout.count("Run folder: ") == done.stdout.count("Report: ") == 1
        assert own_lines(done.stderr) == []
        assert lineage(folder) == lineage("alone")
        steps = [(line.step, line.agent) for line in read_run(folder).steps]
        assert len(steps) == len(set(steps)) > 0
        newest = max(Path(folder, "checkpoints").iterdir())
        assert ("workers" in read_population(newest).state) == (parallel == "members")
    # With as many rows in a batch, whatever the number of processes.
    assert main(["resume", "run-members", "num_epochs=2"]) == 0
    assert len(read_run("run-members").steps) > len(steps)


def test_a_run_in_processes_goes_on_with_workers_and_the_other_way_round() -> None:
    processes = {"lr": 1, "parallel": "members", "processes_per_worker": 2}
    workers = {"lr": 1, "executor": "ray", "workers": 3, "resources_per_worker": {"CPU": 1}}
    assert elsewhere(processes, {"executor": "ray", "workers": 2}) == {"lr": 1}
    assert elsewhere(workers, {"parallel": "members"}) == {"lr": 1}
    # As it was, or with another number.
    assert elsewhere(processes, {"num_epochs": 2}) == elsewhere(processes, {"executor": "local"}) == processes
    assert elsewhere(workers, {"workers": 2}) == workers
    # What contradicts itself is refused later.
    assert elsewhere(processes, {"executor": "ray", "parallel": "members"}) == {"lr": 1, "parallel": "members"}


def test_what_is_wrong_is_said_once(together) -> None:
    done = together("train", "run.yaml", "parallel=members", "lr=-1", "run_dir=run")
    assert done.returncode != 0
    (line,) = own_lines(done.stderr)
    assert line.startswith("evollm: lr=-1: ")
    assert not Path("run").exists()


def test_commands_of_one_process_are_refused_in_several(monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["recipes"]) == 1
        assert capsys.readouterr().err.count("WORLD_SIZE=2: evollm recipes runs in one process") == said
        with pytest.raises(SystemExit):
            main(["train", "--unknown"])
        assert bool(capsys.readouterr().err) == bool(said)


def test_an_error_of_one_process_alone_is_said_by_it(monkeypatch, capsys) -> None:
    store = dist.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "_store", lambda: store)
    monkeypatch.setattr(launch, "_PATIENCE", 0.01)
    for rank, text, said in [
        ("1", "evollm: no such file", "evollm: no such file (process 1)\n"),
        ("0", "evollm: connection closed", "evollm: connection closed\n"),
        ("1", "evollm: connection closed", ""),
    ]:
        monkeypatch.setenv("RANK", rank)
        launch.say_error(text)
        assert capsys.readouterr().err == said


def test_a_warning_of_members_of_another_process_is_said_by_it_and_what_all_say_once(monkeypatch, capsys) -> None:
    store = dist.HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launch, "_store", lambda: store)

    def said_in(rank: str, text: str, processes: Processes) -> str:
        monkeypatch.setenv("RANK", rank)
        with own_warnings_only(), processes.bound() if processes.size == 1 else nullcontext():
            warnings.simplefilter("always")
            # As a module of evollm does.
            exec("import warnings; warnings.warn(text)", {"__name__": "evollm.execution.worker", "text": text})
        return capsys.readouterr().err

    alone, together = Processes(), Processes(1, 2)
    assert said_in("1", "agent 3 is left out", alone) == "evollm: warning: agent 3 is left out (process 1)\n"
    assert said_in("1", "members go one by one", alone) == "evollm: warning: members go one by one (process 1)\n"
    assert said_in("0", "members go one by one", alone) == ""
    assert said_in("0", "rows overlap", together) == "evollm: warning: rows overlap\n"
    assert said_in("1", "rows overlap", together) == ""


def test_ray_is_started_by_one_process(workplace, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Processes, "launched", classmethod(lambda cls: cls(0, 2)))
    monkeypatch.setattr(Processes, "from_main", lambda self, value: value)
    assert main(["train", "--recipe", "population", "data=strings.jsonl", *SHORT, "run_dir=run", "executor=ray"]) == 1
    assert "executor='ray': starts its workers by itself" in capsys.readouterr().err
