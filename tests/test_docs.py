"""The documentation site builds without a warning, and says what the code says."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from documented import blocks
from tokenizers_for_tests import chatml_tokenizer

import evollm
from evollm import demo
from evollm.algorithms.losses import LOSSES
from evollm.demo import demo_pairs
from evollm.runs import events
from evollm.tracking import TRACKERS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def page_blocks(page: str, language: str) -> list[str]:
    return blocks((DOCS / page).read_text(encoding="utf-8"), language)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra docs is not installed")
def test_the_site_builds_without_warnings(tmp_path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    reference = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site/api").rglob("index.html"))
    public = [name for name in evollm.__all__ if not name.endswith("Error")]
    assert [name for name in public if f'id="evollm.{name}"' not in reference] == []


def test_the_python_of_the_quickstart_runs(make_model, tmp_path, monkeypatch) -> None:
    """Word for word, with a small model and a part of the pairs; the first block writes the files."""
    monkeypatch.chdir(tmp_path)
    make_model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    chatml_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(demo, "demo_pairs", lambda split: demo_pairs(split)[:8])
    namespace: dict[str, object] = {}
    for block in page_blocks("quickstart.md", "python"):
        exec(block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "model"), namespace)
    assert len(namespace["accuracies"]) == 4


def test_all_python_of_the_pages_compiles() -> None:
    for page in DOCS.glob("*.md"):
        for block in page_blocks(page.name, "python"):
            compile(block, str(page), "exec")


def test_every_loss_and_tracker_and_callback_has_its_line() -> None:
    losses, tracking = ((DOCS / page).read_text(encoding="utf-8") for page in ("losses.md", "tracking.md"))
    assert re.findall(r"^\| `(\w+)` \|", losses, re.MULTILINE) == ["loss_type", *LOSSES]
    methods = [name for name, _ in inspect.getmembers(evollm.Callback, inspect.isfunction)]
    assert len(methods) > 6
    assert [name for name in methods if f"| `{name}` |" not in tracking] == []
    assert [name for name in TRACKERS if f'| `"{name}"` |' not in tracking] == []
    assert [name for name in TRACKERS if f"`evollm[{name}]`" not in (DOCS / "install.md").read_text()] == []


def test_every_field_of_an_event_is_documented() -> None:
    names = ("RunStarted", "StepDone", "Evaluated", "Evolved", "Checkpointed", "RunEnded")
    for event in (getattr(events, name) for name in names):
        assert [one.name for one in fields(event) if f"{one.name}: " not in (event.__doc__ or "")] == []


def test_every_tutorial_is_listed_and_its_name_exists() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", (DOCS / "tutorials.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "tutorials").glob("*.py"))


def test_the_arguments_in_the_table_for_trls_users_exist() -> None:
    places = {
        **{"DPO": evollm.DPO, "PreferenceGym": evollm.PreferenceGym, "SFTGym": evollm.SFTGym},
        "loop": evollm.finetune_llm_preference,
    }
    text = (DOCS / "from_trl.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| (`.*?`)[^|]*\| `?(DPO|PreferenceGym|SFTGym|loop)\b", text, re.MULTILINE)
    assert len(rows) >= 30
    for names, place in rows:
        known = inspect.signature(places[place]).parameters
        assert [name for name in re.findall(r"`(\w+)`", names) if name not in known] == []
