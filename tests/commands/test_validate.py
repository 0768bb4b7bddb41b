"""`evollm validate` refuses what `evollm train` would refuse, with the same line, and says how long a run takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_examples, make_rows
from quick_page import quick_page
from tokenizers_for_tests import chatml_tokenizer

from evollm.checkpoints import only_writer
from evollm.cli import main
from evollm.inspection.forecast import usual_pairs
from evollm.report import write
from evollm.tuning import rehearsal, validate
from evollm.tuning.request import request_of
from evollm.tuning.setup import set_up

RUN = (
    "model=model",
    "data=train.jsonl",
    "population=2",
    "generations=2",
    "num_epochs=1",
    "data_batch_size_per_gpu=8",
    "lora_config.r=4",
    "lora_config.target_modules=[q_proj]",
    "num_sample_answers=0",
    "verbose=false",
)
# Where root has every right and no file can be.
NO_FILES = "/proc/nowhere"


@pytest.fixture
def folder(make_model, tmp_path, monkeypatch) -> Path:
    """A working folder with a small model and small data."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    chatml_tokenizer().save_pretrained("model")
    for name, rows in (("train", make_rows(40)), ("examples", make_examples(40)), ("one", make_rows(1))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("file").write_text("somebody's")
    Path("full").mkdir()
    Path("full/metrics.jsonl").write_text('{"kind": "step"}\n')
    Path("lines.yaml").write_text("model: model\n")
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    return tmp_path


# Overrides, and how the line begins that says why.
BAD = (
    ("lr=-1", "lr=-1: must be"),
    ("learning_rate=1", "learning_rate=1: is no parameter"),
    ("num_epochs=0", "num_epochs=0: must be"),
    ("population=1", "generations=2: one agent does not evolve"),
    ("generations=90", "generations=90: the run has 4 steps only"),
    ("data=none.jsonl", "data='none.jsonl': no such file"),
    ("data=one.jsonl", "data="),
    ("data=examples.jsonl", "data="),
    ("test_data=none.jsonl", "test_data='none.jsonl': no such file"),
    ("test_data=false", "test_dataset=None: evolution needs held-out rows"),
    ("model=./none", "model='./none': no such folder"),
    ("model=full", "model="),
    ("tokenizer=./none", "tokenizer='./none': no such folder"),
    ("start_from=none", ".*/none is not an agent's checkpoint"),
    ("device=nowhere", "device='nowhere'"),
    ("dtype=halves", "dtype='halves'"),
    ("loss_type=nosuch", "loss_type"),
    ("beta=0", "beta=0"),
    ("hp_config.lr=[1e-3, 1e-4]", "hp_config.lr.min"),
    ("hp_config={loss_type: [sigmoid, nosuch]}", "hp_config"),
    ("hp_config={batch_size: {min: 1, max: 64, dtype: int}}", "hp_config.batch_size.max=64: an optimizer step has"),
    ("batch_size=32", "batch_size=32: an optimizer step has at most the 8 rows of a batch: raise data_batch_size"),
    ("lora_config.target_modules=[nosuch]", "lora_config"),
    ("lora_config.lora_alpha=0", "lora_config"),
    ("lora_config.rank=8", "lora_config.rank=8: is no parameter"),
    ("tournament_size=0", "tournament_size=0"),
    ("rl_hp=-1", "rl_hp=-1"),
    ("max_context_length=3", "max_context_length=3"),
    ("report_to=wandb", 'report_to="wandb" needs the package wandb: pip install "evollm[wandb]"'),
    ("report_to=[trackio, tensorboard]", 'report_to="trackio" needs the package trackio'),
    ("wb=true", 'report_to="wandb" needs the package wandb'),
    ("report_to=nosuch", "report_to='nosuch': 'nosuch' is no tracker"),
    ("run_dir=file/run", "run_dir='file/run/config.json': cannot be written: "),
    (f"run_dir={NO_FILES}/run", f"run_dir='{NO_FILES}/run/config.json': cannot be written: "),
    ("run_dir=full", "run_dir='full': holds metrics.jsonl, which evollm did not write"),
    (f"checkpoint_path={NO_FILES}", f"checkpoint_path='{NO_FILES}/checkpoints': cannot be written: "),
    (f"elite_path={NO_FILES}", f"elite_path='{NO_FILES}': cannot be written: "),
    ("elite_path=file", "elite_path='file': holds something else"),
    ("resume_from_checkpoint=full", "resume_from_checkpoint='full': is no run folder"),
)


def first_line(capsys, *command: str) -> str:
    """What a command says that fails."""
    status, said = main(list(command)), capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith("evollm: warning: ")]
    assert (status, len(lines)) == (1, 1), (status, said)
    assert "Everything fits" not in said.out
    return lines[0]


@pytest.mark.parametrize(("change", "why"), BAD, ids=[change for change, _ in BAD])
def test_validate_refuses_what_train_refuses_with_the_same_line(folder, capsys, change, why) -> None:
    there = sorted(folder.rglob("*"))
    lines = [first_line(capsys, command, "lines.yaml", *RUN, change) for command in ("validate", "train")]
    assert lines[0] == lines[1]
    assert re.match(f"evollm: {why if why.startswith('.*') else re.escape(why)}", lines[0])
    assert len(lines[0]) < 1000
    # And neither has written anything.
    assert sorted(folder.rglob("*")) == there


