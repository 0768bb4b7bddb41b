"""The schedule of the learning rate: transformers' own series, times each agent's evolving `lr`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import make_rows
from transformers import get_scheduler

from evollm import Callback, ConfigurationError, PreferenceGym, finetune_llm_preference, replay, tune
from evollm.checkpoints import newest_population, read_population
from evollm.execution.local import LocalExecutor
from evollm.hpo import Birth
from evollm.runs.events import Checkpointed

LR, STEPS = 1e-2, 8
SCHEDULES: list[tuple[str, dict[str, Any] | None]] = [
    ("linear", None),
    ("cosine", None),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.01}),
    ("polynomial", {"power": 2.0}),
    ("inverse_sqrt", None),
    ("constant_with_warmup", None),
    ("warmup_stable_decay", {"num_decay_steps": 3}),
]


def series(kind: str, kwargs: dict[str, Any] | None, warmup: int, lr: float = LR, total: int = STEPS) -> list[float]:
    """The learning rate of each step, from transformers' scheduler on an optimizer."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = get_scheduler(kind, optimizer, warmup, total, dict(kwargs or {}))
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.fixture
def gym(tokenizer) -> PreferenceGym:
    return PreferenceGym(make_rows(8), make_rows(4, 20), tokenizer, data_batch_size_per_gpu=4)


@pytest.mark.parametrize(("kind", "kwargs"), SCHEDULES)
@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.25}, {"warmup_steps": 2}, {"warmup_steps": 0.25}])
def test_rates_are_those_of_transformers(kind, kwargs, warmup, make_agent, gym) -> None:
    agent = make_agent(lr=LR, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, **warmup)
    agent.num_training_steps = STEPS
    batch = gym.next_batch()
    assert [agent.learn(batch)["learning_rate"] for _ in range(STEPS)] == series(kind, kwargs, 2)
    if agent.settings.depends_on_total:
        with pytest.raises(ConfigurationError, match="schedule has ended"):
            agent.learn(batch)


def test_the_factor_multiplies_an_evolving_rate_and_clones_go_on_at_their_step(make_agent, gym) -> None:
    agent = make_agent(lr=LR, lr_scheduler_type="cosine", warmup_steps=2)
    agent.num_training_steps = STEPS
    batch = gym.next_batch()
    rates = [agent.learn(batch)["learning_rate"] for _ in range(3)]
    child = agent.clone(index=1)
    child.lr = 2 * LR
    rates += [agent.learn(batch)["learning_rate"] for _ in range(3)]
    assert rates == series("cosine", None, 2)[:6]
    assert [child.learn(batch)["learning_rate"] for _ in range(3)] == series("cosine", None, 2, lr=2 * LR)[3:6]


def test_several_optimizer_steps_on_a_batch_have_one_rate(make_agent, gym) -> None:
    agent = make_agent(lr=LR, lr_scheduler_type="linear", batch_size=2, update_epochs=2)
    agent.num_training_steps = STEPS
    batch = gym.next_batch()
    assert [agent.learn(batch)["learning_rate"] for _ in range(STEPS)] == series("linear", None, 0)


def test_without_the_number_of_steps_nothing_is_learnt(make_agent, gym) -> None:
    agent = make_agent(lr_scheduler_type="cosine")
    with pytest.raises(ConfigurationError, match=r"set agent\.num_training_steps"):
        agent.learn(gym.next_batch())
    assert agent.steps == 0
    agent.learn(gym.next_batch(), training=False)


def test_weight_decay_is_that_of_adamw(make_agent, gym) -> None:
    batch, (plain, decayed) = gym.next_batch(), (make_agent(lr=LR, weight_decay=decay) for decay in (0.0, 0.5))
    before = [one.detach().clone() for one in decayed.actor_parameters()]
    for agent in (plain, decayed):
        agent.learn(batch)
    for start, one, other in zip(before, plain.actor_parameters(), decayed.actor_parameters(), strict=True):
        torch.testing.assert_close(other, one - LR * 0.5 * start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "the nearest is 'cosine'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "a schedule over steps"),
        ({"lr_scheduler_type": "linear", "warmup_ratio": 1.5}, "from 0 to 1"),
        ({"lr_scheduler_type": "linear", "warmup_steps": 1.5}, "whole number"),
        ({"lr_scheduler_type": "linear", "warmup_steps": -1}, "at least 0"),
        ({"warmup_steps": 3}, "use 'constant_with_warmup'"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0.1}}, r"takes \['num_cycles'\]"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": [1]}}, "a number, a text or None"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "half"}, "must be a mapping"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "polynomial", "lr": 1e-8}, "must be smaller than initial lr"),
        ({"weight_decay": -0.1}, "must not be negative"),
    ],
)
def test_values_that_cannot_be_are_refused(arguments, message, make_agent) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_agent(**arguments)


def test_warmup_steps_win_over_the_ratio(make_agent) -> None:
    agent = make_agent(lr=LR, lr_scheduler_type="linear", warmup_ratio=0.5, warmup_steps=1)
    agent.num_training_steps = STEPS
    assert agent.settings.factor(LR, 1, STEPS) == 1


