from __future__ import annotations

import pytest
import torch
from gymnasium import spaces
from snapshots import actor_bits

from evollm import DPO, ConfigurationError
from evollm.algorithms.agilerl import CosineLRScheduleConfig, NetworkGroup
from evollm.algorithms.dpo_step import learn_together


def test_the_policy_is_the_base_with_the_agents_actor_active(make_population) -> None:
    first, second = make_population(2)
    policy = second.get_policy()
    assert policy.active_adapters == [second.actor_adapter]
    assert first.evolvable_attributes().keys() == {"actor", "optimizer"}
    assert first.evolvable_attributes(networks_only=True)["actor"] is policy
    assert policy.active_adapters == [first.actor_adapter]


def test_use_adapter_lasts_and_select_adapter_does_not(make_agent) -> None:
    agent = make_agent()
    agent.use_adapter("reference")
    with agent.select_adapter("actor"):
        assert agent.base.adapters.peft_model.active_adapters == [agent.actor_adapter]
    assert agent.base.adapters.peft_model.active_adapters == [agent.adapter("reference")]
    with pytest.raises(ConfigurationError, match="adapter_name='critic'"):
        agent.use_adapter("critic")


def test_inspected_attributes_are_those_of_the_constructor(make_agent) -> None:
    agent = make_agent(beta=0.3)
    values = DPO.inspect_attributes(agent)
    assert (values["beta"], values["steps"]) == (0.3, 0)
    assert "steps" not in DPO.inspect_attributes(agent, input_args_only=True)
    assert DPO.inspect_attributes(agent, input_args_only=True)["lr"] == 1e-3


def test_tensors_move_to_the_agents_device_wherever_they_are(make_agent) -> None:
    tensor = torch.zeros(2)
    moved = make_agent().to_device(tensor, {"a": tensor}, (tensor, 3))
    assert moved[0].device.type == moved[1]["a"].device.type == moved[2][0].device.type == "cpu"
    assert moved[2][1] == 3


def test_reinitialised_optimizers_have_no_moments(make_agent, gym) -> None:
    agent = make_agent()
    agent.learn(gym.next_batch())
    agent.reinit_optimizers()
    assert not agent.optimizer.state
    assert agent.optimizer.param_groups[0]["lr"] == agent.lr


def test_update_lr_sets_the_rate_and_makes_a_cosine_schedule(make_agent) -> None:
    optimizer = make_agent().optimizer
    assert DPO.update_lr(optimizer, 0.5) == (None, None)
    assert optimizer.param_groups[0]["lr"] == 0.5
    _, scheduler = DPO.update_lr(optimizer, 0.5, scheduler_config=CosineLRScheduleConfig(10, warmup_proportion=0.2))
    assert scheduler is not None
    rates = []
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) == 1
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_dimensions_are_the_shapes_of_the_spaces(gym) -> None:
    length = gym.observation_space["input_ids"].shape
    assert set(DPO.get_state_dim(gym.observation_space)) == {length, (4,)}
    assert DPO.get_action_dim(gym.action_space) == (4,)
    assert DPO.get_action_dim(spaces.Discrete(3)) == (3,)


def test_a_network_group_names_networks_that_exist(make_agent) -> None:
    agent = make_agent()
    agent.register_network_group(NetworkGroup("actor", ("reference",), policy=True))
    with pytest.raises(ConfigurationError, match="critic"):
        agent.register_network_group(NetworkGroup("critic"))


def test_the_mode_and_an_observation_pass_through(make_agent, gym) -> None:
    agent = make_agent()
    agent.set_training_mode(False)
    assert agent.training is False
    observation, _ = gym.reset()
    assert agent.preprocess_observation(observation) is observation


@pytest.mark.parametrize("frozen", ["by set_adapter", "by disable_adapter"])
def test_peft_calls_on_the_network_leave_every_actor_trainable(make_population, gym, frozen) -> None:
    batch = gym.next_batch()
    # Without references, whose passes would switch adapters first.
    settings = {"use_separate_reference_adapter": False}
    expected, population = make_population(2, **settings), make_population(2, **settings)
    network = population[0].get_policy()
    if frozen == "by set_adapter":
        network.set_adapter(population[1].actor_adapter)
        network.set_adapter(population[0].actor_adapter)
    else:
        with network.disable_adapter():
            pass
    assert not all(parameter.requires_grad for parameter in population[1].actor_parameters())
    for agents in (expected, population):
        learn_together(agents, batch)
    assert [actor_bits(agent) for agent in population] == [actor_bits(agent) for agent in expected]


def test_a_compiled_base_gives_the_losses_of_the_plain_one(make_agent, make_model, gym) -> None:
    """The backend traces forward and backward without generating code: the adapters' switches must survive that."""
    batches = [gym.next_batch() for _ in range(2)]
    # One layer: each is compiled by itself, which takes most of the time.
    plain, compiled = (make_agent(actor_network=make_model(num_hidden_layers=1)) for _ in range(2))
    compiled.base.compile("default", backend="aot_eager")
    for batch in batches:
        assert compiled.learn(batch)["loss"] == pytest.approx(plain.learn(batch)["loss"], rel=1e-5)
    assert compiled.evaluate(gym).accuracy == plain.evaluate(gym).accuracy


def test_releasing_an_agent_leaves_the_others_running(make_population, gym) -> None:
    first, second = make_population(2)
    before = actor_bits(second)
    first.release()
    assert actor_bits(second) == before
    assert len(second.base.adapters.names) == 2
    second.learn(gym.next_batch())
    assert actor_bits(second) != before
