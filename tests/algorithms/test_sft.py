from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_examples
from families import VOCABULARY, make_family
from peft import LoraConfig
from snapshots import actor_bits, adapter_bits, base_bits, states_of
from torch import Tensor

from evollm import DPO, SFT, ConfigurationError, DivergedError, HyperparameterConfig, RLParameter, SFTGym
from evollm.algorithms.sft_step import learn_together
from evollm.data.samples import Batch, Sample
from evollm.llm_envs.observations import batch_of
from evollm.models.engine import Engine, Item
from evollm.models.fast_paths import FastPaths

EXACT = {"rtol": 0.0, "atol": 1e-10}
SHAPES = [(9, 5), (3, 12), (14, 1), (1, 2), (6, 11)]
MIXED: list[dict[str, Any]] = [
    {"rank": 4, "alpha": 8, "lr": 1e-3},
    {"rank": 2, "alpha": 16, "lr": 3e-3},
    {"rank": 8, "alpha": 4, "lr": 1e-4, "max_grad_norm": 0.05},
    {"rank": 4, "alpha": 32, "lr": 2e-2},
]


def make_batch(seed: int = 0, shapes: Sequence[tuple[int, int]] = SHAPES) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch([Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape)) for shape in shapes])


def make_agents(members: Sequence[dict[str, Any]] = MIXED, **shared: Any) -> list[SFT]:
    """Float64 agents on one small Llama, with weights as after some training: A of a fresh LoRA gets no gradient."""
    model, agents = make_family("llama"), []
    for index, member in enumerate(members):
        values = dict(member)
        lora = LoraConfig(
            r=values.pop("rank"),
            lora_alpha=values.pop("alpha"),
            target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        agents.append(SFT(actor_network=model, lora_config=lora, index=index, seed=index, **values, **shared))
    return agents


def only_plain(agent: SFT) -> None:
    """Let the base of this agent take no fast path from now on."""
    Engine.of(agent.base).prepare = lambda members, length: FastPaths(False, False, False, length)  # type: ignore


def state_of(agent: SFT) -> list[Tensor]:
    """Weights and moments."""
    moments = [state[key] for state in states_of(agent) for key in ("exp_avg", "exp_avg_sq")]
    return [p.detach() for p in agent.actor_parameters()] + moments


@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
@pytest.mark.parametrize("token_budget", [None, 20])
def test_the_loss_is_cross_entropy_on_completion_tokens_alone_with_its_gradient(
    plain: bool, token_budget: int | None
) -> None:
    """Against PEFT's forward pass of each padded sequence with labels -100 on prompt and padding."""
    (agent,) = make_agents(MIXED[:1], token_budget=token_budget, max_grad_norm=1e9)
    batch = make_batch()
    longest = int(batch.num_tokens.max())
    labels = torch.full((len(batch), longest), -100)
    input_ids = torch.zeros(labels.shape, dtype=torch.int64)
    for row in range(len(batch)):
        prompt, end = batch.prompt_lengths[row], batch.num_tokens[row]
        input_ids[row, :end] = torch.from_numpy(batch[row].token_ids)
        labels[row, prompt:end] = input_ids[row, prompt:end]
    mask = torch.from_numpy((np.arange(longest) < batch.num_tokens[:, None]).astype(np.int64))
    with agent.base.active(agent.actor_adapter) as network:
        logits = network(input_ids=input_ids, attention_mask=mask).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        expected.backward()
    gradients = [p.grad.clone() for p in agent.actor_parameters()]
    agent.optimizer.zero_grad()
    if plain:
        only_plain(agent)
    metrics = agent.learn(batch)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=0, abs=1e-10)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=0, abs=1e-10)
    # The first moment after one step is 0.1 times the gradient.
    found = [10 * state["exp_avg"] for state in states_of(agent)]
    torch.testing.assert_close(found, gradients, **EXACT)
    assert min(float(g.abs().max()) for g in gradients) > 1e-4


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size_per_gpu": 1}, {"micro_batch_size_per_gpu": 2}, {"token_budget": 1}]
)
def test_any_micro_batch_of_examples_gives_the_same_update(changes: dict[str, int]) -> None:
    results = []
    for settings in ({}, changes):
        (agent,) = make_agents(MIXED[:1], **settings)
        losses = [agent.learn(make_batch(seed))["loss"] for seed in range(3)]
        results.append((losses, state_of(agent)))
    assert results[1][0] == pytest.approx(results[0][0], rel=0, abs=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1], **EXACT)


