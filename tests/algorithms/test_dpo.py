from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import make_rows
from peft import LoraConfig
from snapshots import actor_bits, adapter_bits, base_bits
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from evollm import DPO, ConfigurationError, DivergedError, HyperparameterConfig, PreferenceGym, RLParameter
from evollm.data.samples import Batch
from evollm.hpo import preference_fitness
from evollm.llm_envs.observations import batch_of

TRL_NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
}


def test_first_loss_is_ln_2_and_all_metrics_are_there(make_agent, gym) -> None:
    metrics = make_agent(nll_alpha=0.0).learn(gym.next_batch())
    assert metrics["mean_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["mean_chosen_reward"] == metrics["mean_rejected_reward"] == 0.0
    assert metrics.keys() >= TRL_NAMES | {"mean_loss", "mean_chosen_reward", "mean_rejected_reward", "nll_loss"}


def test_loss_and_rewards_are_true_means_over_the_pairs(make_agent, gym) -> None:
    batch = gym.next_batch()
    agent = make_agent(beta=0.3, nll_alpha=0.7)
    agent.learn(batch)
    chosen, rejected = agent.logratios(batch)
    tokens = batch.chosen_lengths.sum()
    metrics = agent.learn(batch)
    nll = -metrics["logps/chosen"] * len(batch) / tokens
    loss = np.mean(np.log1p(np.exp(-0.3 * (chosen - rejected)))) + 0.7 * nll
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * chosen.mean(), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.3 * (chosen - rejected).mean(), rel=1e-5)
    assert metrics["rewards/accuracies"] == np.mean(chosen > rejected)


def test_learning_raises_the_margin_and_lowers_the_loss(make_agent, gym) -> None:
    agent, batch = make_agent(), gym.next_batch()
    losses = [agent.learn(batch)["loss"] for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert agent.learn(batch, training=False)["rewards/accuracies"] == 1.0


def test_learn_without_training_changes_nothing(make_agent, gym) -> None:
    agent = make_agent()
    before = adapter_bits(agent.base)
    metrics = agent.learn(gym.next_batch(), training=False)
    assert adapter_bits(agent.base) == before
    assert agent.steps == 0
    assert metrics["grad_norm"] == 0.0
    assert all(parameter.grad is None for parameter in agent.actor_parameters())


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_any_micro_batch_gives_the_same_losses_and_gradients(
    make_agent, make_model, gym, micro_batch: int, gradient_checkpointing: bool
) -> None:
    batches = [gym.next_batch() for _ in range(3)]
    curves = []
    for size in (None, micro_batch):
        agent = make_agent(
            actor_network=make_model(dtype=torch.float64),
            micro_batch_size_per_gpu=size,
            gradient_checkpointing=gradient_checkpointing,
        )
        metrics = [agent.learn(batch) for batch in batches]
        curves.append([value for step in metrics for value in (step["loss"], step["grad_norm"], step["nll_loss"])])
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)


