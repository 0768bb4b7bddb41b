"""Mixture-of-experts bases: what trains is saved, resumed, merged, and answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_rows
from peft import LoraConfig, PeftModel

from evollm import DPO, ConfigurationError, PreferenceGym, save_merged_model, tune
from evollm.models.adapters.merging import all_logprobs, base_state
from evollm.models.generation import greedy_answers
from evollm.tuning.winner import export, open_winner

# That members go one by one, PEFT's remarks on target_parameters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256},
    **{"initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
TWO = {"num_key_value_heads": 2}
HEADS = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4}
FEW = {"num_experts_per_tok": 2, "intermediate_size": 48}


def mixtral(**own: Any) -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, **TWO, **FEW, num_local_experts=4, **own))


def qwen3(**own: Any) -> Any:
    own |= {"moe_intermediate_size": 32, "num_experts": 4, "head_dim": 8}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SMALL, **TWO, **FEW, **own))


def deepseek(**own: Any) -> Any:
    own |= {"moe_intermediate_size": 32, "num_key_value_heads": 4}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**SMALL, **HEADS, **GROUPS, **FEW, **own))


def gpt_oss(**own: Any) -> Any:
    return hf.GptOssForCausalLM(hf.GptOssConfig(**SMALL, **TWO, **FEW, num_local_experts=4, head_dim=8, **own))


def phimoe(**own: Any) -> Any:
    return hf.PhimoeForCausalLM(hf.PhimoeConfig(**SMALL, **TWO, **FEW, num_local_experts=4, **own))


def llama4(**own: Any) -> Any:
    own |= {"intermediate_size": 32, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "head_dim": 8}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**SMALL, **TWO, num_local_experts=4, num_experts_per_tok=1, **own))


def olmoe(**own: Any) -> Any:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**SMALL, **TWO, **FEW, num_experts=4, **own))


GPT_OSS = LoraConfig(
    r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
)
# Each with the LoRA configuration that it is given, and whether its experts are then adapted.
BASES: dict[str, tuple[Callable[..., Any], LoraConfig | None, bool]] = {
    "mixtral": (mixtral, None, True),
    "qwen3-moe": (qwen3, None, True),
    "deepseek-v3": (deepseek, None, True),
    "gpt-oss": (gpt_oss, GPT_OSS, True),
    "phimoe": (phimoe, None, False),
    "llama4": (llama4, None, False),
    "olmoe": (olmoe, None, True),
}


def make(kind: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return BASES[kind][0](vocab_size=len(tokenizer))


def logprobs_of(agent: DPO) -> torch.Tensor:
    with agent.base.active(agent.actor_adapter) as network:
        return all_logprobs(network)


@pytest.mark.parametrize("kind", BASES)
def test_what_trains_on_experts_is_saved_resumed_merged_and_answers(kind: str, tokenizer, gym, tmp_path) -> None:
    make(kind, tokenizer).save_pretrained(tmp_path / "base")
    _, lora, adapts_experts = BASES[kind]
    population = DPO.population(2, model_name=str(tmp_path / "base"), lora_config=lora, lr=1e-2)
    names = set(population[0].base.adapters.parameters(population[0].actor_adapter))
    assert any(".experts." in name for name in names) == adapts_experts
    assert not [name for name in names if ".router." in name or ".gate." in name]
    for agent in population:
        agent.learn(gym.next_batch())
    agent, expected = population[1], logprobs_of(population[1])
    assert (logprobs_of(population[0]) - expected).abs().max() > 1e-3

    agent.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"))
    assert torch.equal(logprobs_of(loaded), expected)
    population[0].load_checkpoint(str(tmp_path / "agent"))
    assert torch.equal(logprobs_of(population[0]), expected)
    batch = gym.next_batch()
    losses = [one.learn(batch)["loss"] for one in (agent, loaded)]
    assert losses[0] == losses[1]

    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = all_logprobs(PeftModel.from_pretrained(plain, tmp_path / "agent" / "actor").eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    agent.load_checkpoint(str(tmp_path / "agent"))
    save_merged_model(agent, tmp_path / "merged")
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(all_logprobs(merged), expected, rtol=0, atol=1e-3)
    prompts = [gym.train_pairs[0].prompt_ids]
    assert len(greedy_answers(agent.base, [agent.actor_adapter], prompts, tokenizer, max_new_tokens=4)[0]) == 1


def test_a_run_on_experts_is_resumed_exported_and_chatted_with(tokenizer, tmp_path) -> None:
    make("mixtral", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = {"population": 2, "data_batch_size_per_gpu": 4, "dtype": "float32", "verbose": False}
    tune(str(tmp_path / "base"), make_rows(24), num_epochs=1, run_dir=tmp_path / "run", **run)
    tune(str(tmp_path / "base"), make_rows(24), num_epochs=2, resume_from_checkpoint=tmp_path / "run", **run)
    export(tmp_path / "run", tmp_path / "merged")
    export(tmp_path / "run", tmp_path / "adapter", "adapter")
    winner = open_winner(tmp_path / "run")
    assert all(isinstance(winner.answer("Question 1 by Ann:", 3, tuned=tuned), str) for tuned in (False, True))
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = all_logprobs(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    torch.testing.assert_close(all_logprobs(merged), adapted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["phimoe", "llama4"])
def test_an_adapter_on_a_layer_that_gives_no_tensor_is_refused_before_training(kind: str, tokenizer) -> None:
    base = make(kind, tokenizer)
    with pytest.raises(ConfigurationError, match=r"router.*gives a tuple.*exclude_modules=\['\w+\.router'\]"):
        DPO(actor_network=base, lora_config=LoraConfig(target_modules=["q_proj", "router"]))
    assert DPO(actor_network=base, lora_config=LoraConfig(target_modules=["q_proj"])).steps == 0


def test_a_router_that_is_named_is_adapted(tokenizer, gym: PreferenceGym) -> None:
    lora = LoraConfig(r=4, target_parameters=["gate.weight"])
    agent = DPO(actor_network=make("mixtral", tokenizer), lora_config=lora)
    assert all(".gate." in name for name in agent.base.adapters.parameters(agent.actor_adapter))
    agent.learn(gym.next_batch())
    base_state(agent.base, agent.actor_adapter)


def test_experts_of_other_ranks_are_not_merged_into_one_another(tokenizer, gym, tmp_path) -> None:
    """Their ranks lie one after the other in one matrix: padded at its end they would go to other experts."""
    parameters = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    small = DPO(actor_network=make("gpt-oss", tokenizer), lora_config=LoraConfig(r=4, **parameters), lr=1e-2)
    small.learn(gym.next_batch())
    small.save_checkpoint(str(tmp_path / "small"))
    large = DPO(actor_network=make("gpt-oss", tokenizer), lora_config=LoraConfig(r=8, **parameters))
    before, adapters = logprobs_of(large), large.base.adapters.names
    with pytest.raises(ConfigurationError, match="would not compute what was saved"):
        large.load_checkpoint(str(tmp_path / "small"), merge_lora_configs=True)
    assert torch.equal(logprobs_of(large), before)
    assert large.base.adapters.names == adapters
