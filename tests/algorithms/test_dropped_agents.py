"""Agents that are dropped without `release()`."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from peft import LoraConfig
from snapshots import actor_bits, adapter_bits

from evollm import DPO, ConfigurationError
from evollm.algorithms.dpo_step import learn_together
from evollm.models import SharedBase


class Wrapper:
    def __init__(self, agent: DPO) -> None:
        self.agent = agent


@pytest.mark.parametrize("wrapper", [None, Wrapper])
def test_a_cell_that_makes_a_population_runs_ten_times_with_the_adapters_of_one(
    make_model, make_population, gym, wrapper
) -> None:
    model = make_model()
    batch = gym.next_batch()
    for _ in range(10):
        population = make_population(3, actor_network=model, wrapper_cls=wrapper)
        agents = [member.agent if wrapper else member for member in population]
        # The last cell's population was still there when this one was made.
        assert len(SharedBase.of(model).adapters.names) == 4
        learn_together(agents, batch)
    own = {path for path, _ in model.named_parameters() if ".actor-" in path or ".reference-" in path}
    assert {path.split(".")[-2] for path in own} == set(agents[0].base.adapters.names)


def test_names_of_freed_adapters_are_not_used_again(make_model, make_agent) -> None:
    model = make_model()
    names: set[str] = set()
    for _ in range(4):
        agent = make_agent(actor_network=model)
        assert not names & set(agent.base.adapters.names)
        names |= set(agent.base.adapters.names)
        del agent


def test_nothing_is_freed_while_an_adapter_is_in_use(make_model, make_agent, lora) -> None:
    model = make_model()
    kept, dropped = make_agent(actor_network=model), make_agent(actor_network=model)
    base, lost = kept.base, dropped.actor_adapter
    dropped.use_adapter("actor")
    del dropped
    with base.active(kept.actor_adapter):
        for _ in range(2):
            assert lost in base.adapters.names
            base.adapters.release(base.adapters.add("actor", lora, trainable=True))
    # It was the active one.
    assert lost not in base.adapters.names
    assert base.adapters.active in base.adapters.names


def test_a_collector_in_another_thread_touches_no_adapter(make_model, make_agent) -> None:
    model = make_model()
    kept, dropped = make_agent(actor_network=model), make_agent(actor_network=model)
    # Only the collector finds it.
    dropped.itself = dropped
    del dropped
    before = list(model.state_dict())
    collecting = threading.Thread(target=gc.collect)
    collecting.start()
    collecting.join()
    assert list(model.state_dict()) == before
    assert len(kept.base.adapters.names) == 2
    assert len(list(model.state_dict())) < len(before)


def test_agents_that_are_dropped_leave_the_others_bits(make_model, make_agent, make_population, gym) -> None:
    batches = [gym.next_batch() for _ in range(2)]

    def learnt(model) -> list[str]:
        population = make_population(2, actor_network=model)
        for batch in batches:
            learn_together(population, batch)
        return [actor_bits(agent) for agent in population]

    model = make_model()
    dropped = make_agent(actor_network=model, lora_config=LoraConfig(r=2, target_modules=["k_proj"]), seed=7)
    dropped.learn(batches[0])
    del dropped
    assert learnt(model) == learnt(make_model())


def test_a_dropped_agents_reference_stays_with_those_who_share_it(make_agent, gym) -> None:
    agent = make_agent()
    base, reference = agent.base, agent.adapter("reference")
    clone = agent.clone(index=1)
    own = adapter_bits(base)[reference]
    del agent
    assert base.adapters.names == [reference, clone.actor_adapter]
    assert adapter_bits(base)[reference] == own
    assert clone.learn(gym.next_batch())["loss"] > 0
    del clone
    assert base.adapters.names == []


def test_an_agent_whose_network_was_handed_out_keeps_its_adapters(make_model, make_agent, gym) -> None:
    model = make_model()
    agent = make_agent(actor_network=model)
    agent.learn(gym.next_batch())
    name, network, bits = agent.actor_adapter, agent.get_policy(), actor_bits(agent)
    del agent
    other = make_agent(actor_network=model)
    network.set_adapter(name)
    assert adapter_bits(other.base)[name] == bits
    with torch.no_grad():
        assert torch.isfinite(network(input_ids=torch.tensor([[1, 2]])).logits).all()


def test_release_frees_at_once_also_what_was_handed_out(make_agent) -> None:
    agent = make_agent()
    agent.get_policy()
    agent.release()
    assert agent.base.adapters.names == []
    with pytest.raises(ConfigurationError, match="released"):
        agent.actor_adapter  # noqa: B018 - a property


def test_copies_of_an_agent_hold_its_adapters(make_agent, gym) -> None:
    agent = make_agent()
    shallow, deep = copy.copy(agent), copy.deepcopy(agent)
    base = agent.base
    assert deep.base is not base
    del agent
    assert len(base.adapters.names) == 2
    shallow.learn(gym.next_batch())
    del shallow
    assert base.adapters.names == []
    assert len(deep.base.adapters.names) == 2
    other = deep.base
    del deep
    assert other.adapters.names == []


def test_an_agent_that_could_not_be_made_leaves_nothing(make_model, make_agent, monkeypatch) -> None:
    model = make_model()
    make_agent(actor_network=model)

    def fail(self: DPO) -> None:
        raise MemoryError

    monkeypatch.setattr(DPO, "_new_optimizer", fail)
    with pytest.raises(MemoryError):
        make_agent(actor_network=model)
    assert SharedBase.of(model).adapters.names == []
