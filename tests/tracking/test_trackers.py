from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
from conftest import make_examples, make_rows

from evollm import (
    SFT,
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    MissingExtraError,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
)
from evollm.hpo import Birth, Mutation
from evollm.tracking import tracker_names

# Where the run of the fixture is interrupted, and the checkpoint before it.
CRASH, SAVED, END = 4, 2, 6


class CrashAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise RuntimeError("the machine fell over")


@pytest.fixture
def run(make_population, tokenizer, tmp_path, monkeypatch):
    """A population of two that evolves every second step."""
    monkeypatch.chdir(tmp_path)

    def start(*callbacks: Callback, resume: bool = False, **arguments) -> Path:
        env = PreferenceGym(make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4)
        config = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), loss_type=RLParameter(choices=("sigmoid", "ipo")))
        folder = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / "run"}
        finetune_llm_preference(
            make_population(2, hp_config=config),
            env,
            max_steps=END,
            evo_steps=2,
            tournament=TournamentSelection(2, True, 2),
            mutation=Mutations(0.2, 0.8, rand_seed=5),
            num_sample_answers=0,
            verbose=False,
            callbacks=callbacks,
            **folder,
            **arguments,
        )
        return tmp_path / "run"

    return start


def interrupted_and_resumed(run, name: str) -> Path:
    with pytest.raises(RuntimeError):
        run(CrashAt(CRASH), report_to=name)
    return run(resume=True, report_to=name)


def born(folder: Path) -> set[int]:
    """Agents that the trackers must know the parent of."""
    names = {path.name for path in (folder / "checkpoints" / f"step-{END:06d}").iterdir() if path.is_dir()}
    return {int(name.split("-")[1]) for name in names if name.startswith("agent-")}


def expected(folder: Path) -> set[str]:
    scalars = {f"agent_{index}/{name}" for index in born(folder) for name in ("loss", "eval_accuracy", "parent", "lr")}
    return scalars | {"agent_0/rewards/margins", "generation", "best_agent", "before/accuracy", "after/margin"}


def test_tensorboard_files_hold_steps_scores_and_evolutions(run) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = interrupted_and_resumed(run, "tensorboard")
    found = accumulators.EventAccumulator(str(folder / "tensorboard")).Reload()
    assert expected(folder) <= set(found.Tags()["scalars"])
    # The run was interrupted after an evolution, which comes after its step's checkpoint, and so again.
    assert [event.step for event in found.Scalars("generation")] == [2, 2, 2, 4, 4, 6]
    (text,) = [tag for tag in found.Tags()["tensors"] if tag.startswith("evolution")]
    lines = found.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert lines.count(" <- agent ") == 2
    assert "elite, kept as it is" in lines