def test_every_completion_token_weighs_the_same_in_every_mean() -> None:
    """Two optimizer steps of 4 and 1 examples: the reported loss is the mean over the tokens of both."""
    (agent,) = make_agents(MIXED[:1], batch_size=4)
    batch = make_batch()
    losses = [agent.learn(part, training=False)["loss"] for part in batch.split(1)]
    tokens = batch.chosen_lengths
    expected = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / tokens.sum()
    metrics = agent.learn(batch, training=False)
    assert metrics["loss"] == metrics["mean_loss"] == pytest.approx(expected, rel=0, abs=1e-10)
    assert (metrics["grad_norm"], metrics["num_tokens"], agent.steps) == (0.0, 0.0, 0)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("other", ["plain", "alone"])
def test_stacked_sft_members_learn_as_they_do_one_by_one(other: str, gradient_checkpointing: bool) -> None:
    """Five steps in float64, mixed ranks, alphas and hyperparameters."""
    results = []
    for way in ("stacked", other):
        agents = make_agents(gradient_checkpointing=gradient_checkpointing)
        if way == "plain":
            only_plain(agents[0])
        steps = []
        for seed in range(5):
            groups = [[agent] for agent in agents] if way == "alone" else [agents]
            steps += [metrics for group in groups for metrics in learn_together(group, make_batch(seed))]
        if way == "stacked":
            assert Engine.of(agents[0].base).prepare([a.actor_adapter for a in agents], 20).stacking
        results.append((steps, [state_of(agent) for agent in agents]))
    (stacked, states), (apart, expected_states) = results
    for found, expected in zip(stacked, apart, strict=True):
        assert found == pytest.approx(expected, rel=0, abs=1e-10)
    torch.testing.assert_close(states, expected_states, **EXACT)


def test_a_nan_in_one_sft_member_leaves_the_others_bits() -> None:
    states = []
    for broken in (False, True):
        agents = make_agents()
        learn_together(agents, make_batch(0))
        if broken:
            with torch.no_grad():
                agents[2].actor_parameters()[0].fill_(float("nan"))
        learn_together(agents, make_batch(1))
        assert [agent.diverged for agent in agents] == [False, False, broken, False]
        states.append([state_of(agent) for agent in agents if agent.index != 2])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    with pytest.raises(DivergedError, match=r"agents \[2\] have diverged.*a lower lr$"):
        learn_together(agents, make_batch(2))


def test_learning_lowers_the_loss_and_trains_the_actor_alone(make_sft_population, sft_gym) -> None:
    population, batch = make_sft_population(2), sft_gym.next_batch()
    base = population[0].base
    assert len(base.adapters.names) == 2
    before, frozen = adapter_bits(base), base_bits(base)
    losses = [population[0].learn(batch) for _ in range(4)]
    after = adapter_bits(base)
    assert [metrics["loss"] for metrics in losses] == sorted([m["loss"] for m in losses], reverse=True)
    assert [metrics["num_tokens"] for metrics in losses] == [n * batch.num_tokens.sum() for n in (1, 2, 3, 4)]
    assert losses[0].keys() >= {"loss", "grad_norm", "learning_rate", "num_tokens", "mean_loss"}
    assert [name for name in after if after[name] != before[name]] == [population[0].actor_adapter]
    assert base_bits(base) == frozen


def test_an_observation_of_examples_trains_like_its_batch_and_the_agent_plays(make_sft, sft_gym) -> None:
    first, second = make_sft(), make_sft()
    observation, _ = sft_gym.reset()
    first.learn(observation)
    second.learn(batch_of(observation))
    assert actor_bits(first) == actor_bits(second)
    action = first.get_action(observation)
    assert action in sft_gym.action_space
    reward = sft_gym.step(action)[1]
    assert reward == pytest.approx(-first.learn(observation, training=False)["loss"], rel=1e-5)


