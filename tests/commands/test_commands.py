from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_examples, make_rows
from peft import PeftModel
from tokenizers_for_tests import chatml_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import load_policy_archive
from evollm.cli import main
from evollm.commands import COMMANDS
from evollm.execution import worker as worker_module
from evollm.recipes import recipe_names
from evollm.runs import read_run
from evollm.tuning.arguments_file import arguments_to_resume

# Over every recipe: a run of seconds.
SMALL = (
    "lora_config.r=4",
    "lora_config.target_modules=[q_proj, v_proj]",
    "data_batch_size_per_gpu=8",
    "num_epochs=1",
    "num_sample_answers=0",
    "verbose=false",
)


@pytest.fixture
def folder(make_model, tmp_path, monkeypatch) -> Path:
    """A working folder with a small model and small data."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    chatml_tokenizer().save_pretrained("model")
    for name, rows in (("train", make_rows(40)), ("examples", make_examples(40))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def train(*arguments: str) -> int:
    return main(["train", *arguments, "model=model", *SMALL])


@pytest.fixture
def finished(folder) -> str:
    Path("run.yaml").write_text(
        "data: train.jsonl\npopulation: 2\ngenerations: 2\nsearch: tournament\nlr: 1e-3\nrun_dir: run\n"
    )
    assert train("run.yaml") == 0
    return "run"


def test_every_command_explains_itself_with_an_example(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    names = [module.__module__.rpartition(".")[2] for module in COMMANDS]
    for name in names:
        assert f"    {name} " in listed
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert f"example:\n  evollm {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in ("qlora", "dpo-after-sft")])
def test_a_recipe_runs(folder, name) -> None:
    small = () if name == "dpo" else ("population=2", "generations=2")
    assert train("--recipe", name, *small, "run_dir=run") == 0
    assert (folder / "run/elite/actor/adapter_model.safetensors").is_file()


def test_the_recipes_of_a_chain_run_one_after_the_other(folder) -> None:
    assert train("--recipe", "sft", "population=2", "generations=2") == 0
    assert train("--recipe", "dpo-after-sft", "population=2", "generations=2", "run_dir=run") == 0
    assert read_run("run").config["algorithm"] == "DPO"


def test_the_quantised_recipe_runs(folder) -> None:
    pytest.importorskip("bitsandbytes")
    small = ("population=2", "generations=2", "max_steps=2", "run_dir=run", "model_config.dtype=float32")
    compute = "model_config.quantization_config.bnb_4bit_compute_dtype=float32"
    assert train("--recipe", "qlora", *small, compute) == 0
    assert len(read_run("run").config["agents"]) == 2


def test_validate_says_what_train_would_do_and_does_not_do_it(folder, capsys) -> None:
    arguments = ["--recipe", "population", "model=model", "generations=4", "run_dir=run", *SMALL]
    assert main(["validate", *arguments]) == 0
    said = capsys.readouterr().out
    for line in ("train: 32 pairs kept", "test: 4 pairs kept", "final: 4 pairs kept", "steps: 4 of 8 pairs, 1 epochs"):
        assert line in said
    assert "search: Racing, which first decides after 1 steps" in said
    assert "lr: 2.0e-5 to 0.001" in said
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "dpo", "learning_rate=1"], "learning_rate=1: is no parameter; the nearest known one is 'lr'"),
        (["--recipe", "population", "num_epochs=no"], "num_epochs='no': must be a whole number or null"),
        (["--recipe", "poplation"], "recipe='poplation': is none of those"),
        (["none.yaml"], "config='none.yaml': cannot be read"),
        ([], "config=None: give a YAML file"),
        (["--recipe", "dpo", "data=none.jsonl"], "data='none.jsonl': no such file"),
        (["--recipe", "dpo", "data="], "data=None: recipe dpo does not say it"),
        (["--recipe", "dpo", "model=./elsewhere"], "model='./elsewhere': no such folder"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["train", "validate"])
def test_a_mistake_is_one_line_and_status_1(folder, capsys, command, arguments, message) -> None:
    model = [] if any(argument.startswith("model=") for argument in arguments) or not arguments else ["model=model"]
    if arguments == ["none.yaml"]:
        model = []
    assert main([command, *arguments, *model]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"evollm: {message}")
    assert "Traceback" not in error


def test_the_home_folder_may_be_written_as_a_tilde_everywhere(folder, monkeypatch, capsys) -> None:
    home = folder / "home"
    home.mkdir()
    Path("model").rename(home / "model")
    rows = Path("train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        (home / f"{name}.jsonl").write_text("".join(part))
    (home / "run.yaml").write_text("model: ~/model\ntokenizer: ~/model\ndata: [~/a.jsonl, ~/b.jsonl]\n")
    monkeypatch.setenv("HOME", str(home))
    small = [*SMALL, "population=2", "generations=2", "lr=1e-3"]
    assert (
        main(["train", "~/run.yaml", *small, "run_dir=~/run", "elite_path=~/run/best", "checkpoint_path=~/run/saved"])
        == 0
    )
    assert main(["resume", "~/run"]) == 0
    assert main(["report", "~/run", "--output", "~/pages/page.html", "--no-pictures"]) == 0
    assert main(["export", "~/run", "--to", "~/out", "--what", "adapter", "--model", "~/model"]) == 0
    assert main(["chat", "~/run", "--elite", "~/run/best", "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert main(["replay", "~/run", "--run-dir", "~/replay", "--checkpoints", "~/run/saved"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["inspect", "~/a.jsonl", "~/b.jsonl", "--model", "~/model", "--against", "~/a.jsonl"]) == 0
    assert "40 pairs" in capsys.readouterr().out
    assert (
        main(["validate", "~/run.yaml", *small, "data=~/a.jsonl", "start_from=~/run/best", "test_data=~/b.jsonl"]) == 0
    )
    assert {path.name for path in home.iterdir()} >= {"run", "pages", "out", "replay"}
    assert {path.name for path in (home / "run").iterdir()} >= {"best", "saved"}
    assert sorted(path.name for path in folder.iterdir()) == ["examples.jsonl", "home", "train.jsonl"]


def make_bad_paths(folder: Path) -> dict[str, str]:
    """Paths that hold nothing of use, by what is wrong with them."""
    (folder / "empty.jsonl").touch()
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "directory.jsonl").mkdir()
    (folder / "directory.jsonl/file").touch()
    (folder / "dangling.jsonl").symlink_to("nowhere")
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    bad = ("missing", "empty", "binary", "directory", "dangling", "loop", "pipe", "x" * 5000, "two\nlines")
    # With a dot in front, or a model would be looked for on the hub.
    return {name[:9]: f"./{name}.jsonl" for name in bad} | {"below a file": "./train.jsonl/below.jsonl", "none": ""}


# Every argument of a command that is a path; BAD stands for it.
PATHS = (
    "train BAD",
    "validate BAD",
    "train c.yaml data=BAD",
    "validate c.yaml data=[train.jsonl,BAD]",
    "validate c.yaml test_data=BAD",
    "validate c.yaml final_data=BAD",
    "validate c.yaml model=BAD",
    "validate c.yaml tokenizer=BAD",
    "validate c.yaml archive=BAD",
    "validate c.yaml start_from=BAD",
    "train c.yaml resume_from_checkpoint=BAD",
    "inspect BAD --model model",
    "inspect train.jsonl --model BAD",
    "inspect train.jsonl --model model --against BAD",
    "resume BAD",
    "report BAD",
    "chat BAD --prompt a",
    "export BAD --to new",
    "replay BAD",
)


@pytest.mark.parametrize("command", PATHS)
def test_a_path_that_cannot_be_used_is_one_line_and_status_1(folder, capsys, command) -> None:
    Path("c.yaml").write_text("model: model\ndata: train.jsonl\npopulation: 2\ngenerations: 2\n")
    bad = make_bad_paths(folder)
    there = sorted(folder.rglob("*"))
    wrong = {}
    if command in ("train BAD", "validate BAD"):
        # A configuration may come through one: evollm train <(cat a.yaml b.yaml).
        del bad["pipe"]
    if "tokenizer" in command:
        # The model's own.
        del bad["none"]
    for kind, path in bad.items():
        value = json.dumps(path) if "=" in command else path
        status = main([word.replace("BAD", value) for word in command.split()])
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("evollm: ")]
        if status != 1 or len(lines) != 1 or len(lines[0]) > 1000 or not said.endswith(lines[0] + "\n"):
            wrong[kind] = (status, said)
    assert wrong == {}
    assert sorted(folder.rglob("*")) == there


def test_what_is_printed_to_be_typed_next_can_be_pasted(folder, capsys) -> None:
    arguments = ["--recipe", "population", "population=2", "generations=2", "run_dir=my $(run)'s"]
    assert train(*arguments) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("  evollm ")]
    assert [shlex.split(line) for line in lines] == [
        ["evollm", "chat", "my $(run)'s"],
        ["evollm", "export", "my $(run)'s", "--to", "my-model"],
    ]
    assert train(*arguments) == 1
    command = shlex.join(["evollm", "resume", "my $(run)'s"])
    assert f"resume it ({command}, or" in capsys.readouterr().err


def test_recipes_lists_and_prints(capsys) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in recipe_names())
    assert main(["recipes", "dpo"]) == 0
    assert "population: 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- a run and afterwards


def test_resume_ends_with_the_bits_of_a_run_that_was_not_interrupted(folder, monkeypatch, capsys) -> None:
    arguments = ("--recipe", "population", "population=2", "generations=4", "checkpoint_steps=1", "lr=1e-4")
    assert train(*arguments, "run_dir=whole") == 0
    learn_all, steps = worker_module.learn_all, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return learn_all(*args)

    monkeypatch.setattr(worker_module, "learn_all", interrupted)
    assert train(*arguments, "run_dir=cut") == 130
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(worker_module, "learn_all", learn_all)
    assert main(["resume", "cut"]) == 0
    whole, cut = (Path(name, "elite/actor/adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    assert main(["resume", "cut", "beta=0.2"]) == 1
    assert "the run began with others" in capsys.readouterr().err


def test_a_run_is_prolonged_by_one_length_and_then_resumed_as_it_is(finished, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.modules["evollm.tuning.tune"], "write_report", Path)
    # 4 steps in 2 generations have been done. What one line leaves behind is what the next goes on with.
    for override, total in (("num_epochs=2", 8), (None, 8), ("generations=5", 10), ("num_epochs=3", 12), (None, 12)):
        assert main(["resume", finished, *([override] if override else [])]) == 0, capsys.readouterr().err
        assert read_run(finished).config["schedule"]["total"] == total
    assert [one.step for one in read_run(finished).evolutions] == [2, 4, 6, 8, 10]
    # A call that is refused leaves everything as it was.
    asked = arguments_to_resume(finished)
    assert main(["resume", finished, "num_epochs=1"]) == 1
    assert "the checkpoint has 12 steps already" in capsys.readouterr().err
    assert arguments_to_resume(finished) == asked


def test_resume_takes_its_run_once(tmp_path, capsys) -> None:
    assert main(["resume", str(tmp_path), "resume_from_checkpoint=x"]) == 1
    assert "resume_from_checkpoint='x': leave it out" in capsys.readouterr().err


def test_resume_of_something_else_says_so(folder, capsys) -> None:
    assert main(["resume", "model"]) == 1
    assert "is no run that a command began" in capsys.readouterr().err


def test_a_run_does_not_go_on_in_the_folder_of_a_model(folder, capsys) -> None:
    before = Path("model/config.json").read_bytes()
    assert train("--recipe", "population", "resume_from_checkpoint=model") == 1
    assert "resume_from_checkpoint='model': is no run folder: its config.json is that of" in capsys.readouterr().err
    assert Path("model/config.json").read_bytes() == before


def test_export_writes_what_transformers_peft_and_the_original_repository_load(finished, make_model, capsys) -> None:
    for what in ("merged", "adapter", "policy"):
        assert main(["export", finished, "--to", f"to-{what}", "--what", what]) == 0
    merged = AutoModelForCausalLM.from_pretrained("to-merged")
    assert AutoTokenizer.from_pretrained("to-merged").chat_template
    assert "tuned on preferences" in Path("to-merged/README.md").read_text()
    policy = AutoModelForCausalLM.from_pretrained("model")
    load_policy_archive("to-policy/policy.pt", policy)
    adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), "to-adapter")
    ids = torch.tensor([[5, 6, 7]])
    expected = merged(ids).logits
    assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained("model")(ids).logits, atol=1e-5)
    for other in (policy, adapter):
        assert torch.allclose(other(ids).logits, expected, atol=1e-5)
    assert main(["export", finished, "--to", "model"]) == 1
    assert "to='model': is there already" in capsys.readouterr().err


def test_chat_shows_base_and_winner_side_by_side(finished, monkeypatch, capsys) -> None:
    assert main(["chat", finished, "--prompt", "Is the [answer] yes?", "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert "Is the [answer] yes?" in said
    assert "base" in said
    assert "winner" in said
    monkeypatch.setattr("sys.stdin", iter(["one\n", "\n", "two\n"]))
    monkeypatch.setattr("evollm.commands.chat._is_terminal", lambda: False)
    assert main(["chat", finished, "--max-new-tokens", "4"]) == 0
    said = capsys.readouterr().out
    assert said.index("one") < said.index("two")
    assert main(["chat", finished, "--prompt", "a", "--max-new-tokens", "0"]) == 1
    assert main(["chat", finished, "--prompt", "no \udcff text", "--max-new-tokens", "1"]) == 0
    assert "no ? text" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_not_opened(capsys) -> None:
    assert main(["export", "nowhere", "--to", "x"]) == 1
    assert "is no run folder" in capsys.readouterr().err
