from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_examples, make_rows

from evollm import (
    SFT,
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
    replay,
    tune,
)
from evollm.checkpoints.agent import read_agent_folder
from evollm.cli import main
from evollm.execution import worker as worker_module
from evollm.models.layouts.packed import LaidOutPacked
from evollm.runs import read_run
from evollm.tuning.replay import Script

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-3, 1e-2), beta=RLParameter(0.05, 0.5), nll_alpha=RLParameter(0.1, 1))
# So that of three members two go through the base together and one by itself.
BUDGET = 600
EVOLUTION = {"tournament": TournamentSelection(2, True, 3, rand_seed=3), "mutation": Mutations(0.1, 0.9, rand_seed=5)}
LENGTH = {"max_steps": 6, "evo_steps": 2}


@pytest.fixture
def made(make_population, tokenizer):
    """Agents and gym, the same ones whenever they are made with the same arguments."""

    def make(size: int = 3, rows: int = 12, **agents):
        env = PreferenceGym(make_rows(rows), make_rows(6, 50), tokenizer, data_batch_size_per_gpu=4)
        return make_population(size, **{"hp_config": HP_CONFIG, "token_budget": BUDGET, **agents}), env

    return make


@pytest.fixture
def run(made, tmp_path):
    """A population's run in the folder `run`."""

    def start(changes=None, **agents) -> Path:
        settings = {**EVOLUTION, **LENGTH, "num_sample_answers": 0, "verbose": False, **(changes or {})}
        finetune_llm_preference(*made(**agents), run_dir=tmp_path / "run", **settings)
        return tmp_path / "run"

    return start


def again(run: Path, agents, env, **changes):
    return replay(run, agents, env, run_dir=run.parent / "replay", verbose=False, **changes)


def slots(run: Path) -> set[tuple[int, int]]:
    return {(slot.place, slot.of) for slot in Script.of(read_run(run)).slots.values()}


def test_replay_makes_the_winners_adapter_bit_for_bit(run, made) -> None:
    folder = run()
    assert len(read_run(folder).schedule) > 1, "a line without a mutation would say little"
    assert slots(folder) - {(0, 3)}, "nor would one that is always first"
    result = again(folder, *made(1))
    assert result.exact
    elite, mine = (Path(path, "elite/actor/adapter_model.safetensors") for path in (folder, result.run_dir))
    assert elite.read_bytes() == mine.read_bytes()
    assert result.schedule == read_run(folder).schedule


