"""The best evaluated weights of a run are kept, and win at its end where nothing later was better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rich.console
import torch
from conftest import make_rows
from snapshots import digest
from two_workers import TwoWorkers

import evollm
from evollm import (
    DPO,
    Callback,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
    replay,
)
from evollm.checkpoints import newest_population, read_agent_folder, read_population
from evollm.checkpoints.find import find_agent
from evollm.execution.local import LocalExecutor
from evollm.report.family_tree import family_tree
from evollm.report.findings import headline
from evollm.report.model_card import ExportedModel, model_card
from evollm.runs import read_run
from evollm.tracking import Console

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-3, 1e-1), beta=RLParameter(0.05, 0.5))
STEPS = 6


def near(margin: float):
    """A fitness that is largest where the mean margin is this one, as it is somewhere on the way."""
    return lambda evaluation: -abs(evaluation.mean_margin - margin)


class Watch(Callback):
    """Notes the weights of every agent at every evaluation, and how the run ends; fails where it is told to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.bits: dict[tuple[int, int], str] = {}
        self.fitnesses: dict[tuple[int, int], tuple[float, ...]] = {}

    def on_evaluation(self, event) -> None:
        self.fitnesses |= {(event.step, index): fitness for index, fitness in event.fitnesses.items()}
        agents = self.executor.population()
        self.bits |= {(event.step, agent.index): actor_bits(agent) for agent in agents}
        if event.step == self.fails_at:
            raise RuntimeError("the machine fell over")

    def on_end(self, event) -> None:
        self.ended = event


@pytest.fixture
def make(make_population, tokenizer):
    def make(size: int = 3, test: int = 6, **agents) -> tuple[list[DPO], PreferenceGym]:
        env = PreferenceGym(
            make_rows(12),
            make_rows(test, 12) if test else None,
            tokenizer,
            data_batch_size_per_gpu=4,
            final_dataset=make_rows(4, 20),
        )
        return make_population(size, hp_config=HP_CONFIG, token_budget=200, **agents), env

    return make


@pytest.fixture
def run(make, tmp_path):
    """Run, or resume, in a folder of that name."""

    def start(name: str, watch: Watch, *, size: int = 3, resume: bool = False, test: int = 6, **changes) -> list[DPO]:
        factory = changes.pop("executor", LocalExecutor)

        def executor(agents, env):
            watch.executor = factory(agents, env)
            return watch.executor

        arguments = {
            "max_steps": STEPS,
            "evaluation_interval": 1,
            "fitness": near(0.75),
            "num_sample_answers": 1,
            "verbose": False,
            "callbacks": [watch],
            "executor": executor,
            "resume_from_checkpoint" if resume else "run_dir": tmp_path / name,
            **{name: value for name, value in changes.items() if name != "agents"},
        }
        if size > 1:
            arguments["tournament"] = TournamentSelection(2, True, size, rand_seed=3)
            arguments["mutation"] = Mutations(0.2, 0.8, rand_seed=5)
            arguments["evo_steps"] = 2
        return finetune_llm_preference(*make(size, test, **changes.pop("agents", {})), **arguments)[0]

    return start


def bits_of(folder: Path) -> str:
    return _bits(read_agent_folder(folder).adapter("actor").tensors)


def actor_bits(agent: DPO) -> str:
    return _bits(agent.base.adapters.export(agent.actor_adapter).tensors)


def _bits(tensors) -> str:
    return digest([tensors[name] for name in sorted(tensors)])


