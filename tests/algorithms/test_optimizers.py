"""The optimizers of agents, against the libraries' own, and LoRA+ against PEFT's."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from snapshots import actor_bits, states_of
from torch import Tensor, nn
from transformers import get_scheduler

from evollm import (
    DPO,
    Callback,
    CheckpointError,
    ConfigurationError,
    MissingExtraError,
    PreferenceGym,
    finetune_llm_preference,
    replay,
    save_policy_archive,
    tune,
)
from evollm.algorithms import optimizers, step
from evollm.algorithms.agilerl import EvolvableAlgorithm
from evollm.checkpoints import newest_population, read_population
from evollm.execution.crossover import crossed
from evollm.runs.events import Checkpointed

bnb = pytest.importorskip("bitsandbytes", "0.50")
schedulefree = pytest.importorskip("schedulefree")

LR, DECAY, STEPS = 1e-2, 0.1, 6
CLASSES: dict[str, Callable[..., Any]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "lion_32bit": bnb.optim.Lion,
    "lion_8bit": bnb.optim.Lion8bit,
    "schedule_free_adamw": schedulefree.AdamWScheduleFree,
}
FREE = "schedule_free_adamw"


@pytest.fixture
def make_wide(make_agent, make_model) -> Callable[..., DPO]:
    """An agent with parameters of 4096 values, whose state bitsandbytes quantises, and smaller ones."""
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")

    def make(**arguments: Any) -> DPO:
        return make_agent(**{"actor_network": make_model(hidden_size=256), "lora_config": lora, "lr": LR, **arguments})

    return make


def weights_of(agent: DPO) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in agent.actor_parameters()]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def bits_of(state: Any) -> Any:
    """The state of an optimizer with its tensors as bytes, to compare."""
    if isinstance(state, Tensor):
        return state.dtype, state.numpy().tobytes()
    if isinstance(state, dict):
        return {name: bits_of(value) for name, value in state.items()}
    return [bits_of(value) for value in state] if isinstance(state, list) else state


def step_beside(agent: DPO, twins: list[nn.Parameter], other: Any) -> list[bool]:
    """Have another optimizer make each step of an agent's, with the same gradients on its own weights.

    Returns:
        For each step whether the weights were equal where the gradient was computed.
    """
    own_step, were_equal = agent.optimizer.step, []

    def both() -> None:
        if hasattr(other, "train"):
            other.train()
        were_equal.append(equal(weights_of(agent), [twin.detach() for twin in twins]))
        for twin, parameter in zip(twins, agent.actor_parameters(), strict=True):
            twin.grad = None if parameter.grad is None else parameter.grad.clone()
        other.step()
        if hasattr(other, "eval"):
            other.eval()
        own_step()

    agent.optimizer.step = both  # type: ignore[method-assign, assignment]
    return were_equal


@pytest.mark.parametrize("optim", CLASSES)
def test_an_agent_steps_as_the_librarys_own_optimizer(optim: str, make_wide, gym) -> None:
    agent = make_wide(optim=optim, weight_decay=DECAY)
    twins = [nn.Parameter(weights) for weights in weights_of(agent)]
    other = CLASSES[optim](twins, lr=LR, weight_decay=DECAY)
    were_equal = step_beside(agent, twins, other)
    for _ in range(3):
        agent.learn(gym.next_batch())
    assert were_equal == [True] * 3
    assert equal(weights_of(agent), [twin.detach() for twin in twins])
    sizes = {parameter.numel() for parameter in twins}
    assert min(sizes) < 4096 <= max(sizes)
    state = agent.optimizer.state_dict()
    assert bits_of(state["state"]) == bits_of(other.state_dict()["state"])
    assert ("8bit" in optim) == any(
        tensor.dtype == torch.uint8
        for values in agent.optimizer.state.values()
        for tensor in values.values()
        if isinstance(tensor, Tensor)
    )


@pytest.mark.parametrize("ratio", [None, 8.0])
@pytest.mark.parametrize("optim", CLASSES)
def test_clones_and_saved_agents_go_on_bit_for_bit(optim: str, ratio, make_wide, gym, tmp_path) -> None:
    made = {"optim": optim, "weight_decay": DECAY, "loraplus_lr_ratio": ratio, "lr_scheduler_type": "cosine"}
    agent = make_wide(**made)
    agent.num_training_steps = STEPS
    for _ in range(2):
        agent.learn(gym.next_batch())
    agent.lr = 2 * LR
    agent.save_checkpoint(str(tmp_path / "agent"))
    again = make_wide(**made)
    again.load_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"), actor_network=make_wide().base.network)
    assert (loaded.optim, loaded.loraplus_lr_ratio) == (optim, ratio)
    clone = agent.clone(index=1)
    others = [again, loaded, clone]
    for _ in range(2):
        batch = gym.next_batch()
        learnt = agent.learn(batch)
        assert all(other.learn(batch) == learnt for other in others)
        assert {actor_bits(other) for other in others} == {actor_bits(agent)}
        states = [bits_of(one.optimizer.state_dict()) for one in (agent, *others)]
        assert all(state == states[0] for state in states)


class Stop(Callback):
    """Interrupts a run after a step."""

    def on_checkpoint(self, event: Checkpointed) -> None:
        if event.step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_32bit", FREE])
def test_a_killed_run_resumes_bit_for_bit(optim: str, make_population, tokenizer, tmp_path) -> None:
    made = {"lr": LR, "optim": optim, "loraplus_lr_ratio": 4.0, "lr_scheduler_type": "linear", "warmup_steps": 2}

    def run(folder, **arguments: Any) -> list[Any]:
        env = PreferenceGym(make_rows(8), make_rows(4, 20), tokenizer, data_batch_size_per_gpu=4)
        asked = {"max_steps": STEPS, "checkpoint_steps": 1, "verbose": False} | arguments
        if "resume_from_checkpoint" not in asked:
            asked["run_dir"] = folder
        finetune_llm_preference(make_population(2, **made), env, **asked)
        newest = newest_population(folder / "checkpoints")
        assert newest is not None
        agents = read_population(newest).agents
        return [bits_of([dict(agent.adapter("actor").tensors), agent.optimizer]) for agent in agents]

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", callbacks=[Stop()])
    assert run(tmp_path / "parts", resume_from_checkpoint=tmp_path / "parts") == whole
    made["optim"] = "adamw_torch"
    with pytest.raises(ConfigurationError, match=rf"optim: '{optim}' then, None now"):
        run(tmp_path / "parts", resume_from_checkpoint=tmp_path / "parts")


@pytest.mark.parametrize("optim", ["adamw_8bit", FREE])
def test_a_search_is_replayed_bit_for_bit(optim: str, make_model, lora, tokenizer, tmp_path) -> None:
    made = {"lora_config": lora, "lr": LR, "optim": optim, "loraplus_lr_ratio": 4.0, "verbose": False}
    rows = {"test_data": make_rows(6, 10), "final_data": False, "tokenizer": tokenizer}
    run = {"population": 3, "max_steps": STEPS, "evo_steps": 2, "data_batch_size_per_gpu": 4}
    found = tune(make_model(), make_rows(10), **rows, **made, **run, run_dir=tmp_path / "run")
    config = json.loads((found.run_dir / "config.json").read_text(encoding="utf-8"))
    assert optim in json.dumps(config)
    again = replay(
        found.run_dir, data=make_rows(10), **rows, model=make_model(), run_dir=tmp_path / "again", verbose=False
    )
    assert again.exact


def test_all_but_training_sees_the_averaged_weights(make_agent, gym, tmp_path) -> None:
    agent = make_agent(optim=FREE, lr=LR)
    optimizer: Any = agent.optimizer
    before = weights_of(agent)
    for _ in range(4):
        agent.learn(gym.next_batch())
    averaged = weights_of(agent)
    # Of a constant rate the average of z_1, z_2, ...; z_t is saved, and y lies between both.
    z = [state["z"] for state in states_of(agent)]
    assert not equal(averaged, z)
    assert not equal(averaged, before)
    with optimizers.gradient_point(optimizer):
        for y, x, last in zip(weights_of(agent), averaged, z, strict=True):
            torch.testing.assert_close(y, 0.9 * x + 0.1 * last)
    assert equal(weights_of(agent), averaged)

    score = agent.test(gym)
    agent.save_checkpoint(str(tmp_path / "agent"))
    merged = copy.deepcopy(agent.base.adapters.export(agent.actor_adapter))
    clone = agent.clone(index=1)
    other = make_agent()
    other.load_checkpoint(str(tmp_path / "agent"), load_optimizer=False)
    assert other.test(gym) == score
    assert equal(weights_of(clone), averaged)
    assert equal(weights_of(other), averaged)
    other.replace_actor(merged)
    assert equal(weights_of(other), averaged)


def test_a_step_that_is_not_made_leaves_every_bit_of_the_averaged_weights(make_agent, gym, monkeypatch) -> None:
    agent = make_agent(optim=FREE, lr=LR)
    for _ in range(3):
        agent.learn(gym.next_batch())
    bits = actor_bits(agent), bits_of(agent.optimizer.state_dict())
    agent.learn(gym.next_batch(), training=False)
    assert (actor_bits(agent), bits_of(agent.optimizer.state_dict())) == bits

    def interrupted() -> None:
        with optimizers.gradient_point(agent.optimizer):
            assert actor_bits(agent) != bits[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (actor_bits(agent), bits_of(agent.optimizer.state_dict())) == bits
    agent.max_grad_norm = 1e300
    monkeypatch.setattr(step, "clip_gradient", lambda *_: torch.tensor(float("nan")))
    agent.learn(gym.next_batch())
    assert agent.diverged
    assert (actor_bits(agent), bits_of(agent.optimizer.state_dict())) == bits


def test_weights_cannot_be_replaced_under_the_state_of_a_schedule_free_optimizer(make_agent, gym, tmp_path) -> None:
    agent = make_agent(optim=FREE)
    agent.save_checkpoint(str(tmp_path / "agent"))
    agent.load_checkpoint(str(tmp_path / "agent"), load_optimizer=False)
    agent.learn(gym.next_batch())
    bits = actor_bits(agent)
    with pytest.raises(ConfigurationError, match=r"load_optimizer=False: .* give True, or load into a new agent"):
        agent.load_checkpoint(str(tmp_path / "agent"), load_optimizer=False)
    assert actor_bits(agent) == bits
    agent.load_checkpoint(str(tmp_path / "agent"))


def test_a_child_of_two_parents_has_the_mean_of_the_optimizers_weights_too(make_population, gym) -> None:
    first, second, idle = make_population(3, optim=FREE, lr=LR)
    batch = gym.next_batch()
    first.learn(batch)
    second.lr = 3 * LR
    for _ in range(2):
        second.learn(batch)
    folders = [copy.deepcopy(agent.to_folder()) for agent in (first, second, idle)]
    kept = bits_of(folders[0].optimizer)
    child = first.clone(index=3)
    child.load_folder(crossed(*folders[:2], 0.25))
    three = (first, second, child)
    for one, other, parameter in zip(*(agent.actor_parameters() for agent in three), strict=True):
        assert torch.equal(parameter, torch.lerp(other, one, 0.25))
    for states in zip(*map(states_of, three), strict=True):
        assert torch.equal(states[2]["z"], torch.lerp(states[1]["z"], states[0]["z"], 0.25))
        assert torch.equal(states[2]["exp_avg_sq"], states[0]["exp_avg_sq"])
    assert bits_of(folders[0].optimizer) == kept
    child.learn(batch)
    with pytest.raises(ConfigurationError, match="has made no step"):
        crossed(folders[0], folders[2], 0.25)


LORAS = {
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "down_proj"]},
    "biases": {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "DoRA": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.filterwarnings(
    "ignore:the base. members go one by one", "ignore:.is_gradient_checkpointing. is deprecated"
)
@pytest.mark.parametrize("kind", LORAS)
def test_loraplus_is_that_of_peft(kind: str, make_agent, make_model, gym) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **LORAS[kind])
    ratio = 16.0
    agent = make_agent(
        lora_config=lora, lr=LR, weight_decay=DECAY, loraplus_lr_ratio=ratio, lr_scheduler_type="cosine", warmup_steps=1
    )
    agent.num_training_steps = STEPS
    network = get_peft_model(make_model(), lora)
    by_name = {name.replace(".default", ""): one for name, one in network.named_parameters() if one.requires_grad}
    own = agent.base.adapters.parameters(agent.actor_adapter)
    assert own.keys() == by_name.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            by_name[name].copy_(parameter)
    twins = [by_name[name] for name in own]
    other = create_loraplus_optimizer(
        network, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio, loraplus_weight_decay=DECAY
    )
    schedule = get_scheduler("cosine", other, 1, STEPS)
    step_beside(agent, twins, other)
    for _ in range(STEPS):
        groups = [[own[path] for path in group] for group in optimizers.parameter_groups(agent.settings, own)]
        assert options_of(agent.optimizer, groups, own) == options_of(
            other, [group["params"] for group in other.param_groups], by_name
        )
        assert agent.learn(gym.next_batch())["learning_rate"] == other.param_groups[0]["lr"]
        schedule.step()
        assert equal(weights_of(agent), [twin.detach() for twin in twins])


def options_of(
    optimizer: torch.optim.Optimizer, groups: list[list[nn.Parameter]], named: Mapping[str, nn.Parameter]
) -> dict[str, tuple[float, float]]:
    """The learning rate and the weight decay of each parameter."""
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        names[id(parameter)]: (options["lr"], options["weight_decay"])
        for options, group in zip(optimizer.param_groups, groups, strict=True)
        for parameter in group
        if id(parameter) in names
    }


def test_the_ratio_holds_whatever_sets_the_rate(make_agent) -> None:
    agent = make_agent(lr=LR, loraplus_lr_ratio=4)

    def rates() -> list[float]:
        return [group["lr"] for group in agent.optimizer.param_groups]

    assert rates() == [LR, 4 * LR]
    agent.lr = 3 * LR
    assert rates() == [agent.lr, 4 * agent.lr]
    EvolvableAlgorithm.update_lr(agent.optimizer, LR)
    assert rates() == [LR, 4 * LR]
    agent.replace_actor(agent.base.adapters.export(agent.actor_adapter))
    assert rates() == [agent.lr, 4 * agent.lr]


def test_a_ratio_of_one_changes_no_bit(make_agent, gym) -> None:
    agents = [make_agent(**settings) for settings in ({}, {"loraplus_lr_ratio": None}, {"loraplus_lr_ratio": 1})]
    batch = gym.next_batch()
    for agent in agents:
        agent.learn(batch)
    assert len({str(bits_of(agent.optimizer.state_dict())) for agent in agents}) == 1
    assert len({actor_bits(agent) for agent in agents}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "adamw_8bits"}, "optim='adamw_8bits': is not known; the nearest is 'adamw_8bit', known are"),
        ({"optim": None}, "optim=None: is not known, known are adamw_torch"),
        ({"loraplus_lr_ratio": 0}, "loraplus_lr_ratio=0: must be above 0"),
        ({"loraplus_lr_ratio": "16"}, "take its quotation marks away"),
    ],
)
def test_values_that_cannot_be_are_refused(arguments, message, make_agent) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_agent(**arguments)


@pytest.mark.parametrize("optim", list(CLASSES)[1:])
def test_without_the_extra_its_name_is_told_before_a_base_is_loaded(optim: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(MissingExtraError, match=rf"optim='{optim}' needs .* pip install \"evollm\[optimizers\]\""):
        DPO(model_name="not-there", optim=optim)


@pytest.mark.parametrize("settings", [{"optim": "lion_32bit"}, {"optim": FREE}, {"loraplus_lr_ratio": 2.0}])
def test_deepspeed_shards_adamw_alone(settings) -> None:
    accelerator: Any = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    (field,) = settings
    with pytest.raises(ConfigurationError, match=rf"{field}=.*DeepSpeed shards AdamW with one learning rate: use"):
        DPO(model_name="not-there", accelerator=accelerator, **settings)


def test_weights_or_devices_that_bitsandbytes_cannot_update_are_refused(make_agent, make_model, monkeypatch) -> None:
    with pytest.raises(ConfigurationError, match=r"optim='lion_8bit': updates float32 weights, .*torch\.float64"):
        make_agent(optim="lion_8bit", actor_network=make_model(dtype=torch.float64))
    make_agent(optim=FREE, actor_network=make_model(dtype=torch.float64))

    def without_kernel(*arguments: Any, **named: Any) -> None:
        raise NotImplementedError("no kernel for this backend")

    monkeypatch.setattr(bnb.functional, "optimizer_update_8bit_blockwise", without_kernel)
    optimizers._check_kernels.cache_clear()
    with pytest.raises(ConfigurationError, match=r"does not run on cpu .no kernel for this backend.: use adamw_torch"):
        make_agent(optim="lion_8bit")
    optimizers._check_kernels.cache_clear()


OTHERS = [
    ({"optim": "lion_32bit"}, {"optim": "adamw_torch"}),
    ({"optim": "adamw_8bit"}, {"optim": "lion_8bit"}),
    ({"optim": "adamw_torch"}, {"optim": FREE}),
    ({"loraplus_lr_ratio": 2.0}, {"loraplus_lr_ratio": None}),
    ({"loraplus_lr_ratio": 1.0}, {"loraplus_lr_ratio": 2.0}),
]


@pytest.mark.parametrize(("saved", "own"), OTHERS)
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(saved, own, make_agent, gym, tmp_path) -> None:
    agent = make_agent(**saved)
    agent.learn(gym.next_batch())
    agent.save_checkpoint(str(tmp_path / "agent"))
    other = make_agent(**own)
    bits = actor_bits(other)
    ((field, value),) = saved.items()
    with pytest.raises(
        CheckpointError, match=rf"with {field}={value!r}, and .* build the agent with {field}={value!r}"
    ):
        other.load_checkpoint(str(tmp_path / "agent"))
    assert actor_bits(other) == bits
    other.load_checkpoint(str(tmp_path / "agent"), load_optimizer=False)
    # The next stage starts with a new optimizer of its own.
    other.load_checkpoint(str(tmp_path / "agent"), overwrite_reference_adapter=True)
    other.learn(gym.next_batch())


def nested(state: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = state["state"][number]
    return found.get("__bnb_optimizer_quant_state__", found)


@pytest.mark.parametrize(
    ("optim", "edit", "said"),
    [
        ("adamw_8bit", lambda state: nested(state).pop("absmax2"), "parameter 0 has"),
        ("adamw_8bit", lambda state: nested(state).update(qmap1=torch.zeros(255)), "parameter 0 has"),
        ("lion_8bit", lambda state: nested(state).update(state1=nested(state)["state1"].float()), "parameter 0 has"),
        ("lion_32bit", lambda state: nested(state).update(state1=torch.zeros(3)), "parameter 0 has"),
        ("lion_32bit", lambda state: state["state"][0].update(step="1"), "cannot be used"),
        (FREE, lambda state: state["param_groups"][0].pop("weight_sum"), "weight_sum"),
        (FREE, lambda state: state["param_groups"][0].update(lr_max=float("nan")), "lr_max=nan"),
        (FREE, lambda state: state["state"][1].pop("z"), "parameter 1 has"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(optim: str, edit, said: str, make_wide, gym) -> None:
    agent = make_wide(optim=optim)
    agent.learn(gym.next_batch())
    folder = copy.deepcopy(agent.to_folder())
    agent.learn(gym.next_batch())
    bits = actor_bits(agent), bits_of(agent.optimizer.state_dict())
    agent.load_folder(copy.deepcopy(folder))
    assert actor_bits(agent) != bits[0]
    bits = actor_bits(agent), bits_of(agent.optimizer.state_dict())
    edit(folder.optimizer)
    with pytest.raises(CheckpointError, match=said):
        agent.load_folder(folder)
    assert (actor_bits(agent), bits_of(agent.optimizer.state_dict())) == bits


@pytest.mark.parametrize("settings", [{"optim": "lion_32bit"}, {"loraplus_lr_ratio": 2.0}])
def test_the_original_repositorys_optimizer_files_are_adamws_alone(settings, make_agent, tmp_path) -> None:
    save_policy_archive(make_agent(), tmp_path / "policy.pt")
    agent = make_agent(**settings)
    ((field, value),) = settings.items()
    with pytest.raises(ConfigurationError, match=rf"{field}={value!r}: the files are for a constant .* of AdamW"):
        agent.load_optimizer_archive(tmp_path)
    with pytest.warns(UserWarning, match=rf"not written, .* the agent has {field}={value!r}"):
        save_policy_archive(agent, tmp_path / "other" / "policy.pt")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["policy.pt"]
