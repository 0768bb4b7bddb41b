"""An agent's constructor is told what `inspect_attributes` says of another agent, and makes its equal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from gymnasium import spaces
from peft import LoraConfig
from snapshots import actor_bits

from evollm import DPO, SFT, ConfigurationError, HyperparameterConfig, RLParameter, save_policy_archive
from evollm.algorithms.agilerl import EvolvableAlgorithm

# For each argument another value than its default.
VALUES: dict[str, Any] = {
    "observation_space": spaces.Discrete(3),
    "action_space": spaces.Discrete(2),
    "pad_token_id": 3,
    "pad_token": "<pad>",
    "model_config": {"dtype": torch.float64},
    "hp_config": HyperparameterConfig(lr=RLParameter(min=1e-7, max=1e-2)),
    "index": 5,
    "batch_size": 3,
    "lr": 3e-4,
    "beta": 0.3,
    "nll_alpha": 0.25,
    "loss_type": ["ipo", "sigmoid"],
    "loss_weights": [0.5],
    "label_smoothing": 0.1,
    "discopop_tau": 0.1,
    "simpo_gamma": 0.75,
    "ld_alpha": 0.5,
    "max_grad_norm": 0.7,
    "update_epochs": 2,
    "calc_position_embeddings": False,
    "micro_batch_size_per_gpu": 2,
    "device": torch.device("cpu"),
    "dtype": "float64",
    "lora_config": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "wrap": False,
    "clone": True,
    "seed": 7,
    "gradient_checkpointing": True,
    "torch_compiler": "default",
    "use_liger_loss": True,
    "use_separate_reference_adapter": False,
    "token_budget": 4096,
    "drop_nonfinite_rows": False,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_ratio": 0.1,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "optim": "lion_32bit",
    "loraplus_lr_ratio": 4.0,
}
# These make no difference to the agent, or none that is in effect.
WITHOUT_EFFECT = {"wrap", "clone", "use_liger_loss"}
# Arguments that another one needs.
WITH: dict[str, dict[str, Any]] = {
    "loss_weights": {"loss_type": "ipo"},
    "lr_scheduler_type": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine_with_min_lr"},
    "warmup_ratio": {"lr_scheduler_type": "linear"},
    "warmup_steps": {"lr_scheduler_type": "linear"},
}
# Of a base that is loaded by its name.
BY_NAME = {"model_config", "dtype", "archive", "model_name"}


@pytest.fixture(params=[DPO, SFT])
def kind(request) -> type[EvolvableAlgorithm]:
    return request.param


@pytest.fixture
def other_than_default(kind, make_agent, make_model, model_folder, tmp_path) -> dict[str, Any]:
    """For each argument of the constructor another value than its default."""
    save_policy_archive(make_agent(actor_network=make_model(seed=5)), tmp_path / "policy.pt")
    values = VALUES | {
        "model_name": str(model_folder),
        "actor_network": make_model(),
        "archive": str(tmp_path / "policy.pt"),
        "accelerator": Accelerator(),
    }
    arguments = inspect.signature(kind).parameters
    assert set(arguments) <= set(values), "a new argument needs a value here"
    return {name: values[name] for name in arguments}


def rebuilt(agent: EvolvableAlgorithm) -> EvolvableAlgorithm:
    return type(agent)(**type(agent).inspect_attributes(agent, input_args_only=True))


def described(agent: EvolvableAlgorithm) -> list[Any]:
    values = type(agent).inspect_attributes(agent, input_args_only=True)
    base = agent.base
    return [values, agent.settings, agent.hyperparameters, base.weights_fingerprint, base.archive, actor_bits(agent)]


@pytest.mark.filterwarnings("ignore:use_liger_loss=True has no effect")
def test_an_agent_is_rebuilt_from_its_attributes_whatever_argument_was_given(kind, other_than_default) -> None:
    model, folder = other_than_default["actor_network"], other_than_default["model_name"]
    small = {"lora_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    for name, value in other_than_default.items():
        base = {"model_name": folder} if name in BY_NAME else {"actor_network": model}
        with_it = WITH.get(name, {})
        agent = kind(**{**small, **base, **with_it, name: value})
        said = kind.inspect_attributes(agent, input_args_only=True)
        assert (name in said) == (name not in {"wrap", "clone"}), name
        if name not in WITHOUT_EFFECT:
            assert said[name] == value, name
            assert getattr(agent, name) == value, name
        again = rebuilt(agent)
        assert described(again) == described(agent), name
        assert (again.base is agent.base) == (name not in BY_NAME), name
        for done in (agent, again):
            done.release()


def test_all_arguments_at_once_make_an_equal_agent(kind, other_than_default) -> None:
    together = {name: other_than_default[name] for name in other_than_default if name not in BY_NAME | WITHOUT_EFFECT}
    agent = kind(**(together | ({"loss_weights": [0.5, 0.25]} if "loss_weights" in together else {})))
    assert described(rebuilt(agent)) == described(agent)


def test_a_loaded_model_that_got_an_archives_weights_needs_them_no_more(kind, make_model, other_than_default) -> None:
    agent = kind(actor_network=make_model(), archive=other_than_default["archive"])
    assert agent.base.archive is not None
    assert kind.inspect_attributes(agent, input_args_only=True)["archive"] is None
    assert described(rebuilt(agent)) == described(agent)


def test_what_evolution_has_changed_is_rebuilt_too(make_agent) -> None:
    agent = make_agent()
    agent.lr, agent.loss_type = 2e-3, ["hinge"]
    again = rebuilt(agent)
    assert (again.lr, again.loss_type, again.optimizer.param_groups[0]["lr"]) == (2e-3, ["hinge"], 2e-3)
    assert "lr" not in DPO.inspect_attributes(agent, input_args_only=True, exclude=["lr"])


def test_the_attributes_of_agilerls_agents_mean_what_they_mean_there(make_population, make_sft) -> None:
    first, second = make_population(2, seed=3)
    assert (first.seed, first.use_liger_loss) == (3, False)
    assert (make_sft(seed=4).seed, make_sft().use_liger_loss) == (4, False)
    assert second.actor is second.get_policy()
    assert second.actor.active_adapters == [second.actor_adapter]
    assert first.actor.active_adapters == [first.actor_adapter]
    with pytest.raises(ConfigurationError, match="seed=4: is set when an agent is made"):
        first.seed = 4
    assert first.seed == 3


def test_looking_at_attributes_hands_out_no_network(make_agent) -> None:
    agent = make_agent()
    base = agent.base
    DPO.inspect_attributes(agent)
    DPO.inspect_attributes(agent, input_args_only=True)
    del agent
    base.adapters.release_lost()
    assert base.adapters.names == []


@pytest.mark.parametrize(
    "hook",
    [
        lambda heard: lambda: heard.append("called"),
        lambda heard: lambda agent: heard.append("called"),
        lambda heard: lambda *anything: heard.append("called"),
    ],
)
def test_a_mutation_hook_takes_the_agent_or_nothing_and_hears_of_mutations_alone(
    make_agent, tmp_path, hook: Callable[[list[str]], Callable[..., None]]
) -> None:
    heard: list[str] = []
    agent = make_agent()
    agent.register_mutation_hook(hook(heard))
    agent.lr = 2e-3
    agent.set_hyperparameters({"lr": 3e-3})
    agent.save_checkpoint(str(tmp_path / "agent"))
    agent.lr = 4e-3
    agent.load_checkpoint(str(tmp_path / "agent"))
    assert heard == []
    agent.clone(index=1).mutation_hook()
    assert heard == ["called"]


def test_a_hook_that_is_a_method_is_the_clones_own() -> None:
    class Counting(DPO):
        def count(self) -> None:
            self.counted = getattr(self, "counted", 0) + 1

    agent = object.__new__(Counting)
    agent._mutation_hooks = ()
    agent.register_mutation_hook(agent.count)
    other = object.__new__(Counting)
    other._mutation_hooks = agent._mutation_hooks
    other.mutation_hook()
    assert (vars(other)["counted"], hasattr(agent, "counted")) == (1, False)


def test_a_hook_of_two_arguments_is_refused(make_agent) -> None:
    with pytest.raises(ConfigurationError, match=r"hook=.*of an agent, or of nothing"):
        make_agent().register_mutation_hook(lambda agent, other: None)