def test_the_held_out_score_is_minus_the_mean_loss_of_a_token_in_the_order_of_the_split(make_sft, tokenizer) -> None:
    env = SFTGym(make_examples(8), make_examples(7, 8), tokenizer, data_batch_size_per_gpu=4)
    agent = make_sft()
    agent.learn(env.next_batch())
    evaluation = agent.evaluate(env)
    for position, example in enumerate(env.test_pairs):
        alone = agent.learn(Batch([example]), training=False)["loss"]
        assert -evaluation.logprobs[position] / len(example.chosen_ids) == pytest.approx(alone, rel=1e-5)
    whole = agent.learn(Batch(env.test_pairs), training=False)["loss"]
    assert float(agent.test(env)) == agent.fitness[0] == pytest.approx(-whole, rel=1e-6)
    assert evaluation.scores == {"loss": evaluation.loss, "perplexity": math.exp(evaluation.loss)}


def test_sft_mutates_its_learning_rate_and_knows_no_beta(make_sft_population, make_sft) -> None:
    population = make_sft_population(4, hp_config=HyperparameterConfig(lr=RLParameter(1e-5, 1e-2)))
    assert len({agent.lr for agent in population}) == 4
    with pytest.raises(ConfigurationError, match="beta"):
        make_sft(hp_config=HyperparameterConfig(beta=RLParameter(0.1, 1.0)))
    with pytest.raises(ConfigurationError, match=r"is not a role of SFT: \['actor'\]"):
        population[0].adapter("reference")


# --------------------------------------------------------------------------------------------------------------- stages


@pytest.fixture
def tuned(make_sft, sft_gym) -> SFT:
    agent = make_sft(index=3, lr=5e-3)
    for _ in range(3):
        agent.learn(sft_gym.next_batch())
    agent.test(sft_gym)
    return agent


def test_a_dpo_agent_starts_from_an_sft_checkpoint_as_its_actor_and_reference(tuned, make_agent, gym, tmp_path) -> None:
    tuned.save_checkpoint(str(tmp_path / "sft"))
    assert sorted(path.name for path in (tmp_path / "sft").iterdir() if path.is_dir()) == ["actor"]
    agent, fresh = make_agent(nll_alpha=0.0, lr=2e-4), make_agent()
    batch = gym.next_batch()
    agent.learn(batch)
    agent.load_checkpoint(str(tmp_path / "sft"))
    expected = Engine.of(tuned.base).logprobs(Item.on(batch, [tuned.actor_adapter]), tuned.pass_options)[0]
    found = agent.reference_logprobs(batch)
    assert found.chosen.tolist() == expected.chosen.tolist()
    assert found.rejected.tolist() == expected.rejected.tolist()
    assert found.chosen.tolist() != fresh.reference_logprobs(batch).chosen.tolist()
    assert actor_bits(agent) == actor_bits(tuned)
    # The agent's own: neither the moments of another loss nor another stage's hyperparameters and counters.
    assert not agent.optimizer.state
    assert (agent.lr, agent.index, agent.steps, agent.fitness) == (2e-4, 0, 1, [])
    assert agent.learn(batch)["loss"] == pytest.approx(math.log(2), abs=1e-7)
    # And the reference stays where the stage began.
    assert agent.reference_logprobs(batch).chosen.tolist() == expected.chosen.tolist()