def test_a_saved_agent_goes_on_at_its_step_and_the_next_stage_begins_anew(make_agent, gym, tmp_path) -> None:
    shared = {"lr": LR, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "warmup_steps": 1}
    agent = make_agent(**shared)
    agent.num_training_steps = STEPS
    agent.learn(gym.next_batch())
    # Set again, this begins at the agent's second step.
    agent.num_training_steps = STEPS
    for _ in range(3):
        agent.learn(gym.next_batch())
    agent.save_checkpoint(str(tmp_path / "agent"))
    again = make_agent(**shared)
    again.load_checkpoint(str(tmp_path / "agent"))
    stage = make_agent(**shared)
    stage.load_checkpoint(str(tmp_path / "agent"), overwrite_reference_adapter=True)
    stage.num_training_steps = STEPS
    rates = series("linear", None, 1)
    batch = gym.next_batch()
    assert again.learn(batch)["learning_rate"] == rates[3]
    assert stage.learn(batch)["learning_rate"] == rates[0]
    # A run counts from its own first step.
    finetune_llm_preference([again], gym, max_steps=STEPS, run_dir=tmp_path / "run", verbose=False)
    assert learnt_at(tmp_path / "run", again.index) == rates


class Stop(Callback):
    """Interrupts a run after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_checkpoint(self, event: Checkpointed) -> None:
        if event.step == self.step:
            raise KeyboardInterrupt


def learnt_at(folder, index: int) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["learning_rate"] for line in lines if "learning_rate" in line and line["agent"] == index]


def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(make_population, gym, tokenizer, tmp_path) -> None:
    def run(folder, steps_at_first: int | None) -> list[dict[str, torch.Tensor]]:
        arguments = {"max_steps": STEPS, "checkpoint_steps": 1, "verbose": False}
        made = {"lr": LR, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
        if steps_at_first:
            env = PreferenceGym(make_rows(8), make_rows(4, 20), tokenizer, data_batch_size_per_gpu=4)

            with pytest.raises(KeyboardInterrupt):
                finetune_llm_preference(
                    make_population(2, **made), env, run_dir=folder, callbacks=[Stop(steps_at_first)], **arguments
                )
            arguments |= {"resume_from_checkpoint": folder}
        else:
            arguments |= {"run_dir": folder}
        env = PreferenceGym(make_rows(8), make_rows(4, 20), tokenizer, data_batch_size_per_gpu=4)
        finetune_llm_preference(make_population(2, **made), env, **arguments)
        newest = newest_population(folder / "checkpoints")
        assert newest is not None
        return [dict(agent.adapter("actor").tensors) for agent in read_population(newest).agents]

    whole, parts = run(tmp_path / "whole", None), run(tmp_path / "parts", 3)
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert learnt_at(tmp_path / "parts", 0) == series("cosine", None, 2)
    longer = {"max_steps": STEPS + 1, "resume_from_checkpoint": tmp_path / "whole", "verbose": False}
    made = {"lr": LR, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}
    with pytest.raises(ConfigurationError, match=r"lr_schedule\.num_training_steps: 8 then, 9 now"):
        finetune_llm_preference(make_population(2, **made), gym, **longer)


def test_a_fresh_member_has_a_schedule_over_the_steps_that_are_left(make_population, gym) -> None:
    agents = make_population(2, lr=LR, lr_scheduler_type="linear", warmup_steps=1)
    for agent in agents:
        agent.num_training_steps = STEPS
    values = agents[0].hyperparameter_values()
    executor = LocalExecutor(agents, gym)
    executor.begin([Birth(0, 0, (), True, values), Birth(1, 1, (), False, values)], moving_references=False)
    list(executor.learn(0, 3))
    executor.apply([Birth(0, 0, (), True, values), Birth(2, None, (), False, values), Birth(3, 0, (), False, values)])
    rates = [step.metrics for step in executor.learn(3, STEPS)]
    expected = series("linear", None, 1)[3:]
    assert [step[0]["learning_rate"] for step in rates] == [step[3]["learning_rate"] for step in rates] == expected
    assert [step[2]["learning_rate"] for step in rates] == series("linear", None, 1, total=STEPS - 3)


def test_a_search_with_a_schedule_is_replayed_bit_for_bit(make_model, lora, tokenizer, tmp_path) -> None:
    made = {"lora_config": lora, "lr": LR, "lr_scheduler_type": "cosine", "warmup_ratio": 0.25, "verbose": False}
    rows = {"data": make_rows(10), "test_data": make_rows(6, 10), "final_data": False, "tokenizer": tokenizer}
    run = {"population": 3, "max_steps": STEPS, "evo_steps": 2, "data_batch_size_per_gpu": 4}
    found = tune(make_model(), rows.pop("data"), **rows, **made, **run, run_dir=tmp_path / "run")
    again = replay(
        found.run_dir, data=make_rows(10), **rows, model=make_model(), run_dir=tmp_path / "again", verbose=False
    )
    assert again.exact
    rates = learnt_at(tmp_path / "again", again.agent.index)
    assert rates[0] == 0
    assert rates[-1] < LR / 4
