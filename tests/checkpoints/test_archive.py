from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import broken
from snapshots import base_bits, digest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from evollm import DPO, CheckpointError, ConfigurationError, load_policy_archive, save_policy_archive
from evollm.models import completion_logprobs

METRICS = {"loss/eval": 1.25, "rewards_eval/accuracies": [0.5, 0.75], "note": "sft"}
STEP = 4096


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def original_file(path: Path, model: torch.nn.Module, **changes: Any) -> Path:
    """A file as the original repository's `write_state_dict` makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"step_idx": STEP, "state": model.state_dict(), "metrics": METRICS} | changes, path)
    return path


@pytest.fixture
def policy(make_model, tmp_path) -> Path:
    return original_file(tmp_path / "LATEST" / "policy.pt", make_model(seed=5))


def weights(model: torch.nn.Module) -> str:
    return digest(list(model.state_dict().values()))


def logps(network: torch.nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return completion_logprobs(network.eval(), batch, torch.device("cpu")).chosen


def test_a_policy_archive_becomes_the_base_of_actor_and_reference(policy, make_model, gym, lora, tmp_path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    batch = gym.next_batch()
    expected = logps(make_model(seed=5), batch)
    for where in ({"actor_network": make_model()}, {"model_name": str(tmp_path / "base")}):
        for agent in DPO.population(2, **where, archive=policy, lora_config=lora):
            for role in ("actor", "reference"):
                with agent.select_adapter(role):
                    torch.testing.assert_close(logps(agent.base.network, batch), expected, rtol=0, atol=0)
            assert (agent.base.archive.step_idx, agent.base.archive.metrics) == (STEP, METRICS)


def test_loading_by_hand_says_step_and_metrics_and_casts_to_the_models_type(policy, make_model) -> None:
    model = make_model(dtype=torch.bfloat16)
    archive = load_policy_archive(policy, model)
    assert (archive.path, archive.step_idx, archive.metrics) == (str(policy), STEP, METRICS)
    assert weights(model) == weights(make_model(seed=5).to(torch.bfloat16))
    assert model.dtype == torch.bfloat16
    double = make_model(dtype=torch.float64)
    load_policy_archive(policy, double)
    assert weights(double) == weights(make_model(seed=5).double())


def test_an_exported_agent_loads_as_in_the_original_repository_and_gives_the_same_log_probs(
    make_agent, make_model, gym, tmp_path
) -> None:
    agent = make_agent()
    for _ in range(3):
        agent.learn(gym.next_batch())
    before, path = base_bits(agent.base), tmp_path / "new" / "policy.pt"
    agent.test(gym)
    save_policy_archive(agent, path)
    save_policy_archive(agent, path, metrics={"accuracy": np.float64(0.5), "step": 3})
    assert base_bits(agent.base) == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["optimizer.pt", "policy.pt", "scheduler.pt"]
    # The lines of the original repository's train.py.
    state_dict = torch.load(path, map_location="cpu")
    step, metrics = state_dict["step_idx"], state_dict["metrics"]
    assert (step, metrics) == (3, {"accuracy": 0.5, "step": 3})
    fresh, batch = make_model(seed=9), gym.next_batch()
    fresh.load_state_dict(state_dict["state"])
    with agent.select_adapter("actor"):
        expected = logps(agent.base.network, batch)
    torch.testing.assert_close(logps(fresh, batch), expected, rtol=0, atol=1e-4)
    assert (logps(make_model(), batch) - expected).abs().max() > 1e-3
    again = make_agent(actor_network=make_model(seed=9), archive=path)
    with again.select_adapter("reference"):
        torch.testing.assert_close(logps(again.base.network, batch), expected, rtol=0, atol=1e-4)


def test_the_metrics_of_a_trained_agent_are_its_own(policy, make_agent, gym, tmp_path) -> None:
    agent = make_agent(archive=policy)
    agent.learn(gym.next_batch())
    save_policy_archive(agent, tmp_path / "policy.pt")
    written = torch.load(tmp_path / "policy.pt")
    assert (written["step_idx"], written["metrics"]) == (1, {})
    agent.test(gym)
    save_policy_archive(agent, tmp_path / "policy.pt")
    assert torch.load(tmp_path / "policy.pt")["metrics"] == {"fitness": agent.fitness[-1]}
    with pytest.raises(ConfigurationError, match="JSON values"):
        save_policy_archive(agent, tmp_path / "policy.pt", metrics={"loss": torch.zeros(1)})


@pytest.mark.parametrize("metrics", [METRICS, None, {}])
@pytest.mark.parametrize("tied", [True, False])
def test_an_archive_that_nothing_was_learnt_on_is_exported_bit_for_bit(
    make_agent, make_model, tmp_path, metrics, tied: bool
) -> None:
    model = make_model(seed=5, tie_word_embeddings=tied)
    with torch.no_grad():
        # Plus and minus zero are different bits.
        model.model.layers[0].self_attn.q_proj.weight[:2] = torch.tensor(-0.0)
    policy = original_file(tmp_path / "policy.pt", model, metrics=metrics)
    agent = make_agent(actor_network=make_model(tie_word_embeddings=tied), archive=policy)
    save_policy_archive(agent, tmp_path / "again.pt")
    old, new = torch.load(policy), torch.load(tmp_path / "again.pt")
    assert (new["step_idx"], new["metrics"]) == (STEP, metrics)
    assert list(new["state"]) == list(old["state"])
    for name, tensor in old["state"].items():
        assert digest([new["state"][name]]) == digest([tensor]), name
    # Tied weights are written once.
    assert (tmp_path / "again.pt").stat().st_size < 1.1 * policy.stat().st_size


def test_tied_weights_may_be_in_the_archive_once_or_twice(make_model, tmp_path) -> None:
    state = make_model(seed=5, tie_word_embeddings=True).state_dict()
    expected = weights(make_model(seed=5, tie_word_embeddings=True))
    for absent in (None, "lm_head.weight", "model.embed_tokens.weight"):
        kept = OrderedDict((name, tensor) for name, tensor in state.items() if name != absent)
        path = original_file(tmp_path / "policy.pt", make_model(), state=kept)
        model = make_model(tie_word_embeddings=True)
        load_policy_archive(path, model)
        assert weights(model) == expected
        assert model.lm_head.weight is model.model.embed_tokens.weight
    # From a model that does not tie them, whose two weights are not the same.
    path, before = original_file(tmp_path / "policy.pt", make_model(seed=5)), weights(model)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False"):
        load_policy_archive(path, model)
    assert weights(model) == before


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name.replace("__", "."): tensor for name, tensor in changes.items()})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda state: state.pop("model.norm.weight"), r"it lacks model\.norm\.weight\. Nothing was loaded: load the"),
        (lambda state: state.pop("lm_head.weight"), r"it lacks lm_head\.weight"),
        (change(value_head=torch.zeros(2)), r"the model has no value_head"),
        (change(model__norm__weight=torch.zeros(3)), r"model\.norm\.weight \(3,\), the model's is \(32,\)"),
        (
            change(model__norm__weight=torch.zeros(32, dtype=torch.int64)),
            r"torch\.int64, the model's is torch\.float32",
        ),
        (change(model__norm__weight=torch.zeros(32, dtype=torch.complex64)), r"torch\.complex64"),
        (change(model__norm__weight=torch.zeros(32).to_sparse()), r"not the weights of a model: model\.norm\.weight"),
        (change(model__norm__weight=[1.0]), r"not the weights of a model: model\.norm\.weight"),
        (change(model__norm__weight=torch.zeros(32, device="meta")), r"not the weights of a model"),
    ],
)
def test_an_archive_that_does_not_fit_is_refused_before_anything_is_loaded(make_model, tmp_path, edit, said) -> None:
    state = make_model(seed=5).state_dict()
    edit(state)
    path, model = original_file(tmp_path / "policy.pt", make_model(), state=state), make_model()
    before = weights(model)
    with pytest.raises(CheckpointError, match=said):
        load_policy_archive(path, model)
    assert weights(model) == before
    with pytest.raises(CheckpointError, match=said):
        DPO(actor_network=model, archive=path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weight": torch.zeros(1)}, r'is not a policy archive, a dict with "step_idx".*it has \[\'weight\'\]'),
        (torch.zeros(3), "it is no dict"),
        ({"step_idx": 1.5, "state": {}, "metrics": {}}, r"step_idx=1\.5 must be a whole number"),
        ({"step_idx": 1, "state": [], "metrics": {}}, "state must be a dict"),
        ({"step_idx": 1, "state": {}, "metrics": [1]}, "metrics must be a dict"),
        ({"step_idx": 1, "state": {"param_groups": [], "state": {}}, "metrics": {}}, "not the optimizer's"),
        ({"step_idx": 1, "state": {}, "metrics": {"names": {"a", "b"}}}, "holds a set"),
        ({"step_idx": 1, "state": {}, "metrics": {"where": torch.device("cpu")}}, "holds a device"),
        ({"step_idx": 1, "state": {}, "metrics": {"loss": np.float64(1)}}, r"holds numpy\._core\.multiarray\.scalar"),
        (torch.nn.Linear(1, 1), r"holds torch\.nn\.modules\.linear\.Linear, and evollm reads tensors, numbers"),
    ],
)
def test_what_is_no_plain_policy_archive_is_refused(make_model, tmp_path, content: object, said: str) -> None:
    torch.save(content, tmp_path / "policy.pt")
    with pytest.raises(CheckpointError, match=said):
        load_policy_archive(tmp_path / "policy.pt", make_model())


def test_a_missing_and_a_damaged_file_are_errors_of_evollm(policy, make_model, tmp_path) -> None:
    model, whole = make_model(), policy.read_bytes()
    before = weights(model)
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        policy.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_policy_archive(policy, model)
    with pytest.raises(CheckpointError, match=r"nowhere\.pt cannot be read"):
        load_policy_archive(tmp_path / "nowhere.pt", model)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_policy_archive(tmp_path, model)
    assert weights(model) == before


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "bare pickle", "bare pickle of protocol 2"])
@pytest.mark.parametrize("place", ["whole", "metrics", "state"])
def test_a_malicious_pickle_in_place_of_a_policy_archive_is_refused_and_not_run(
    make_model, tmp_path, form: str, place: str
) -> None:
    mark, path, model = tmp_path / "ran", tmp_path / "policy.pt", make_model()
    trap: Any = Malicious(mark)
    if place != "whole":
        trap = {"step_idx": 1, "state": {}, "metrics": {}} | {place: {"key": trap}}
    pickle.loads(pickle.dumps(trap))
    assert mark.is_dir()
    mark.rmdir()
    if form.startswith("bare"):
        path.write_bytes(pickle.dumps(trap, protocol=2 if form.endswith("2") else None))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=form == "zip")
    before = weights(model)
    with pytest.raises(CheckpointError, match="Nothing of it was run") as caught:
        load_policy_archive(path, model)
    assert "weights_only" not in str(caught.value)
    with pytest.raises(CheckpointError):
        DPO(actor_network=model, archive=path)
    assert not mark.exists()
    assert weights(model) == before


def test_a_file_from_before_torch_1_6_loads(make_model, tmp_path) -> None:
    content = {"step_idx": 1, "state": make_model(seed=5).state_dict(), "metrics": None}
    torch.save(content, tmp_path / "policy.pt", _use_new_zipfile_serialization=False)
    model = make_model()
    assert load_policy_archive(tmp_path / "policy.pt", model).metrics is None
    assert weights(model) == weights(make_model(seed=5))


def test_masks_and_frequencies_of_older_transformers_are_left_out(make_model, tmp_path) -> None:
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    source, model = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    state = source.state_dict()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    load_policy_archive(original_file(tmp_path / "policy.pt", source, state=state), model)
    assert weights(model) == weights(source)
    state["transformer.h.0.attn.bias"] = torch.zeros(96)
    with pytest.raises(CheckpointError, match=r"the model has no transformer\.h\.0\.attn\.bias"):
        load_policy_archive(original_file(tmp_path / "policy.pt", source, state=state), model)
    old_llama = make_model(seed=5).state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load_policy_archive(original_file(tmp_path / "policy.pt", source, state=old_llama), make_model())


def test_weights_under_living_agents_are_never_replaced(policy, make_agent) -> None:
    agent = make_agent()
    before = base_bits(agent.base)
    with pytest.raises(ConfigurationError, match="agents have been built on this model"):
        make_agent(actor_network=agent.base.network, archive=policy)
    assert base_bits(agent.base) == before
    assert agent.base.archive is None
    with pytest.raises(ConfigurationError, match="archive=3"):
        make_agent(archive=3)


def test_an_agent_on_an_archive_is_found_again_by_the_name_of_its_base(policy, make_model, lora, gym, tmp_path) -> None:
    make_model().save_pretrained(tmp_path / "base")
    agent = DPO(model_name=str(tmp_path / "base"), archive=policy, lora_config=lora)
    agent.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"))
    assert base_bits(loaded.base) == base_bits(agent.base)
    assert loaded.base.archive == agent.base.archive
    moved = policy.rename(tmp_path / "moved.pt")
    with pytest.raises(CheckpointError, match=r"policy\.pt cannot be read"):
        DPO.load(str(tmp_path / "agent"))
    assert base_bits(DPO.load(str(tmp_path / "agent"), archive=moved).base) == base_bits(agent.base)


def test_an_archive_is_replaced_whole_or_not_at_all(make_agent, tmp_path) -> None:
    agent, path = make_agent(), tmp_path / "policy.pt"
    with broken(None) as count:
        save_policy_archive(agent, path, metrics={"number": -1})
    assert count.calls > 4
    seen = []
    for number in range(count.calls):
        save_policy_archive(agent, path, metrics={"number": -1})
        raised = False
        with broken(number):
            try:
                save_policy_archive(agent, path, metrics={"number": number})
            except OSError as error:
                raised = "No space left" in str(error)
        seen.append((raised, torch.load(path)["metrics"]["number"] == number))
    # And nothing is left that takes up room.
    save_policy_archive(agent, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["optimizer.pt", "policy.pt", "scheduler.pt"]
    # What fails in removing leftovers costs nothing, and after the rename only the flush of the folder comes.
    assert set(seen) == {(True, False), (True, True), (False, True)}
    assert seen.count((True, True)) == 1


def test_nothing_but_a_policy_archive_is_replaced_by_one(make_agent, tmp_path) -> None:
    agent = make_agent()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    for name in ("notes.txt", "folder", "optimizer.pt"):
        with pytest.raises(ConfigurationError, match="would be lost"):
            save_policy_archive(agent, tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_base_that_an_archive_became_is_known_by_its_weights(policy, make_model, lora, tmp_path) -> None:
    plain, loaded = DPO(actor_network=make_model(), lora_config=lora), make_model()
    assert isinstance(loaded, LlamaForCausalLM)
    load_policy_archive(policy, loaded)
    DPO(actor_network=loaded, lora_config=lora).save_checkpoint(str(tmp_path / "agent"))
    with pytest.raises(CheckpointError, match="saved on another base"):
        plain.load_checkpoint(str(tmp_path / "agent"))
