from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_examples, make_rows
from snapshots import actor_bits
from stage_kills import STEPS, killed_ends

from evollm import (
    DPO,
    GRPO,
    SFT,
    Callback,
    ConfigurationError,
    DataError,
    HyperparameterConfig,
    Judge,
    Mutations,
    PreferenceGym,
    RewardGym,
    RLParameter,
    SFTGym,
    TournamentSelection,
    finetune_llm_preference,
    finetune_llm_reasoning,
    finetune_llm_sft,
    replay,
    tune,
)
from evollm.algorithms.rollouts import ROLLOUT, collect
from evollm.report import read_run
from evollm.training import finetune
from evollm.tuning.tune import validate

BOUNDS = HyperparameterConfig(
    lr=RLParameter(min=1e-3, max=3e-2),
    temperature=RLParameter(min=0.5, max=2.0),
    group_size=RLParameter(min=2, max=6, dtype=int),
)
QUIET: dict[str, Any] = {"num_sample_answers": 0, "verbose": False}


def prompts(count: int, skip: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "name": row["chosen"]} for row in make_rows(count, skip)]


def of_one_length(count: int, skip: int = 0) -> list[dict[str, Any]]:
    """Prompts that are answered in one call."""
    return [{"prompt": f"Question {number:02}:", "name": str(number)} for number in range(skip, skip + count)]


def brevity(completions: list[str], name: list[str]) -> list[float]:
    """Short answers are better; the rows' other column is there."""
    assert len(name) == len(completions)
    return [-float(len(completion)) for completion in completions]


@pytest.fixture
def env(tokenizer) -> RewardGym:
    return RewardGym(
        prompts(6), prompts(3, 6), tokenizer, brevity, final_dataset=prompts(3, 9), data_batch_size_per_gpu=3
    )


@pytest.fixture
def make(make_model, lora) -> Any:
    def make(size: int = 1, **values: Any) -> list[GRPO]:
        settings = {"lr": 1e-2, "group_size": 4, "max_completion_length": 6, "beta": 0.01, **values}
        return GRPO.population(size, actor_network=make_model(), lora_config=lora, **settings)

    return make


def vowels(completions: list[str]) -> list[int]:
    return [completion.count("e") + completion.count("a") for completion in completions]


def test_the_reward_of_a_rule_rises(make, tokenizer, tmp_path: Path) -> None:
    env = RewardGym(of_one_length(6), of_one_length(3, 6), tokenizer, vowels, data_batch_size_per_gpu=3)
    agents = make(lr=2e-2, group_size=16, max_completion_length=4, beta=0.0)
    before = agents[0].evaluate(env).reward
    (agent,), (fitness,) = finetune_llm_reasoning(
        agents, env, max_steps=16, evaluation_interval=16, run_dir=tmp_path / "run", **QUIET
    )
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward"] for line in lines if line["kind"] == "step"]
    assert np.mean(rewards[-4:]) > 2 * np.mean(rewards[:4])
    assert fitness > before + 0.5
    record = read_run(tmp_path / "run")
    assert record.config["algorithm"] == "GRPO"
    assert record.config["data"]["noun"] == "prompt"
    assert {"reward_std", "kl", "clip_ratio/region_mean", "completions/mean_length", "rewards/vowels/mean"} <= lines[
        1
    ].keys()
    assert agent.steps == 16
    # Log-probs of answers, which never come again, are not kept.
    assert not agent.base.reference_cache._entries


def test_a_population_of_four_evolves_by_rewards(make, env, tmp_path: Path) -> None:
    population, fitnesses = finetune_llm_reasoning(
        make(4, hp_config=BOUNDS, max_completion_length=4),
        env,
        max_steps=4,
        evo_steps=2,
        tournament=TournamentSelection(2, True, 4, rand_seed=1),
        mutation=Mutations(no_mutation=0.0, rl_hp=1.0, rand_seed=1),
        run_dir=tmp_path / "run",
        **QUIET,
    )
    assert len({agent.temperature for agent in population} | {agent.group_size for agent in population}) > 2
    assert all(math.isfinite(fitness) for fitness in fitnesses)
    record = read_run(tmp_path / "run")
    # Of one agent by itself: a population of four takes about four times as much.
    assert 2 < record.spent[-1][1].runs < 6


