"""What an agent is handed fits it, or is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_examples, make_rows

from evollm import ConfigurationError, DataError, PreferenceGym, SFTGym, finetune_llm_preference
from evollm.llm_envs.dataset_gym import NO_PAIRS


@pytest.fixture(params=["dpo", "sft"])
def agent(request, make_agent, make_sft):
    return {"dpo": make_agent, "sft": make_sft}[request.param]()


@pytest.fixture
def own_gym(agent, gym, sft_gym):
    return gym if agent.algorithm == "DPO" else sft_gym


@pytest.mark.parametrize("env", [make_rows(4), None, "train.jsonl", PreferenceGym, 3])
def test_what_is_no_gym_is_refused_by_its_type(agent, env) -> None:
    wanted = "PreferenceGym" if agent.algorithm == "DPO" else "SFTGym"
    for call in (agent.evaluate, agent.test):
        with pytest.raises(ConfigurationError, match=f"env='{type(env).__name__}': is no {wanted}"):
            call(env)
    assert agent.fitness == []


def test_a_gym_for_the_other_stage_is_refused(make_agent, make_sft, gym, sft_gym) -> None:
    with pytest.raises(ConfigurationError, match=r"env='SFTGym': is no PreferenceGym, which DPO.evaluate needs"):
        make_agent().test(sft_gym)
    with pytest.raises(ConfigurationError, match=r"env='PreferenceGym': is no SFTGym, which SFT.evaluate needs"):
        make_sft().test(gym)


def test_a_split_that_is_not_there_is_refused(agent, own_gym) -> None:
    with pytest.raises(ConfigurationError, match="split='tset': evaluate on one of"):
        agent.evaluate(own_gym, "tset")
    with pytest.raises(ConfigurationError, match="final_dataset=None"):
        agent.evaluate(own_gym, "final")


@pytest.mark.parametrize("experiences", [make_rows(4), make_rows(1)[0], None, "text", 3, NO_PAIRS])
def test_what_is_no_batch_is_refused(agent, experiences) -> None:
    for call in (agent.learn, agent.get_action):
        with pytest.raises(DataError, match="experiences="):
            call(experiences)


def test_examples_are_nothing_to_compare(make_agent, sft_gym) -> None:
    agent, (observation, _) = make_agent(), sft_gym.reset()
    for call in (agent.learn, agent.get_action):
        with pytest.raises(DataError, match="without a rejected side"):
            call(observation)


def test_ids_and_lengths_that_the_base_does_not_know_are_refused_before_it_sees_them(agent, own_gym) -> None:
    observation, _ = own_gym.reset()
    with pytest.raises(DataError, match=r"input_ids'\]=\d+: is no token of the base"):
        agent.learn({**observation, "input_ids": observation["input_ids"] + agent.base.num_embeddings})
    long = {name: np.repeat(values, 200, axis=-1) for name, values in observation.items() if name == "input_ids"}
    lengths = {name: values + 100 for name, values in observation.items() if name != "input_ids"}
    with pytest.raises(DataError, match="is longer than the base's 256 positions"):
        agent.learn(long | lengths | {"prompt_lengths": lengths["prompt_lengths"] + 100})


def test_a_gym_of_another_tokenizer_is_refused(make_agent, make_sft, make_model, tokenizer) -> None:
    model = make_model(vocab_size=len(tokenizer) // 2)
    with pytest.raises(ConfigurationError, match=r"tokenizer=.*the base knows"):
        make_agent(actor_network=model).test(PreferenceGym(make_rows(4), make_rows(4, 4), tokenizer))
    with pytest.raises(ConfigurationError, match=r"tokenizer=.*the base knows"):
        make_sft(actor_network=model).test(SFTGym(make_examples(4), make_examples(4, 4), tokenizer))


def test_a_reference_that_is_no_adapter_is_refused(make_agent, gym) -> None:
    with pytest.raises(ConfigurationError, match="adapter='refrence': is not an adapter of this base: actor-0"):
        make_agent().evaluate(gym, reference="refrence")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda agent: agent.set_hyperparameters(3), "hyperparameters=3: must be a mapping"),
        (lambda agent: agent.register_mutation_hook(3), "hook=3: must be a function"),
        (lambda agent: agent.clone("next"), "index='next': must be a whole number"),
        (lambda agent: agent.set_reference_policy("1"), "reference_update_tracker='1': must be a whole number"),
        (lambda agent: type(agent)(model_name=agent.base.network), "model_name='LlamaForCausalLM': .*actor_network"),
        (lambda agent: type(agent)(model_name="x", model_config="bfloat16"), "model_config='bfloat16'"),
    ],
)
def test_other_arguments_of_the_wrong_kind_are_refused(agent, call, message) -> None:
    adapters = agent.base.adapters.names
    with pytest.raises(ConfigurationError, match=message):
        call(agent)
    assert agent.base.adapters.names == adapters


def test_a_switch_in_words_is_refused(agent, own_gym) -> None:
    with pytest.raises(ConfigurationError, match="training='no': must be True or False"):
        agent.learn(own_gym.reset()[0], training="no")


def test_an_agent_in_place_of_the_population_is_refused(make_agent, gym) -> None:
    agent = make_agent()
    for population in (agent, [], None, (one for one in [agent])):
        with pytest.raises(ConfigurationError, match=r"pop=.*must be a list of at least one agent: \[agent\]"):
            finetune_llm_preference(population, gym)
    with pytest.raises(ConfigurationError, match="env='list': is no PreferenceGym, which finetune_llm_preference"):
        finetune_llm_preference([agent], make_rows(4))
