from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import rich.console
from conftest import make_examples
from snapshots import actor_bits, base_bits

from evollm import (
    SFT,
    Callback,
    ConfigurationError,
    HyperparameterConfig,
    Mutations,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_sft,
    save_merged_model,
)
from evollm.tracking import Console

HP_CONFIG = HyperparameterConfig(lr=RLParameter(1e-4, 1e-2))


@pytest.fixture
def quiet(tmp_path: Path) -> dict[str, object]:
    return {"run_dir": tmp_path / "run", "verbose": False, "num_sample_answers": 0}


@pytest.fixture
def run(make_sft_population, tokenizer, tmp_path):
    """A population that evolves twice in 9 steps."""

    def start(name: str, resume: bool = False, **changes) -> list[SFT]:
        env = SFTGym(make_examples(12), make_examples(6, 12), tokenizer, data_batch_size_per_gpu=4)
        population = make_sft_population(3, hp_config=HP_CONFIG)
        folder = {"resume_from_checkpoint" if resume else "run_dir": tmp_path / name}
        arguments = {"num_epochs": 3, "checkpoint_steps": 2, "verbose": False, "num_sample_answers": 1, **changes}
        evolution = {"tournament": TournamentSelection(2, True, 3), "mutation": Mutations(0.2, 0.8, rand_seed=5)}
        return finetune_llm_sft(population, env, **folder, **evolution, **arguments)[0]

    return start


class CrashAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, event) -> None:
        if event.step == self.step:
            raise RuntimeError


def test_an_sft_run_of_one_equals_a_plain_loop_over_learn_bit_for_bit(make_sft, tokenizer, quiet) -> None:
    def env() -> SFTGym:
        return SFTGym(make_examples(12), make_examples(6, 12), tokenizer, data_batch_size_per_gpu=4)

    tuned, looped = make_sft(), make_sft()
    _, scores = finetune_llm_sft([tuned], env(), num_epochs=2, **quiet)
    batches = env()
    for _ in range(2 * len(batches)):
        looped.learn(batches.next_batch())
    assert actor_bits(tuned) == actor_bits(looped)
    assert scores == [-looped.evaluate(env()).loss]


def test_a_resumed_sft_run_ends_with_the_bits_of_one_never_interrupted(run, tmp_path) -> None:
    whole = [actor_bits(agent) for agent in run("whole")]
    for step in (3, 5):
        with pytest.raises(RuntimeError):
            run(f"crashed-{step}", callbacks=[CrashAt(step)])
        assert [actor_bits(agent) for agent in run(f"crashed-{step}", resume=True)] == whole
        for name in ("metrics.jsonl", "lineage.jsonl", "elite/actor/adapter_model.safetensors"):
            assert (tmp_path / f"crashed-{step}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_population_of_sft_agents_evolves_and_lowers_the_held_out_loss(run, tmp_path) -> None:
    text = io.StringIO()
    population = run("evolved", callbacks=[Console(rich.console.Console(file=text, width=150))])
    folder = tmp_path / "evolved"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    end = lines[-1]
    assert end["kind"] == "end"
    assert end["after_loss"] < end["before_loss"]
    assert end["after_perplexity"] == pytest.approx(np.exp(end["after_loss"]))
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert all(line["fitness"] == [-line["loss"]] for line in evaluations)
    # The elite is the agent of the lowest held-out loss.
    last = [line for line in evaluations if line["step"] == 9]
    assert end["best"] == min(last, key=lambda line: line["loss"])["agent"]
    plans = [json.loads(line) for line in (folder / "lineage.jsonl").read_text().splitlines()][1:]
    assert len(plans) == 2
    assert all(1e-4 <= agent.lr <= 1e-2 for agent in population)
    assert len(population[0].base.adapters.names) == 3
    shown = text.getvalue()
    assert "Held-out loss on 6 selection examples" in shown
    assert "perplexity" in shown
    assert "9 steps of 4 examples" in shown
    assert not any(word in shown for word in ("beta", "margin", "accuracy", "pairs"))
    best = next(agent for agent in population if agent.index == end["best"])
    before = base_bits(best.base)
    save_merged_model(best, tmp_path / "merged", run_dir=folder)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "supervised fine-tuning" in card
    assert f"| loss (nats per completion token) | {end['before_loss']:.3f} | {end['after_loss']:.3f} |" in card
    assert "preference" not in card.lower()
    assert base_bits(best.base) == before


def test_a_fitness_of_the_users_scores_completions(run, tmp_path) -> None:
    run("own", fitness=lambda evaluation: float(evaluation.logprobs.sum()))
    lines = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["fitness"][0] < -line["loss"] for line in lines if line["kind"] == "evaluation")


def test_agents_and_gyms_of_the_other_stage_are_refused(make_sft, make_agent, sft_gym, gym, quiet) -> None:
    sft, dpo = make_sft(), make_agent()
    with pytest.raises(ConfigurationError, match="pop='DPO': is not a SFT agent, which finetune_llm_sft tunes"):
        finetune_llm_sft([dpo], sft_gym, **quiet)
    with pytest.raises(ConfigurationError, match="pop='SFT': is not a DPO agent"):
        finetune_llm_preference([sft], gym, **quiet)
    with pytest.raises(ConfigurationError, match="env='PreferenceGym': is no SFTGym"):
        finetune_llm_sft([sft], gym, **quiet)
    with pytest.raises(ConfigurationError, match="env='SFTGym': is no PreferenceGym"):
        finetune_llm_preference([dpo], sft_gym, **quiet)
    assert not quiet["run_dir"].exists()