def test_a_default_folder_that_cannot_be_written_is_refused_too(folder, capsys) -> None:
    Path("evollm-runs").write_text("no folder")
    lines = [first_line(capsys, command, "lines.yaml", *RUN) for command in ("validate", "train")]
    assert lines[0].split("'")[2] == lines[1].split("'")[2]
    assert "evollm-runs is no folder" in lines[0]


def test_a_folder_that_a_run_writes_to_is_refused(folder, capsys) -> None:
    Path("run").mkdir()
    with only_writer(Path("run"), what=Path("run")):
        lines = [first_line(capsys, command, "lines.yaml", *RUN, "run_dir=run") for command in ("validate", "train")]
    assert lines == ["evollm: another process is writing to run: wait for it, or give another folder"] * 2


def test_a_run_to_go_on_with_is_checked_against_its_checkpoint(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(write, "render", quick_page)
    assert main(["train", "lines.yaml", *RUN, "run_dir=run", "max_steps=2"]) == 0
    shutil.copytree("run", "kept")
    capsys.readouterr()
    resume = ("resume_from_checkpoint=run", "generations=null")
    lines = [first_line(capsys, name, "lines.yaml", *RUN, *resume, "nll_alpha=0.9") for name in ("validate", "train")]
    assert lines[0] == lines[1]
    assert "nll_alpha" in lines[0]
    assert main(["validate", "lines.yaml", *RUN, *resume, "max_steps=4"]) == 0
    assert re.search(r"^time: about \d+ s on this machine, of which 2 steps are left", capsys.readouterr().out, re.M)
    # It has not gone on.
    assert Path("run/metrics.jsonl").read_bytes() == Path("kept/metrics.jsonl").read_bytes()
    assert len(os.listdir("run/checkpoints")) == len(os.listdir("kept/checkpoints"))


def test_validate_says_how_long_a_run_takes_and_how_that_was_measured(make_model, tokenizer, monkeypatch) -> None:
    lora = {"r": 2, "target_modules": ["q_proj"]}
    arguments = {"tokenizer": tokenizer, "lora_config": lora, "population": 2, "generations": 2}
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = validate(model, make_rows(60), **arguments)
    assert re.search(
        r"^time: about \d+ s on this machine, .* \(2 agents learnt from \d+ tokens in \S+ s\)$", said, re.M
    )
    after = model.state_dict()
    assert all(
        tensor.equal(after[name if name in after else name.replace(".weight", ".base_layer.weight")])
        for name, tensor in before.items()
    )

    # One second for a token of a step; what is only scored costs a third, and references are made once for both.
    monkeypatch.setattr(rehearsal, "_seconds_per_token", lambda *_: (1.0, "measured"))
    setup = set_up(request_of(make_model(), make_rows(60), **arguments))
    splits = (setup.env.train_pairs, setup.env.test_pairs, setup.env.final_pairs)
    train, test, final = (sum(pair.num_tokens for pair in pairs) for pairs in splits)
    assert (setup.schedule.total, setup.schedule.epoch) == (12, 6)
    # One of the two makes the second half.
    seconds = 1.5 * train + (1.5 * test + (3 * final + train + test + final) / 2) / 3
    assert f"about {rehearsal.rough_duration(seconds)} on" in rehearsal.rehearse(setup)


def test_few_rows_are_timed_where_a_step_would_take_long(make_model, tokenizer, monkeypatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(rehearsal, "learn_all", lambda _, batch: sizes.append(len(batch)))
    lora = {"r": 2, "target_modules": ["q_proj"]}
    arguments = {"tokenizer": tokenizer, "lora_config": lora, "population": 1, "data_batch_size_per_gpu": 32}
    setup = set_up(request_of(make_model(), make_rows(90), **arguments))
    few = len(usual_pairs(setup.env.train_pairs, rehearsal.TIMED_TOKENS))
    assert 1 < few < 32
    for quick, expected in ((0.0, [few, few]), (1e9, [few, few, 32, 32])):
        monkeypatch.setattr(rehearsal, "QUICK", quick)
        sizes.clear()
        rehearsal._seconds_per_token(setup.agents, setup.env.train_pairs, setup.env.batch_size)
        assert sizes == expected


def test_validate_leaves_the_generators_as_they_were(make_model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(rehearsal, "learn_all", lambda *_: torch.rand(3))
    lora = {"r": 2, "target_modules": ["q_proj"]}
    setup = set_up(request_of(make_model(), make_rows(20), tokenizer=tokenizer, population=1, lora_config=lora))
    state = torch.get_rng_state()
    rehearsal.rehearse(setup)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_export_target_that_takes_no_files_is_refused_before_anything_is_read(folder, capsys) -> None:
    assert first_line(capsys, "export", "full", "--to", NO_FILES).startswith(f"evollm: to='{NO_FILES}': cannot be")
