"""ZeRO in two processes, launched as a user would; `make test-deepspeed` installs DeepSpeed and runs it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from deepspeed_run import CELLS, batches, make_agent, name_of
from parallel_run import make_small_model
from safetensors.torch import load_file

from evollm import ConfigurationError, MissingExtraError
from evollm.distributed.zero_config import check_zero_config, zero_stage

HERE = Path(__file__).parent
KINDS = ["plain", "ddp", "zero1", "zero2", "zero3"]
ZERO = [kind for kind in KINDS if kind.startswith("zero")]


def needs_deepspeed(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that launches DeepSpeed."""
    absent = importlib.util.find_spec("deepspeed") is None
    return pytest.mark.deepspeed(pytest.mark.skipif(absent, reason="DeepSpeed is not installed")(test))


def start(command: list[str]) -> subprocess.Popen[str]:
    """Run a command of the virtual environment in the background."""
    program = shutil.which(command[0], path=str(Path(sys.executable).parent))
    assert program
    python_path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": python_path}
    return subprocess.Popen(
        [program, *command[1:]], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def launch(kind: str, what: str, folder: Path, processes: int = 2) -> list[dict]:
    """One launch of `deepspeed_run.py`; returns what each process found."""
    processes = 1 if kind == "plain" else processes
    launcher = ["python"] if kind == "plain" else ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
    folder.mkdir(exist_ok=True)
    process = start([*launcher, str(HERE / "deepspeed_run.py"), kind, what, str(folder)])
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{what}-{processes}-*.json"))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """For each kind of launch an agent saved in every way, and what each process found going on."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, {kind: launch(kind, "save", folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(saved) -> dict[str, list[dict]]:
    """For each kind what fresh processes found going on from the saved agents."""
    folder, _ = saved
    return {kind: launch(kind, "load", folder / kind) for kind in KINDS}


@needs_deepspeed
@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_saved_in_any_way_goes_on_in_a_fresh_process(saved, loaded, kind) -> None:
    tolerance = 1e-6 if kind == "zero3" else 0
    assert len(saved[1][kind]) == len(loaded[kind]) == (1 if kind == "plain" else 2)
    for before, after in zip(saved[1][kind], loaded[kind], strict=True):
        for lora_only, save_optimizer in CELLS:
            found = after[name_of(lora_only, save_optimizer)]
            steps = len(before["losses"]) if save_optimizer else 1
            np.testing.assert_allclose(found["losses"][:steps], before["losses"][:steps], rtol=0, atol=tolerance)
            np.testing.assert_allclose(found["logratios"], before["logratios"], rtol=0, atol=tolerance)
            # Fresh moments lead elsewhere, which is why there is a warning.
            assert (abs(found["losses"][-1] - before["losses"][-1]) > 1e-3) == (not save_optimizer)
            assert len(found["warnings"]) == (not save_optimizer)


@needs_deepspeed
@pytest.mark.parametrize("kind", ["ddp", *ZERO])
def test_one_process_loads_what_two_saved_and_the_other_way_round(saved, loaded, kind) -> None:
    folder, found = saved
    expected = found["plain"][0]
    agent = make_agent(None, make_small_model())
    agent.load_checkpoint(str(folder / kind / name_of(True, True)))
    coming = batches(None)[-len(expected["losses"]) :]
    np.testing.assert_allclose(np.concatenate(agent.logratios(coming[0])), expected["logratios"], rtol=0, atol=1e-4)
    losses = [agent.learn(batch)["loss"] for batch in coming]
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=1e-5)
    for process in loaded[kind]:
        np.testing.assert_allclose(process["plain"]["losses"], expected["losses"], rtol=0, atol=1e-5)