class Stop(Callback):
    """Ends a run behind a step, as a crash would."""

    def on_step(self, event: Any) -> None:
        if event.step == 3:
            raise KeyboardInterrupt


def tuned(make_model: Any, tokenizer: Any, lora: Any, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "test_data": of_one_length(3, 6),
        "final_data": of_one_length(3, 9),
        "algorithm": "grpo",
        "reward_functions": brevity,
        "population": 2,
        "evo_steps": 2,
        "max_steps": 4,
        "checkpoint_steps": 2,
        "data_batch_size_per_gpu": 3,
        "group_size": 3,
        "max_completion_length": 4,
        "lr": 1e-2,
        "lora_config": lora,
        **QUIET,
    }
    return tune(make_model(), of_one_length(6), **{**arguments, **changes})


@pytest.mark.usefixtures("drawn_reports")
def test_tune_evolves_it_and_a_run_that_was_interrupted_goes_on_bit_for_bit(
    make_model, tokenizer, lora, tmp_path: Path
) -> None:
    whole = tuned(make_model, tokenizer, lora, run_dir=tmp_path / "whole")
    assert {*whole.best.hp_config} == {"lr", "beta"}
    with pytest.raises(KeyboardInterrupt):
        tuned(make_model, tokenizer, lora, run_dir=tmp_path / "cut", callbacks=[Stop()])
    resumed = tuned(make_model, tokenizer, lora, resume_from_checkpoint=tmp_path / "cut")
    assert actor_bits(resumed.best) == actor_bits(whole.best)
    assert resumed.fitnesses == whole.fitnesses
    page = whole.report.read_text(encoding="utf-8")
    assert "mean reward of the sampled answers" in page
    with pytest.raises(ConfigurationError, match=r"is of grpo: answers that one agent samples alone"):
        replay(tmp_path / "whole")


def test_answers_are_a_function_of_seed_epoch_row_and_weights_and_members_share_their_luck(make, env) -> None:
    first, second = make(2, group_size=3)
    second.set_hyperparameters({"group_size": 5})
    batch = env.next_batch()
    mine, theirs = collect([first, second], batch, env)
    for one, other in zip(mine, theirs, strict=True):
        assert (len(one.completions), len(other.completions)) == (3, 5)
        for answer, same in zip(one.completions, other.completions, strict=False):
            assert answer.ids.tolist() == same.ids.tolist()
    (alone,) = collect([first], batch.select([1]), env)
    assert [one.ids.tolist() for one in alone[0].completions] == [one.ids.tolist() for one in mine[1].completions]
    while env.num_epochs < 1:
        env.next_batch()
    env.next_batch()
    (other_epoch,) = collect([first], batch.select([1]), env)
    assert [one.ids.tolist() for one in other_epoch[0].completions] != [one.ids.tolist() for one in mine[1].completions]


def test_evaluation_does_not_depend_on_what_evolves(make, env) -> None:
    agent = make()[0]
    found = agent.evaluate(env)
    agent.set_hyperparameters({"temperature": 3.0, "group_size": 2, "beta": 1.0, "epsilon": 0.5})
    assert agent.evaluate(env).equals(found)
    assert found.reward == np.mean(found.rewards) == found.scores["reward"]
    part = agent.evaluate(env, rows=2)
    assert len(part) == 2
    sampled = make(evaluation_answers=3, evaluation_temperature=1.0)[0]
    assert sampled.evaluate(env).equals(sampled.evaluate(env))
    assert not sampled.evaluate(env).equals(found)


def test_rewards_that_are_not_finite_harm_one_member_alone(make, tokenizer, tmp_path: Path) -> None:
    """Answers of one member alone get NaN; the other one learns as without it."""
    calls: list[int] = []

    def partly(completions: list[str]) -> list[float]:
        calls.append(len(completions))
        half = len(completions) // 2 if len(completions) == 24 else len(completions)
        points = [-float(len(one)) for one in completions]
        return [*points[:half], *[math.nan] * (len(completions) - half)]

    def trained(function: Any, size: int, name: str) -> list[GRPO]:
        env = RewardGym(prompts(6), None, tokenizer, function, data_batch_size_per_gpu=3)
        return finetune_llm_reasoning(make(size), env, max_steps=2, run_dir=tmp_path / name, **QUIET)[0]

    with pytest.warns(UserWarning, match="left out for agent 1: its answers to row"):
        first, second = trained(partly, 2, "both")
    (untouched,) = make()
    assert actor_bits(second) == actor_bits(untouched)
    assert actor_bits(first) != actor_bits(untouched)
    assert not second.diverged
    assert 24 in calls
    (still,) = trained(lambda completions: [1.0] * len(completions), 1, "constant")
    assert still.steps == 2


