"""The tutorials run as they are, at a small size."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_examples, make_rows
from safetensors.torch import load_file

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
def test_several_processes_train_as_the_readme_launches_them(small, tmp_path, start) -> None:
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(start)]
    *variables, line = line.split(" ", maxsplit=1) if "=" in start else [line]
    launcher, *words = line.split()
    torchrun = shutil.which(launcher, path=str(Path(sys.executable).parent))
    assert torchrun
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    sizes = [f"--{name}={path}" for name, path in small.items()] + ["--pairs-per-process=1"]
    output = run([torchrun, *words, *sizes], tmp_path / "here", **dict(variable.split("=") for variable in variables))
    assert output.count("Held-out accuracy") == 1
    assert len(json.loads((tmp_path / "here/several-processes/metrics.jsonl").read_text().splitlines()[0])) > 1


def test_sft_then_dpo_runs_three_stages_each_from_the_one_before(small, tmp_path) -> None:
    files = {"sft": make_examples(16), "preferences": make_rows(16)}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [f"--model={small['model']}", "--steps=2", *(f"--{name}={tmp_path / name}.jsonl" for name in files)]
    output = run([sys.executable, str(ROOT / "tutorials/sft_then_dpo.py"), *sizes], tmp_path / "here")
    assert output.count("Held-out loss on 8 selection examples") == 1
    assert output.count("Held-out accuracy on 8 selection pairs: 0.500 ->") == 2
    stages = tmp_path / "here/stages"
    for before, after in (("sft", "dpo-1"), ("dpo-1", "dpo-2")):
        actor, reference = (
            load_file(stages / run / "elite" / role / "adapter_model.safetensors")
            for run, role in ((before, "actor"), (after, "reference"))
        )
        assert all(torch.equal(tensor, actor[name]) for name, tensor in reference.items())
