from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from members_run import RUNS, train
from own_answers_run import BUDGET
from own_answers_run import train as train_own_answers
from peft import LoraConfig
from two_workers import TwoWorkers

from evollm.checkpoints import read_population
from evollm.errors import ConfigurationError, DivergedError, MissingExtraError
from evollm.execution.executor import Member
from evollm.execution.local import LocalExecutor
from evollm.execution.members import check_parallel, data_executor, executor_of, members_executor
from evollm.execution.wire import error_from_bytes, error_to_bytes, from_bytes, to_bytes
from evollm.processes import Processes

SCRIPT = Path(__file__).with_name("members_run.py")
OWN_ANSWERS = SCRIPT.with_name("own_answers_run.py")
STEPS, OWN_STEPS = 6, 5
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def spread(launch, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """All runs, in two processes; the folder, and what each process held."""
    folder = tmp_path_factory.mktemp("spread")
    return folder, launch(2, folder, STEPS, script=SCRIPT)


@pytest.fixture(scope="module")
def cut(launch, tmp_path_factory) -> Path:
    """All runs, left by two processes at half their steps."""
    folder = tmp_path_factory.mktemp("cut")
    launch(2, folder, STEPS // 2, script=SCRIPT)
    return folder


def lineage(folder: Path) -> list[dict]:
    """Who came from whom with which values; fitnesses carry the rounding of the passes."""
    lines = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "fitnesses"} for line in lines]


