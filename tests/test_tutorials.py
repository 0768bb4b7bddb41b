"""The tutorials run as they are, at a small size."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_examples, make_rows
from safetensors.torch import load_file

from evollm import tune

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small(make_model, tokenizer, tmp_path) -> dict[str, Path]:
    """A model and files of pairs, as a user would have them."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = {"model": tmp_path / "model"}
    for name, rows in (("train", make_rows(8)), ("test", make_rows(4, 8))):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What a command prints, run in an empty folder."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def tutorial(warm_python, small, tmp_path) -> Callable[..., str]:
    """What a tutorial prints with the small model and pairs."""

    def tutorial(name: str, *arguments: str) -> str:
        files = [f"--{option}={path}" for option, path in small.items()]
        return run([warm_python, str(ROOT / f"tutorials/{name}.py"), *files, *arguments], tmp_path / "here")

    return tutorial


@pytest.mark.parametrize(
    "start",
    [
        "torchrun ",
        pytest.param(
            "DS_ACCELERATOR=cpu torchrun ",
            marks=[
                pytest.mark.deepspeed,
                pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
            ],
        ),
    ],
)
def test_several_processes_train_as_the_docs_launch_them(warm_python, small, tmp_path, start) -> None:
    lines = (ROOT / "docs/processes.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(start) and "tutorials/" in line]
    *variables, line = line.split(" ", maxsplit=1) if "=" in start else [line]
    launcher, *words = line.split()
    torchrun = shutil.which(launcher, path=str(Path(sys.executable).parent))
    assert torchrun
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    sizes = [f"--{name}={path}" for name, path in small.items()] + ["--pairs-per-process=1"]
    given = {"PYTHON_EXEC": warm_python, **dict(variable.split("=") for variable in variables)}
    output = run([torchrun, *words, *sizes], tmp_path / "here", **given)
    assert output.count("Held-out accuracy") == 1
    assert len(json.loads((tmp_path / "here/several-processes/metrics.jsonl").read_text().splitlines()[0])) > 1


def test_sft_then_dpo_runs_three_stages_each_from_the_one_before(warm_python, small, tmp_path) -> None:
    files = {"sft": make_examples(16), "preferences": make_rows(16)}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [f"--model={small['model']}", "--steps=2", *(f"--{name}={tmp_path / name}.jsonl" for name in files)]
    output = run([warm_python, str(ROOT / "tutorials/sft_then_dpo.py"), *sizes], tmp_path / "here")
    assert output.count("Held-out loss on 8 selection examples") == 1
    assert output.count("Held-out accuracy on 8 selection pairs: 0.500 ->") == 2
    stages = tmp_path / "here/stages"
    for before, after in (("sft", "dpo-1"), ("dpo-1", "dpo-2")):
        actor, reference = (
            load_file(stages / run / "elite" / role / "adapter_model.safetensors")
            for run, role in ((before, "actor"), (after, "reference"))
        )
        assert all(torch.equal(tensor, actor[name]) for name, tensor in reference.items())


def test_own_answers_make_the_pairs_of_rounds_each_from_the_one_before(tutorial, tmp_path) -> None:
    output = tutorial("own_answers", "--rounds=2", "--tokens=6")
    assert re.findall(r"^Round (\d): [1-8] pairs of answers of its own\.$", output, re.MULTILINE) == ["1", "2"]
    rounds = tmp_path / "here/own-answers"
    actor, reference = (
        load_file(rounds / folder / "elite" / role / "adapter_model.safetensors")
        for folder, role in (("round-1", "actor"), ("round-2", "reference"))
    )
    assert all(torch.equal(tensor, actor[name]) for name, tensor in reference.items())


def test_sft_dpo_grpo_hands_on_the_actor_and_rewards_answers(warm_python, small, tmp_path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(16)))
    sizes = [f"--model={small['model']}", "--steps=2", "--tokens=6", f"--preferences={tmp_path / 'pairs.jsonl'}"]
    output = run([warm_python, str(ROOT / "tutorials/sft_dpo_grpo.py"), *sizes], tmp_path / "here")
    assert "stage 3 begins at stage 2's actor: True" in output
    assert "Held-out mean reward on 8 selection prompts" in output


def test_first_run_shows_losses_and_files(tutorial, small, tmp_path) -> None:
    output = tutorial("first_run", "--steps=2")
    assert "Held-out accuracy on 4 selection pairs: 0.500 ->" in output
    assert "Loss of the first and last batch:" in output
    assert "Files: checkpoints, config.json, elite, " in output


