"""Tokens that were added to a tokenizer and its base: kept, or refused before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_rows
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm import DPO, ConfigurationError, save_merged_model, tune
from evollm.models import load_base_model
from evollm.models.adapters.merging import all_logprobs


@pytest.fixture
def resized(model_folder) -> tuple[Any, Any]:
    """A base and its tokenizer with two more tokens than their folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<|think|>", "<|done|>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def test_a_base_with_tokens_that_its_folder_lacks_is_refused_before_training(resized, model_folder, tmp_path) -> None:
    model, tokenizer = resized
    with pytest.raises(ConfigurationError, match=r"no checkpoint would hold the rows.*save_pretrained.*model_name"):
        tune(model, make_rows(12), tokenizer=tokenizer, run_dir=tmp_path / "run", data_batch_size_per_gpu=4)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigurationError, match="no checkpoint would hold the rows"):
        DPO(actor_network=model)
    assert DPO(actor_network=AutoModelForCausalLM.from_pretrained(model_folder)).steps == 0


# That members with such adapters go one by one.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_base_that_was_saved_with_its_new_tokens_is_found_again(resized, gym, tmp_path) -> None:
    model, tokenizer = resized
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    lora = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])
    agent = DPO(model_name=str(tmp_path / "grown"), lora_config=lora, lr=1e-2)
    agent.learn(gym.next_batch())
    new = [len(tokenizer) - 2, len(tokenizer) - 1]
    with agent.base.active(agent.actor_adapter) as network:
        expected = all_logprobs(network, new)
    agent.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"))
    with loaded.base.active(loaded.actor_adapter) as network:
        assert torch.equal(all_logprobs(network, new), expected)
    save_merged_model(agent, tmp_path / "merged", tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(all_logprobs(merged, new), expected, rtol=0, atol=1e-3)


# PEFT says that it saves them.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_was_saved_with_new_tokens_is_a_base_with_them(resized, model_folder, tmp_path) -> None:
    model, tokenizer = resized
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = [len(tokenizer) - 2, len(tokenizer) - 1]
    expected = all_logprobs(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval(), new)
    found = load_base_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(all_logprobs(found, new), expected, rtol=0, atol=1e-4)
    assert DPO(model_name=str(tmp_path / "adapter")).base.num_embeddings == len(tokenizer)


@pytest.mark.parametrize("option", [{"trainable_token_indices": [5]}, {"modules_to_save": ["lm_head"]}])
def test_training_whole_rows_or_modules_is_refused_with_what_does_the_same(make_model, option) -> None:
    with pytest.raises(ConfigurationError, match="does not work on a shared base: name embed_tokens or lm_head"):
        DPO(actor_network=make_model(), lora_config=LoraConfig(target_modules=["q_proj"], **option))
