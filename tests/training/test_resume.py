from __future__ import annotations

import errno
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from kill_test import kill_and_compare
from snapshots import actor_bits

from evollm import (
    DPO,
    Callback,
    CheckpointError,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
)
from evollm.checkpoints import read_agent_folder
from evollm.execution import local as local_module
from evollm.hpo import TournamentSearch
from evollm.runs import read_run

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.05, 0.5))


class StopAt(Callback):
    """Does something when a step is done."""

    def __init__(self, step: int, what: object) -> None:
        self.step, self.what = step, what

    def on_step(self, event) -> None:
        if event.step == self.step:
            self.what()


def crash() -> None:
    raise RuntimeError("the machine fell over")


@pytest.fixture
def run(make_population, tokenizer, tmp_path):
    """Run, or resume, a population of four in a folder of that name."""

    def start(name: str, resume: bool = False, **changes) -> list[DPO]:
        rows = changes.pop("rows", make_rows(12))
        env = PreferenceGym(rows, make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)
        population = make_population(4, hp_config=HP_CONFIG, **changes.pop("agents", {}))
        arguments = {
            "max_steps": 8,
            "evo_steps": 2,
            "checkpoint_steps": 1,
            "tournament": TournamentSelection(2, True, 4, rand_seed=3),
            "mutation": Mutations(0.2, 0.8, rand_seed=5),
            "verbose": False,
            "num_sample_answers": 0,
            "resume_from_checkpoint" if resume else "run_dir": tmp_path / name,
        }
        return finetune_llm_preference(population, env, **{**arguments, **changes})[0]

    return start


def end(folder: Path, population: list[DPO]) -> dict[str, object]:
    return {
        "actors": [actor_bits(agent) for agent in population],
        "agents": [(agent.index, agent.hyperparameter_values(), agent.fitness) for agent in population],
        "lineage": (folder / "lineage.jsonl").read_text(),
        "metrics": (folder / "metrics.jsonl").read_text(),
    }


@pytest.fixture(scope="module")
def known_ends() -> dict[str, Any]:
    return {}


@pytest.fixture
def whole(run, tmp_path, known_ends) -> dict[str, object]:
    """What a run ends with that nothing interrupts; it is made once."""
    if not known_ends:
        known_ends.update(end(tmp_path / "whole", run("whole")))
    return known_ends


@pytest.mark.parametrize("updates_reference", [False, True])
def test_a_resumed_run_ends_with_the_bits_of_one_never_interrupted(run, tmp_path, updates_reference) -> None:
    changes = {"update_reference_each_epoch": updates_reference}
    population = run("whole", **changes)
    whole, adapters = end(tmp_path / "whole", population), len(population[0].base.adapters.names)
    for step in (1, 2, 4, 7):
        name = f"crashed-{step}"
        with pytest.raises(RuntimeError):
            run(name, callbacks=[StopAt(step + 1, crash)], **changes)
        population = run(name, resume=True, **changes)
        assert end(tmp_path / name, population) == whole
        # The references that the new process made for its founders are gone again.
        assert len(population[0].base.adapters.names) == adapters


@pytest.mark.parametrize("ended", [3, 4])
def test_a_run_that_ended_goes_on_when_it_is_given_more_steps(run, tmp_path, ended: int) -> None:
    """With the bits of a run that had them from the beginning; at step 4 that one evolves."""
    whole = end(tmp_path / "whole", run("whole", max_steps=7, evaluation_interval=1))
    run("short", max_steps=ended, evaluation_interval=1)
    assert end(tmp_path / "short", run("short", resume=True, max_steps=7, evaluation_interval=1)) == whole
    with pytest.raises(ConfigurationError, match="has 7 steps already"):
        run("short", resume=True, max_steps=5, evaluation_interval=1)


@pytest.mark.parametrize("limit", [{"max_steps": 5}, {"max_member_steps": 20}])
def test_a_run_that_is_ended_by_lower_limits_on_its_way_evaluates_what_it_ends_with(run, tmp_path, limit) -> None:
    """From the checkpoint of step 5, after the decision of step 4, whose evaluation was that of other agents."""
    whole = end(tmp_path / "whole", run("whole", **limit))
    with pytest.raises(RuntimeError):
        run("crashed", callbacks=[StopAt(6, crash)])
    assert end(tmp_path / "crashed", run("crashed", resume=True, **limit)) == whole
    bests = [(tmp_path / name / "elite/actor/adapter_model.safetensors").read_bytes() for name in ("whole", "crashed")]
    assert bests[0] == bests[1]
    # Its last checkpoint has the evaluation, too.
    assert end(tmp_path / "crashed", run("crashed", resume=True, **limit)) == whole


def test_less_patience_ends_a_run_at_its_next_evaluation(run, tmp_path) -> None:
    constant = {"fitness": lambda evaluation: 0.5, "early_stopping_patience": 3}
    with pytest.raises(RuntimeError):
        run("crashed", callbacks=[StopAt(6, crash)], **constant)
    population = run("crashed", resume=True, **{**constant, "early_stopping_patience": 1})
    assert {agent.steps for agent in population} == {6}
    ended = read_run(tmp_path / "crashed").ended
    assert (ended.step, ended.best_step) == (6, 6)