def test_a_resumed_dpo_agent_keeps_its_own_reference_and_a_next_stage_takes_the_actor(
    tuned, make_agent, gym, tmp_path
) -> None:
    tuned.save_checkpoint(str(tmp_path / "sft"))
    first = make_agent()
    first.load_checkpoint(str(tmp_path / "sft"))
    for _ in range(2):
        first.learn(gym.next_batch())
    first.save_checkpoint(str(tmp_path / "dpo"))
    batch = gym.next_batch()
    resumed, staged = make_agent(lr=7e-4), make_agent(lr=7e-4, nll_alpha=0.0)
    resumed.load_checkpoint(str(tmp_path / "dpo"))
    assert resumed.reference_logprobs(batch).chosen.tolist() == first.reference_logprobs(batch).chosen.tolist()
    assert (resumed.lr, resumed.steps, bool(resumed.optimizer.state)) == (1e-3, 2, True)
    assert resumed.learn(batch) == first.learn(batch)
    staged.load_checkpoint(str(tmp_path / "dpo"), overwrite_reference_adapter=True)
    assert (staged.lr, staged.steps, bool(staged.optimizer.state)) == (7e-4, 0, False)
    assert staged.learn(batch)["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_an_sft_agent_starts_from_a_dpo_checkpoint(make_agent, make_sft, gym, sft_gym, tmp_path) -> None:
    dpo = make_agent()
    dpo.learn(gym.next_batch())
    dpo.save_checkpoint(str(tmp_path / "dpo"))
    agent = make_sft(lr=2e-3)
    agent.load_checkpoint(str(tmp_path / "dpo"))
    assert actor_bits(agent) == actor_bits(dpo)
    assert (agent.lr, len(agent.base.adapters.names), bool(agent.optimizer.state)) == (2e-3, 1, False)
    agent.learn(sft_gym.next_batch())


def test_load_optimizer_false_keeps_the_live_moments_in_a_next_stage(tuned, make_agent, gym, tmp_path) -> None:
    tuned.save_checkpoint(str(tmp_path / "sft"))
    agent = make_agent()
    agent.learn(gym.next_batch())
    agent.load_checkpoint(str(tmp_path / "sft"), load_optimizer=False)
    assert agent.optimizer.state


def test_a_base_that_is_the_reference_cannot_take_an_actor_for_one(tuned, make_agent, tmp_path) -> None:
    tuned.save_checkpoint(str(tmp_path / "sft"))
    agent = make_agent(use_separate_reference_adapter=False)
    before = actor_bits(agent)
    with pytest.raises(ConfigurationError, match="use_separate_reference_adapter=False"):
        agent.load_checkpoint(str(tmp_path / "sft"))
    assert actor_bits(agent) == before
    agent.load_checkpoint(str(tmp_path / "sft"), overwrite_reference_adapter=False)
    assert actor_bits(agent) == actor_bits(tuned)


@pytest.mark.parametrize("how", ["load_checkpoint", "load"])
def test_a_resumed_sft_agent_goes_on_bit_for_bit(tuned, make_sft, make_model, sft_gym, tmp_path, how: str) -> None:
    tuned.save_checkpoint(str(tmp_path / "sft"))
    if how == "load":
        resumed = SFT.load(str(tmp_path / "sft"), actor_network=make_model())
    else:
        resumed = make_sft(seed=7)
        resumed.load_checkpoint(str(tmp_path / "sft"))
    assert (resumed.index, resumed.lr, resumed.fitness, resumed.steps) == (3, 5e-3, tuned.fitness, 3)
    for _ in range(2):
        batch = sft_gym.next_batch()
        assert resumed.learn(batch) == tuned.learn(batch)
    assert actor_bits(resumed) == actor_bits(tuned)


def test_load_refuses_an_agent_of_another_algorithm(tuned, make_model, tmp_path) -> None:
    tuned.save_checkpoint(str(tmp_path / "sft"))
    with pytest.raises(ConfigurationError, match="holds a SFT agent: make one of DPO and use load_checkpoint"):
        DPO.load(str(tmp_path / "sft"), actor_network=make_model())


def test_a_population_starts_from_one_checkpoint_with_one_reference(tuned, make_population, tmp_path) -> None:
    tuned.save_checkpoint(str(tmp_path / "sft"))
    population = make_population(3)
    for agent in population:
        agent.load_checkpoint(str(tmp_path / "sft"))
    assert len({agent.adapter("reference") for agent in population}) == 1
    assert len(population[0].base.adapters.names) == 4
