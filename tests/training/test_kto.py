from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from snapshots import actor_bits

from evollm import (
    KTO,
    SFT,
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    RLParameter,
    TournamentSelection,
    UnpairedGym,
    finetune_llm_kto,
    finetune_llm_sft,
    replay,
    tune,
)
from evollm.report import read_run

BOUNDS = HyperparameterConfig(
    lr=RLParameter(min=1e-3, max=1e-2),
    beta=RLParameter(min=0.05, max=0.5),
    desirable_weight=RLParameter(min=0.5, max=2.0),
)


def answers(count: int, skip: int = 0, *, undesirable: bool = True) -> list[dict[str, Any]]:
    """Both sides of `make_rows`, each with its label."""
    sides = (("chosen", True), ("rejected", False)) if undesirable else (("chosen", True),)
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in make_rows(count, skip)
        for side, label in sides
    ]


@pytest.fixture
def env(tokenizer) -> UnpairedGym:
    return UnpairedGym(answers(6), make_rows(4, 6), tokenizer, final_dataset=answers(4, 10), data_batch_size_per_gpu=4)


def test_a_population_evolves_and_its_run_says_what_was_learnt(make_model, env, lora, tmp_path: Path) -> None:
    agents = KTO.population(2, actor_network=make_model(), lora_config=lora, lr=3e-3, hp_config=BOUNDS)
    population, fitnesses = finetune_llm_kto(
        agents,
        env,
        num_epochs=4,
        evo_steps=3,
        tournament=TournamentSelection(2, True, 2, rand_seed=1),
        mutation=Mutations(no_mutation=0.0, rl_hp=1.0, rand_seed=1),
        run_dir=tmp_path / "run",
        verbose=False,
    )
    assert max(fitnesses) > 0.8
    assert all(isinstance(agent, KTO) for agent in population)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=0.3)
    assert {"kl", "rewards/margins", "grad_norm"} <= steps[0].keys()
    record = read_run(tmp_path / "run")
    assert record.config["algorithm"] == "KTO"
    assert record.config["data"]["noun"] == "answer"


def test_one_agent_trains_with_references_that_move_and_a_last_batch_of_one_answer(
    make_model, tokenizer, lora, tmp_path: Path
) -> None:
    env = UnpairedGym([*answers(2), answers(1, 5)[0]], answers(2, 6), tokenizer, data_batch_size_per_gpu=4)
    agent = KTO(actor_network=make_model(), lora_config=lora, lr=5e-3)
    (agent,), (fitness,) = finetune_llm_kto(
        [agent], env, num_epochs=3, update_reference_each_epoch=True, run_dir=tmp_path / "run", verbose=False
    )
    assert agent.steps == 6
    assert agent.reference_update_tracker == 2
    assert 0 <= fitness <= 1


class Stop(Callback):
    """Ends a run behind a step, as a crash would."""

    def on_step(self, event: Any) -> None:
        if event.step == 3:
            raise KeyboardInterrupt


def tuned(make_model: Any, tokenizer: Any, lora: Any, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "test_data": answers(3, 6),
        "final_data": answers(3, 9),
        "algorithm": "kto",
        "population": 2,
        "evo_steps": 2,
        "max_steps": 4,
        "checkpoint_steps": 2,
        "num_sample_answers": 0,
        "data_batch_size_per_gpu": 4,
        "lr": 3e-3,
        "lora_config": lora,
        "verbose": False,
    }
    return tune(make_model(), answers(6), **{**arguments, **changes})


