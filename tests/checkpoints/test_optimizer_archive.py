"""`optimizer.pt` and `scheduler.pt` as the original DPO repository saves them beside `policy.pt`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from snapshots import actor_bits
from torch.optim.lr_scheduler import LambdaLR

from evollm import DPO, CheckpointError, ConfigurationError, save_policy_archive

NAMES = ("policy.pt", "optimizer.pt", "scheduler.pt")


@pytest.fixture
def trained(make_agent, gym) -> DPO:
    agent = make_agent(batch_size=2)
    for _ in range(3):
        agent.learn(gym.next_batch())
    return agent


@pytest.fixture
def latest(trained, tmp_path) -> Path:
    """The folder that the original repository calls LATEST."""
    save_policy_archive(trained, tmp_path / "LATEST" / "policy.pt", metrics={"accuracy": 0.5})
    return tmp_path / "LATEST"


def moments(agent: DPO) -> list[torch.Tensor]:
    return [tensor.clone() for state in agent.optimizer.state_dict()["state"].values() for tensor in state.values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def edited(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(folder / name)
    edit(content)
    torch.save(content, folder / name)


def test_three_files_have_the_form_of_the_original_repository(trained, latest) -> None:
    assert sorted(path.name for path in latest.iterdir()) == sorted(NAMES)
    files = {name: torch.load(latest / name, weights_only=True) for name in NAMES}
    for content in files.values():
        assert set(content) == {"step_idx", "state", "metrics"}
        assert (content["step_idx"], content["metrics"]) == (3, {"accuracy": 0.5})
    # As torch reads them: an optimizer over the same parameters, and a schedule that stays where it is.
    optimizer = torch.optim.AdamW([torch.zeros_like(one) for one in trained.actor_parameters()], lr=1.0)
    optimizer.load_state_dict(files["optimizer.pt"]["state"])
    assert equal([value for state in optimizer.state.values() for value in state.values()], moments(trained))
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    schedule.load_state_dict(files["scheduler.pt"]["state"])
    # A batch of four pairs in steps of two.
    assert (schedule.last_epoch, schedule.get_last_lr()) == (6, [trained.lr])
    optimizer.step()
    schedule.step()
    assert (schedule.last_epoch, optimizer.param_groups[0]["lr"]) == (7, trained.lr)


def test_an_agent_that_lacks_its_moments_goes_on_with_the_same_bits(trained, latest, make_agent, gym, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"), save_optimizer=False)
    agent = make_agent()
    agent.load_checkpoint(str(tmp_path / "agent"), load_optimizer=False)
    agent.load_optimizer_archive(latest)
    assert equal(moments(agent), moments(trained))
    for _ in range(2):
        batch = gym.next_batch()
        assert agent.learn(batch) == trained.learn(batch)
    assert actor_bits(agent) == actor_bits(trained)


def test_a_new_adapter_on_the_policy_starts_with_the_old_ones_moments_and_says_so(
    trained, latest, make_agent, make_model
) -> None:
    agent = make_agent(actor_network=make_model(seed=9), archive=latest / "policy.pt")
    with pytest.warns(UserWarning, match="no resume to the bit"):
        agent.load_optimizer_archive(latest)
    assert equal(moments(agent), moments(trained))
    assert (agent.optimizer.param_groups[0]["weight_decay"], agent.optimizer.param_groups[0]["lr"]) == (0.0, agent.lr)
    assert "param_names" not in agent.optimizer.param_groups[0]


def test_moments_of_another_adapter_are_refused(trained, latest, make_agent, make_model, gym, lora) -> None:
    others = {
        "another adapter's": make_agent(),
        "with the same lora_config": make_agent(
            lora_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
        ),
        "parameter 0 has": make_agent(lora_config=LoraConfig(**{**lora.to_dict(), "r": 2})),
    }
    learnt = make_agent(actor_network=make_model(seed=9), archive=latest / "policy.pt")
    learnt.learn(gym.next_batch())
    trained.learn(gym.next_batch())
    for said, agent in [*others.items(), ("another adapter's", learnt), ("another adapter's", trained)]:
        before = moments(agent)
        with pytest.raises(CheckpointError, match=said):
            agent.load_optimizer_archive(latest)
        assert equal(moments(agent), before)


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        ("optimizer.pt", lambda file: file.pop("metrics"), "it has .*'state', 'step_idx'"),
        ("optimizer.pt", lambda file: file.update(step_idx=1.5), r"step_idx=1\.5 must be a whole number"),
        ("optimizer.pt", lambda file: file.update(state={"weight": torch.zeros(1)}), "not an optimizer's"),
        ("optimizer.pt", lambda file: file["state"]["param_groups"][0].pop("betas"), "not the state of AdamW"),
        ("optimizer.pt", lambda file: file["state"]["param_groups"][0].pop("param_names"), "not the state of AdamW"),
        ("optimizer.pt", lambda file: file["state"]["param_groups"][0]["param_names"].reverse(), "in another order"),
        ("optimizer.pt", lambda file: file["state"]["state"][0].pop("exp_avg"), "parameter 0 has"),
        ("optimizer.pt", lambda file: file["state"].update(state=3), "cannot be used"),
        ("scheduler.pt", lambda file: file.update(step_idx=2), "is of step 2, and optimizer.pt beside it of step 3"),
        ("scheduler.pt", lambda file: file["state"].update(base_lrs=[5e-4], _last_lr=[5e-4]), "set agent.lr = 0.0005"),
        ("scheduler.pt", lambda file: file["state"].update(_last_lr=[5e-4]), "is not at its own rate"),
        ("scheduler.pt", lambda file: file["state"].pop("base_lrs"), "is not at its own rate"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(trained, latest, name: str, edit, said: str) -> None:
    edited(latest, name, edit)
    before = moments(trained)
    with pytest.raises(CheckpointError, match=said):
        trained.load_optimizer_archive(latest)
    assert equal(moments(trained), before)


def test_the_original_repositorys_own_optimizer_is_refused_with_what_to_do(trained, latest) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.RMSprop([weight], lr=5e-7)
    weight.sum().backward()
    optimizer.step()
    torch.save({"step_idx": 3, "state": optimizer.state_dict(), "metrics": {}}, latest / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"not the state of AdamW.*policy\.pt goes on as archive="):
        trained.load_optimizer_archive(latest)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read: there is no such file"):
        trained.load_optimizer_archive(latest / "elsewhere")


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", NAMES[1:])
def test_code_in_either_file_is_refused_and_not_run(trained, latest, tmp_path, name: str) -> None:
    edited(latest, name, lambda file: file["state"].update(lr_lambdas=[Malicious(tmp_path / "mark")]))
    with pytest.raises(CheckpointError, match="Nothing of it was run"):
        trained.load_optimizer_archive(latest)
    assert not (tmp_path / "mark").exists()


def test_a_file_of_somebody_elses_beside_the_policy_is_not_replaced(trained, tmp_path) -> None:
    # As other trainers save it, under the same name.
    torch.save(trained.optimizer.state_dict(), tmp_path / "optimizer.pt")
    before = (tmp_path / "optimizer.pt").read_bytes()
    with pytest.raises(ConfigurationError, match=r"optimizer\.pt.*would be lost"):
        save_policy_archive(trained, tmp_path / "policy.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.pt"]
    assert (tmp_path / "optimizer.pt").read_bytes() == before
    save_policy_archive(trained, tmp_path / "another-name.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another-name.pt", "optimizer.pt"]


def test_an_agent_that_has_learnt_nothing_has_no_moments_to_save(make_agent, tmp_path) -> None:
    save_policy_archive(make_agent(), tmp_path / "policy.pt")
    assert torch.load(tmp_path / "optimizer.pt")["state"]["state"] == {}
    assert torch.load(tmp_path / "scheduler.pt")["state"]["last_epoch"] == 0
    with pytest.warns(UserWarning, match="holds no moments"):
        make_agent().load_optimizer_archive(tmp_path)


def test_an_agent_with_a_schedule_has_no_files_of_a_constant_rate(make_agent, latest, tmp_path) -> None:
    agent = make_agent(lr_scheduler_type="cosine")
    with pytest.raises(ConfigurationError, match="for a constant learning rate"):
        agent.load_optimizer_archive(latest)
    with pytest.warns(UserWarning, match="not written"):
        save_policy_archive(agent, tmp_path / "other" / "policy.pt")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["policy.pt"]
