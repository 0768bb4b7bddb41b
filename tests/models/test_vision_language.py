"""Models that read pictures too, tuned on text: everything happens in their language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_rows
from peft import LoraConfig, PeftModel

from evollm import DPO, ConfigurationError, PreferenceGym, save_merged_model
from evollm.models.adapters.merging import all_logprobs
from evollm.models.engine import Engine
from evollm.models.loading.pretrained import load_base_model

TEXT = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.2, "rope_theta": 1e4},
}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 16, "patch_size": 8},
}


def llava(vocab: int) -> Any:
    text = hf.LlamaConfig(vocab_size=vocab, **TEXT)
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(**VISION), text_config=text, image_token_index=3)
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl(vocab: int) -> Any:
    text = {"vocab_size": vocab, **TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    tokens = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def gemma3(vocab: int) -> Any:
    text = {"vocab_size": vocab, **TEXT, "head_dim": 8, "sliding_window": 64}
    tokens = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5, "mm_tokens_per_image": 4}
    config = hf.Gemma3Config(text_config=text, vision_config=VISION, **tokens)
    return hf.Gemma3ForConditionalGeneration(config)


def idefics3(vocab: int) -> Any:
    text = hf.LlamaConfig(vocab_size=vocab, **TEXT)
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(text_config=text, vision_config=VISION, image_token_id=3)
    )


KINDS = {"llava": llava, "qwen2-vl": qwen2_vl, "gemma3": gemma3, "idefics3": idefics3}


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone_tunes_the_language_model_alone(kind: str, tokenizer, gym, tmp_path) -> None:
    torch.manual_seed(0)
    KINDS[kind](len(tokenizer)).save_pretrained(tmp_path / "base")
    population = DPO.population(2, model_name=str(tmp_path / "base"), lr=1e-2)
    base, agent = population[0].base, population[1]
    assert all(
        ".language_model." in name or ".text_model." in name for name in base.adapters.parameters(agent.actor_adapter)
    )
    assert base.max_positions == TEXT["max_position_embeddings"]
    assert len(base.layers) == TEXT["num_hidden_layers"]
    for one in population:
        one.learn(gym.next_batch())
    (paths,) = Engine.of(base).paths.values()
    assert (paths.shared_prompt, paths.stacking, paths.tiled_head, paths.reasons) == (True, True, True, ())

    with base.active(agent.actor_adapter) as network:
        expected = all_logprobs(network)
    agent.save_checkpoint(str(tmp_path / "agent"))
    loaded = DPO.load(str(tmp_path / "agent"))
    with loaded.base.active(loaded.actor_adapter) as network:
        assert torch.equal(all_logprobs(network), expected)
    plain = load_base_model(str(tmp_path / "base"))
    adapted = PeftModel.from_pretrained(plain, tmp_path / "agent" / "actor").eval()
    torch.testing.assert_close(all_logprobs(adapted), expected, rtol=0, atol=1e-5)
    save_merged_model(agent, tmp_path / "merged")
    merged = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(all_logprobs(merged), expected, rtol=0, atol=1e-3)


def test_texts_longer_than_the_language_model_takes_are_refused(tokenizer) -> None:
    agent = DPO(actor_network=llava(len(tokenizer)))
    rows = [{**row, "prompt": "many words " * 80} for row in make_rows(4)]
    env = PreferenceGym(rows, None, tokenizer, data_batch_size_per_gpu=2)
    with pytest.raises(ConfigurationError, match="longer than the base's 96 positions"):
        agent.test(env) if env.test_pairs else agent.learn(env.next_batch())


def test_what_is_named_is_adapted_wherever_it_is(tokenizer) -> None:
    agent = DPO(actor_network=llava(len(tokenizer)), lora_config=LoraConfig(target_modules=["fc1"]))
    assert all(".vision_tower." in name for name in agent.base.adapters.parameters(agent.actor_adapter))