def test_micro_batches_of_a_float32_model_agree_to_1e_5(make_agent, gym) -> None:
    batch = gym.next_batch()
    losses = []
    for size in (1, 2, 4):
        agent = make_agent(micro_batch_size_per_gpu=size)
        losses.append([agent.learn(batch)["loss"] for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


def test_a_batch_larger_than_batch_size_makes_several_optimizer_steps(make_agent, gym) -> None:
    batch = gym.next_batch()
    agent = make_agent(batch_size=3)
    agent.learn(batch)
    steps = [state["step"].item() for state in agent.optimizer.state.values()]
    assert set(steps) == {2}


def test_update_epochs_repeat_the_batch(make_agent, make_model, gym) -> None:
    batch = gym.next_batch()
    twice = make_agent(update_epochs=2)
    twice.learn(batch)
    once = make_agent()
    once.learn(batch)
    once.learn(batch)
    assert actor_bits(twice) == actor_bits(once)


def test_the_gradient_is_clipped_to_max_grad_norm(make_agent, gym) -> None:
    """With AdamW the step hardly depends on the gradient's length, so its first moment tells: 0.1 x the clipped one."""
    agent = make_agent(max_grad_norm=0.01)
    assert agent.learn(gym.next_batch())["grad_norm"] > 0.01
    moments = [state["exp_avg"] for state in agent.optimizer.state.values()]
    norm = math.sqrt(sum(moment.pow(2).sum().item() for moment in moments))
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_stepping_one_agent_leaves_all_other_adapters_and_the_base_alone(make_population, gym) -> None:
    population = make_population(3)
    base = population[0].base
    for agent in population:
        agent.learn(gym.next_batch())
    before, frozen = adapter_bits(base), base_bits(base)
    population[1].learn(gym.next_batch())
    after = adapter_bits(base)
    assert [name for name in after if after[name] != before[name]] == [population[1].actor_adapter]
    assert base_bits(base) == frozen


def test_the_references_of_a_fresh_population_are_one_adapter(make_population) -> None:
    population = make_population(5)
    assert len({agent.adapter("reference") for agent in population}) == 1
    assert len({agent.actor_adapter for agent in population}) == 5
    assert len(population[0].base.adapters.names) == 6


def test_updating_one_agents_reference_leaves_the_others_theirs(make_population, gym) -> None:
    first, second = make_population(2)
    shared = second.adapter("reference")
    before = adapter_bits(first.base)[shared]
    batch = gym.next_batch()
    first.learn(batch)
    first.set_reference_policy(1)
    assert second.adapter("reference") == shared != first.adapter("reference")
    assert adapter_bits(first.base)[shared] == before
    chosen, rejected = first.logratios(batch)
    assert np.abs(chosen).max() == np.abs(rejected).max() == 0.0
    assert len(first.base.reference_cache) == 2 * len(batch)
    first.learn(batch)
    kept = first.adapter("reference")
    first.set_reference_policy(1)
    assert first.adapter("reference") == kept


def test_log_probs_of_a_reference_that_is_gone_are_forgotten(make_agent, gym) -> None:
    agent, batch = make_agent(), gym.next_batch()
    for epoch in (1, 2):
        agent.learn(batch)
        agent.set_reference_policy(epoch)
        assert len(agent.base.reference_cache) == 0
    agent.logratios(batch)
    assert len(agent.base.reference_cache) == len(batch)


def test_the_base_as_reference_gives_the_same_run(make_agent, gym) -> None:
    batches = [gym.next_batch() for _ in range(3)]
    bits = []
    for separate in (True, False):
        agent = make_agent(use_separate_reference_adapter=separate)
        for batch in batches:
            agent.learn(batch)
        bits.append(actor_bits(agent))
    assert bits[0] == bits[1]
    with pytest.raises(ConfigurationError, match="use_separate_reference_adapter"):
        agent.set_reference_policy(1)


def test_a_clone_goes_on_exactly_like_its_original(make_agent, gym) -> None:
    agent = make_agent()
    agent.learn(gym.next_batch())
    agent.rng.random(3)
    clone = agent.clone(index=7)
    assert (clone.index, agent.index) == (7, 0)
    assert clone.base is agent.base
    batch = gym.next_batch()
    agent.learn(batch)
    clone.learn(batch)
    assert actor_bits(clone) == actor_bits(agent)
    assert clone.rng.random() == agent.rng.random()


def test_a_clone_shares_nothing_that_training_changes(make_agent, gym) -> None:
    agent = make_agent()
    agent.learn(gym.next_batch())
    clone = agent.clone(index=1)
    before = actor_bits(agent), [s["exp_avg"].clone() for s in agent.optimizer.state.values()], list(agent.fitness)
    clone.lr = 0.5
    clone.learn(gym.next_batch())
    clone.test(gym)
    assert actor_bits(agent) == before[0]
    for kept, moment in zip(before[1], agent.optimizer.state.values(), strict=True):
        assert torch.equal(kept, moment["exp_avg"])
    assert (agent.lr, agent.fitness) == (1e-3, before[2])


def test_setting_a_hyperparameter_reaches_the_optimizer_and_keeps_its_moments(make_agent, gym) -> None:
    agent = make_agent()
    agent.learn(gym.next_batch())
    moments = [state["exp_avg"].clone() for state in agent.optimizer.state.values()]
    agent.lr = 2e-3
    agent.lr = 2e-3
    assert [group["lr"] for group in agent.optimizer.param_groups] == [2e-3]
    for before, state in zip(moments, agent.optimizer.state.values(), strict=True):
        assert torch.equal(before, state["exp_avg"])


def test_fitness_is_the_same_whatever_beta(make_agent, gym) -> None:
    agent = make_agent()
    for _ in range(3):
        agent.learn(gym.next_batch())
    found = set()
    for beta in (0.05, 0.1, 1.0):
        agent.beta = beta
        found.add((float(agent.test(gym)), preference_fitness(agent.evaluate(gym))))
    assert len(found) == 1
    assert agent.fitness == [next(iter(found))[0]] * 3


def test_an_untrained_agent_ties_every_pair(make_agent, gym) -> None:
    evaluation = make_agent().evaluate(gym)
    assert evaluation.accuracy == 0.5
    assert len(evaluation.margins) == 6


def test_evaluation_keeps_the_order_of_the_split(make_agent, tokenizer) -> None:
    rows = make_rows(7, 12)
    env = PreferenceGym(make_rows(12), rows, tokenizer, data_batch_size_per_gpu=4)
    agent = make_agent()
    for _ in range(2):
        agent.learn(env.next_batch())
    together = agent.evaluate(env).margins
    for position, pair in enumerate(env.test_pairs):
        chosen, rejected = agent.logratios(Batch([pair]))
        assert together[position] == pytest.approx((chosen - rejected)[0], abs=1e-4)


def test_an_agent_plays_the_environment(make_agent, gym) -> None:
    agent = make_agent()
    for _ in range(6):
        agent.learn(gym.next_batch())
    observation, _ = gym.reset(seed=3)
    action = agent.get_action(observation)
    assert action in gym.action_space
    _, reward, *_ = gym.step(action)
    assert reward == np.mean(action > 0)


def test_an_observation_trains_like_its_batch(make_agent, gym) -> None:
    observation, _ = gym.reset(seed=5)
    first, second = make_agent(), make_agent()
    first.learn(observation)
    second.learn(batch_of(observation))
    assert actor_bits(first) == actor_bits(second)


HP = {"lr": RLParameter(1e-5, 1e-2), "beta": RLParameter(0.01, 1.0)}


def test_a_population_starts_inside_the_bounds_and_its_first_agent_as_given(make_population) -> None:
    population = make_population(6, hp_config=HyperparameterConfig(**HP), beta=0.25)
    assert (population[0].lr, population[0].beta) == (1e-3, 0.25)
    assert len({agent.lr for agent in population}) == 6
    assert all(1e-5 <= agent.lr <= 1e-2 and 0.01 <= agent.beta <= 1.0 for agent in population)
    assert [agent.index for agent in population] == list(range(6))
    assert len({actor_bits(agent) for agent in population}) == 1
    same = make_population(3, hp_config=HyperparameterConfig(**HP), sample_hyperparameters=False)
    assert {agent.lr for agent in same} == {1e-3}


def test_start_values_are_spread_evenly_where_asked(make_population) -> None:
    population = make_population(7, hp_config=HyperparameterConfig(**HP), sampling="latin_hypercube")
    assert population[0].lr == 1e-3
    # Of the three decades between 1e-5 and 1e-2 each half has one.
    assert sorted(int(2 * (math.log10(agent.lr) + 5)) for agent in population[1:]) == list(range(6))
    with pytest.raises(ConfigurationError, match="sampling='sobol': must be random or latin_hypercube"):
        make_population(2, hp_config=HyperparameterConfig(**HP), sampling="sobol")


def test_a_wrapper_is_put_around_each_agent(make_population) -> None:
    class Wrapper:
        def __init__(self, agent: DPO, tag: str) -> None:
            self.agent, self.tag = agent, tag

    wrapped = make_population(2, wrapper_cls=Wrapper, wrapper_kwargs={"tag": "x"})
    assert [(w.agent.index, w.tag) for w in wrapped] == [(0, "x"), (1, "x")]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"nll_alpha": -1}, "nll_alpha=-1"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"update_epochs": 1.5}, "update_epochs=1.5"),
        ({"micro_batch_size_per_gpu": 0}, "micro_batch_size_per_gpu=0"),
        ({"actor_network": None}, "model_name=None"),
        ({"actor_network": "gpt2"}, "actor_network='gpt2'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"index": "a"}, "index='a'"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": 7.5}, "device=7.5"),
        ({"accelerator": "x"}, "accelerator='x'"),
        ({"torch_compiler": "bogus"}, "torch_compiler='bogus'"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing='no'"),
        ({"lora_config": {"r": 4}}, "lora_config='dict'"),
        ({"model_name": "x"}, "model_name='x'"),
        ({"model_config": {"dtype": "float32"}}, "model_config="),
        ({"hp_config": {"lr": (1e-5, 1e-2)}}, "hp_config="),
        ({"hp_config": HyperparameterConfig(learning_rate=RLParameter(1e-5, 1e-2))}, "lr"),
        ({"hp_config": HyperparameterConfig(lr=RLParameter(1e-5, 1e-4))}, "lr=0.001"),
    ],
)
def test_a_bad_argument_is_named_with_its_value(make_agent, arguments, field) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_agent(**arguments)
    assert field in str(caught.value)


