"""User code may move, replace and delete the parameters of an adapter; nothing goes on with the old ones unnoticed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from families import make_family
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from row_members import ALIKE, check_rows, make_agents, make_batch
from snapshots import actor_bits, states_of
from torch import Tensor, nn

from evollm import DPO, ConfigurationError
from evollm.algorithms.dpo_step import learn_together

Weights = Mapping[str, Tensor]


def assign(model: PeftModel, name: str, weights: Weights) -> None:
    paths = {path.replace(f".{name}", ""): path for path, _ in model.named_parameters() if name in path.split(".")}
    model.load_state_dict({paths[path]: weight for path, weight in weights.items()}, strict=False, assign=True)


def each(change: Callable[[nn.ModuleDict, str, Tensor], None]) -> Callable[[PeftModel, str, Weights], None]:
    """A change of all weights by one of the weight of an adapter's module in a dictionary of PEFT's layer."""

    def change_all(model: PeftModel, name: str, weights: Weights) -> None:
        for path, weight in weights.items():
            change(model.get_submodule(path.removesuffix(".weight")), name, weight.clone())

    return change_all


def replace_parameter(modules: nn.ModuleDict, name: str, weight: Tensor) -> None:
    modules[name].weight = nn.Parameter(weight)


def replace_module(modules: nn.ModuleDict, name: str, weight: Tensor) -> None:
    modules[name] = nn.Linear(*weight.shape[::-1], bias=False)
    modules[name].weight = nn.Parameter(weight)


def replace_values(modules: nn.ModuleDict, name: str, weight: Tensor) -> None:
    modules[name].weight.data = weight


def delete_and_add(model: PeftModel, name: str, weights: Weights) -> None:
    config = model.peft_config[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter(name)
        model.add_adapter(name, config)
    set_peft_model_state_dict(model, dict(weights), name)


WAYS: dict[str, Callable[[PeftModel, str, Weights], Any]] = {
    "by PEFT": lambda model, name, weights: set_peft_model_state_dict(
        model, dict(weights), name, low_cpu_mem_usage=True
    ),
    "by PEFT, in another type": lambda model, name, weights: set_peft_model_state_dict(
        model, {path: weight.bfloat16() for path, weight in weights.items()}, name, low_cpu_mem_usage=True
    ),
    "assigned": assign,
    "parameters": each(replace_parameter),
    "modules": each(replace_module),
    "values": each(replace_values),
    "deleted and added": delete_and_add,
}


def other_weights(agent: DPO) -> Weights:
    """Weights that bfloat16 holds without rounding."""
    weights = get_peft_model_state_dict(agent.get_policy(), adapter_name=agent.actor_adapter)
    return {path: (1.5 * weight).bfloat16().double() for path, weight in weights.items()}


def agent_with(
    way: str | None, *, moments: bool = True, dtype: torch.dtype = torch.float64, **shared: Any
) -> tuple[list[DPO], list[nn.Parameter], Weights]:
    """Agents of which the second one has got other weights, in place if no way is given; its parameters before."""
    agents = make_agents(make_family("llama").to(dtype), ALIKE[:3], **shared)
    parameters = agents[1].actor_parameters()
    if moments:
        learn_together(agents, make_batch())
    name, model, weights = agents[1].actor_adapter, agents[1].get_policy(), other_weights(agents[1])
    if way is None:
        set_peft_model_state_dict(model, dict(weights), name)
    else:
        WAYS[way](model, name, weights)
    return agents, parameters, weights


@pytest.mark.parametrize("way", WAYS)
def test_an_agent_goes_on_from_the_parameters_that_user_code_put_in_place_of_its_own(way: str) -> None:
    results = []
    for used in (None, way):
        agents, before, _ = agent_with(used)
        metrics = [learn_together(agents, make_batch(seed)) for seed in (1, 2)]
        check_rows(agents)
        name, model = agents[1].actor_adapter, agents[1].get_policy()
        own = {id(one) for path, one in model.named_parameters() if name in path.split(".")}
        assert own == set(map(id, before)) == set(map(id, agents[1].actor_parameters()))
        results.append((metrics, [actor_bits(agent) for agent in agents]))
    assert results[0] == results[1]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_cloned_and_scored_has_the_parameters_that_user_code_put_in_place(way: str) -> None:
    for use in (
        lambda agent: agent.to_folder().adapter("actor").tensors,
        lambda agent: agent.clone().to_folder().adapter("actor").tensors,
        lambda agent: copy.deepcopy(agent).to_folder().adapter("actor").tensors,
        lambda agent: get_peft_model_state_dict(agent.get_policy(), adapter_name=agent.actor_adapter),
    ):
        agents, _, weights = agent_with(way, moments=False)
        found = use(agents[1])
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[path].double(), weight) for path, weight in weights.items())
    agents, _, weights = agent_with(way, moments=False)
    # Loading writes to the parameters that the model computes with.
    agents[1].base.adapters.load(agents[1].actor_adapter, {path: 2 * weight for path, weight in weights.items()})
    found = get_peft_model_state_dict(agents[1].get_policy(), adapter_name=agents[1].actor_adapter)
    assert all(torch.equal(found[path], 2 * weight) for path, weight in weights.items())


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_gradients_of_parameters_that_user_code_put_in_place_are_stepped_with(optim: str) -> None:
    results = []
    for way in (None, "assigned"):
        agents, *_ = agent_with(way, dtype=torch.float32, optim=optim)
        name, model = agents[1].actor_adapter, agents[1].get_policy()
        own = [one for path, one in model.named_parameters() if name in path.split(".")]
        generator = torch.Generator().manual_seed(0)
        for parameter in own:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        agents[1].optimizer.step()
        results.append(actor_bits(agents[1]))
        agents[1].optimizer.zero_grad()
        assert not any(one.grad is not None and one.grad.any() for one in agents[1].actor_parameters())
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", ["another rank", "one that would be broadcast"])
@pytest.mark.parametrize("change", [replace_parameter, replace_module, replace_values])
def test_parameters_of_other_shapes_are_refused(change: Callable[..., None], shape: str) -> None:
    agents = make_agents(make_family("llama"), ALIKE[:2])
    modules = agents[1].get_policy().get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A")
    weight = modules[agents[1].actor_adapter].weight
    change(modules, agents[1].actor_adapter, (weight[:1] if shape.startswith("one") else weight[:2]).clone())
    for act in (lambda: agents[1].learn(make_batch()), agents[1].to_folder, agents[1].clone, agents[1].optimizer.step):
        with pytest.raises(
            ConfigurationError, match=r"up_proj\.lora_A\.weight of actor-\d+.*an adapter keeps its rank"
        ):
            act()


def test_a_replaced_parameter_with_hooks_is_refused() -> None:
    agents = make_agents(make_family("llama"), ALIKE[:2])
    modules = agents[1].get_policy().get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A")
    module = modules[agents[1].actor_adapter]
    module.weight = nn.Parameter(module.weight.detach().clone())
    module.weight.register_hook(torch.zeros_like)
    with pytest.raises(ConfigurationError, match=r"register them on agent\.actor_parameters"):
        agents[1].learn(make_batch())


@pytest.mark.parametrize("optim", ["adamw_torch", "schedule_free_adamw", "lion_32bit", "adamw_8bit"])
def test_a_model_in_another_type_than_the_moments_is_refused_until_it_is_converted_back(optim: str) -> None:
    agents = make_agents(make_family("llama").float(), ALIKE[:2], optim=optim)
    learn_together(agents, make_batch())
    model = agents[0].base.network
    model.to(torch.bfloat16)
    bits, states = [actor_bits(agent) for agent in agents], [copy.deepcopy(states_of(agent)) for agent in agents]
    with pytest.raises(ConfigurationError, match=r"is torch\.float32: convert the model back"):
        learn_together(agents, make_batch(1))
    assert bits == [actor_bits(agent) for agent in agents]
    torch.testing.assert_close([states_of(agent) for agent in agents], states, rtol=0.0, atol=0.0)
    model.float()
    learn_together(agents, make_batch(1))
    assert {one.dtype for one in agents[0].actor_parameters()} == {torch.float32}


def test_an_adapter_that_user_code_deleted_is_missed_by_its_own_agent_alone() -> None:
    results = []
    for deleted in (False, True):
        first, *others = make_agents(make_family("llama"), ALIKE[:3])
        learn_together([first, *others], make_batch())
        if deleted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                first.get_policy().delete_adapter(first.actor_adapter)
            for act in (partial(first.learn, make_batch()), first.to_folder, first.clone):
                with pytest.raises(ConfigurationError, match=r"deleted through PEFT: release the agent"):
                    act()
        results.append([learn_together(others, make_batch(1)), [actor_bits(agent) for agent in others]])
        first.release()
        learn_together([*others, others[0].clone(index=5)], make_batch(2))
    assert results[0] == results[1]


def test_an_adapter_that_user_code_deleted_from_a_layer_is_refused() -> None:
    agents = make_agents(make_family("llama"), ALIKE[:2])
    agents[1].get_policy().get_submodule("base_model.model.model.layers.0.mlp.up_proj").delete_adapter(
        agents[1].actor_adapter
    )
    with pytest.raises(ConfigurationError, match=r"up_proj\.lora_A\.weight of actor-\d+.*no longer in its PEFT layer"):
        agents[1].learn(make_batch())