@pytest.mark.usefixtures("drawn_reports")
def test_tune_evolves_what_kto_has_and_an_interrupted_run_and_a_replay_have_its_bits(
    make_model, tokenizer, lora, tmp_path: Path
) -> None:
    whole = tuned(make_model, tokenizer, lora, run_dir=tmp_path / "whole")
    assert {*whole.best.hp_config} == {"lr", "beta", "desirable_weight", "undesirable_weight"}
    with pytest.raises(KeyboardInterrupt):
        tuned(make_model, tokenizer, lora, run_dir=tmp_path / "cut", callbacks=[Stop()])
    resumed = tuned(make_model, tokenizer, lora, resume_from_checkpoint=tmp_path / "cut")
    assert actor_bits(resumed.best) == actor_bits(whole.best)
    assert resumed.fitnesses == whole.fitnesses
    page = whole.report.read_text(encoding="utf-8")
    assert "AUC" in page
    assert "estimated divergence from the reference" in page
    rows = {"data": answers(6), "test_data": answers(3, 6), "final_data": answers(3, 9)}
    handed = {"model": make_model(), "tokenizer": tokenizer, "lora_config": lora, "verbose": False}
    assert replay(tmp_path / "whole", run_dir=tmp_path / "replay", **handed, **rows).exact


def test_labels_far_from_balance_are_warned_of_with_the_weights_of_the_paper(
    make_model, tokenizer, lora, tmp_path: Path
) -> None:
    rows = [*answers(9, undesirable=False), *answers(3, 9)]
    env = UnpairedGym(rows, answers(3, 12), tokenizer, data_batch_size_per_gpu=5)
    agent = KTO(actor_network=make_model(), lora_config=lora)
    message = (
        "12 desirable and 3 undesirable answers.*either desirable_weight from 0.25 to 0.333 or undesirable_weight "
    )
    short: dict[str, Any] = {"max_steps": 1, "num_sample_answers": 0, "verbose": False}
    with pytest.warns(UserWarning, match=message):
        finetune_llm_kto([agent], env, run_dir=tmp_path / "run", **short)
    agent.set_hyperparameters({"desirable_weight": 0.3})
    finetune_llm_kto([agent], env, run_dir=tmp_path / "next", **short)


def test_what_cannot_run_is_refused_before_training(make_model, tokenizer, lora, env, tmp_path: Path) -> None:
    single = UnpairedGym(answers(3), None, tokenizer, data_batch_size_per_gpu=1)
    agent = KTO(actor_network=make_model(), lora_config=lora)
    with pytest.raises(ConfigurationError, match=r"data_batch_size_per_gpu=1: .*at least 2.*apo_zero_unpaired"):
        finetune_llm_kto([agent], single, run_dir=tmp_path / "run")
    with pytest.raises(ConfigurationError, match="is not a SFT agent"):
        finetune_llm_sft([agent], env, run_dir=tmp_path / "run")
    with pytest.raises(ConfigurationError, match="is not a KTO agent, which finetune_llm_kto tunes"):
        finetune_llm_kto([SFT(actor_network=make_model(), lora_config=lora)], env, run_dir=tmp_path / "run")
    with pytest.raises(TypeError, match="guards"):
        finetune_llm_kto([agent], env, guards={"max_kl": 1.0})
    with pytest.raises(ConfigurationError, match=r"fitness='accuracy': .*auc, mean_margin"):
        finetune_llm_kto([agent], env, fitness="accuracy", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    alone = KTO(actor_network=make_model(), lora_config=lora, loss_type="apo_zero_unpaired")
    finetune_llm_kto([alone], single, max_steps=1, run_dir=tmp_path / "alone", verbose=False)


@pytest.mark.parametrize("moving", [False, True])
def test_a_budget_of_one_run_has_the_passes_of_the_estimate_of_the_divergence(
    make_model, tokenizer, lora, tmp_path: Path, moving
) -> None:
    env = UnpairedGym(answers(7), answers(2, 7), tokenizer, data_batch_size_per_gpu=4)
    agent = KTO(actor_network=make_model(), lora_config=lora)
    finetune_llm_kto(
        [agent],
        env,
        max_steps=16,
        budget=1.0,
        num_sample_answers=0,
        update_reference_each_epoch=moving,
        run_dir=tmp_path / "run",
        verbose=False,
    )
    assert agent.steps == 16
    # A mismatched answer may be one of the rows, whose log-probs are known.
    assert 0.9 < read_run(tmp_path / "run").spent[-1][1].runs < 1.01