def test_a_population_of_nobody_is_refused(make_population) -> None:
    with pytest.raises(ConfigurationError, match="size=0"):
        make_population(0)


def test_an_unknown_model_name_is_an_evollm_error(tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="model_name"):
        DPO(model_name=str(tmp_path / "nothing-here"))


def test_settings_without_effect_are_said_to_have_none(make_agent) -> None:
    dropout = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="lora_dropout=0.1 has no effect"):
        make_agent(lora_config=dropout)


def test_a_base_whose_layers_cannot_be_checkpointed_is_said_to_be_one(make_agent, tokenizer, gym) -> None:
    config = OpenAIGPTConfig(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=1, n_head=2)
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = OpenAIGPTLMHeadModel(config)
    with pytest.warns(UserWarning, match="gradient_checkpointing=True has no effect"):
        make_agent(actor_network=model, lora_config=lora, gradient_checkpointing=True)
    # A warning here is an error: by default nobody has asked for it.
    agent = make_agent(actor_network=model, lora_config=lora)
    batch = gym.next_batch()
    with pytest.warns(UserWarning, match="do not share their prompt"):
        losses = [agent.learn(batch)["loss"] for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


def test_agents_with_other_scaling_do_not_share_reference_log_probs(make_model, gym) -> None:
    """Both references hold the same random weights; `alpha_pattern` alone tells them apart."""
    model, batch = make_model(), gym.next_batch()
    for pattern in ({}, {"q_proj": 64}):
        config = LoraConfig(
            r=4, alpha_pattern=pattern, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"
        )
        agent = DPO(actor_network=model, lora_config=config)
        assert agent.learn(batch, training=False)["rewards/margins"] == 0.0


def test_liger_is_said_to_have_no_effect(make_agent) -> None:
    with pytest.warns(UserWarning, match="use_liger_loss"):
        make_agent(use_liger_loss=True)


def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(make_agent, gym) -> None:
    agent = make_agent()
    agent.learn(gym.next_batch())
    with torch.no_grad():
        next(iter(agent.actor_parameters())).fill_(float("nan"))
    before = actor_bits(agent)
    metrics = agent.learn(gym.next_batch())
    assert math.isnan(metrics["loss"])
    assert agent.diverged
    with pytest.raises(DivergedError, match=r"agents \[0\] have diverged"):
        agent.learn(gym.next_batch())
    assert actor_bits(agent) == before
    assert not any(parameter.grad.any() for parameter in agent.actor_parameters())
