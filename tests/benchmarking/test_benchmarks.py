"""The benchmarks run, at a toy size and without the peers; their figures at this size say nothing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_rows
from throughput import PEER_OPTIONS, chosen_dtype, commands

from evollm import DPO
from evollm.models.loading import precision

FOLDER = Path(__file__).resolve().parents[2] / "benchmarking"
# Two would wait for each other at every operation where tests keep all cores busy.
ONE_THREAD = ("--threads", 1)


@pytest.fixture
def run(warm_python) -> Callable[..., str]:
    def run(script: str, *arguments: object) -> str:
        command = [warm_python, str(FOLDER / script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


def test_throughput_reports_rates_phases_and_the_share_of_the_floor(run, model_folder, tmp_path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
    sizes = ["--num-pairs", 8, "--rounds", 1, "--batch-size", 4, "--population", 3, *ONE_THREAD, "--out", tmp_path]
    output = run("throughput.py", "--pairs", pairs, "--model", model_folder, "--without-peers", *sizes)
    assert "evollm, 3 members" in output
    assert output.splitlines()[2].endswith(", float32")
    results = json.loads((tmp_path / "throughput.json").read_text())["results"]
    assert [result["member_pairs"] for result in results] == [48, 16]
    assert set(results[0]["seconds_phases"]) == {"forward", "backward", "reference", "optimizer", "evaluation"}
    assert all(0 < result["share_of_floor"] < 1 for result in results)


def test_throughput_gives_all_libraries_one_dtype(run, model_folder, tmp_path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
    sizes = ["--num-pairs", 4, "--rounds", 1, "--batch-size", 4, "--epochs", 1, "--population", 2, *ONE_THREAD]
    what = ["--pairs", pairs, "--model", model_folder, "--without-peers", "--dtype", "bfloat16", "--out", tmp_path]
    assert run("throughput.py", *what, *sizes).splitlines()[2].endswith(", bfloat16")
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert found["dtype"] == "bfloat16"
    settings = [result["settings"] for result in found["results"]]
    assert [(one["dtype"], one["lora_dtype"]) for one in settings] == [("torch.bfloat16", "torch.float32")] * 2
    options = SimpleNamespace(batch_size=4, epochs=1, threads=1, population=2, without_peers=False, peers=tmp_path)
    for peer in PEER_OPTIONS:
        (tmp_path / peer / "bin").mkdir(parents=True)
        (tmp_path / peer / "bin" / "python").touch()
    asked = commands(options, str(model_folder), "bfloat16", tmp_path).values()
    assert len(asked) == 2 + len(PEER_OPTIONS)
    assert all(command[command.index("--dtype") + 1] == "bfloat16" for command in asked)


@pytest.mark.parametrize("speedup", [None, 0.5, 8.0])
def test_auto_is_the_dtype_that_an_agent_takes(speedup, model_folder, monkeypatch) -> None:
    if speedup is not None:
        monkeypatch.setattr(precision, "_FEWEST_WEIGHTS", 1)
        monkeypatch.setattr(precision, "speedup", lambda *sizes: speedup)
    taken = DPO(model_name=str(model_folder), dtype="auto", device="cpu").base.network.dtype
    assert chosen_dtype("auto", str(model_folder)) == str(taken).removeprefix("torch.")
    assert chosen_dtype("bfloat16", str(model_folder)) == "bfloat16"


def test_scaling_measures_members_together_and_in_a_loop(run, model_folder, tmp_path) -> None:
    sizes = ["--populations", 2, "--populations-only", "--batch-size", 1, *ONE_THREAD]
    run("scaling.py", "--model", model_folder, *sizes, "--out", tmp_path)
    results = json.loads((tmp_path / "scaling.json").read_text())["results"]
    assert [(result["members"], result["together"]) for result in results] == [(2, True), (2, False)]
    assert all(result["rate"] > 0 for result in results)


def test_growth_measures_the_work_around_the_passes(run) -> None:
    lines = run("growth.py", "--agents", 2, 3, "--layers", 1).splitlines()
    assert lines[1].split() == ["agents", "building", "checkpoint", "evolution", "references"]
    assert [int(line.split()[0]) for line in lines[2:]] == [2, 3]
    assert all(float(seconds) >= 0 for line in lines[2:] for seconds in line.split()[1:])


def test_the_gpu_benchmark_runs_on_a_cpu_at_toy_size(run, tmp_path) -> None:
    output = run("gpu.py", "--toy", "--steps", 1, "--members", 2, "--batch-sizes", 2, "--out", tmp_path)
    assert "CPU, toy size" in output
    results = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [result["case"] for result in results][:3] == ["together", "in a loop", "one"]
    # Two members took a step each, one after the other.
    assert [result["steps"] for result in results][:3] == [1, 2, 1]
    for result in results:
        assert result["rate"] > 0
        assert 0 < result["of_floor"] < 1
        assert result["attention"]
        assert (result["busy"], result["kernels"]) == (None, None), "unknown on a CPU"


def test_gradients_through_4_bit_bases_are_those_of_their_dequantised_weights(run) -> None:
    pytest.importorskip("bitsandbytes")
    lines = run("quantised_gradients.py").splitlines()
    found = {(line[:20].strip(), line[20:28].strip()): float(line.split()[-1]) for line in lines[2:]}
    for kind in ("nf4", "nf4-double", "fp4", "int8, inputs kept"):
        assert max(found[kind, path] for path in ("fast", "plain")) < 1e-5, kind
    assert max(found["int8", path] for path in ("fast", "plain")) < 0.1


def test_ddp_parity_compares_two_processes_with_one(run, model_folder, tmp_path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows(32)))
    sizes = ["--lrs", 1e-3, "--steps", 4, "--population", 2]
    *_, line = run("ddp_parity.py", "--model", model_folder, "--pairs", pairs, *sizes).splitlines()
    lr, largest, of_learnt, lineage, *_ = line.split()
    assert (float(lr), lineage) == (1e-3, "equal")
    assert float(largest) < 1e-4
    assert float(of_learnt) < 1e-3


def test_rounding_shows_the_floor_and_what_swapped_adapters_would_do(run, model_folder) -> None:
    line = run("rounding.py", "--model", model_folder, "--dtypes", "bfloat16", "--lengths", 60).splitlines()[-1].split()
    floor, bound, swapped = (float(value) for value in line[2:5])
    assert 0 < floor < bound < swapped
    assert line[5:] == ["shared_prompt,", "tiled_head,", "stacking"]


def test_grpo_steps_times_members_together_and_one_by_one_and_measures_memory(run, model_folder) -> None:
    sizes = ["--members", 2, "--answers", 2, "--prompt-tokens", 4, "--tokens", 3, "--repeats", 1, *ONE_THREAD]
    output = run("grpo_steps.py", "--model", model_folder, *sizes)
    _, sizes_of_it, one_by_one, together, times, peaks = output.splitlines()
    assert sizes_of_it.startswith("2 prompts x 2 answers, ")
    assert all(line.endswith(" s a step of all members") for line in (one_by_one, together))
    assert times.endswith(" times as fast together")
    assert peaks.startswith("peak of 1 member ")


def test_generation_times_members_together_and_one_by_one_and_measures_memory(run, model_folder) -> None:
    sizes = ["--members", 2, "--prompts", 2, "--prompt-tokens", 4, "--tokens", 3, "--repeats", 1, *ONE_THREAD]
    sizes += ["--prompt-tokens-spread", 3]
    output = run("generation.py", "--model", model_folder, "--temperature", 1, *sizes)
    machine, lengths, one_by_one, together, unpadded, times, times_padded, probes, peaks = output.splitlines()
    assert machine.endswith("torch.float32, 2 members, 2 prompts, sampled at temperature 1")
    assert lengths.endswith(" tokens, answers of 3")
    assert all(line.endswith(" tokens/s") for line in (one_by_one, together, unpadded))
    assert times.endswith(" times as fast together")
    assert times_padded.endswith(" times as fast as unpadded")
    assert probes.startswith("the probes, once: ")
    assert peaks.startswith("peak of 1 member ")
