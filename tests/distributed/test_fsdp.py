"""FSDP2 in two processes on a CPU, launched as a user would."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from fsdp_run import BASES, next_loss
from parallel_run import make_small_model
from peft import LoraConfig
from safetensors.torch import load_file

from evollm import DPO, ConfigurationError
from evollm.distributed.fsdp_base import shard_layers
from evollm.distributed.fsdp_settings import check_fsdp

SCRIPT = Path(__file__).with_name("fsdp_run.py")


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory) -> tuple[Path, dict, list[dict]]:
    """The folder of the runs, and what one process and two processes held."""
    folder = tmp_path_factory.mktemp("fsdp")
    (one,) = launch(1, folder / "one", script=SCRIPT)
    return folder, one, launch(2, folder / "two", script=SCRIPT)


def test_fsdp_ends_with_the_adapters_the_losses_and_the_lineage_of_one_process(runs) -> None:
    folder, one, (first, second) = runs
    assert first["actors"] == second["actors"]
    for mine, theirs in zip(one["actors"], first["actors"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(losses_of(folder / "two"), losses_of(folder / "one"), rtol=1e-6)
    lineages = [without_margins(folder / name / "lineage.jsonl") for name in ("one", "two")]
    assert lineages[0] == lineages[1]
    assert len(lineages[0]) == 3


def losses_of(run: Path) -> list[float]:
    """The losses of all agents and steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(found) > 6
    return found


def without_margins(path: Path) -> list[dict]:
    """Who came from whom with which values; mean margins differ by rounding."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "fitnesses"} for line in lines]


def test_fsdp_leaves_each_process_half_of_the_layers(runs) -> None:
    _, one, two = runs
    assert one["memory"]["shards"] == 0
    for process in two:
        for found in (process["memory"], process["memory after saving"]):
            assert found["shards"] == found["weights"] / 2
            # A few stand-ins, each of one number.
            assert found["reached"] < found["in matrices"] / 2 + 50
    assert one["memory"]["reached"] >= one["memory"]["in matrices"]


def test_one_process_goes_on_from_what_two_saved_under_fsdp_and_the_other_way_round(launch, runs, tmp_path) -> None:
    folder, one, two = runs
    loaded = DPO.load(str(folder / "two/saved"))
    assert next_loss(loaded) == pytest.approx(one["loss"], abs=1e-6)
    for process in two:
        assert process["loss of one's"] == pytest.approx(one["loss"], abs=1e-6)
    launch(2, tmp_path / "run", max_steps=3, script=SCRIPT)
    (resumed,) = launch(1, tmp_path / "run")
    for mine, theirs in zip(one["actors"], resumed["actors"], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


def test_whole_models_are_written_under_fsdp(runs) -> None:
    folder, *_ = runs
    for file, tolerance in (("saved/base/model.safetensors", 0), ("merged/model.safetensors", 1e-6)):
        expected, found = (load_file(folder / name / file) for name in ("one", "two"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name].numpy(), tensor.numpy(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", BASES)
def test_fsdp_trains_bases_of_many_kinds_as_data_parallelism_does(runs, name) -> None:
    for process in runs[2]:
        found = process["bases"][name]
        assert found["losses"] <= 1e-6
        assert found["adapters"] <= 1e-6
        assert found["learnt"] > 1e-5


def test_a_base_with_agents_is_not_sharded_afterwards(runs) -> None:
    assert all("give them all the same accelerator" in process["refusal"] for process in runs[2])


def make_accelerator(mixed_precision: str = "no", **settings) -> SimpleNamespace:
    """What evollm reads of an accelerator; a real one is for FSDP on GPUs only."""
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    return SimpleNamespace(
        num_processes=1,
        distributed_type=SimpleNamespace(value="FSDP"),
        mixed_precision=mixed_precision,
        device=torch.device("cpu"),
        state=SimpleNamespace(fsdp_plugin=plugin),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, r"fsdp_version=1: .*FullyShardedDataParallelPlugin\(fsdp_version=2\)"),
        ({"cpu_offload": True}, "cpu_offload=.*offloading is not supported"),
        ({"mixed_precision": "bf16"}, "accelerator.mixed_precision='bf16'.*load the base in the precision"),
        ({"mixed_precision_policy": "bf16"}, "mixed_precision_policy=.*load the base in the precision"),
        ({"reshard_after_forward": False}, "reshard_after_forward=False: each layer is freed"),
        ({"ignored_modules": ".*mlp"}, "ignored_modules='.*mlp': all repeated layers are sharded"),
    ],
)
def test_fsdp_settings_that_would_be_ignored_are_refused(settings, message) -> None:
    accelerator = make_accelerator(**settings)
    with pytest.raises(ConfigurationError, match=message):
        DPO(actor_network=make_small_model(), accelerator=accelerator)


def test_loading_in_one_process_alone_is_refused(monkeypatch) -> None:
    check_fsdp(make_accelerator())
    # As accelerate's plugin and its launcher set it.
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "True")
    with pytest.raises(ConfigurationError, match="cpu_ram_efficient_loading=True: each process shards"):
        check_fsdp(make_accelerator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"torch_compiler": "default"}, "torch_compiler='default'"),
        ({"lora_config": LoraConfig(use_dora=True, target_modules=["q_proj"])}, "lora_config.use_dora=True"),
    ],
)
def test_agents_that_cannot_be_trained_under_fsdp_are_refused(arguments, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DPO(actor_network=make_small_model(), accelerator=make_accelerator(), **arguments)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("is_quantized", True, "is quantised"), ("hf_device_map", {"": 0}, "was loaded with a device_map")],
)
def test_bases_that_fsdp_cannot_shard_are_refused(attribute, value, message) -> None:
    model = make_small_model()
    layers = list(model.model.layers)
    with pytest.raises(ConfigurationError, match="declares no repeated layers"):
        shard_layers(model, [], torch.device("cpu"))
    setattr(model, attribute, value)
    with pytest.raises(ConfigurationError, match=message):
        shard_layers(model, layers, torch.device("cpu"))
