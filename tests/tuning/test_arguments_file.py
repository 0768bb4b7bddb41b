"""What a run folder holds of how a run was begun, and what is taken from it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig
from tokenizers_for_tests import chatml_tokenizer
from transformers import BitsAndBytesConfig

from evollm import Callback, ConfigurationError, replay, tune
from evollm.cli import main
from evollm.tuning.arguments_file import arguments_to_resume, read_tune_arguments, write_tune_arguments
from evollm.tuning.from_yaml import lora_config_of, model_config_of
from evollm.tuning.winner import open_winner

replay_module = importlib.import_module("evollm.tuning.replay")  # The package has a function of this name.
LORA = {"r": 4, "target_modules": ["q_proj"]}
SHORT = {
    "population": 2,
    "max_steps": 2,
    "evo_steps": 1,
    "num_sample_answers": 0,
    "verbose": False,
    "lora_config": LORA,
}
CHAT = ["--prompt", "a", "--max-new-tokens", "2"]


@pytest.fixture
def begin(make_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`tune` on the small model in the folder `model` and the rows in `rows.jsonl`, unless others are given."""
    monkeypatch.chdir(tmp_path)
    # Drawing a report takes longer than these runs.
    monkeypatch.setattr(importlib.import_module("evollm.tuning.tune"), "write_report", lambda run_dir: None)
    make_model().save_pretrained("model")
    chatml_tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))

    def start(**changes: Any) -> Path:
        arguments = {"model": "model", "data": "rows.jsonl", "run_dir": "run", **SHORT, **changes}
        return tune(**arguments).run_dir

    return start


def change(run: Path, **settings: Any) -> None:
    """Write other settings into the record of a run, as somebody might who hands it on."""
    content = json.loads((run / "tune.json").read_text())
    content["settings"] |= settings
    (run / "tune.json").write_text(json.dumps(content))