def test_a_killed_run_ends_as_if_it_had_never_been_killed(tmp_path) -> None:
    result = kill_and_compare(4, tmp_path, seed=1)
    assert result.runs > 0
    assert result.kills.total() >= 4
    assert result.is_good


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_ctrl_c_and_sigterm_save_and_stop(run, whole, tmp_path, number, raised) -> None:
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised):
        run("stopped", checkpoint_steps=0, callbacks=[StopAt(3, lambda: os.kill(os.getpid(), number))])
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step-000003"]
    assert end(tmp_path / "stopped", run("stopped", resume=True, checkpoint_steps=0)) == whole


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, whole, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run("crashed", callbacks=[StopAt(6, crash)])
    file = next((tmp_path / "crashed/checkpoints/step-000005").glob("agent-*/actor/adapter_model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="step-000005: agent-.*/actor/adapter_model.safetensors is not what was saved"):
        population = run("crashed", resume=True)
    assert end(tmp_path / "crashed", population) == whole


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(run, whole, tmp_path, monkeypatch) -> None:
    write, full = local_module.write_population, {"now": False}

    def write_unless_full(*args) -> None:
        if full["now"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    monkeypatch.setattr(local_module, "write_population", write_unless_full)
    with pytest.warns(UserWarning, match=r"step \d could not be saved.*No space left"):
        population = run("full", callbacks=[StopAt(4, lambda: full.update(now=True))])
    assert end(tmp_path / "full", population) == whole
    assert sorted(path.name for path in (tmp_path / "full/checkpoints").iterdir()) == ["step-000002", "step-000003"]


def test_a_run_killed_before_its_first_checkpoint_starts_anew(run, whole, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run("early", callbacks=[StopAt(1, crash)])
    with pytest.warns(UserWarning, match="holds no checkpoint: it starts anew"):
        population = run("early", resume=True)
    assert end(tmp_path / "early", population) == whole


def test_other_settings_data_or_agents_are_refused_with_each_difference(run, make_model) -> None:
    run("run", max_steps=3)
    with pytest.raises(ConfigurationError, match=r"options.tournament.rand_seed: 3 then, 4 now"):
        run("run", resume=True, tournament=TournamentSelection(2, True, 4, rand_seed=4))
    with pytest.raises(ConfigurationError, match=r"data.fingerprint"):
        run("run", resume=True, rows=make_rows(12)[::-1])
    with pytest.raises(ConfigurationError, match=r"agents.0.lr: 0.001 then, 0.002 now"):
        run("run", resume=True, agents={"lr": 2e-3})
    with pytest.raises(ConfigurationError, match="base_fingerprint"):
        run("run", resume=True, agents={"actor_network": make_model(seed=1)})


def test_a_folder_without_a_run_and_a_second_folder_are_refused(run, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="is no run folder"):
        run("nowhere", resume=True)
    run("run", max_steps=3)
    with pytest.raises(ConfigurationError, match="leave it out"):
        run("run", resume=True, run_dir=tmp_path / "other")


def test_a_run_folder_has_one_writer(run, tmp_path) -> None:
    def second() -> None:
        with pytest.raises(CheckpointError, match="another process is writing"):
            run("run", resume=True)

    run("run", callbacks=[StopAt(2, second)], max_steps=3)


def test_a_run_checkpoints_before_it_evolves(run, whole, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TournamentSearch, "tell", lambda *_: crash())
        with pytest.raises(RuntimeError):
            run("crashed")
    saved = [path.name for path in (tmp_path / "crashed/checkpoints").iterdir()]
    evolves_first = json.loads(whole["lineage"].splitlines()[1])["step"]
    assert f"step-{evolves_first:06d}" in saved
    assert end(tmp_path / "crashed", run("crashed", resume=True)) == whole


def test_a_run_that_did_not_get_to_its_first_step_is_begun_again(run, whole, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        run("early", callbacks=[StopAtStart()])
    assert (tmp_path / "early/config.json").exists()
    assert end(tmp_path / "early", run("early")) == whole
    with pytest.raises(ConfigurationError, match=r"holds (another run|checkpoints of another run)"):
        run("early")


class StopAtStart(Callback):
    """A run that dies when all is ready."""

    def on_start(self, event) -> None:
        crash()


def test_two_runs_do_not_share_a_folder_of_checkpoints(run, tmp_path) -> None:
    run("one", checkpoint_path=tmp_path / "saved")
    before = sorted((tmp_path / "saved").iterdir())
    with pytest.raises(ConfigurationError, match=r"checkpoint_path=.*holds checkpoints of another run"):
        run("two", checkpoint_path=tmp_path / "saved")
    assert sorted((tmp_path / "saved").iterdir()) == before
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "final.safetensors", "elite", "evaluations"])
def test_a_run_begins_among_no_files_of_the_users(run, tmp_path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(ConfigurationError, match=f"(run_dir|elite_path)=.*{name}"):
        run("mine")
    assert (tmp_path / "mine" / name).read_text() == "{}"


def test_a_best_agent_without_room_is_saved_elsewhere(run, tmp_path, monkeypatch) -> None:
    save = DPO.save_checkpoint

    def save_elsewhere(agent: DPO, path: str, **arguments: object) -> None:
        if Path(path).is_relative_to(tmp_path / "full"):
            raise OSError(28, "No space left on device")
        save(agent, path, **arguments)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    ended = []
    listener = Callback()
    listener.on_end = ended.append
    with monkeypatch.context() as patch:
        patch.setattr(DPO, "save_checkpoint", save_elsewhere)
        with pytest.warns(UserWarning, match="could not be saved to .*No space left.*it was saved to .*elsewhere"):
            run("full", save_elite=True, callbacks=[listener])
    assert ended[0].best_path.parent == tmp_path / "elsewhere"
    assert read_agent_folder(ended[0].best_path).attributes["index"] == ended[0].best
    # There is room again.
    run("full", resume=True, save_elite=True)
    assert (tmp_path / "full/elite/attributes.pt").is_file()
