from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from snapshots import actor_bits, adapter_bits, base_bits
from transformers import AutoModelForCausalLM

from evollm import (
    DPO,
    CheckpointError,
    ConfigurationError,
    EvoLLMError,
    HyperparameterConfig,
    RLParameter,
    save_llm_checkpoint,
    save_policy_archive,
)
from evollm.checkpoints import replace_folder
from evollm.checkpoints.atomic import MANIFEST, seal
from evollm.models import completion_logprobs
from evollm.models.adapters.lora_config import write_lora_config


@pytest.fixture
def trained(make_agent, gym) -> DPO:
    agent = make_agent(index=3, hp_config=HyperparameterConfig(lr=RLParameter(1e-5, 1e-2)))
    for _ in range(2):
        agent.learn(gym.next_batch())
    agent.test(gym)
    agent.lr = 2e-3
    agent.rng.random(5)
    return agent


def logps(network: torch.nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return completion_logprobs(network.eval(), batch, torch.device("cpu")).chosen


def test_the_folder_has_the_layout_of_the_seed_page(trained, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    found = sorted(str(path.relative_to(tmp_path / "agent")) for path in (tmp_path / "agent").rglob("*.*"))
    assert found == [
        "actor/adapter_config.json",
        "actor/adapter_model.safetensors",
        "attributes.pt",
        MANIFEST,
        "reference/adapter_config.json",
        "reference/adapter_model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent"]


def test_peft_loads_each_role_and_gives_the_same_log_probs(trained, make_model, gym, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    batch = gym.next_batch()
    for role in ("actor", "reference"):
        loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "agent" / role))
        with trained.select_adapter(role):
            expected = logps(trained.base.network, batch)
        torch.testing.assert_close(logps(loaded.get_base_model(), batch), expected, rtol=0, atol=1e-6)


def test_save_llm_checkpoint_writes_the_actor_alone(trained, make_model, gym, tmp_path) -> None:
    save_llm_checkpoint(trained, tmp_path / "deploy")
    assert sorted(path.name for path in (tmp_path / "deploy").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "attributes.pt",
        MANIFEST,
    ]
    batch = gym.next_batch()
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path / "deploy"))
    with trained.select_adapter("actor"):
        expected = logps(trained.base.network, batch)
    torch.testing.assert_close(logps(loaded.get_base_model(), batch), expected, rtol=0, atol=1e-6)


def test_what_save_llm_checkpoint_wrote_is_loaded_as_actor_and_reference(
    trained, make_agent, make_model, gym, tmp_path
) -> None:
    save_llm_checkpoint(trained, tmp_path / "deploy")
    agent, batch = make_agent(seed=7, lr=5e-4), gym.next_batch()
    with pytest.warns(UserWarning, match="no optimizer state"):
        agent.load_checkpoint(str(tmp_path / "deploy"))
    loaded = DPO.load(str(tmp_path / "deploy"), actor_network=agent.base.network)
    for one in (agent, loaded):
        assert actor_bits(one) == actor_bits(trained)
        assert (one.steps, one.fitness, bool(one.optimizer.state)) == (0, [], False)
        assert np.array_equal(*one.logratios(batch))
    assert (agent.lr, loaded.lr) == (5e-4, trained.lr)
    with pytest.raises(CheckpointError, match="no reference adapter"):
        agent.load_checkpoint(str(tmp_path / "deploy"), overwrite_reference_adapter=False)
    with pytest.raises(CheckpointError, match="saved on another base"):
        make_agent(actor_network=make_model(seed=1)).load_checkpoint(str(tmp_path / "deploy"))


def test_an_sft_agent_goes_on_from_what_save_llm_checkpoint_wrote(make_sft, sft_gym, tmp_path) -> None:
    learner = make_sft(index=2)
    learner.learn(sft_gym.next_batch())
    save_llm_checkpoint(learner, tmp_path / "deploy")
    resumed = make_sft()
    resumed.load_checkpoint(str(tmp_path / "deploy"), load_optimizer=False)
    assert (resumed.index, resumed.steps, actor_bits(resumed)) == (2, 1, actor_bits(learner))


@pytest.mark.parametrize("how", ["load_checkpoint", "load"])
def test_a_resumed_agent_goes_on_bit_for_bit(trained, make_agent, make_model, gym, tmp_path, how: str) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    if how == "load":
        resumed = DPO.load(str(tmp_path / "agent"), actor_network=make_model())
    else:
        resumed = make_agent(seed=7)
        resumed.load_checkpoint(str(tmp_path / "agent"))
    assert (resumed.index, resumed.lr, resumed.fitness, resumed.steps) == (3, 2e-3, trained.fitness, 2)
    if how == "load":
        assert dict(resumed.hp_config) == dict(trained.hp_config)
    assert resumed.rng.random() == trained.rng.random()
    for _ in range(2):
        batch = gym.next_batch()
        assert resumed.learn(batch) == trained.learn(batch)
    assert actor_bits(resumed) == actor_bits(trained)


