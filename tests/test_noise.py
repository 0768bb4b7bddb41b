"""No command, and no call of the library, says what nobody can act on: bars and remarks of other libraries."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
from conftest import make_rows
from tokenizers_for_tests import chatml_tokenizer
from transformers.utils import logging as transformers_log

from evollm import cli
from evollm.commands import recipes
from evollm.quiet import quiet

NOISE = re.compile(r"Warning|deprecat|it/s|\d%\||Loading weights|Writing model|Failed to load|MatMul|Traceback", re.I)
SMALL = "lora_config.r=4 data_batch_size_per_gpu=8 num_epochs=1 population=2 generations=2 num_sample_answers=1"
COMMANDS = (
    "inspect train.jsonl --model model --estimate",
    f"validate --recipe population model=model data=train.jsonl {SMALL}",
    f"train --recipe population model=model data=train.jsonl run_dir=run {SMALL}",
    "resume run num_epochs=2",
    "report run --no-pictures",
    "chat run --prompt hello --max-new-tokens 4",
    "export run --to merged",
    "replay run --run-dir replay",
    "recipes",
)
EIGHT_BIT = "model_config.quantization_config.load_in_8bit=true"
LIBRARY = """
import evollm
settings = {"population": 2, "lora_config": {"r": 4}, "data_batch_size_per_gpu": 8, "max_steps": 2, "verbose": False}
result = evollm.tune("model", "train.jsonl", generations=2, run_dir="run", num_sample_answers=1, **settings)
evollm.save_merged_model(result.best, "merged")
evollm.DPO.load("run/elite")
evollm.inspect_data("train.jsonl", "model")
"""


@pytest.fixture
def folder(make_model, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # bitsandbytes quantises blocks of 64 values.
    make_model(hidden_size=64, intermediate_size=128).save_pretrained("model")
    chatml_tokenizer().save_pretrained("model")
    rows = [{"instruction": row.pop("prompt"), **row} for row in make_rows(40)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def python(program: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def ran(*commands: str) -> subprocess.CompletedProcess[str]:
    """The commands, one after the other in a process of their own."""
    return python(f"from evollm.cli import main\nfor line in {commands}:\n    assert main(line.split()) == 0, line")


def noise_in(said: str) -> list[str]:
    """Lines that nobody can act on. That few rows are held out is no such line."""
    return [line for line in said.splitlines() if NOISE.search(line) and "Few held-out pairs" not in line]


def test_no_command_says_what_nobody_can_act_on(folder) -> None:
    said = ran(*COMMANDS)
    assert said.stderr == ""
    assert "bit for bit" in said.stdout
    assert noise_in(said.stdout) == []


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra quantization is missing")
def test_an_8_bit_base_is_as_quiet(folder) -> None:
    said = ran(f"train --recipe population model=model data=train.jsonl {EIGHT_BIT} {SMALL}")
    assert [line for line in said.stderr.splitlines() if not line.startswith("evollm: warning: model: ")] == []
    assert noise_in(said.stdout) == []


def test_the_library_prints_nothing_of_other_libraries(folder) -> None:
    said = python(LIBRARY)
    assert (said.stdout, said.stderr) == ("", "")


def test_loading_is_quiet_and_everything_is_as_before_afterwards() -> None:
    def state() -> tuple[object, ...]:
        return (
            transformers_log.get_verbosity(),
            transformers_log.is_progress_bar_enabled(),
            datasets.are_progress_bars_disabled(),
        )

    verbosity = transformers_log.get_verbosity()
    try:
        for level, inside in ((logging.WARNING, logging.ERROR), (logging.INFO, logging.INFO)):
            transformers_log.set_verbosity(level)
            before = state()
            with quiet():
                assert state() == (inside, False, True)
                with quiet():
                    pass
                assert state() == (inside, False, True)
            assert state() == before
    finally:
        transformers_log.set_verbosity(verbosity)


@pytest.mark.parametrize(("options", "shown"), [([], ["ours is"]), (["default"], ["ours is", "theirs is"])])
def test_a_warning_of_ours_is_one_line_and_others_are_hidden(options, shown, monkeypatch, capsys) -> None:
    def warn() -> list[str]:
        warnings.simplefilter("always")
        for module, text in (("evollm.made.up", "ours is\nsaid"), ("other", "theirs is\nsaid")):
            # Whatever file a warning names, as `stacklevel` does.
            exec("import warnings; warnings.warn(text, UserWarning, stacklevel=2)", {"__name__": module, "text": text})
        return []

    monkeypatch.setattr(recipes, "recipe_names", warn)
    monkeypatch.setattr(sys, "warnoptions", options)
    usual = warnings.showwarning
    assert cli.main(["recipes"]) == 0
    assert capsys.readouterr().err.splitlines() == [f"evollm: warning: {text} said" for text in shown]
    assert warnings.showwarning is usual
