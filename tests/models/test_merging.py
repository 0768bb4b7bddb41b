"""A merged model computes what its adapter computed, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from snapshots import base_bits
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from evollm import DPO, ConfigurationError, save_merged_model
from evollm.models import load_base_model
from evollm.models.adapters.merging import all_logprobs, base_state

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# Larger than usual, so that adapters change log-probs clearly.
SPREAD = {"initializer_range": 0.2}


def trained(network: Any, gym: Any, lora: LoraConfig, lr: float = 1e-2) -> DPO:
    agent = DPO(actor_network=network, lora_config=lora, lr=lr, seed=3)
    gym.reset(seed=0)
    for _ in range(2):
        agent.learn(gym.next_batch())
    return agent


def logprobs_of(agent: DPO) -> torch.Tensor:
    with agent.base.active(agent.actor_adapter) as network:
        return all_logprobs(network)


def qwen2(tokenizer: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **SMALL, **SPREAD))


def gpt2(tokenizer: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, **SPREAD)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("llama", {"target_modules": ["lm_head", "v_proj"], "use_rslora": True}),
        ("tied", {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value["target_modules"])),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merged_model_computes_what_its_adapter_computed(
    make_model, tokenizer, gym, tmp_path, base: str, lora: dict[str, Any], dtype: torch.dtype
) -> None:
    networks = {"qwen2": qwen2, "gpt2": gpt2}
    tied = base == "tied"
    network = networks[base](tokenizer) if base in networks else make_model(tie_word_embeddings=tied)
    agent = trained(network.to(dtype), gym, LoraConfig(r=4, **lora))
    before = base_bits(agent.base)
    expected = logprobs_of(agent)
    with agent.base.active(None) as plain:
        untuned = all_logprobs(plain)
    save_merged_model(agent, tmp_path / "merged")
    assert base_bits(agent.base) == before
    assert torch.equal(logprobs_of(agent), expected)
    found = all_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype))
    far = float((untuned - expected).abs().max())
    assert far > 0.1
    assert float((found - expected).abs().max()) < (1e-3 if dtype == torch.float32 else 0.5) * far


# PEFT's about biases and ties, and evollm's that such members go one by one.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("tied", "lora", "fault"),
    [
        (False, {"target_modules": ["q_proj"], "lora_bias": True}, "has no bias"),
        (True, {"target_modules": ["embed_tokens"]}, "log-probs would be off by"),
        (True, {"target_modules": ["lm_head", "q_proj"]}, "log-probs would be off by"),
    ],
    ids=["bias without a place", "tied embeddings", "tied head"],
)
def test_what_would_not_compute_the_same_is_refused_and_leaves_nothing_behind(
    make_model, gym, tmp_path, tied: bool, lora: dict[str, Any], fault: str
) -> None:
    agent = trained(make_model(tie_word_embeddings=tied), gym, LoraConfig(r=4, **lora))
    before = base_bits(agent.base)
    with pytest.raises(ConfigurationError, match=f"{fault}.*--what adapter"):
        save_merged_model(agent, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    assert base_bits(agent.base) == before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_has_learnt_nothing_merges_bit_for_bit(make_model, tmp_path) -> None:
    agent = DPO(actor_network=make_model(tie_word_embeddings=True), lora_config=LoraConfig(target_modules=["lm_head"]))
    own, merged = base_state(agent.base), base_state(agent.base, agent.actor_adapter)
    assert own.keys() == merged.keys()
    assert all(torch.equal(own[name], merged[name]) for name in own)


# PEFT warns of the tie as well.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_folder_of_an_adapter_on_tied_weights_is_no_base(make_model, tmp_path, target: str) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", target], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"cannot be merged.*off by.*untie"):
        load_base_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 9]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=lambda lora: [*lora][-1],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_folder_of_any_adapter_that_merges_is_a_base_with_its_log_probs(make_model, tmp_path, lora) -> None:
    make_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = all_logprobs(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), [7, 9])
    found = all_logprobs(load_base_model(str(tmp_path / "adapter")), [7, 9])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