def test_load_finds_the_base_by_the_name_it_was_loaded_from(make_model, lora, gym, tmp_path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    agent = DPO(model_name=str(tmp_path / "base"), lora_config=lora, lr=1e-3)
    agent.learn(gym.next_batch())
    agent.save_checkpoint(str(tmp_path / "agent"))
    assert actor_bits(DPO.load(str(tmp_path / "agent"))) == actor_bits(agent)


def test_without_a_name_load_asks_for_the_base(trained, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    with pytest.raises(ConfigurationError, match="actor_network"):
        DPO.load(str(tmp_path / "agent"))


def test_a_resume_restores_the_reference_and_a_next_stage_takes_the_actor(trained, make_agent, gym, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    batch = gym.next_batch()
    resumed, staged = make_agent(), make_agent()
    resumed.load_checkpoint(str(tmp_path / "agent"))
    staged.load_checkpoint(str(tmp_path / "agent"), overwrite_reference_adapter=True)
    assert resumed.logratios(batch)[0].tolist() == trained.logratios(batch)[0].tolist() != [0.0] * len(batch)
    assert staged.logratios(batch)[0].tolist() == [0.0] * len(batch)


def test_loading_into_one_agent_leaves_the_reference_of_the_others(trained, make_population, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    first, second = make_population(2)
    before = adapter_bits(first.base)
    first.load_checkpoint(str(tmp_path / "agent"), overwrite_reference_adapter=True)
    after = adapter_bits(first.base)
    for name in (second.actor_adapter, second.adapter("reference")):
        assert after[name] == before[name]


def test_without_optimizer_state_a_warning_is_given_and_moments_start_afresh(trained, make_agent, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"), save_optimizer=False)
    agent = make_agent()
    with pytest.warns(UserWarning, match="no optimizer state"):
        agent.load_checkpoint(str(tmp_path / "agent"))
    assert not agent.optimizer.state


def test_a_next_stage_warns_of_a_checkpoint_without_optimizer_state_too(trained, make_agent, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"), save_optimizer=False)
    with pytest.warns(UserWarning, match="no optimizer state"):
        make_agent().load_checkpoint(str(tmp_path / "agent"), overwrite_reference_adapter=True)
    make_agent().load_checkpoint(str(tmp_path / "agent"), load_optimizer=False, overwrite_reference_adapter=True)
    trained.save_checkpoint(str(tmp_path / "agent"))
    make_agent().load_checkpoint(str(tmp_path / "agent"), overwrite_reference_adapter=True)


def test_a_full_checkpoint_is_loaded_by_the_way_that_the_message_names(
    trained, make_model, make_agent, lora, gym, tmp_path
) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"), lora_only=False)
    for load in (
        lambda: make_agent(actor_network=make_model(seed=1)).load_checkpoint(str(tmp_path / "agent")),
        lambda: DPO.load(str(tmp_path / "agent"), actor_network=make_model(seed=1)),
    ):
        with pytest.raises(CheckpointError, match="saved on another base") as caught:
            load()
        assert "check_base" not in str(caught.value)
        # What the message says, as it stands there.
        (named,) = re.findall(r"build the agent with (model_name='[^']*')", str(caught.value))
        agent = eval(f"DPO({named}, lora_config=lora)", {"DPO": DPO, "lora": lora})
        agent.load_checkpoint(str(tmp_path / "agent"))
        batch = gym.next_batch()
        assert agent.learn(batch) == DPO.load(str(tmp_path / "agent")).learn(batch)


def test_a_checkpoint_without_its_base_names_the_one_to_build_on(trained, make_model, lora, tmp_path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    policy = tmp_path / "policy.pt"
    save_policy_archive(trained, policy)
    DPO(model_name=str(tmp_path / "base"), archive=policy, lora_config=lora).save_checkpoint(str(tmp_path / "agent"))
    with pytest.raises(CheckpointError, match="check_base=False") as caught:
        DPO(actor_network=make_model(seed=1), lora_config=lora).load_checkpoint(str(tmp_path / "agent"))
    (named,) = re.findall(r"build the agent with (model_name='[^']*' and archive='[^']*')", str(caught.value))
    agent = eval(f"DPO({named.replace(' and', ',')}, lora_config=lora)", {"DPO": DPO, "lora": lora})
    agent.load_checkpoint(str(tmp_path / "agent"))


def test_another_base_is_refused(trained, make_agent, make_model, gym, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    agent = make_agent(actor_network=make_model(seed=1))
    before = actor_bits(agent)
    with pytest.raises(CheckpointError, match="saved on another base"):
        agent.load_checkpoint(str(tmp_path / "agent"))
    with pytest.raises(CheckpointError, match="saved on another base"):
        DPO.load(str(tmp_path / "agent"), actor_network=make_model(seed=1))
    assert actor_bits(agent) == before
    agent.load_checkpoint(str(tmp_path / "agent"), check_base=False)
    assert actor_bits(agent) == actor_bits(trained)


def test_load_optimizer_false_keeps_the_live_optimizer(trained, make_agent, gym, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    agent = make_agent()
    agent.learn(gym.next_batch())
    moments = [state["exp_avg"].clone() for state in agent.optimizer.state.values()]
    agent.load_checkpoint(str(tmp_path / "agent"), load_optimizer=False)
    for before, state in zip(moments, agent.optimizer.state.values(), strict=True):
        assert torch.equal(before, state["exp_avg"])


def test_another_lora_config_is_refused_with_each_field_that_differs(trained, make_agent, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    other = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    agent = make_agent(lora_config=other)
    before = actor_bits(agent)
    with pytest.raises(ValueError, match="lora_config") as caught:
        agent.load_checkpoint(str(tmp_path / "agent"))
    assert "r: 8 here, 4 in the checkpoint" in str(caught.value)
    assert "target_modules" in str(caught.value)
    assert actor_bits(agent) == before


def merged_setup(make_agent, rank: int, alpha: int, modules: list[str]) -> DPO:
    return make_agent(lora_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("rank", "alpha", "modules"),
    [(8, 16, ["q_proj", "v_proj", "down_proj"]), (2, 4, ["q_proj"]), (8, 4, ["o_proj", "q_proj"])],
)
def test_merged_lora_configs_compute_what_was_saved(trained, make_agent, gym, tmp_path, rank, alpha, modules) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    agent, batch = merged_setup(make_agent, rank, alpha, modules), gym.next_batch()
    agent.learn(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent.load_checkpoint(str(tmp_path / "agent"), merge_lora_configs=True)
    said = [str(warning.message) for warning in caught]
    assert any("no optimizer state" in text for text in said)
    assert any("['lora_alpha']" in text for text in said) == (alpha != 8)
    config = agent.base.adapters.config(agent.actor_adapter)
    assert config.r == max(rank, 4)
    assert set(config.target_modules) == {"q_proj", "v_proj", "down_proj", *modules}
    for mine, theirs in zip(agent.logratios(batch), trained.logratios(batch), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    # Everything can learn: B is zero where it was padded, A is not, and a new module's A follows its B.
    for _ in range(2):
        agent.learn(batch)
    gradients = [state["exp_avg"].abs().sum() for state in agent.optimizer.state.values()]
    assert all(gradient > 0 for gradient in gradients)
    agent.save_checkpoint(str(tmp_path / "again"))
    assert len(agent.base.adapters.names) == 2


def test_merging_what_has_no_union_is_refused_and_changes_nothing(trained, make_agent, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    agent = make_agent(lora_config=LoraConfig(r=4, target_modules=".*q_proj", task_type="CAUSAL_LM"))
    before = adapter_bits(agent.base)
    with pytest.raises(ConfigurationError, match="has no union"):
        agent.load_checkpoint(str(tmp_path / "agent"), merge_lora_configs=True)
    patterned = LoraConfig(r=8, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, task_type="CAUSAL_LM")
    other = make_agent(lora_config=patterned)
    with pytest.warns(match="rank_pattern"), pytest.raises(ConfigurationError, match="cannot be merged"):
        other.load_checkpoint(str(tmp_path / "agent"), merge_lora_configs=True)
    assert adapter_bits(agent.base) == before
    assert len(other.base.adapters.names) == 2


@pytest.mark.parametrize("save_optimizer", [True, False])
@pytest.mark.parametrize("lora_only", [True, False])
def test_each_cell_of_the_grid_goes_on_bit_for_bit(
    trained, make_model, gym, tmp_path, lora_only: bool, save_optimizer: bool
) -> None:
    path = tmp_path / "agent"
    trained.save_checkpoint(str(path), lora_only=lora_only, save_optimizer=save_optimizer)
    assert (path / "base").is_dir() != lora_only
    resumed = DPO.load(str(path), actor_network=make_model() if lora_only else None)
    assert bool(resumed.optimizer.state) == save_optimizer
    if not save_optimizer:
        trained.optimizer = trained._new_optimizer()
    for _ in range(2):
        batch = gym.next_batch()
        assert resumed.learn(batch) == trained.learn(batch)
    assert actor_bits(resumed) == actor_bits(trained)


def test_a_saved_base_is_a_plain_transformers_model_without_adapters(trained, make_model, gym, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"), lora_only=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "agent" / "base")
    expected = make_model().state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_place_of_the_attributes_is_refused_and_not_run(trained, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    mark = tmp_path / "ran"
    (tmp_path / "agent" / "attributes.pt").write_bytes(pickle.dumps(Malicious(mark)))
    seal(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="cannot be read"):
        trained.load_checkpoint(str(tmp_path / "agent"))
    torch.save({"algorithm": Malicious(mark)}, tmp_path / "agent" / "attributes.pt")
    seal(tmp_path / "agent")
    with pytest.raises(CheckpointError, match="cannot be read"):
        trained.load_checkpoint(str(tmp_path / "agent"))
    assert not mark.exists()


@pytest.mark.parametrize("lora_only", [True, False])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("optimizer",), "Nothing of it was run"),
        (("optimizer", "state", 0, "exp_avg"), "Nothing of it was run"),
        (("optimizer", "param_groups", 0, "lr"), "Nothing of it was run"),
        (("settings", "seed"), "Nothing of it was run"),
        (("rng",), "Nothing of it was run"),
        ("actor/adapter_model.safetensors", "cannot be read"),
        ("reference/adapter_config.json", "cannot be read"),
    ],
)
def test_code_anywhere_in_a_checkpoint_is_refused_and_not_run_under_a_right_manifest(
    trained, make_model, tmp_path, place, said: str, lora_only: bool
) -> None:
    path, mark, before = tmp_path / "agent", tmp_path / "ran", actor_bits(trained)
    trained.save_checkpoint(str(path), lora_only=lora_only)
    if isinstance(place, str):
        torch.save(Malicious(mark), path / place)
    else:
        # Everything but one value is what evollm wrote.
        attributes = torch.load(path / "attributes.pt", weights_only=True)
        holder = attributes
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = Malicious(mark)
        torch.save(attributes, path / "attributes.pt")
        torch.load(path / "attributes.pt", weights_only=False)
        assert mark.is_dir()
        mark.rmdir()
    seal(path)
    for load_optimizer in (True, False):
        with pytest.raises(CheckpointError, match=said):
            trained.load_checkpoint(str(path), load_optimizer=load_optimizer)
    with pytest.raises(CheckpointError, match=said):
        DPO.load(str(path), actor_network=make_model())
    assert not mark.exists()
    assert actor_bits(trained) == before


@pytest.mark.parametrize("trap", ["weights", "code"])
def test_a_saved_base_that_would_run_code_is_refused_and_not_run(trained, tmp_path, trap: str) -> None:
    path, mark = tmp_path / "agent", tmp_path / "ran"
    trained.save_checkpoint(str(path), lora_only=False)
    if trap == "weights":
        (path / "base" / "model.safetensors").unlink()
        torch.save(Malicious(mark), path / "base" / "pytorch_model.bin")
    else:
        config = json.loads((path / "base" / "config.json").read_text())
        config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
        (path / "base" / "config.json").write_text(json.dumps(config))
        (path / "base" / "trap.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Trap: pass\n")
        attributes = torch.load(path / "attributes.pt", weights_only=True)
        attributes["model_config"] = {"trust_remote_code": True}
        torch.save(attributes, path / "attributes.pt")
    seal(path)
    with pytest.raises(EvoLLMError):
        DPO.load(str(path))
    assert not mark.exists()


def test_a_checkpoint_that_names_a_base_cannot_ask_for_its_code(trained, make_model, tmp_path) -> None:
    mark, base = tmp_path / "ran", tmp_path / "base"
    make_model().save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "trap.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Trap: pass\n")
    trained.save_checkpoint(str(tmp_path / "agent"))
    attributes = torch.load(tmp_path / "agent" / "attributes.pt", weights_only=True)
    attributes |= {"base_name": str(base), "model_config": {"trust_remote_code": True}}
    torch.save(attributes, tmp_path / "agent" / "attributes.pt")
    seal(tmp_path / "agent")
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        DPO.load(str(tmp_path / "agent"))
    assert not mark.exists()


def test_a_base_found_by_its_name_has_the_type_that_it_was_first_loaded_in(make_model, lora, tmp_path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    asked = {"dtype": torch.bfloat16, "attn_implementation": "eager", "token": "secret", "trust_remote_code": True}
    agent = DPO(model_name=str(tmp_path / "base"), model_config=asked, lora_config=lora)
    agent.save_checkpoint(str(tmp_path / "agent"))
    kept = torch.load(tmp_path / "agent" / "attributes.pt", weights_only=True)["model_config"]
    assert kept == {"dtype": "bfloat16", "attn_implementation": "eager"}
    loaded = DPO.load(str(tmp_path / "agent"))
    assert loaded.base.network.dtype == torch.bfloat16
    assert loaded.base.network.config._attn_implementation == "eager"
    assert base_bits(loaded.base) == base_bits(agent.base)
    # And is kept once more.
    loaded.save_checkpoint(str(tmp_path / "again"))
    assert base_bits(DPO.load(str(tmp_path / "again")).base) == base_bits(agent.base)
    with pytest.raises(CheckpointError, match="saved on another base"):
        DPO.load(str(tmp_path / "agent"), model_config={"dtype": "float32"})


@pytest.mark.parametrize("missing", ["attributes.pt", "actor/adapter_model.safetensors", "actor/adapter_config.json"])
def test_a_missing_file_is_an_evollm_error(trained, tmp_path, missing: str) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    (tmp_path / "agent" / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        trained.load_checkpoint(str(tmp_path / "agent"))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "folder"
    with replace_folder(target) as folder:
        (folder / "attributes.pt").write_text("first")

    def fail() -> None:
        with replace_folder(target) as folder:
            (folder / "attributes.pt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (target / "attributes.pt").read_text() == "first"
    with replace_folder(target) as folder:
        (folder / "adapter_config.json").write_text("second")
    assert sorted(path.name for path in target.iterdir()) == ["adapter_config.json", MANIFEST]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_nothing_but_an_agent_or_adapter_is_ever_replaced(trained, tmp_path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "work", tmp_path / "file"):
        with pytest.raises(ConfigurationError, match="would be lost"):
            trained.save_checkpoint(str(path))
        with pytest.raises(ConfigurationError, match="would be lost"):
            save_llm_checkpoint(trained, path)
    assert (tmp_path / "work" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    trained.save_checkpoint(str(tmp_path / "empty"))


def test_numpy_numbers_are_saved_as_plain_ones(make_agent, make_model, tmp_path) -> None:
    agent = make_agent(
        lr=np.float64(1e-3), beta=np.float32(0.5), batch_size=np.int64(4), seed=np.int64(1), index=np.int64(2)
    )
    agent.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"), actor_network=make_model())
    assert (loaded.index, loaded.batch_size, loaded.beta, loaded.lr) == (2, 4, 0.5, 1e-3)


def test_a_checkpoint_without_reference_is_refused_before_anything_changes(make_agent, gym, tmp_path) -> None:
    source = make_agent(use_separate_reference_adapter=False)
    source.learn(gym.next_batch())
    source.save_checkpoint(str(tmp_path / "agent"))
    agent = make_agent()
    before = actor_bits(agent)
    with pytest.raises(CheckpointError, match="no reference adapter"):
        agent.load_checkpoint(str(tmp_path / "agent"))
    assert actor_bits(agent) == before


def test_attributes_of_something_else_are_refused(trained, tmp_path) -> None:
    trained.save_checkpoint(str(tmp_path / "agent"))
    for content in ({"lr": 1}, torch.zeros(2)):
        torch.save(content, tmp_path / "agent" / "attributes.pt")
        seal(tmp_path / "agent")
        with pytest.raises(CheckpointError, match="is not an agent's"):
            trained.load_checkpoint(str(tmp_path / "agent"))


def test_an_adapter_configuration_is_the_same_in_every_process(tmp_path) -> None:
    """Sets of names have another order in each."""
    code = (
        "import sys; from pathlib import Path; from peft import LoraConfig; "
        "from evollm.models.adapters.lora_config import write_lora_config; "
        "names = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj']; "
        "write_lora_config(LoraConfig(target_modules=names, exclude_modules=names[:2]), Path(sys.argv[1]), 'base')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONHASHSEED": "0"}, check=True)
    found = (tmp_path / "adapter_config.json").read_text()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    write_lora_config(LoraConfig(target_modules=names, exclude_modules=names[:2]), tmp_path, "base")
    assert (tmp_path / "adapter_config.json").read_text() == found