@needs_deepspeed
def test_one_process_under_zero_loads_what_two_saved(saved) -> None:
    folder, found = saved
    (process,) = launch("zero3", "load", folder / "zero3", processes=1)
    expected = found["zero3"][0]["losses"]
    np.testing.assert_allclose(process[name_of(True, True)]["losses"], expected, rtol=0, atol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("kind", ZERO)
def test_zero_ends_with_the_adapters_and_the_lineage_of_data_parallelism(saved, kind) -> None:
    folder, _ = saved
    plain, first, second = (
        json.loads((folder / name).read_text())
        for name in ("ddp/run/held-0.json", f"{kind}/run/held-0.json", f"{kind}/run/held-1.json")
    )
    assert first == second
    for mine, theirs in zip(plain["actors"], first["actors"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    lines = [
        [json.loads(line) for line in (folder / name / "run/lineage.jsonl").read_text().splitlines()]
        for name in ("ddp", kind)
    ]
    for line in (*lines[0], *lines[1]):
        # Mean margins differ by rounding.
        line.pop("fitnesses", None)
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3


@needs_deepspeed
@pytest.mark.parametrize("kind", ZERO)
def test_each_process_holds_half_of_the_moments_and_clones_copy_them(saved, kind) -> None:
    _, found = saved
    (whole,) = {process["moments"] for process in found["ddp"]}
    for process in found[kind]:
        assert process["moments"] <= whole / 2 + 2
        assert process["clone"] == process["losses"]


@needs_deepspeed
def test_stage_3_leaves_each_process_half_of_the_layers(saved) -> None:
    _, found = saved
    (plain,) = {process["in_layers"] for process in found["ddp"]}
    whole = plain - found["zero3"][0]["in_layers"]
    for process in found["zero3"]:
        # What is left in them are references, which are adapters.
        assert process["in_layers"] < 0.1 * plain
        assert process["in_shards"] == whole / 2


@needs_deepspeed
@pytest.mark.parametrize("kind", ["ddp", *ZERO])
def test_a_merged_model_is_written_whole(saved, kind) -> None:
    folder, _ = saved
    expected, found = (load_file(folder / name / "merged/model.safetensors") for name in ("plain", kind))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=0, atol=1e-6)


@needs_deepspeed
def test_launches_that_would_not_do_what_was_asked_for_are_refused() -> None:
    script = str(HERE / "trap_run.py")
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "2", script]
    running = {
        "DeepSpeed was asked for and is not used": start([*torchrun, "cpu-and-deepspeed"]),
        "so each would train alone: launch with": start([*torchrun, "no-gloo"]),
        "`accelerate launch --cpu` starts one process": start(
            ["accelerate", "launch", "--cpu", "--num_processes", "2", script, "accelerate-launch"]
        ),
    }
    for reason, process in running.items():
        output, errors = process.communicate(timeout=300)
        refusals = [line for line in output.splitlines() if line.startswith("REFUSED")]
        assert refusals, errors[-3000:]
        assert all(reason in refusal and "torchrun" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type='AdamW': evollm makes AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type='WarmupLR': learning rates are the agents'"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True: adapters train in float32"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0: each agent clips by its own max_grad_norm"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4: an agent accumulates"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization.stage=0: must be one of \(1, 2, 3\)"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offloading is not supported"),
        ({"zero_optimization": {"overlap_comm": True}}, "overlap_comm=True: has no effect"),
    ],
)
def test_deepspeed_settings_that_would_be_overridden_are_refused(config, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_zero_config(config)


def test_settings_left_to_evollm_are_fine() -> None:
    check_zero_config(
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "optimizer": {"type": "auto"},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none", "nvme_path": None}},
            "fp16": {"enabled": False},
        }
    )


def test_a_missing_deepspeed_names_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    with pytest.raises(MissingExtraError, match=r"evollm\[deepspeed\]"):
        zero_stage(accelerator)
    assert zero_stage(None) == 0


def test_evollm_does_not_import_its_engines() -> None:
    code = "import sys, evollm; assert not [name for name in sys.modules if name.startswith('evollm.distributed')]"
    subprocess.run([sys.executable, "-c", code], check=True)