def test_a_replay_that_was_interrupted_goes_on(run, made, monkeypatch) -> None:
    folder = run()
    learn_all, steps = worker_module.learn_all, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return learn_all(*args)

    monkeypatch.setattr(worker_module, "learn_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again(folder, *made(1))
    result = replay(folder, *made(1), resume_from_checkpoint=folder.parent / "replay", verbose=False)
    assert len(steps) == LENGTH["max_steps"]
    assert result.exact


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many members went through the base together, for each pass that had gradients."""
    found, plain = [], LaidOutPacked.read

    def watched(laid, network, count, *reading):
        if torch.is_grad_enabled():
            found.append(count)
        return plain(laid, network, count, *reading)

    monkeypatch.setattr(LaidOutPacked, "read", watched)
    return found


def test_the_agent_learns_in_passes_of_the_runs_shapes(run, made, sizes, monkeypatch) -> None:
    """Bits depend on shapes; with two threads, for example, the adapter is another without the slots."""
    folder, found = run(), Script.of
    assert set(sizes) == {1, 2}
    sizes.clear()
    again(folder, *made(1))
    with_seats = [*sizes]
    assert max(with_seats) > 1
    sizes.clear()
    monkeypatch.setattr(Script, "of", lambda record: replace(found(record), slots={}))
    result = replay(folder, *made(1), run_dir=folder.parent / "alone", verbose=False)
    assert set(sizes) == {1}
    # The pass with the agent in it is the only one that is computed.
    assert len(with_seats) == len(sizes)
    elite = read_agent_folder(folder / "elite").adapter("actor").tensors
    mine = result.agent.base.adapters.export(result.agent.actor_adapter).tensors
    assert all(torch.allclose(elite[name], mine[name], atol=1e-3) for name in elite)


def test_another_value_gives_another_adapter(run, made) -> None:
    folder = run()
    path = folder / "lineage.jsonl"
    path.write_text(path.read_text().replace('"max_grad_norm": 1.0', '"max_grad_norm": 0.01'))
    assert again(folder, *made(1)).exact is False


class Poison(Callback):
    """Makes an agent of the first generation diverge at once, so that the passes of the others get smaller."""

    def __init__(self, agent) -> None:
        self.agent = agent

    def on_start(self, event) -> None:
        for parameter in self.agent.actor_parameters():
            parameter.data.fill_(float("nan"))


def test_replay_keeps_its_seat_when_another_agent_diverges(made, tmp_path) -> None:
    agents, env = made()
    settings = {**EVOLUTION, **LENGTH, "num_sample_answers": 0, "verbose": False}
    finetune_llm_preference(agents, env, run_dir=tmp_path / "run", callbacks=[Poison(agents[1])], **settings)
    assert {count for _, count in slots(tmp_path / "run")} == {2, 3}
    assert again(tmp_path / "run", *made(1)).exact


def test_replay_is_exact_where_the_batch_size_evolves(made, tmp_path) -> None:
    """Agents of unlike batch sizes do not share passes."""
    config = HyperparameterConfig(lr=RLParameter(1e-3, 1e-2), batch_size=RLParameter(2, 4, dtype=int))
    agents, env = made(hp_config=config, batch_size=4)
    settings = {**EVOLUTION, **LENGTH, "num_sample_answers": 0, "verbose": False}
    finetune_llm_preference(agents, env, run_dir=tmp_path / "run", **settings)
    assert len({count for _, count in slots(tmp_path / "run")}) > 1
    assert again(tmp_path / "run", *made(1, batch_size=4)).exact


def test_replay_of_a_supervised_run(make_sft_population, tokenizer, tmp_path) -> None:
    def made(size: int):
        env = SFTGym(make_examples(12), make_examples(6, 50), tokenizer, data_batch_size_per_gpu=4)
        config = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2))
        return make_sft_population(size, hp_config=config, token_budget=BUDGET), env

    settings = {**EVOLUTION, **LENGTH, "num_sample_answers": 0, "verbose": False}
    finetune_llm_sft(*made(3), run_dir=tmp_path / "run", **settings)
    result = again(tmp_path / "run", *made(1))
    assert isinstance(result.agent, SFT)
    assert result.exact


def test_on_other_data_the_schedule_is_stretched(run, made) -> None:
    folder = run()
    changes = [step for step, _ in read_run(folder).schedule]
    agents, env = made(1, rows=24)
    result = again(folder, agents, env)
    # Two epochs of 3 steps were run; two epochs of 24 pairs are 12 steps.
    assert result.agent.steps == 12
    assert [step for step, _ in result.schedule] == [2 * step for step in changes]
    assert result.agent.hyperparameter_values() == read_run(folder).schedule[-1][1]
    assert result.exact is None


def test_agents_or_settings_of_another_run_are_refused(run, made) -> None:
    folder = run()
    with pytest.raises(ConfigurationError, match=r"settings.token_budget: 600 then, 99 now"):
        again(folder, *made(1, token_budget=99))
    with pytest.raises(ConfigurationError, match="pass agents and env together"):
        again(folder, made(1)[0], None)
    with pytest.raises(ConfigurationError, match="is no run that a command began"):
        again(folder, None, None)


def test_what_tune_began_is_replayed_from_its_folder(make_model, tokenizer, tmp_path, capsys) -> None:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    folder = tmp_path / "run"
    tune(
        str(tmp_path / "model"),
        str(tmp_path / "rows.jsonl"),
        population=3,
        **{"lora_config": {"r": 4, "target_modules": ["q_proj"]}, "evo_steps": 2, "max_steps": 6, "lr": 1e-3},
        **{"run_dir": folder, "num_sample_answers": 0, "verbose": False, "token_budget": 600},
    )
    assert again(folder, None, None).exact
    assert main(["replay", str(folder), "--run-dir", str(tmp_path / "command")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    more = ["--data", str(tmp_path / "more.jsonl"), "--run-dir", str(tmp_path / "more")]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)))
    assert main(["replay", str(folder), *more]) == 0
    assert "stretched" in capsys.readouterr().out