def test_own_data_says_what_became_of_each_row(tutorial, small, tmp_path) -> None:
    def messages(row: dict[str, str]) -> dict[str, object]:
        sides = {side: [{"role": "assistant", "content": row[side].strip()}] for side in ("chosen", "rejected")}
        return {"prompt": [{"role": "user", "content": row["prompt"]}], **sides}

    rows = [messages(row) for row in make_rows(8)]
    rows[3]["rejected"] = rows[3]["chosen"]
    small["train"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tutorial("own_data", "--steps=1")
    assert "7 rows kept, 1 dropped\n  1 x chosen == rejected: rows (3,)" in output
    assert "### user\nQuestion 0 by Ann:\n### assistant\nyes, Ann</s>" in output
    assert (tmp_path / "here/own-data/elite").is_dir()


def test_search_of_eight_compares_at_equal_member_steps(tutorial, small, tmp_path) -> None:
    sizes = ("--population=3", "--generations=2", "--evo-steps=1", f"--final={tmp_path / 'final.jsonl'}")
    (tmp_path / "final.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(5, 20)))
    output = tutorial("search_of_eight", *sizes)
    lines = {
        kind: [
            json.loads(line) for line in (tmp_path / "here/search" / kind / "metrics.jsonl").read_text().splitlines()
        ]
        for kind in ("population", "single")
    }
    assert [sum(line["kind"] == "step" for line in lines[kind]) for kind in lines] == [6, 6]
    assert "On 5 final pairs, after 6 member-steps each:" in output
    assert len(re.findall(r"^  agent \d+: lr \S+, beta \S+$", output, re.MULTILINE)) == 2


def test_a_search_of_ones_own_is_killed_resumed_replayed_and_drawn(tutorial, small, tmp_path, monkeypatch) -> None:
    script = ROOT / "tutorials/own_search.py"
    files = [f"--{option}={path}" for option, path in small.items()]
    sizes = ["--steps=4", "--evo-steps=1", "--population=3"]
    (tmp_path / "here").mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), *files, *sizes], cwd=tmp_path / "here", stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "here/own-search/checkpoints/step-000002").is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "here/own-search/elite").exists()
    output = tutorial("own_search", *sizes, "--resume")
    assert "resumed after step" in output
    assert "again by itself: the same bits" in output
    assert "family-tree" in (tmp_path / "here/own-search/report.html").read_text()

    # The same search from the same file, in one go and undrawn.
    monkeypatch.setattr(importlib.import_module("evollm.tuning.tune"), "write_report", lambda run_dir: run_dir)
    spec = importlib.util.spec_from_file_location("own_search", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_search"] = module
    spec.loader.exec_module(module)
    tune(
        str(small["model"]),
        str(small["train"]),
        test_data=str(small["test"]),
        final_data=False,
        data_batch_size_per_gpu=4,
        population=3,
        search=module.Truncation(),
        evo_steps=1,
        max_steps=4,
        run_dir=tmp_path / "whole",
        num_sample_answers=0,
        verbose=False,
    )
    for name in ("lineage.jsonl", "elite/actor/adapter_model.safetensors"):
        assert (tmp_path / "here/own-search" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    births = [json.loads(line)["births"] for line in (tmp_path / "whole/lineage.jsonl").read_text().splitlines()]
    assert [len(found) for found in births] == [3, 3, 3, 1]
    assert [birth["index"] for birth in births[1] if birth["parent"] is None] == [4]


def test_qlora_evolves_four_agents_on_a_base_in_4_bits(tutorial, small, tmp_path, make_model) -> None:
    pytest.importorskip("bitsandbytes")
    # Large enough that quantised weights fill whole blocks.
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(small["model"])
    output = tutorial("qlora", "--steps=3")
    assert "MiB in 4 bits" in output
    lineage = (tmp_path / "here/qlora/lineage.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lineage] == ["founders", "evolution", "evolution"]


def test_coming_from_trl_writes_what_the_trainer_would(tutorial, small, tmp_path) -> None:
    tutorial("coming_from_trl", "--steps=2")
    folder = tmp_path / "here/from-trl"
    assert (folder / "final/actor/adapter_model.safetensors").is_file()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_coming_from_agilerl_evolves_under_agilerls_names(tutorial, small, tmp_path) -> None:
    output = tutorial("coming_from_agilerl", "--steps=2")
    assert "best accuracy" in output
    assert (tmp_path / "here/from-agilerl/adapter/adapter_config.json").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "tutorials").glob("*.py")), ids=lambda path: path.stem)
def test_every_tutorial_says_how_to_run_it(path, tmp_path) -> None:
    text = path.read_text()
    assert f"tutorials/{path.name}" in text.split('"""')[1]
    assert "parser.parse_args()" in text
    assert "description=__doc__" in text
