from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from snapshots import adapter_bits, base_bits
from transformers import GPT2Config, GPT2LMHeadModel

from evollm import ConfigurationError
from evollm.data.samples import Batch
from evollm.models import SharedBase, completion_logprobs


@pytest.fixture
def batch(gym) -> Batch:
    return gym.next_batch()


def perturb(base: SharedBase, name: str, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base.adapters.parameters(name).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def logps(base: SharedBase, name: str | None, batch: Batch) -> torch.Tensor:
    with base.active(name) as network, torch.no_grad():
        return completion_logprobs(network, batch, base.device).chosen


def test_the_same_model_object_gives_the_same_base(make_model) -> None:
    model = make_model()
    assert SharedBase.of(model) is SharedBase.of(model)
    assert SharedBase.of(model) is not SharedBase.of(make_model())


def test_adding_an_adapter_leaves_base_and_global_generator_as_they_were(make_model, lora) -> None:
    base = SharedBase.of(make_model())
    before, state = base_bits(base), torch.get_rng_state()
    base.adapters.add("actor", lora, trainable=True, seed=3)
    assert base_bits(base) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_decides_the_first_weights(make_model, lora) -> None:
    base = SharedBase.of(make_model())
    names = [base.adapters.add("actor", lora, trainable=True, seed=seed) for seed in (1, 1, 2)]
    bits = adapter_bits(base)
    assert bits[names[0]] == bits[names[1]] != bits[names[2]]


def test_a_fresh_adapter_computes_what_the_base_computes(make_model, lora, batch) -> None:
    base = SharedBase.of(make_model())
    name = base.adapters.add("actor", lora, trainable=True)
    assert torch.equal(logps(base, name, batch), logps(base, None, batch))
    perturb(base, name)
    assert not torch.allclose(logps(base, name, batch), logps(base, None, batch))


def test_only_trainable_adapters_require_gradients_whichever_is_active(make_model, lora) -> None:
    base = SharedBase.of(make_model())
    actor = base.adapters.add("actor", lora, trainable=True)
    reference = base.adapters.copy(actor, "reference", trainable=False)
    other = base.adapters.copy(actor, "actor", trainable=True)
    for active in (reference, actor, None, other, reference):
        base.adapters.use(active)
        for name in base.adapters.names:
            assert {p.requires_grad for p in base.adapters.parameters(name).values()} == {name != reference}
        trainable = sum(parameter.requires_grad for parameter in base.network.parameters())
        assert trainable == len(base.adapters.parameters(actor)) + len(base.adapters.parameters(other))


def test_active_restores_what_was_active_before_also_after_an_error(make_model, lora, batch) -> None:
    base = SharedBase.of(make_model())
    first = base.adapters.add("actor", lora, trainable=True)
    second = base.adapters.copy(first, "actor", trainable=True)
    perturb(base, first)
    base.adapters.use(first)
    with torch.no_grad():
        expected = completion_logprobs(base.network, batch, base.device).chosen
    with pytest.raises(RuntimeError), base.active(second), base.active(None):
        raise RuntimeError
    with torch.no_grad():
        assert torch.equal(completion_logprobs(base.network, batch, base.device).chosen, expected)


def test_the_last_release_frees_an_adapter_without_a_warning(make_model, lora, batch) -> None:
    base = SharedBase.of(make_model())
    kept = base.adapters.add("actor", lora, trainable=True)
    shared = base.adapters.copy(kept, "reference", trainable=False)
    base.adapters.retain(shared)
    before = sum(parameter.numel() for parameter in base.network.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.adapters.release(shared)
        assert shared in base.adapters.names
        base.adapters.use(shared)
        base.adapters.release(shared)
    assert base.adapters.names == [kept]
    freed = before - sum(parameter.numel() for parameter in base.network.parameters())
    assert freed == sum(parameter.numel() for parameter in base.adapters.parameters(kept).values())
    assert torch.isfinite(logps(base, kept, batch)).all()


def test_adapters_are_float32_on_a_bfloat16_base_and_log_probs_are_too(make_model, lora, batch) -> None:
    base = SharedBase.of(make_model(dtype=torch.bfloat16))
    name = base.adapters.add("actor", lora, trainable=True)
    assert {parameter.dtype for parameter in base.adapters.parameters(name).values()} == {torch.float32}
    assert logps(base, name, batch).dtype == torch.float32


def gradients(base: SharedBase, name: str, other: str, batch: Batch, *, recompute: bool) -> list[torch.Tensor]:
    """Gradients of `name` when the backward pass runs while `other` is the active adapter."""
    with base.active(name, gradient_checkpointing=recompute) as network:
        loss = completion_logprobs(network, batch, base.device).chosen.sum()
    base.adapters.use(other)
    loss.backward()
    found = [parameter.grad.clone() for parameter in base.adapters.parameters(name).values()]
    for parameter in base.network.parameters():
        parameter.grad = None
    return found


def test_checkpointed_layers_recompute_with_the_adapter_of_their_forward_pass(make_model, lora, batch) -> None:
    base = SharedBase.of(make_model(dtype=torch.float64))
    name = base.adapters.add("actor", lora, trainable=True)
    other = base.adapters.copy(name, "actor", trainable=True)
    perturb(base, name, seed=1)
    perturb(base, other, seed=2)
    plain = gradients(base, name, other, batch, recompute=False)
    recomputed = gradients(base, name, other, batch, recompute=True)
    for expected, found in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_checkpointing_really_recomputes(make_model, lora, batch) -> None:
    base = SharedBase.of(make_model())
    name = base.adapters.add("actor", lora, trainable=True)
    calls: list[int] = []
    base.network.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for recompute in (False, True):
        calls.clear()
        gradients(base, name, name, batch, recompute=recompute)
        assert len(calls) == 1 + recompute


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("user_trains", [False, True])
def test_dropout_stays_off_in_training(tokenizer, batch, recompute: bool, user_trains: bool) -> None:
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5, attn_pdrop=0.5
    )
    base = SharedBase.of(GPT2LMHeadModel(config).eval())
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    first = base.adapters.add("actor", lora, trainable=True)
    name = base.adapters.copy(first, "actor", trainable=True)
    perturb(base, name)
    if user_trains:
        base.network.train()
    with base.active(name, gradient_checkpointing=recompute) as network:
        first, second = (completion_logprobs(network, batch, base.device).chosen for _ in range(2))
    assert torch.equal(first, second)


def test_fingerprints_tell_weights_apart_and_know_equal_ones(make_model, lora) -> None:
    base = SharedBase.of(make_model())
    actor = base.adapters.add("actor", lora, trainable=True)
    first, second = (base.adapters.copy(actor, "reference", trainable=False) for _ in range(2))
    assert base.adapters.fingerprint(first) == base.adapters.fingerprint(second) != base.adapters.fingerprint(None)
    perturb(base, actor)
    changed = base.adapters.copy(actor, "reference", trainable=False)
    assert base.adapters.fingerprint(changed) != base.adapters.fingerprint(first)
    with pytest.raises(ConfigurationError, match="trainable"):
        base.adapters.fingerprint(actor)


def test_weights_that_do_not_fit_are_refused_and_nothing_changes(make_model, lora) -> None:
    base = SharedBase.of(make_model())
    name = base.adapters.add("actor", lora, trainable=True)
    before = adapter_bits(base)
    tensors = dict(base.adapters.export(name).tensors)
    key = next(iter(tensors))
    with pytest.raises(ConfigurationError, match="do not fit"):
        base.adapters.load(name, {**tensors, key: torch.zeros(1, 1)})
    with pytest.raises(ConfigurationError, match="do not fit"):
        base.adapters.load(name, {"unknown": torch.zeros(1)})
    assert adapter_bits(base) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ""}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"exclude_modules": 3}, "exclude_modules"),
        ({"layers_to_transform": -1}, "layers_to_transform"),
        ({"layers_to_transform": []}, "layers_to_transform"),
        ({"layers_to_transform": "all"}, "layers_to_transform"),
        ({"lora_alpha": 0}, "lora_alpha=0: must be above 0"),
        ({"lora_alpha": -8}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 0}}, r"alpha_pattern\['q_proj'\]=0: must be above 0"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0: must be a whole number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
        ({"lora_dropout": 1}, "lora_dropout"),
        # PEFT would import the module that megatron_core names.
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        # It rounds the base's own weights, once more for each adapter.
        ({"kasa_config": {"a": 1}}, "kasa_config"),
        ({"velora_config": {"a": 1}}, "velora_config"),
    ],
)
def test_a_lora_config_that_cannot_work_is_refused(make_model, changes, field) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes})
    base = SharedBase.of(make_model())
    with pytest.raises(ConfigurationError, match=f"lora_config.{field}"):
        base.adapters.add("actor", config, trainable=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["no_such_layer"]}, ["{'no_such_layer'}", "not found", "are q_proj, k_proj, v_proj"]),
        ({"target_modules": "["}, ["'target_modules': '['", "unterminated"]),
        ({"target_modules": ["self_attn"]}, ["LlamaAttention is not supported", "are q_proj"]),
        ({"target_modules": ["q_proj", "norm"]}, ["LlamaRMSNorm", "not supported"]),
        ({"exclude_modules": ["q_proj"]}, ["'exclude_modules': {'q_proj'}", "No modules were targeted"]),
        ({"layers_to_transform": [99]}, ["'layers_to_transform': [99]", "not found"]),
        ({"rank_pattern": {"(": 3}}, ["rank_pattern", "unterminated"]),
        ({"r": 3, "init_lora_weights": "orthogonal"}, ["'r': 3", "even"]),
        ({"runtime_config": 3}, ["runtime_config"]),
    ],
)
def test_what_peft_refuses_is_one_short_line_and_leaves_the_base_as_it_was(make_model, lora, changes, words) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **changes})
    base, fresh = SharedBase.of(make_model()), SharedBase.of(make_model())
    fresh.adapters.add("actor", lora, trainable=True)
    for adapters in ([], ["actor-0"]):
        with pytest.raises(ConfigurationError) as caught:
            base.adapters.add("actor", config, trainable=True)
        said = str(caught.value)
        assert said.startswith("lora_config={")
        assert [word for word in words if word not in said] == []
        assert "\n" not in said
        assert len(said) < 450
        assert base.adapters.names == adapters
        if not adapters:
            base.adapters.add("actor", lora, trainable=True)
        assert base.network.state_dict().keys() == fresh.network.state_dict().keys()
    assert adapter_bits(base) == adapter_bits(fresh)


def test_a_model_that_carries_adapters_already_is_refused(make_model, lora) -> None:
    with pytest.raises(ConfigurationError, match="actor_network"):
        SharedBase.of(get_peft_model(make_model(), lora))