def assert_near(here: dict[str, Any], there: dict[str, Any]) -> None:
    assert (here["agents"], here["values"]) == (there["agents"], there["values"])
    for mine, theirs in zip(here["actors"], there["actors"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_members_in_two_processes_end_as_in_one(spread, tmp_path, name) -> None:
    folder, (first, second) = spread
    assert first[name] == second[name]
    one = train(tmp_path, name, STEPS)
    assert_near(one, first[name])
    assert lineage(tmp_path / name) == lineage(folder / name)
    if name not in ("tournament", "pb2"):
        return
    # Two workers in one process have the same members, and so the same passes and bits.
    both = train(tmp_path / "both", name, STEPS, parallel="data", executor=TwoWorkers)
    assert {key: both[key] for key in ("agents", "values", "actors", "scores")} == {
        key: first[name][key] for key in ("agents", "values", "actors", "scores")
    }
    assert (tmp_path / "both" / name / "metrics.jsonl").read_bytes() == (folder / name / "metrics.jsonl").read_bytes()


def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_two(spread, launch, cut, tmp_path) -> None:
    _, whole = spread
    for name in RUNS:
        shutil.copytree(cut / name, tmp_path / "one" / name)
        assert_near(train(tmp_path / "one", name, STEPS, parallel="auto"), whole[0][name])
    shutil.copytree(cut, tmp_path / "two")
    resumed = launch(2, tmp_path / "two", STEPS, script=SCRIPT)
    for here, there in zip(resumed, whole, strict=True):
        assert {name: here[name] for name in RUNS} == {name: there[name] for name in RUNS}


def test_what_differs_between_processes_is_named_in_all_of_them(spread) -> None:
    _, (first, second) = spread
    assert first["refused"] == second["refused"]
    rows, together, agents, unknown = first["refused"]
    for error in (rows, together):
        assert error.startswith("ConfigurationError: env='process 1': has other rows")
    assert agents.startswith("ConfigurationError: pop='process 1': has other agents")
    assert unknown.startswith("ConfigurationError: parallel='member': must be one of 'data', 'members', 'auto'")


def test_an_error_of_one_process_ends_all(spread) -> None:
    _, (first, second) = spread
    # The main process judges for all.
    assert first["unfit"] == "KeyError: 'no fitness of process 0'"
    assert second["unfit"] == f"EvoLLMError: the fitness function has failed in the main process: {first['unfit']}"
    assert first["failed"] == second["failed"] == "RuntimeError: the card fell off"


def test_members_are_divided_where_they_can_be() -> None:
    def agents(count: int, *, sharded: bool = False, zero: bool = False) -> list[Any]:
        accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED" if zero else "MULTI_GPU"))
        base = SimpleNamespace(is_sharded=sharded)
        return [SimpleNamespace(base=base, accelerator=accelerator) for _ in range(count)]

    # One process divides nothing.
    assert executor_of("members", LocalExecutor, agents(4)) is LocalExecutor
    assert executor_of("data", LocalExecutor, agents(4)) is LocalExecutor
    with Processes(0, 4).bound():
        assert executor_of("members", LocalExecutor, agents(2)) is members_executor
        assert executor_of("data", LocalExecutor, agents(4)) is data_executor
        assert executor_of("auto", LocalExecutor, agents(4)) is members_executor
        assert executor_of("auto", LocalExecutor, agents(3)) is data_executor
        assert executor_of("auto", TwoWorkers, agents(4)) is TwoWorkers
        for unfit in (agents(4, sharded=True), agents(4, zero=True)):
            assert executor_of("auto", LocalExecutor, unfit) is data_executor
            with pytest.raises(ConfigurationError, match=r"parallel='members': the base .*sharded"):
                executor_of("members", LocalExecutor, unfit)
    with pytest.raises(ConfigurationError, match="parallel='members': the given executor decides"):
        check_parallel("members", TwoWorkers)


def test_plain_data_comes_back_as_it_was() -> None:
    value = {
        1: (1.5, float("inf"), None, True, "ä"),
        "tensors": [torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T, torch.tensor(2.0)],
        "rows": np.array([1.0, np.nan]),
        "member": Member(3, {"lr": 1e-3}, 2, 5, diverged=False),
        "lora": LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    found = from_bytes(to_bytes(value))
    assert found[1] == value[1]
    assert found["member"] == value["member"]
    assert found["lora"].r == 3
    assert found["lora"].target_modules == {"q_proj"}
    np.testing.assert_array_equal(found["rows"], value["rows"])
    for here, there in zip(found["tensors"], value["tensors"], strict=True):
        assert here.dtype == there.dtype
        assert torch.equal(here, there)
    with pytest.raises(TypeError, match="object is no plain data"):
        to_bytes([object()])


class LocalError(Exception):
    """Known nowhere else."""


def test_errors_of_other_processes_keep_their_kind_and_text() -> None:
    same = [
        *(ConfigurationError("lr", 2, "lower it"), ConfigurationError("pop", [object], "x"), DivergedError("all")),
        *(MissingExtraError("ray", "ray", "executor='ray'"), torch.OutOfMemoryError("CUDA out of memory")),
        *(KeyError("fitness"), PermissionError(13, "Permission denied", "run"), OSError("full"), MemoryError()),
    ]
    for error in same:
        found = error_from_bytes(error_to_bytes(error))
        assert (type(found), str(found)) == (type(error), str(error))
    for error in (StopIteration("x"), LocalError("x")):
        found = error_from_bytes(error_to_bytes(error))
        assert (type(found), str(found)) == (RuntimeError, f"{type(error).__name__}: x")


def test_a_checkpoint_says_who_was_where(spread) -> None:
    folder, _ = spread
    state = read_population(folder / "pb2" / "checkpoints" / "step-000006").state
    assert (state["workers"], sorted(state["places"])) == (2, [0, 0, 1, 1])


@pytest.fixture(scope="module")
def own_answers(launch, tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes held and was told that train GRPO and KTO."""
    return launch(2, tmp_path_factory.mktemp("own_answers"), OWN_STEPS, script=OWN_ANSWERS)


def test_a_reward_function_that_fails_in_another_process_is_refused_before_the_run(own_answers) -> None:
    first, second = own_answers
    assert first["function"] == second["function"]
    assert first["function"].startswith(
        'ConfigurationError: reward_functions="works_in_the_main_process raised ModuleNotFoundError: No module named '
        "'judging'\": in process 1, which calls it for its members, on row "
    )


def test_reward_functions_and_options_that_differ_between_processes_are_named(own_answers) -> None:
    first, second = own_answers
    assert (first["weights"], first["options"]) == (second["weights"], second["options"])
    for error in first["weights"]:
        assert error.startswith("ConfigurationError: env.own_settings='process 1': has other settings of the gym, such")
    assert first["packages"].startswith("ConfigurationError: versions='process 1': has other packages than process 0")
    assert first["options"] == [
        "ConfigurationError: checkpoint_steps=2: in process 1, and 1 in process 0: give all the same",
        "ConfigurationError: parallel='members': in process 1, and 'data' in process 0: give all the same",
    ]


@pytest.mark.parametrize("algorithm", ["grpo", "kto"])
def test_unequal_shares_of_a_batch_teach_what_the_batch_does_in_one_process(own_answers, tmp_path, algorithm) -> None:
    # In GRPO the other process samples other answers, as on another device; in KTO it spends more on its probe.
    first, second = own_answers
    assert first[algorithm] == second[algorithm]
    one = train_own_answers(tmp_path, algorithm, OWN_STEPS, **({"budget": BUDGET} if algorithm == "kto" else {}))
    np.testing.assert_allclose(one, first[algorithm], rtol=0, atol=1e-6)
