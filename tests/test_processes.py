from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from evollm import ConfigurationError
from evollm.processes import Processes, check_processes
from evollm.runs import read_run

TUNE = Path(__file__).with_name("parallel_tune.py")


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory) -> tuple[Path, list[dict[str, list]], list[dict[str, list]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, launch(1, folder / "one"), launch(2, folder / "two")


@pytest.fixture(scope="module")
def cut(launch, tmp_path_factory) -> Path:
    """The folder of a run that two processes began and left at half its steps."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    launch(2, folder, max_steps=3)
    return folder


def test_two_processes_end_with_the_adapters_of_one_and_the_same_lineage(runs) -> None:
    folder, (one,), (first, second) = runs
    assert first == second
    for mine, theirs in zip(one["actors"], first["actors"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    lineages = [_without_margins(folder / name / "lineage.jsonl") for name in ("one", "two")]
    assert lineages[0] == lineages[1]
    assert len(lineages[0]) == 3


def _without_margins(path: Path) -> list[dict]:
    """Who came from whom with which values; mean margins differ by rounding."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "fitnesses"} for line in lines]


def test_two_processes_resume_with_the_same_bits(launch, runs, cut, tmp_path) -> None:
    _, _, whole = runs
    shutil.copytree(cut, tmp_path / "cut")
    assert launch(2, tmp_path / "cut") == whole


def test_one_process_resumes_what_two_began(launch, runs, cut, tmp_path) -> None:
    _, (one,), _ = runs
    shutil.copytree(cut, tmp_path / "cut")
    (resumed,) = launch(1, tmp_path / "cut")
    for mine, theirs in zip(one["actors"], resumed["actors"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


def test_tune_gives_every_process_the_winner_and_its_schedule(launch, tmp_path) -> None:
    first, second = launch(2, tmp_path / "run", max_steps=2, script=TUNE)
    assert first.pop("report")
    assert second.pop("report") is None
    assert first == second
    record = read_run(tmp_path / "run")
    assert len(record.evolutions) == 1
    assert (first["best"], first["steps"]) == (record.winner, record.ended.best_step) == (record.winner, 1)
    assert first["schedule"] == [[step, values] for step, values in record.schedule]


def test_processes_that_would_train_alone_are_refused(monkeypatch) -> None:
    def accelerator(processes: int, kind: str = "MULTI_CPU") -> SimpleNamespace:
        return SimpleNamespace(num_processes=processes, distributed_type=SimpleNamespace(value=kind))

    assert check_processes(None) == check_processes(accelerator(1, "NO")) == Processes(0, 1)
    with pytest.raises(ConfigurationError, match=r"must be an accelerate\.Accelerator"):
        check_processes("two")
    with pytest.raises(ConfigurationError, match=r"num_processes=2: 1 processes were launched"):
        check_processes(accelerator(2))
    assert check_processes(accelerator(1, "DEEPSPEED")) == Processes(0, 1)
    assert check_processes(accelerator(1, "FSDP")) == Processes(0, 1)
    with pytest.raises(ConfigurationError, match="distributed_type='TP'"):
        check_processes(accelerator(1, "TP"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="2 processes were launched: launch with `torchrun"):
        check_processes(None)
    with pytest.raises(ConfigurationError, match="2 processes were launched and 1 are connected"):
        check_processes(accelerator(1, "NO"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigurationError, match="'MULTI_CPU': DeepSpeed was asked for and is not used"):
        check_processes(accelerator(2))