def test_the_seeds_switches_mean_the_names(tmp_path) -> None:
    assert tracker_names(None) == tracker_names("none") == tracker_names(["none"]) == []
    assert tracker_names(None, wb=True, tensorboard=True) == tracker_names(["wandb", "tensorboard"])
    assert tracker_names("wandb", wb=True) == ["wandb"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"report_to": "wanbd"}, "'wanbd' is no tracker; the nearest is 'wandb'"),
        ({"report_to": ["tensorboard", "trackoi"]}, "the nearest is 'trackio'"),
        ({"report_to": ["none", "wandb"]}, "'none' stands alone"),
        ({"report_to": 3}, "report_to=3: must be a name or a list"),
        ({"report_to": [None]}, "must be a name or a list"),
        ({"wb": "no"}, "wb='no': must be True or False"),
    ],
)
def test_an_unknown_tracker_is_refused_before_training(make_agent, gym, tmp_path, arguments, message) -> None:
    agent = make_agent()
    with pytest.raises(ConfigurationError, match=message):
        finetune_llm_preference([agent], gym, run_dir=tmp_path / "run", verbose=False, **arguments)
    assert agent.steps == 0
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_says_so_and_leaves_no_run_in_the_way(run, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    # A file where the folder should be.
    (tmp_path / "run/tensorboard").write_text("")
    with pytest.raises(ConfigurationError, match="report_to='tensorboard': could not start"):
        run(report_to="tensorboard")
    (tmp_path / "run/tensorboard").unlink()
    assert (run(report_to="tensorboard") / "elite").is_dir()


@pytest.mark.parametrize(("name", "arguments"), [("wandb", {"wb": True}), ("trackio", {"report_to": "trackio"})])
def test_a_missing_tracker_is_named_with_its_extra_before_training(
    make_agent, gym, tmp_path, monkeypatch, name, arguments
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    agent = make_agent()
    with pytest.raises(MissingExtraError, match=rf'pip install "evollm\[{name}\]"'):
        finetune_llm_preference([agent], gym, run_dir=tmp_path / "run", verbose=False, **arguments)
    assert agent.steps == 0


def test_an_sft_run_reports_too(make_sft, tokenizer, tmp_path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    env = SFTGym(make_examples(8), make_examples(4, 8), tokenizer, data_batch_size_per_gpu=4)
    agents: list[SFT] = [make_sft()]
    finetune_llm_sft(agents, env, run_dir=tmp_path / "run", verbose=False, report_to=["tensorboard"])
    found = accumulators.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Tags()["scalars"]
    assert {"agent_0/loss", "agent_0/eval_perplexity", "before/loss", "after/loss"} <= set(found)


# ------------------------------------------------------------------------------------------- Weights & Biases, trackio


def records(path: Path) -> list[bytes]:
    """The records of an offline W&B run: a log of blocks of 32 KiB, as LevelDB writes them."""
    data, offset, found, part = path.read_bytes(), 7, [], b""
    while offset + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        if kind == 0:
            offset += 32768 - offset % 32768
            continue
        part += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            found, part = [*found, part], b""
        if 32768 - offset % 32768 < 7:
            offset += 32768 - offset % 32768
    return found


def wandb_runs() -> list[tuple[str, dict[int, set[str]]]]:
    """Id, and the names logged at each step, of every offline run below this folder, oldest first."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    runs = []
    for path in sorted(Path("wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        identity, rows = "", {}
        for data in records(path):
            record = messages.Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                identity = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                names = {item.key or "/".join(item.nested_key) for item in record.history.item}
                rows[record.history.step.num] = names
        runs.append((identity, rows))
    return runs


def test_a_resumed_run_goes_on_with_its_wandb_run_and_no_step_is_dropped(run, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = interrupted_and_resumed(run, "wandb")
    # The process of wandb that writes the files still has some of them in its buffer.
    wandb.teardown()
    (first, before), (second, after) = wandb_runs()
    assert first == second == (folder / "tracking-id").read_text().strip()
    assert sorted(before) == list(range(1, CRASH + 1))
    assert sorted(after) == list(range(SAVED + 1, END + 1))
    # One row holds what the step, the evaluation and the evolution after it had to say.
    assert {"agent_0/loss", "agent_0/eval_accuracy", "evolution", "generation"} <= before[2]
    assert {name for rows in (before, after) for names in rows.values() for name in names} >= expected(folder)


def test_a_resumed_run_goes_on_with_its_trackio_run(run, monkeypatch, tmp_path) -> None:
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils  # noqa: PLC0415

    # Read from TRACKIO_DIR at the import.
    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    folder = interrupted_and_resumed(run, "trackio")
    storage = sqlite_storage.SQLiteStorage
    (name,) = storage.get_runs("evollm")
    assert name == f"run-{(folder / 'tracking-id').read_text().strip()}"
    rows = storage.get_logs("evollm", name)
    assert {row["step"] for row in rows} == set(range(1, END + 1))
    assert {key for row in rows for key in row} >= expected(folder)
    assert any("<- agent" in row.get("evolution", "") for row in rows)


def test_an_origin_is_told_to_a_person() -> None:
    grown = Mutation("lr", 1e-5, 1.2e-5, 1.2)
    births = [Birth(1, 1, (), True, {}), Birth(2, 1, (), False, {}), Birth(3, 1, (grown,), False, {})]
    assert [birth.origin for birth in births] == ["elite, kept as it is", "copy", "lr: 1.0e-5 -(x1.2)-> 1.2e-5"]