def test_rewards_of_which_none_is_finite_are_named_at_the_end_of_the_first_epoch(make, tokenizer, tmp_path) -> None:
    def never(completions: list[str]) -> list[float]:
        return [math.nan] * len(completions)

    env = RewardGym(prompts(3), None, tokenizer, never, data_batch_size_per_gpu=3)
    with (
        pytest.warns(UserWarning, match="left out for agent 0"),
        pytest.raises(DataError, match=r"rewards are NaN or infinite: correct the reward functions"),
    ):
        finetune_llm_reasoning(make(), env, max_steps=2, run_dir=tmp_path / "run", **QUIET)


def test_a_function_that_fails_in_a_run_says_where(make, tokenizer, tmp_path: Path) -> None:
    def failing(prompts: list[str], completions: list[str]) -> list[float]:
        if len(completions) > 2:
            raise ValueError("no judge")
        return [0.0] * len(completions)

    env = RewardGym(prompts(3), None, tokenizer, failing, data_batch_size_per_gpu=3)
    with pytest.raises(ConfigurationError, match=r"failing raised ValueError: no judge.* on row \d, 'Question"):
        finetune_llm_reasoning(make(), env, max_steps=2, run_dir=tmp_path / "run", **QUIET)


def test_what_cannot_run_is_refused_before_training(make, env, make_model, tokenizer, lora, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigurationError, match=r"max_completion_length=250: .*do not fit into the base's 256"):
        finetune_llm_reasoning(make(max_completion_length=250), env, run_dir=folder)
    with pytest.raises(ConfigurationError, match=r"budget=1.0: cannot be planned for grpo.*max_member_steps"):
        finetune_llm_reasoning(make(), env, budget=1.0, run_dir=folder)
    with pytest.raises(ConfigurationError, match=r"budget=1.0: cannot be planned for grpo"):
        finetune(make(), env, budget=1.0, run_dir=folder)
    with pytest.raises(TypeError, match="guards"):
        finetune_llm_reasoning(make(), env, guards={"max_kl": 1.0})
    with pytest.raises(ConfigurationError, match="is no RewardGym, which finetune_llm_reasoning needs"):
        finetune_llm_reasoning(make(), SFTGym(make_examples(4), None, tokenizer), run_dir=folder)
    with pytest.raises(ConfigurationError, match="names no reward model; other functions are Python: call evollm"):
        tuned(make_model, tokenizer, lora, reward_functions="rewards:brevity")
    assert not folder.exists()
    told = validate(
        make_model(),
        prompts(12),
        tokenizer=tokenizer,
        algorithm="grpo",
        reward_functions=brevity,
        max_completion_length=6,
        lora_config=lora,
    )
    assert "time: not measured, since grpo learns from answers that are still to be sampled" in told


def test_sft_then_dpo_then_grpo_hand_on_their_actors(make_model, tokenizer, lora, tmp_path: Path) -> None:
    """At each stage the actor begins as the last stage's, and so does the reference, which stays."""

    def weights(agent: Any, role: str) -> dict[str, Any]:
        return {name: value.tolist() for name, value in agent.base.adapters.export(agent.adapter(role)).tensors.items()}

    rows = make_rows(8)
    short: dict[str, Any] = {"max_steps": 2, **QUIET}
    base = {"actor_network": make_model(), "lora_config": lora, "lr": 1e-2}
    (sft,), _ = finetune_llm_sft(
        [SFT(**base)], SFTGym(make_examples(8), None, tokenizer, 4), run_dir=tmp_path / "sft", **short
    )
    dpo = DPO(**base)
    dpo.load_checkpoint(str(tmp_path / "sft/elite"))
    assert weights(dpo, "actor") == weights(dpo, "reference") == weights(sft, "actor")
    finetune_llm_preference([dpo], PreferenceGym(rows, None, tokenizer, 4), run_dir=tmp_path / "dpo", **short)
    assert weights(dpo, "actor") != weights(dpo, "reference") == weights(sft, "actor")
    grpo = GRPO(**base, group_size=4, max_completion_length=6)
    grpo.load_checkpoint(str(tmp_path / "dpo/elite"), overwrite_critic_adapter=True)
    assert weights(grpo, "actor") == weights(grpo, "reference") == weights(dpo, "actor")
    assert grpo.steps == 0
    env = RewardGym(prompts(6), None, tokenizer, brevity, data_batch_size_per_gpu=3)
    finetune_llm_reasoning([grpo], env, run_dir=tmp_path / "grpo", **short)
    assert weights(grpo, "actor") != weights(grpo, "reference") == weights(dpo, "actor")
    # A resume of the same algorithm restores both.
    again = GRPO(**base, group_size=4, max_completion_length=6)
    again.load_checkpoint(str(tmp_path / "grpo/elite"))
    assert weights(again, "actor") == weights(grpo, "actor")
    assert weights(again, "reference") == weights(grpo, "reference")