@pytest.mark.parametrize(
    ("size", "changes"),
    [(1, {}), (3, {}), (3, {"executor": TwoWorkers}), (3, {"update_reference_each_epoch": True})],
    ids=["one agent", "several", "two workers", "moving references"],
)
def test_the_best_evaluation_of_the_whole_run_wins(run, tmp_path, size, changes) -> None:
    watch = Watch()
    population = run("run", watch, size=size, **changes)
    step, index = max(watch.fitnesses, key=lambda place: (watch.fitnesses[place], place[0]))
    ended = watch.ended
    assert (ended.best_step, ended.best) == (step, index)
    assert step < STEPS, "with the best at the end nothing would be shown"
    # The elite has its weights, moments and history; the population is the last one.
    elite = read_agent_folder(tmp_path / "run/elite")
    assert bits_of(tmp_path / "run/elite") == watch.bits[step, index]
    assert elite.attributes["index"] == index
    assert elite.attributes["fitness"][-1] == watch.fitnesses[step, index][0]
    assert elite.optimizer["state"][0]["step"].item() == elite.attributes["steps"] == step
    assert [actor_bits(agent) for agent in population] == [watch.bits[STEPS, agent.index] for agent in population]
    # The final score is that of these weights, and the next best is the best one of the last population.
    last = {agent.index: watch.fitnesses[STEPS, agent.index] for agent in population}
    assert ended.runner_up == max(last, key=lambda index: last[index])
    assert ended.after.margins.tolist() != ended.runner_up_score.margins.tolist()
    record = read_run(tmp_path / "run")
    assert (record.ended.best_step, record.winner_step, record.winner) == (step, step, index)
    references = {agent.adapter("reference") for agent in population}
    assert len(population[0].base.adapters.names) == size + len(references)


def test_of_equals_the_later_one_wins(run) -> None:
    watch = Watch()
    run("run", watch, fitness=lambda evaluation: 1.0)
    assert (watch.ended.best_step, watch.ended.best) == (STEPS, watch.executor.members()[0].index)


