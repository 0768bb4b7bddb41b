"""What is printed to be typed next works as it is printed; runs that have not ended have an agent, too."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch
from command_runs import MESSAGES, train
from quick_page import quick_page
from safetensors.torch import load_file

from evollm import DPO, tune
from evollm.checkpoints.find import find_agent
from evollm.cli import main
from evollm.config import override
from evollm.execution import worker as worker_module
from evollm.report import write_report
from evollm.runs import read_run

NAME = 'my $(run)\'s "ü" [b]:smile: run'
ACTOR = "actor/adapter_model.safetensors"


def typed(line: str) -> int:
    """The status of a printed command, typed as it is."""
    program, *arguments = shlex.split(line)
    assert program == "evollm"
    if arguments[0] == "chat":
        arguments += ["--prompt", "Hello", "--max-new-tokens", "2"]
    return main(arguments)


def next_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("  evollm ")]


@pytest.mark.parametrize("name", [NAME, "-run", "~run"])
def test_every_line_that_is_printed_to_be_typed_next_works(workplace, capsys, name) -> None:
    setting = json.dumps(f"./{name}", ensure_ascii=False)
    (workplace / "my-model").mkdir()
    assert train(f"run_dir={setting}") == 0
    said = capsys.readouterr().out
    assert f"Run folder: {name}\n" in said
    assert f"folder {name}" in said
    assert f"Best adapter: {name}/elite/actor" in said
    lines = next_lines(said)
    assert [shlex.split(line)[1] for line in lines] == ["chat", "export"]
    for line in lines:
        assert typed(line) == 0, line
    assert (workplace / "my-model-2/model.safetensors").is_file()
    # Load it with.
    (line,) = [line for line in said.splitlines() if line.startswith("Load it with: ")]
    found = {}
    exec("from peft import PeftModel\nfrom transformers import AutoModelForCausalLM", found)
    exec("base_model = AutoModelForCausalLM.from_pretrained('model')", found)
    exec(line.removeprefix("Load it with: "), found)
    # A second run there.
    assert train(f"run_dir={setting}") == 1
    said = capsys.readouterr().err
    assert typed(said.partition("resume it (")[2].rpartition(", or resume_from")[0]) == 0


def test_resume_ends_like_train(interrupted, capsys) -> None:
    assert train("run_dir=whole") == 0
    whole = capsys.readouterr().out.splitlines()
    assert interrupted("run_dir=cut") == 130
    capsys.readouterr()
    assert main(["resume", "cut"]) == 0
    cut = capsys.readouterr().out.splitlines()
    last = whole[whole.index("Run folder: whole") :]
    assert len(last) == 5
    assert [line.replace("whole", "cut") for line in last] == cut[-len(last) :]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("places", [(), ("checkpoint_path='saved: here'", "elite_path='best one'")])
def test_an_interrupted_run_prints_the_command_that_goes_on_with_it(
    interrupted, capsys, number, status, places
) -> None:
    arguments = (f"run_dir={json.dumps(NAME)}", *places)
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as stopped:
            interrupted(*arguments, number=number)
        assert stopped.value.code == status
    else:
        assert interrupted(*arguments, number=number) == status
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(("evollm: interrupted: go on with: ", "evollm: stopped; go on with: "))
    command = said.partition("go on with: ")[2]
    # TuneArguments for an agent, it is that of the checkpoint.
    assert typed(command) == 0
    assert read_run(NAME).ended is not None
    for line in next_lines(capsys.readouterr().out):
        assert typed(line) == 0, line


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_script_and_a_replay_are_told_how_they_go_on(interrupted, monkeypatch, capsys) -> None:
    assert train("run_dir=run") == 0

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker_module, "learn_all", stop)
        assert main(["replay", "run", "--max-steps", "2", "--run-dir", "the replay"]) == 130
        said = capsys.readouterr().err.splitlines()[-1]
        with pytest.raises(KeyboardInterrupt, match="go on with resume_from_checkpoint='script'"):
            tune("model", [dict(row) for row in MESSAGES], run_dir="script", **override({}, SCRIPT), verbose=False)
    assert typed(said.partition("go on with: ")[2]) == 0
    assert Path("the replay/elite").is_dir()


SCRIPT = ("population=2", "generations=2", "num_epochs=1", "lora_config.r=2", "data_batch_size_per_gpu=8")


# -------------------------------------------------------------------------------------------- runs that have not ended


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_run_that_has_not_ended_is_asked_and_exported_from_its_newest_checkpoint(interrupted, capsys) -> None:
    assert interrupted("run_dir=run") == 130
    capsys.readouterr()
    state = json.loads(Path("run/checkpoints/step-000003/population.json").read_text())
    # Scored after step 2, before the evolution; the elite was kept.
    best = max(state["fitnesses"], key=lambda index: state["fitnesses"][index])
    assert main(["chat", "run", "--prompt", "a", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().err.splitlines()
    choice = f"agent {best} is taken, the best of the checkpoint of step 3"
    assert said == [f"evollm: warning: run: the run has not ended: {choice}"]
    for what in ("merged", "adapter", "policy"):
        assert main(["export", "run", "--to", what, "--what", what]) == 0
        assert "the run has not ended" in capsys.readouterr().err
    assert "had not ended" in Path("merged/README.md").read_text()
    exported = load_file("adapter/adapter_model.safetensors")
    saved = load_file(f"run/checkpoints/step-000003/agent-{best}/{ACTOR}")
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    # Without a checkpoint there is one line.
    shutil.rmtree("run/checkpoints")
    for command in (["chat", "run", "--prompt", "a"], ["export", "run", "--to", "x"]):
        assert main(command) == 1
        said = capsys.readouterr().err
        assert said.startswith("evollm: run: the run has not ended and has saved no checkpoint yet")
        assert said.count("\n") == 1
        assert typed(said.rstrip().partition("go on with it: ")[2]) == 0
        assert read_run("run").ended is not None
        break


def test_every_argument_that_takes_an_agent_takes_a_run(interrupted, capsys) -> None:
    assert interrupted("run_dir=cut") == 130
    assert train("run_dir=run") == 0
    with pytest.warns(UserWarning, match="the run has not ended: agent"):
        cut = DPO.load("cut")
    assert cut.index == find_agent("path", "cut").index
    elite = load_file(f"run/elite/{ACTOR}")
    for given in ("run", "run/elite", "run/elite/actor"):
        agent = DPO.load(given)
        state = agent.base.adapters.export(agent.actor_adapter).tensors
        assert all(torch.equal(state[name], elite[name]) for name in elite)
        agent.load_checkpoint(given, overwrite_reference_adapter=True)
        assert main(["chat", given, "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert main(["chat", "run", "--elite", "run", "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert train("run_dir=next", "start_from=run", "max_steps=2", "generations=null", "evo_steps=1") == 0
    begun = load_file("next/checkpoints/step-000001/agent-0/reference/adapter_model.safetensors")
    assert all(torch.equal(begun[name], elite[name]) for name in elite)
    capsys.readouterr()
    for command in (["resume", "run/elite"], ["report", "run/checkpoints/step-000004"], ["replay", "run/elite/actor"]):
        assert main(command) == 1
        assert "is no run folder but a part of one: give run" in capsys.readouterr().err


def test_agents_born_after_the_last_scoring_are_ranked_by_their_parents(tmp_path) -> None:
    birth = {"mutations": [], "elite": False, "hyperparameters": {}}
    plan = {"generation": 0, "elite": 0, "fitnesses": {}, "step": 1}
    plan["births"] = [{**birth, "index": 2, "parent": 1}, {**birth, "index": 3, "parent": 0}]
    state = {"step": 3, "agents": ["agent-2", "agent-3"], "fitnesses": {"0": [0.9], "1": [0.5]}, "evolutions": [plan]}
    (tmp_path / "population.json").write_text(json.dumps(state))
    assert find_agent("path", tmp_path).index == 3
    (tmp_path / "population.json").write_text(json.dumps({**state, "fitnesses": {}}))
    found = find_agent("path", tmp_path)
    assert found.index == 2
    assert "none has been scored" in found.remark


def test_a_run_in_place_of_a_model_is_refused_with_what_to_give(workplace, capsys) -> None:
    assert train("run_dir=run") == 0
    for given, actor in (("run", "run/elite/actor"), ("run/elite", "run/elite/actor")):
        for command in (["validate", "--recipe", "dpo", f"model={given}", "data=messages.jsonl"], ["chat", "run"]):
            more = ["--model", given, "--prompt", "a"] if command[0] == "chat" else []
            assert main([*command, *more]) == 1
            said = capsys.readouterr().err
            assert f"model='{given}': is the folder of a" in said
            assert f"start_from={given}, or {actor}" in said


def test_a_run_that_kept_no_agent_offers_none(workplace, capsys) -> None:
    assert train("run_dir=run", "save_elite=false", "checkpoint_steps=0") == 0
    said = capsys.readouterr().out
    assert said.endswith("Next:\n  nothing: the run kept no agent to ask or to export\n")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_all_of_a_run_and_of_an_export_has_the_permissions_of_the_umask(workplace, monkeypatch, mask) -> None:
    tune_module = importlib.import_module("evollm.tuning.tune")
    monkeypatch.setattr(tune_module, "write_report", write_report)
    monkeypatch.setattr("evollm.report.write.render", quick_page)
    before = os.umask(mask)
    try:
        assert train("run_dir=run") == 0
        for what in ("merged", "adapter", "policy"):
            assert main(["export", "run", "--to", f"out/{what}", "--what", what]) == 0
    finally:
        os.umask(before)
    found = [path for folder in ("run", "out") for path in (Path(folder), *Path(folder).rglob("*"))]
    names = {path.name for path in found}
    assert {"report.html", "README.md", "policy.pt", "model.safetensors", "population.json"} <= names
    wrong = {
        str(path): oct(path.stat().st_mode)
        for path in found
        if stat.S_IMODE(path.stat().st_mode) != (0o777 if path.is_dir() else 0o666) & ~mask
    }
    assert wrong == {}