def test_a_member_that_is_cloned_answers_as_its_parent_did(make, env) -> None:
    (agent,) = make()
    batch = agent.collect(env.next_batch(), env)
    agent.learn(batch)
    child = agent.clone(index=1)
    following = env.next_batch()
    mine, theirs = (one.collect(following, env) for one in (agent, child))
    for one, other in zip(mine, theirs, strict=True):
        assert [answer.ids.tolist() for answer in one.completions] == [
            answer.ids.tolist() for answer in other.completions
        ]
        assert one.extras[ROLLOUT].rewards.tolist() == other.extras[ROLLOUT].rewards.tolist()
    assert agent.learn(mine)["loss"] == child.learn(theirs)["loss"]
    assert actor_bits(agent) == actor_bits(child)


def test_a_judge_compares_the_answers_of_agents_that_learn_from_rewards(make, env, tmp_path: Path) -> None:
    asked = []

    def first_is_best(prompts: list[Any], first: list[str], second: list[str]) -> list[float]:
        asked.extend(prompts)
        return [1.0] * len(first)

    *_, (fitness,) = finetune_llm_reasoning(
        make(),
        env,
        max_steps=1,
        judge=Judge(first_is_best, max_new_tokens=4),
        fitness="win_rate",
        run_dir=tmp_path / "run",
        **QUIET,
    )
    assert fitness == 0.5
    assert set(asked) <= {row["prompt"] for row in prompts(12)}
    evaluation = read_run(tmp_path / "run").evaluations[-1]
    assert {"reward", "win_rate"} <= evaluation.scores.keys()


@pytest.mark.parametrize(
    ("functions", "weights"),
    [({"vowels": vowels, "other": vowels}, [0, 1]), ({"vowels": vowels, "more": vowels}, [1, 0])],
)
def test_a_run_goes_on_with_the_rewards_that_it_began_with(make, tokenizer, tmp_path, functions, weights) -> None:
    def gym(functions: Any, weights: Any) -> RewardGym:
        return RewardGym(prompts(4), None, tokenizer, functions, data_batch_size_per_gpu=2, reward_weights=weights)

    def go(env: RewardGym, steps: int, **more: Any) -> Any:
        agents = make(group_size=2, max_completion_length=2, beta=0.0)
        return finetune_llm_reasoning(agents, env, max_steps=steps, checkpoint_steps=1, **more, **QUIET)

    first = {"vowels": vowels, "other": vowels}
    go(gym(first, [1, 0]), 1, run_dir=tmp_path / "run")
    with pytest.raises(ConfigurationError, match=r"data\.rewards"):
        go(gym(functions, weights), 2, resume_from_checkpoint=tmp_path / "run")
    (agent,), _ = go(gym(first, [1, 0]), 2, resume_from_checkpoint=tmp_path / "run")
    assert agent.steps == 2


def test_sft_dpo_and_grpo_that_are_killed_in_the_middle_of_steps_end_bit_for_bit_as_never_killed(tmp_path) -> None:
    """Adapters, moments, metrics and lineage; killed while an agent learns, samples a token or is scored."""
    whole, killed, newest = killed_ends(tmp_path)
    assert killed == whole
    assert all("step-000000" < name < f"step-{STEPS:06}" for name in newest), newest