def test_the_best_evaluation_between_two_decisions_counts(run) -> None:
    watch = Watch()
    run("run", watch)
    assert watch.ended.best_step % 2 == 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"executor": TwoWorkers}, {"update_reference_each_epoch": True}],
    ids=["one worker", "two workers", "moving references"],
)
def test_a_run_that_died_after_any_evaluation_ends_with_the_same_best(run, tmp_path, changes) -> None:
    watch = Watch()
    run("whole", watch, checkpoint_steps=2, **changes)
    assert watch.ended.best_step < STEPS
    whole = tmp_path / "whole"
    for step in range(2, STEPS + 1):
        with pytest.raises(RuntimeError, match="fell over"):
            run(f"died-{step}", Watch(step), checkpoint_steps=2, **changes)
        if step == 2:
            with pytest.warns(UserWarning, match="holds no checkpoint"):
                run("died-2", Watch(), checkpoint_steps=2, resume=True, **changes)
        else:
            run(f"died-{step}", Watch(), checkpoint_steps=2, resume=True, **changes)
        died = tmp_path / f"died-{step}"
        assert (died / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert (died / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
        ends = [read_agent_folder(folder / "elite") for folder in (whole, died)]
        assert bits_of(whole / "elite") == bits_of(died / "elite")
        assert ends[0].attributes == ends[1].attributes
        for one, other in zip(*(end.optimizer["state"].values() for end in ends), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_selection_pairs_nothing_is_kept(run, tmp_path) -> None:
    watch = Watch()
    run("run", watch, size=1, test=0)
    saved = read_population(newest_population(tmp_path / "run/checkpoints"))
    assert saved.best_so_far is None
    assert "best" not in saved.state
    assert watch.ended.best_step == STEPS


def test_a_run_that_has_not_ended_gives_the_best_agent_of_its_checkpoint_as_it_was(run, tmp_path) -> None:
    watch = Watch(STEPS)
    with pytest.raises(RuntimeError):
        run("run", watch, checkpoint_steps=1)
    found = find_agent("path", tmp_path / "run")
    assert f"agent {found.index} is taken as it was after step {found.step}, at the best evaluation" in found.remark
    assert bits_of(found.path) == watch.bits[found.step, found.index]
    assert found.step < STEPS - 1
    # The records say the same of it.
    record = read_run(tmp_path / "run")
    assert (record.winner, record.winner_step) == (found.index, found.step)
    assert f"The best agent is that of step {found.step} of {STEPS}, agent {found.index}" in " ".join(
        headline(record, [])
    )
    card = model_card(tmp_path / "run", exported(found.index, found.step))
    assert f"this is agent {found.index} after step {found.step} of {STEPS}" in card


def exported(agent: int, step: int | None = None) -> ExportedModel:
    return ExportedModel("", "folder", "AutoModelForCausalLM", False, "", False, agent, step)


@pytest.mark.parametrize(
    "agents",
    [{}, {"lr_scheduler_type": "cosine"}, {"lr_scheduler_type": "linear", "warmup_ratio": 0.3}],
    ids=["constant", "cosine", "linear"],
)
def test_the_winner_is_replayed_up_to_its_step_bit_for_bit(run, make, tmp_path, agents) -> None:
    watch = Watch()
    run("run", watch, agents=agents, fitness=near(0.75))
    result = replay(tmp_path / "run", *make(1, **agents), run_dir=tmp_path / "replay", verbose=False)
    assert result.exact
    assert 1 < read_run(tmp_path / "replay").last_step == watch.ended.best_step < STEPS
    assert result.schedule == read_run(tmp_path / "run").schedule
    # A replay's own folder says what it learnt by.
    if agents:
        again = replay(tmp_path / "replay", *make(1, **agents), run_dir=tmp_path / "again", verbose=False)
        assert again.exact
        longer = replay(tmp_path / "run", *make(1, **agents), max_steps=12, run_dir=tmp_path / "longer", verbose=False)
        assert longer.agent.num_training_steps == round(STEPS * 12 / watch.ended.best_step) > 12


def test_report_card_and_console_name_the_step_of_the_best(run, tmp_path) -> None:
    watch, text = Watch(), tmp_path / "text"
    with text.open("w") as file:
        console = Console(rich.console.Console(file=file, width=200))
        run("run", watch, callbacks=[watch, console])
    step, index = watch.ended.best_step, watch.ended.best
    assert f"It is agent {index} after step {step} of {STEPS}, the best evaluation." in text.read_text()
    record = read_run(tmp_path / "run")
    said = " ".join(headline(record, []))
    assert f"The best agent is that of step {step} of {STEPS}: a fitness of" in said
    (star,) = [node for node in family_tree(record) if (node.generation, node.birth.index) == ((step - 1) // 2, index)]
    assert star.on_line
    assert star.score.step == step
    assert not any(node.on_line for node in family_tree(record) if node.generation > star.generation)
    assert record.line_ends[index] == step
    assert max(scored.step for scored in record.line_evaluations) == step
    assert f"After step {step} of {STEPS}, the best evaluation, on pairs" in model_card(
        tmp_path / "run", exported(index)
    )
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert (line["best"], line["best_step"]) == (index, step)


def test_tune_returns_the_best_as_it_was_and_the_last_population(make_model, tokenizer, lora, tmp_path) -> None:
    ended = []
    listener = Callback()
    listener.on_end = ended.append
    result = evollm.tune(
        make_model(),
        make_rows(40),
        tokenizer=tokenizer,
        lora_config=lora,
        lr=1e-2,
        population=2,
        generations=3,
        num_epochs=3,
        data_batch_size_per_gpu=8,
        fitness=near(0.5),
        num_sample_answers=0,
        callbacks=[listener],
        run_dir=tmp_path / "run",
        verbose=False,
    )
    assert ended[0].best_step < ended[0].step
    assert result.best not in result.population
    assert result.best.index == ended[0].best
    assert result.best.steps == ended[0].best_step
    assert actor_bits(result.best) == bits_of(tmp_path / "run/elite")
    assert result.schedule == read_run(tmp_path / "run").schedule
    assert result.schedule[-1][0] < ended[0].best_step
    # It can be used: it learns on, and is saved.
    result.best.save_checkpoint(str(tmp_path / "again"))
    assert bits_of(tmp_path / "again") == bits_of(tmp_path / "run/elite")
