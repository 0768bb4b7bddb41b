from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig
from snapshots import base_bits
from transformers import GPT2Config, GPT2LMHeadModel

from evollm import (
    DPO,
    CheckpointError,
    HyperparameterConfig,
    Mutations,
    PreferenceGym,
    RLParameter,
    TournamentSelection,
    finetune_llm_preference,
    save_llm_checkpoint,
    save_merged_model,
)

# Everything that somebody needs who has never heard of evollm; it prints the log-probs of some tokens, for each base
# and the adapter on it, or none.
ELSEWHERE = """
import importlib.metadata, importlib.util, json, sys
sys.path.append(sys.argv.pop(1))
assert importlib.util.find_spec("evollm") is None, "evollm can be imported"
assert not list(importlib.metadata.distributions(name="evollm")), "evollm is installed"
import torch
from transformers import AutoModelForCausalLM
found = []
for base, *adapter in json.loads(sys.argv[1]):
    model = AutoModelForCausalLM.from_pretrained(base)
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, *adapter)
    with torch.no_grad():
        logits = model.eval()(torch.arange(5, 25).view(1, -1)).logits
    found.append(logits.double().log_softmax(-1)[0, :, ::7].tolist())
assert not [name for name in sys.modules if name.partition(".")[0] == "evollm"], "evollm was imported"
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory) -> Callable[..., list[torch.Tensor]]:
    """Log-probs of several models, computed by a process that finds all that is installed here but evollm."""
    site = tmp_path_factory.mktemp("site-packages")
    for installed in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for entry in installed.iterdir():
            # A .pth file could lead to evollm's sources.
            if "evollm" not in entry.name and entry.suffix != ".pth":
                (site / entry.name).symlink_to(entry)

    def logps(*models: tuple[Path, ...]) -> list[torch.Tensor]:
        # Isolated, and without this environment's own site-packages: nothing is found but the standard library.
        command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", ELSEWHERE, str(site)]
        command.append(json.dumps([[str(folder) for folder in folders] for folders in models]))
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [torch.tensor(found) for found in json.loads(done.stdout)]

    return logps


def here(agent: DPO) -> torch.Tensor:
    with agent.select_adapter("actor"), torch.no_grad():
        logits = agent.base.network(torch.arange(5, 25).view(1, -1)).logits
    return logits.double().log_softmax(-1)[0, :, ::7]


@pytest.fixture
def trained(make_agent, gym) -> DPO:
    agent = make_agent()
    for _ in range(3):
        agent.learn(gym.next_batch())
    return agent


def test_an_exported_adapter_and_a_merged_model_load_without_evollm_and_give_the_same_log_probs(
    trained, make_model, tokenizer, elsewhere, tmp_path
) -> None:
    make_model().save_pretrained(tmp_path / "base")
    before = base_bits(trained.base)
    save_llm_checkpoint(trained, tmp_path / "adapter")
    save_merged_model(trained, tmp_path / "merged", tokenizer)
    save_merged_model(trained, tmp_path / "merged", tokenizer)
    assert base_bits(trained.base) == before
    expected = here(trained)
    trained.save_checkpoint(str(tmp_path / "agent"))
    base, saved = tmp_path / "base", tmp_path / "agent"
    adapters = tmp_path / "adapter", saved / "actor", saved / "reference"
    untuned, merged, *found, reference = elsewhere(
        (base,), (tmp_path / "merged",), *((base, path) for path in adapters)
    )
    assert (untuned - expected).abs().max() > 1e-3
    for adapted in found:
        assert (adapted - expected).abs().max() < 1e-6
    assert (merged - expected).abs().max() < 1e-4
    assert torch.equal(reference, untuned)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_model_of_conv1d_layers_is_merged_too(gym, tokenizer, elsewhere, tmp_path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256)
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    agent = DPO(actor_network=GPT2LMHeadModel(config), lora_config=lora, lr=1e-2)
    agent.learn(gym.next_batch())
    save_merged_model(agent, tmp_path / "merged")
    (merged,) = elsewhere((tmp_path / "merged",))
    assert (merged - here(agent)).abs().max() < 1e-4


def test_the_model_card_states_data_schedule_and_scores(make_population, tokenizer, tmp_path) -> None:
    env = PreferenceGym(
        make_rows(12), make_rows(6, 12), tokenizer, data_batch_size_per_gpu=4, final_dataset=make_rows(4, 30)
    )
    population = make_population(2, hp_config=HyperparameterConfig(lr=RLParameter(1e-4, 1e-2)))
    run = tmp_path / "run"
    population, _ = finetune_llm_preference(
        population,
        env,
        num_epochs=2,
        tournament=TournamentSelection(2, True, 2, rand_seed=3),
        mutation=Mutations(0, 1, rand_seed=5),
        run_dir=run,
        verbose=False,
    )
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    best = next(agent for agent in population if agent.index == end["best"])
    save_merged_model(best, tmp_path / "merged", tokenizer, run_dir=run)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"| preference accuracy | {end['before_accuracy']:.3f} | {end['after_accuracy']:.3f} |" in card
    assert "- train: 12 pairs kept" in card
    assert "2 agents, 6 steps of 4 pairs" in card
    assert f"| 1 | {best.index} |" in card
    assert "LoRA: rank 4, alpha 8, on `down_proj`, `q_proj`, `v_proj`." in card
    assert str(run) not in card


def test_a_card_without_a_finished_run_is_refused(trained, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        save_merged_model(trained, tmp_path / "merged", run_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
