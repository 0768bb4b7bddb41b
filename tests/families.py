"""Small models of several families, with random weights, in float64 where they can."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MT5Config,
    OpenAIGPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

VOCABULARY = 160
# Shorter than the pairs of the tests.
WINDOW = 7
ROTARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LEARNED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 256,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
}
RELATIVE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "initializer_factor": 0.3,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**ROTARY),
    "qwen2": lambda: Qwen2Config(**ROTARY),
    "qwen2-window": lambda: Qwen2Config(
        **ROTARY, use_sliding_window=True, sliding_window=WINDOW, layer_types=["full_attention", "sliding_attention"]
    ),
    "qwen3": lambda: Qwen3Config(**ROTARY),
    "mistral-window": lambda: MistralConfig(**ROTARY, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(
        **ROTARY, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **ROTARY, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: GPT2Config(**LEARNED),
    "gpt-neox": lambda: GPTNeoXConfig(**{**ROTARY, "num_key_value_heads": None}),
    "openai-gpt": lambda: OpenAIGPTConfig(**LEARNED),
    "t5": lambda: T5Config(**RELATIVE),
    "mt5": lambda: MT5Config(**RELATIVE, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": lambda: BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=256,
        init_std=0.1,
    ),
}


def make_family(name: str) -> PreTrainedModel:
    config = FAMILIES[name]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(config)
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
            module.forward = partial(_rms_norm, module)
    # Gemma 2's own attention takes its softmax in float32, in which the mask of a float64 model is minus infinity.
    return model.to(torch.float32 if name == "gemma2" else torch.float64).eval()


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    """The family's norm without its detour through float32, which would hide everything below 1e-7."""
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight + ("Gemma" in type(module).__name__)
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
