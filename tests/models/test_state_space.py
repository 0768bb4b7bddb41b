"""Models whose layers carry a state along the sequence, alone or between attention layers: Mamba and its like."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import ROTARY, VOCABULARY, make_family
from models.test_engine import make_batch
from models.test_probe import check_own_log_probs, one_agent, paths_of
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RwkvConfig,
    xLSTMConfig,
)

from evollm import ConfigurationError

PLAIN: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
MIXER: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
HYBRID: dict[str, Any] = {name: value for name, value in ROTARY.items() if name != "head_dim"}
CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "mamba": lambda: MambaConfig(**PLAIN, state_size=8),
    "falcon-mamba": lambda: FalconMambaConfig(**PLAIN, state_size=8),
    "mamba2": lambda: Mamba2Config(**PLAIN, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=16),
    "rwkv": lambda: RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, context_length=256),
    "xlstm": lambda: xLSTMConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=4,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
    ),
    "lfm2": lambda: Lfm2Config(**ROTARY, layer_types=["conv", "full_attention"]),
    "jamba": lambda: JambaConfig(
        **HYBRID, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=4
    ),
    "bamba": lambda: BambaConfig(**HYBRID, **MIXER, attn_layer_indices=[1]),
    "granite-hybrid": lambda: GraniteMoeHybridConfig(
        **HYBRID,
        **MIXER,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
    ),
    "falcon-h1": lambda: FalconH1Config(**ROTARY, **{**MIXER, "mamba_d_head": 4}, mamba_d_ssm=32),
    "nemotron-h": lambda: NemotronHConfig(
        **{name: ROTARY[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")},
        layers_block_type=["mamba", "attention"],
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        ssm_state_size=8,
        chunk_size=16,
    ),
    "qwen3-next": lambda: Qwen3NextConfig(
        **ROTARY,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
}


def make_model(name: str) -> PreTrainedModel:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGURATIONS[name]())
    return model.float().eval()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_model_with_a_state_gives_its_own_log_probs_and_gradients_on_the_plain_path(name: str) -> None:
    """A rejected side that followed its chosen one would begin with the state that this left."""
    agent = one_agent(make_model(name), "all-linear")
    paths = paths_of(agent)
    assert (paths.shared_prompt, paths.stacking, paths.explicit_positions) == (False, False, True)
    check_own_log_probs(agent, make_batch())


def test_all_linear_leaves_out_the_weights_that_a_mixer_reads_itself() -> None:
    adapted = {
        path.split(".lora_")[0].rpartition(".")[2]
        for path in dict(one_agent(make_model("mamba"), "all-linear").base.adapters.peft_model.named_parameters())
        if "lora_" in path
    }
    assert adapted == {"in_proj", "x_proj"}


def test_an_adapter_on_a_layer_that_is_never_called_is_refused_before_training() -> None:
    """As fused kernels do, which read a layer's weight: with it comes nothing of the adapter."""
    model = make_family("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(functional.silu(mlp.gate_proj(x)) * functional.linear(x, mlp.up_proj.weight))
    agent = one_agent(model, ["q_proj", "up_proj"])
    with pytest.raises(ConfigurationError, match=r"\['up_proj'\]: LlamaForCausalLM does not call .*exclude") as refused:
        paths_of(agent)
    assert "\n" not in str(refused.value)
    assert paths_of(one_agent(model, ["q_proj", "down_proj"])).shared_prompt


def test_a_model_that_keeps_something_from_one_pass_to_the_next_is_refused() -> None:
    model = make_model("lfm2")
    longest = 0

    def shift(module: Any, inputs: Any, output: Any) -> Any:
        nonlocal longest
        longest = max(longest, output.shape[1])
        return output * (1 + longest / 100)

    model.get_input_embeddings().register_forward_hook(shift)
    with pytest.raises(ConfigurationError, match="keeps something from one pass to the next"):
        paths_of(one_agent(model, "all-linear"))