def own_code() -> None:
    """Let the model come with code of its own, which leaves a mark when it is run."""
    config = json.loads(Path("model/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    Path("model/config.json").write_text(json.dumps(config))
    Path("model/own.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"pathlib.Path({str(Path('ran').resolve())!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )


def test_a_run_folder_cannot_ask_for_code(begin, monkeypatch, tmp_path, capsys) -> None:
    run = begin()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    change(run, model_config={"trust_remote_code": True, "attn_implementation": "somebody/kernel"})
    own_code()
    export, again = ["export", "run", "--to", "exported"], ["replay", "run", "--run-dir", "again"]
    for command in (["chat", "run", *CHAT], export, again, ["resume", "run", "max_steps=3"]):
        assert main(command) == 1
        assert "Traceback" not in capsys.readouterr().err
    assert not Path("ran").exists()
    for command in (["chat", "run", *CHAT], export, again):
        assert main([*command, "--trust-remote-code"]) == 0
        assert Path("ran").exists()
    assert main(["resume", "run", "max_steps=3", "model_config.trust_remote_code=true"]) == 0


def test_only_what_chooses_weights_is_taken_from_a_run_folder(tmp_path) -> None:
    quantised = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
    kept = {"dtype": "bfloat16", "device_map": "auto", "revision": "v1", "quantization_config": quantised}
    dropped = {"trust_remote_code": True, "attn_implementation": "somebody/kernel", "code_revision": "x"}
    content = {"settings": {"model_config": kept | dropped}, "objects": []}
    (tmp_path / "tune.json").write_text(json.dumps(content))
    assert arguments_to_resume(tmp_path)["model_config"] == kept
    content["settings"]["model_config"] = {"device_map": {"": "cuda"}, "attn_implementation": "sdpa"}
    (tmp_path / "tune.json").write_text(json.dumps(content))
    assert arguments_to_resume(tmp_path)["model_config"] == {"attn_implementation": "sdpa"}


def test_no_password_is_written_into_a_run_folder(begin) -> None:
    run = begin(model_config={"token": "secret", "proxies": {"https": "me:secret@host"}, "dtype": torch.float32})
    assert "secret" not in "".join(path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
    assert arguments_to_resume(run)["model_config"] == {"dtype": "float32"}
    assert main(["chat", "run", *CHAT]) == 0


@pytest.mark.parametrize(
    ("value", "held"),
    [({"config": object()}, False), ({"token": object()}, True), ({"dtype": torch.float16}, True)],
)
def test_an_object_in_model_config_is_named(tmp_path, value, held) -> None:
    write_tune_arguments(tmp_path, {"model_config": value})
    assert json.loads((tmp_path / "tune.json").read_text())["objects"] == ([] if held else ["model_config"])


def test_another_name_for_the_model_leaves_the_rest_of_the_record(begin) -> None:
    chatml_tokenizer().save_pretrained("tokenizer")
    run = begin(model="./model", elite_path="best", tokenizer="tokenizer", model_config={"dtype": "float64"})
    Path("model").rename("moved")
    with pytest.raises(ConfigurationError, match="no such folder"):
        open_winner(run, elite="best")
    # Weights of another type would be another base, which its agent refuses.
    winner = open_winner(run, "moved", elite="best")
    assert winner.agent.base.network.dtype == torch.float64
    assert winner.tokenizer.name_or_path == str(Path("tokenizer").absolute())


def test_a_run_with_objects_is_opened_exported_and_replayed_as_far_as_it_needs_none(begin, capsys) -> None:
    objects = {"callbacks": [Callback()], "fitness": lambda evaluation: evaluation.accuracy}
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    run = begin(**objects, lora_config=LoraConfig(r=4, lora_alpha=4, target_modules={"v_proj", "q_proj"}))
    assert main(["chat", "run", *CHAT]) == 0
    assert main(["export", "run", "--to", "exported"]) == 0
    assert replay(run, run_dir="again", verbose=False).exact
    assert main(["resume", "run"]) == 1
    assert "with callbacks, fitness as objects" in capsys.readouterr().err
    fields = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": None}
    assert read_tune_arguments(run).settings["lora_config"] == fields
    write_tune_arguments(run, {"model_config": {"quantization_config": quantised}})
    loaded = model_config_of(read_tune_arguments(run).settings["model_config"])
    assert loaded["quantization_config"].to_dict() == quantised.to_dict()


@pytest.mark.parametrize("given", [{}, {"r": 8, "target_modules": ["q_proj"]}, {"r": 4, "lora_alpha": 8}, {"r": 16}])
def test_a_lora_config_object_is_found_again_as_it_was(tmp_path, given) -> None:
    """The defaults of PEFT and those of `tune` differ."""
    config = LoraConfig(**given)
    write_tune_arguments(tmp_path, {"lora_config": config})
    assert lora_config_of(read_tune_arguments(tmp_path).settings["lora_config"]) == config


@pytest.mark.parametrize("needed", ["tokenizer", "model"])
def test_what_cannot_be_loaded_without_an_object_says_so(begin, make_model, needed) -> None:
    given = {"tokenizer": chatml_tokenizer()}
    if needed == "model":
        given["model"] = make_model()
    run = begin(**given)
    with pytest.raises(ConfigurationError, match=f"begun from Python with .*{needed}.* as objects"):
        open_winner(run) if needed == "tokenizer" else replay(run)
    assert open_winner(run, "model").agent.base.name
    given.setdefault("model", "model")
    assert replay(run, **given, run_dir="again", verbose=False).exact


def test_rows_are_not_copied_into_a_run_folder(begin, capsys) -> None:
    rows = {"data": make_rows(40), "test_data": make_rows(6, 50), "final_data": False}
    run = begin(**rows)
    content = json.loads((run / "tune.json").read_text())
    assert content["objects"] == ["data", "test_data"]
    assert content["settings"].keys() & rows.keys() == {"final_data"}
    for command in (["resume", "run"], ["replay", "run"]):
        assert main(command) == 1
        assert "with data, test_data as objects, which no folder holds" in capsys.readouterr().err
    assert main(["replay", "run", "--data", "rows.jsonl", "--run-dir", "file"]) == 0
    assert "nothing to compare with: the schedule was stretched over other data" in capsys.readouterr().out
    assert replay(run, **rows, run_dir="again", verbose=False).exact
    assert replay(run, data=make_rows(30), run_dir="other", verbose=False).exact is None
    with pytest.raises(ConfigurationError, match="nearest known one"):
        replay(run, **rows, callbacks=[])


def test_a_replay_finds_what_the_run_wrote_elsewhere(begin, monkeypatch) -> None:
    looked_in, newest = [], replay_module.newest_population
    monkeypatch.setattr(replay_module, "newest_population", lambda path: looked_in.append(path) or newest(path))
    run = begin(elite_path="best", checkpoint_path="saved")
    elsewhere = {"elite_path": "best", "checkpoint_path": "saved"}
    with pytest.raises(ConfigurationError, match=r"checkpoint_path='/.*/saved', or --checkpoints /.*/saved"):
        replay(run, run_dir="again", verbose=False)
    assert replay(run, run_dir="again", verbose=False, **elsewhere).exact
    assert looked_in == [Path("saved")]
    assert newest(looked_in[0]) is not None


def test_a_replay_says_why_it_compares_nothing(begin, capsys) -> None:
    run = begin()
    assert "steps of your own" in replay(run, max_steps=1, run_dir="short", verbose=False).reason
    (run / "elite").rename("elsewhere")
    assert main(["replay", "run", "--run-dir", "again"]) == 0
    assert "nothing to compare with: the run's best agent is not at run/elite" in capsys.readouterr().out
    # What another run left there.
    unsaved = begin(run_dir="unsaved", elite_path="elsewhere", save_elite=False)
    result = replay(unsaved, run_dir="third", elite_path="elsewhere", verbose=False)
    assert (result.exact, "save_elite=False" in result.reason) == (None, True)


def test_the_command_goes_on_with_a_replay_and_resume_says_so(begin, capsys) -> None:
    begin()
    assert main(["replay", "run", "--run-dir", "again"]) == 0
    assert main(["replay", "run", "--resume", "again"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["resume", "again"]) == 1
    assert "evollm replay RUN --resume" in capsys.readouterr().err


def test_a_run_folder_does_not_say_where_tokens_are_kept_outside_it(begin, tmp_path) -> None:
    run = begin(cache_dir="tokens")
    assert list(Path("tokens").iterdir())
    assert "cache_dir" not in arguments_to_resume(run)
    main(["resume", str(run), "max_steps=3"])
    change(run, cache_dir=str(tmp_path / "trap"))
    main(["resume", str(run), "max_steps=4", "cache_dir=mine"])
    assert list(Path("mine").iterdir())
    assert not (tmp_path / "trap").exists()
    change(run, cache_dir=str(run / "tokens"))
    assert arguments_to_resume(run)["cache_dir"] == str(run / "tokens")
