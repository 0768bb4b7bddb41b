"""Runs that were begun with relative paths, used from elsewhere."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import PeftModel
from tokenizers_for_tests import chatml_tokenizer
from transformers import AutoModelForCausalLM

from evollm import DPO, ConfigurationError, tune
from evollm.models.adapters.merging import all_logprobs
from evollm.models.loading.pretrained import load_tokenizer
from evollm.runs import read_run
from evollm.tuning.arguments_file import arguments_to_resume
from evollm.tuning.winner import export, open_winner

SHORT: dict[str, Any] = {
    **{"population": 2, "generations": 2, "num_epochs": 1, "data_batch_size_per_gpu": 8, "lr": 1e-3},
    **{"lora_config": {"r": 4, "target_modules": ["q_proj"]}, "num_sample_answers": 0, "verbose": False},
}


@pytest.fixture
def workplace(make_model, tmp_path, monkeypatch) -> Path:
    """A folder with a base and rows, in which one is."""
    # Drawing a report takes longer than these runs.
    monkeypatch.setattr(importlib.import_module("evollm.tuning.tune"), "write_report", lambda run_dir: None)
    (tmp_path / "first").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "first")
    make_model().save_pretrained("base")
    chatml_tokenizer().save_pretrained("base")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    return tmp_path


def logprobs_of(agent: Any) -> torch.Tensor:
    with agent.base.active(agent.actor_adapter) as network:
        return all_logprobs(network)


def test_a_run_that_was_begun_with_relative_paths_is_used_from_anywhere(workplace, monkeypatch) -> None:
    tune("base", ["rows.jsonl"], run_dir="run", cache_dir="cache", tokenizer="base", elite_path="run/best", **SHORT)
    monkeypatch.chdir(workplace / "elsewhere")
    run = "../first/run"
    asked = arguments_to_resume(run)
    at = str(workplace / "first")
    assert (asked["model"], asked["tokenizer"], asked["data"]) == (f"{at}/base", f"{at}/base", [f"{at}/rows.jsonl"])
    assert asked["elite_path"] == f"{at}/run/best"
    assert read_run(run).config["base"] == f"{at}/base"
    total = read_run(run).config["schedule"]["total"]

    winner = open_winner(run)
    assert isinstance(winner.answer("Question", 2, tuned=True), str)
    export(run, "merged")
    export(run, "adapter", "adapter")
    expected = logprobs_of(winner.agent)
    named = json.loads(Path("adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    plain = AutoModelForCausalLM.from_pretrained(named)
    found = all_logprobs(PeftModel.from_pretrained(plain, "adapter").eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(logprobs_of(DPO.load(f"{run}/best")), expected)
    tune(**{**asked, "num_epochs": 2}, resume_from_checkpoint=run)
    assert read_run(run).config["schedule"]["total"] == 2 * total


def test_a_base_that_was_moved_is_one_line_and_is_found_where_it_is_given(workplace, monkeypatch) -> None:
    tune("base", "rows.jsonl", run_dir="run", **SHORT)
    shutil.move("base", workplace / "moved")
    for use in (open_winner, lambda run: DPO.load(f"{run}/elite"), lambda run: tune(**arguments_to_resume(run))):
        with pytest.raises(ConfigurationError, match=r"/base'.*no such folder.*moved") as error:
            use("run")
        assert "\n" not in str(error.value)
    assert open_winner("run", model=str(workplace / "moved")).agent.steps > 0
    monkeypatch.chdir(workplace / "elsewhere")
    asked = {**arguments_to_resume("../first/run"), "model": "../moved", "num_epochs": 2}
    tune(**asked, resume_from_checkpoint="../first/run")


def test_a_loaded_model_of_a_relative_name_is_found_from_anywhere(workplace, monkeypatch) -> None:
    agent = DPO(actor_network=AutoModelForCausalLM.from_pretrained("base"))
    agent.save_checkpoint("agent")
    monkeypatch.chdir(workplace / "elsewhere")
    loaded = DPO.load("../first/agent")
    assert loaded.base.name == str(workplace / "first" / "base")
    assert torch.equal(logprobs_of(loaded), logprobs_of(agent))


def test_the_folder_of_an_adapter_takes_the_tokenizer_of_its_base(workplace, monkeypatch) -> None:
    tune("base", "rows.jsonl", run_dir="run", **SHORT)
    export("run", "adapter", "adapter")
    monkeypatch.chdir(workplace / "elsewhere")
    assert not any("token" in name for name in os.listdir("../first/adapter"))
    tokenizer = load_tokenizer("../first/adapter")
    assert tokenizer.get_vocab() == chatml_tokenizer().get_vocab()
    tune("../first/adapter", "../first/rows.jsonl", run_dir="next", **SHORT)
    assert open_winner("next").tokenizer.chat_template == tokenizer.chat_template
    # One of its own comes first.
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained("../first/adapter")
    assert load_tokenizer("../first/adapter").chat_template == "{{ messages }}"


def test_an_adapter_whose_base_is_gone_says_so(workplace) -> None:
    agent = DPO(model_name="base")
    agent.save_checkpoint("agent")
    shutil.rmtree("base")
    with pytest.raises(ConfigurationError, match=r"/base'.*no such folder"):
        load_tokenizer("agent/actor")
