"""Adapters of every kind of LoRA, and what they cost when there are many."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from snapshots import adapter_bits, base_bits
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from evollm.models import SharedBase


def gpt2(make_model: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def mixtral(make_model: Any) -> MixtralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 2}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=60, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    )


KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "linear": (lambda make: make(), {"target_modules": "all-linear"}),
    "dora": (lambda make: make(), {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "embeddings and head": (lambda make: make(), {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied": (lambda make: make(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "lm_head"]}),
    "ranks": (
        lambda make: make(),
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "biases": (lambda make: make(attention_bias=True), {"target_modules": ["q_proj"], "lora_bias": True}),
    "one layer": (lambda make: make(), {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "bfloat16": (lambda make: make(dtype=torch.bfloat16), {"target_modules": ["q_proj"]}),
    "transposed": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "experts": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


def log_probs(base: SharedBase, name: str) -> torch.Tensor:
    with base.active(name) as network, torch.no_grad():
        return network(input_ids=torch.arange(12)[None]).logits.log_softmax(-1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_copied_exported_loaded_and_freed_as_by_peft(make_model, kind) -> None:
    make, settings = KINDS[kind]
    base = SharedBase.of(make(make_model))
    before = base_bits(base)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    first = base.adapters.add("actor", config, trainable=True, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(base.adapters.parameters(first).values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).to(parameter))
    copied = base.adapters.copy(first, "actor", trainable=True)
    # By PEFT from the beginning.
    loaded = base.adapters.add("reference", config, trainable=False, seed=2)
    base.adapters.load(loaded, base.adapters.export(first).tensors)

    state = base.adapters.export(first)
    for name in (first, copied, loaded):
        by_peft = get_peft_model_state_dict(base.adapters.peft_model, adapter_name=name, save_embedding_layers=False)
        found = base.adapters.export(name).tensors
        assert list(found) == list(by_peft) == list(state.tensors)
        assert all(torch.equal(found[key], by_peft[key]) for key in found)
        assert all(torch.equal(found[key], state.tensors[key]) for key in found)
        assert torch.equal(log_probs(base, name), log_probs(base, first))
        assert {parameter.requires_grad for parameter in base.adapters.parameters(name).values()} == {name != loaded}
    # An equal frozen one is found; the copies share nothing.
    assert base.adapters.frozen(state, "reference") == loaded
    base.adapters.release(loaded)
    with torch.no_grad():
        next(iter(base.adapters.parameters(copied).values())).add_(1)
    bits = adapter_bits(base)
    assert bits[first] == bits[loaded] != bits[copied]
    assert base.adapters.frozen(base.adapters.export(copied), "reference") not in (first, copied, loaded)
    # Nothing of a freed adapter stays, and the base is what it was.
    for name in base.adapters.names[1:]:
        base.adapters.release(name)
    assert {name for path in base.network.state_dict() for name in path.split(".") if "-" in name} == {first}
    assert adapter_bits(base)[first] == bits[first]
    assert base_bits(base) == before


def calls_of(work: Callable[[], object]) -> int:
    """Functions that are called, torch's own included: a measure of work that is the same every time."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_work_on_one_adapter_does_not_grow_with_their_number(make_model, lora) -> None:
    base = SharedBase.of(make_model())
    actor = base.adapters.add("actor", lora, trainable=True)

    def changed() -> None:
        with torch.no_grad():
            next(iter(base.adapters.parameters(actor).values())).add_(1)

    def measure() -> dict[str, int]:
        changed()
        state, made = base.adapters.export(actor), []
        works = {
            "add": lambda: made.append(base.adapters.add("actor", lora, trainable=True)),
            "copy": lambda: made.append(base.adapters.copy(actor, "actor", trainable=True)),
            "new reference": lambda: made.append(base.adapters.frozen(state, "reference")),
            "same reference": lambda: made.append(base.adapters.frozen(state, "reference")),
            "switch": lambda: base.adapters.use(actor),
            "switch off": lambda: base.adapters.use(None),
            "export": lambda: base.adapters.export(actor),
            "load": lambda: base.adapters.load(actor, state.tensors),
            "first layer": lambda: base.adapters.first_layer([actor]),
            "free": lambda: base.adapters.release(made.pop(0)),
        }
        counts = {name: calls_of(work) for name, work in works.items()}
        for name in made:
            base.adapters.release(name)
        return counts

    measure()
    few = measure()
    for _ in range(10):
        base.adapters.copy(actor, "actor", trainable=True)
        changed()
        base.adapters.fingerprint(base.adapters.frozen(base.adapters.export(actor), "reference"))
    many = measure()
    for name, count in few.items():
        # Of the 20 others no more than a name or a digest is looked at.
        assert many[name] <= 1.05 * count + 100, (name, count, many[name])
