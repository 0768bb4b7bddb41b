"""Members over groups of processes that divide their batches: four processes on a CPU, launched as a user would."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from groups_run import NAME, cut
from members_run import train
from test_members import STEPS, assert_near, lineage

from evollm.checkpoints import read_population
from evollm.errors import ConfigurationError
from evollm.execution import arrivals
from evollm.execution.arrivals import Arrivals
from evollm.execution.local import LocalExecutor
from evollm.execution.members import check_processes_per_worker, data_executor, executor_of
from evollm.processes import Processes

SCRIPT = Path(__file__).with_name("groups_run.py")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def grouped(launch, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a run in groups, and what each of four processes held."""
    folder = tmp_path_factory.mktemp("groups") / "grouped"
    return folder, launch(4, folder, STEPS, script=SCRIPT)


@pytest.fixture(scope="module")
def sharded(launch, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The same under FSDP2."""
    folder = tmp_path_factory.mktemp("groups") / "sharded"
    return folder, launch(4, folder, STEPS, script=SCRIPT)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The same run in one process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train(folder, NAME, STEPS)


@pytest.mark.parametrize("name", ["grouped", "sharded"])
def test_members_in_groups_of_processes_end_as_in_one_process(request, one, name) -> None:
    folder, held = request.getfixturevalue(name)
    assert all(process["whole"] == held[0]["whole"] for process in held)
    assert_near(one[1], held[0]["whole"])
    assert lineage(folder / NAME) == lineage(one[0] / NAME)
    state = read_population(folder / NAME / "checkpoints" / f"step-{STEPS:06d}").state
    assert (state["workers"], sorted(state["places"])) in [(2, [0, 0, 1]), (2, [0, 1, 1])]
    # A sharded base is shared by a group alone.
    assert held[0]["whole"]["share"] == (0.5 if name == "sharded" else 1.0)


def test_a_checkpoint_of_groups_goes_on_in_them_bit_for_bit_and_in_others(grouped, one, tmp_path) -> None:
    folder, held = grouped
    for process in held:
        assert process["again"] == process["whole"]
        assert_near(one[1], process["by itself"])
    cut(folder, tmp_path, STEPS // 2)
    assert_near(train(tmp_path, NAME, STEPS), one[1])


def test_an_error_in_a_group_ends_all(grouped) -> None:
    _, held = grouped
    assert [process["failed"] for process in held] == ["RuntimeError: the card fell off"] * 4


def test_a_process_whose_group_waits_for_it_in_vain_knows(monkeypatch) -> None:
    monkeypatch.setattr(arrivals, "PATIENCE", 0.01)
    store = dist.HashStore()
    first, second = (Arrivals(store, rank, 2) for rank in (0, 1))
    assert first.note(failed=False)
    assert second.note(failed=True)
    # The other one has come through the call before, not through this one.
    assert not second.note(failed=True)
    assert store.num_keys() == 2


def test_groups_that_cannot_be_made_are_refused_in_all_processes(grouped) -> None:
    for process in grouped[1]:
        uneven, together = process["refused"]
        assert uneven == (
            "ConfigurationError: processes_per_worker=3: must divide the 4 processes into equal groups: take 1, 2 or 4"
        )
        assert together.startswith("ConfigurationError: processes_per_worker=2: is for parallel='members'")
    with pytest.raises(ConfigurationError, match="processes_per_worker=0: must be a whole number of at least 1"):
        check_processes_per_worker(0, "members", 4)
    # One process has nothing to divide.
    assert check_processes_per_worker(2, "members", 1) == 2


def test_deepspeed_cannot_shard_over_a_group() -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    agents = [SimpleNamespace(base=SimpleNamespace(is_sharded=False), accelerator=accelerator)] * 4
    with Processes(0, 4).bound():
        with pytest.raises(ConfigurationError, match="sharded by DeepSpeed over all processes"):
            executor_of("members", LocalExecutor, agents, 2)
        plain = [SimpleNamespace(base=SimpleNamespace(is_sharded=False), accelerator=None)] * 4
        assert executor_of("members", LocalExecutor, plain, 4) is data_executor


def test_members_of_a_sharded_base_need_groups(sharded) -> None:
    for process in sharded[1]:
        assert process["refused"].startswith("ConfigurationError: parallel='members': the base is sharded, so that")
