"""The tutorials run as they are, at a small size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_rows

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


def run(command: list[str], folder: Path) -> str:
    """What a command prints, run in an empty folder."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_several_processes_train_as_the_readme_launches_them(small, tmp_path) -> None:
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("torchrun ")]
    launcher, *words = line.split()
    torchrun = shutil.which(launcher, path=str(Path(sys.executable).parent))
    assert torchrun
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    sizes = [f"--{name}={path}" for name, path in small.items()] + ["--pairs-per-process=1"]
    output = run([torchrun, *words, *sizes], tmp_path / "here")
    assert output.count("Held-out accuracy") == 1
    assert len(json.loads((tmp_path / "here/several-processes/metrics.jsonl").read_text().splitlines()[0])) > 1
