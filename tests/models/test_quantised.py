"""Quantised bases: right gradients on processors that pack 4-bit weights for inference and on those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from snapshots import digest
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from evollm import DPO, ConfigurationError
from evollm.models.quantised import gradient_error, quantised_layers
from evollm.models.shared_base import SharedBase

bnb = pytest.importorskip("bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4-bfloat16": {**NF4, "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4-double": {**NF4, "bnb_4bit_use_double_quant": True},
    "nf4-stored-in-float32": {**NF4, "bnb_4bit_quant_storage": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(params=[False, True], ids=["packs-nothing", "packs-4-bit-weights"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """bitsandbytes as on a processor without AVX512-BF16, and as on one with it."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return bool(request.param)


@pytest.fixture
def load(make_model: Callable[..., LlamaForCausalLM], tmp_path) -> Callable[[str], Any]:
    """A base of a kind."""
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def load(kind: str) -> Any:
        config = BitsAndBytesConfig(**KINDS[kind])
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu", dtype=torch.float32
        )

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_keeps_its_bits_and_its_gradients_through_passes_without_gradients(
    kind: str, load, packs: bool, lora
) -> None:
    model = load(kind)
    layers = [layer for _, layer in quantised_layers(model)]
    agent = DPO(actor_network=model, lora_config=lora)
    before = [digest(list(layer.state_dict().values())) for layer in layers]
    with torch.no_grad(), agent.base.active(None) as network:
        network(input_ids=torch.arange(3, 9)[None])
        network.generate(input_ids=torch.arange(3, 9)[None], max_new_tokens=2, do_sample=False)
    assert [digest(list(layer.state_dict().values())) for layer in layers] == before
    assert len(layers) == 14
    assert max(gradient_error(layer) for layer in layers) < (5e-3 if kind == "nf4-bfloat16" else 1e-4)


def test_a_base_that_was_packed_before_is_refused_with_what_to_do(load, lora) -> None:
    model = load("nf4")
    name, layer = list(quantised_layers(model))[3]
    weight = layer.weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(ConfigurationError, match=f"{name}.*packed for inference.*load the base again"):
        DPO(actor_network=model, lora_config=lora)


@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1, float("nan")])
def test_a_gradient_of_other_weights_is_refused_before_training(factor: float, load, lora, monkeypatch) -> None:
    """What a backward pass that reads the weights in another layout, or not at all, would give."""
    dequantised = bnb.functional.dequantize_4bit
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", lambda *args: dequantised(*args) * factor)
    with pytest.raises(ConfigurationError, match=r"q_proj.*gradient is off by .*Linear4bit.*cpu.*quantization_config"):
        DPO(actor_network=load("nf4"), lora_config=lora)


def test_gradients_are_compared_once_for_each_base(load, lora, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("evollm.models.adapters.registry.check_gradients", calls.append)
    model = load("nf4")
    agents = DPO.population(3, actor_network=model, lora_config=lora)
    DPO(actor_network=model, lora_config=lora)
    assert calls == [SharedBase.on(model).network]
    assert {id(agent.base.network) for agent in agents} == {id(model)}
