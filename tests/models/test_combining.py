"""Combined and scaled adapters compute what their deltas say, in every layer that an adapter can be on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor

from evollm import ConfigurationError
from evollm.models.adapters.combining import COMBINATIONS, combined, scaled
from evollm.models.adapters.merging import all_logprobs
from evollm.models.adapters.peft_layers import adapted_layers
from evollm.models.shared_base import SharedBase

# That members go one by one, PEFT's remarks on target_parameters.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPREAD = {"initializer_range": 0.2}


def llama(vocab_size: int) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, **SMALL, **SPREAD))


def gpt2(vocab_size: int) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=vocab_size, **sizes, **SPREAD))


def mixtral(vocab_size: int) -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=vocab_size, **experts, **SMALL, **SPREAD))


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rslora": (llama, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "down_proj"]},
            **{"rank_pattern": {"k_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"q_proj": 5}},
        },
    ),
    "embeddings": (llama, {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "gpt2": (gpt2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "experts": (mixtral, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "all experts": (mixtral, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
}


def make_base(kind: str, vocab_size: int = 99) -> tuple[SharedBase, LoraConfig]:
    make, lora = CASES[kind]
    torch.manual_seed(0)
    return SharedBase.of(make(vocab_size=vocab_size)), LoraConfig(**lora)


def add(base: SharedBase, config: LoraConfig, seed: int, size: float = 0.1) -> str:
    """A frozen adapter whose weights are random numbers of this size."""
    name = base.adapters.add("member", config, trainable=False)
    generator = torch.Generator().manual_seed(seed)
    tensors = base.adapters.export(name).tensors
    base.adapters.load(
        name, {key: size * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    )
    return name


def deltas(base: SharedBase, name: str) -> dict[str, Tensor]:
    """What PEFT adds to the weight of each layer, in float64 of float32 products."""
    return {
        path: layer.get_delta_weight(name).detach().double()
        for path, layer in adapted_layers(base.network, name).items()
    }


def weighted(base: SharedBase, names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    found = [deltas(base, name) for name in names]
    return {path: sum(weight * one[path] for one, weight in zip(found, weights, strict=True)) for path in found[0]}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert (found[path] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), path


@torch.no_grad()
def logprobs_with(base: SharedBase, changes: Mapping[str, Tensor]) -> Tensor:
    """Log-probs of the base with these deltas added to the weights themselves."""
    weights = []
    for path, change in changes.items():
        layer = base.network.get_submodule(path)
        inner = layer.get_base_layer()
        weights.append((getattr(inner, getattr(layer, "parameter_name", None) or "weight"), change))
    before = [weight.data for weight, _ in weights]
    for weight, change in weights:
        weight.data = (weight.data.double() + change).float()
    try:
        with base.active(None) as network:
            return all_logprobs(network)
    finally:
        for (weight, _), data in zip(weights, before, strict=True):
            weight.data = data


def logprobs_of(base: SharedBase, name: str | None) -> Tensor:
    with base.active(name) as network:
        return all_logprobs(network)


@pytest.mark.parametrize("kind", CASES)
def test_cat_computes_what_the_weighted_sum_of_the_deltas_computes(kind: str) -> None:
    base, config = make_base(kind)
    names, weights = [add(base, config, seed) for seed in range(3)], [0.5, 0.7, -0.4]
    expected = weighted(base, names, weights)
    found = base.adapters.frozen(combined(base, names, weights), "candidate")
    assert_close(deltas(base, found), expected)
    logprobs = logprobs_of(base, found)
    assert (logprobs - logprobs_with(base, expected)).abs().max() < 2e-4
    assert (logprobs - logprobs_of(base, None)).abs().max() > 1e-2
    assert all(layer.scaling[found] == 1 for layer in adapted_layers(base.network, found).values())


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.7, -1.0])
def test_scaled_moves_along_the_line_from_the_reference_to_the_adapter(kind: str, factor: float) -> None:
    base, config = make_base(kind)
    actor, reference = add(base, config, 0), add(base, config, 1)
    alone = base.adapters.frozen(scaled(base, actor, factor), "candidate")
    assert_close(deltas(base, alone), weighted(base, [actor], [factor]))
    assert base.adapters.config(alone).r == config.r
    both = base.adapters.frozen(scaled(base, actor, factor, reference), "candidate")
    expected = weighted(base, [actor, reference], [factor, 1 - factor])
    assert_close(deltas(base, both), expected)
    assert (logprobs_of(base, both) - logprobs_with(base, expected)).abs().max() < 2e-4


def test_a_reference_without_deltas_costs_no_rank() -> None:
    base, config = make_base("llama")
    actor = add(base, config, 0)
    fresh = base.adapters.add("reference", config, trainable=False)
    state, plain = scaled(base, actor, 1.5, fresh), scaled(base, actor, 1.5)
    assert state.config.r == config.r
    assert all(torch.equal(state.tensors[key], tensor) for key, tensor in plain.tensors.items())


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("rank", [None, 3])
def test_svd_is_the_nearest_adapter_of_its_rank(kind: str, rank: int | None) -> None:
    base, config = make_base(kind)
    names, weights = [add(base, config, seed) for seed in range(2)], [0.5, 0.5]
    found = base.adapters.frozen(combined(base, names, weights, "svd", rank=rank), "candidate")
    expected = {}
    for path, delta in weighted(base, names, weights).items():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        kept = rank or base.network.get_submodule(path).r[names[0]]
        expected[path] = left[..., :kept] * values[..., None, :kept] @ right[..., :kept, :]
    assert_close(deltas(base, found), expected)


@pytest.mark.parametrize("kind", ["llama", "embeddings", "gpt2"])
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_where_peft_is_right_a_combination_is_pefts(kind: str, combination: str) -> None:
    base, config = make_base(kind)
    names, weights = [add(base, config, seed) for seed in range(3)], [0.5, 0.7, 0.4]
    # The `dare` combinations draw numbers, and PEFT draws others before them.
    density = 1.0 if combination.startswith("dare") else 0.6
    state = combined(base, names, weights, combination, density=density)
    model: Any = get_peft_model(CASES[kind][0](vocab_size=99), config, names[0])
    for name in names:
        if name != names[0]:
            model.add_adapter(name, config)
        for path, layer in adapted_layers(base.network, name).items():
            own = model.base_model.model.get_submodule(path)
            for kinds in ("lora_A", "lora_B"):
                if name in getattr(own, kinds):
                    getattr(own, kinds)[name].weight.data = getattr(layer, kinds)[name].weight.data
            for kinds in ("lora_embedding_A", "lora_embedding_B"):
                if name in getattr(own, kinds):
                    getattr(own, kinds)[name].data = getattr(layer, kinds)[name].data
    if combination.endswith("ties"):
        weights = [len(names) * weight for weight in weights]
    if combination not in ("cat", "svd"):
        weights = [weight**2 for weight in weights]
    model.add_weighted_adapter(names, weights, "new", combination, density=density)
    expected = {
        path: layer.get_delta_weight("new").detach().double()
        for path, layer in adapted_layers(model.base_model.model, "new").items()
    }
    assert_close(deltas(base, base.adapters.frozen(state, "candidate")), expected)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_average_of_equal_adapters_is_that_adapter(kind: str, combination: str) -> None:
    base, config = make_base(kind)
    names = [add(base, config, 0) for _ in range(3)]
    for weights in (None, [0.5, 0.2, 0.3]):
        state = combined(base, names, weights, combination, density=1)
        if weights is None or not combination.endswith("ties"):
            assert_close(deltas(base, base.adapters.frozen(state, "candidate")), deltas(base, names[0]))


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties"])
def test_dare_draws_its_own_numbers_and_keeps_the_mean(combination: str) -> None:
    base, config = make_base("llama")
    name = add(base, config, 0)
    before = torch.random.get_rng_state()
    states = [combined(base, [name], None, combination, density=0.25, seed=seed).tensors for seed in (*range(100), 0)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(states[0][key], tensor) for key, tensor in states[-1].items())
    scaling = base.network.model.layers[0].self_attn.q_proj.scaling[name]
    for key, tensor in base.adapters.export(name).tensors.items():
        drawn = torch.stack([state[key] for state in states[:100]])
        assert (drawn == 0).double().mean() == pytest.approx(0.75, abs=0.03)
        gap = (drawn.mean(dim=0) - scaling**0.5 * tensor).square().mean().sqrt()
        assert gap < 0.3 * (scaling**0.5 * tensor).square().mean().sqrt()


def test_a_bias_of_b_is_summed_with_its_scaling() -> None:
    base, _ = make_base("gpt2")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], lora_bias=True, fan_in_fan_out=True)
    names = [add(base, config, seed) for seed in range(2)]
    found = base.adapters.frozen(combined(base, names, [0.7, -0.2]), "candidate")
    half = base.adapters.frozen(scaled(base, names[0], 0.5), "candidate")
    layer = base.network.transformer.h[0].attn.c_attn

    def bias(name: str) -> Tensor:
        return layer.scaling[name] * layer.lora_B[name].bias

    assert torch.allclose(bias(found), 0.7 * bias(names[0]) - 0.2 * bias(names[1]))
    assert torch.allclose(bias(half), 0.5 * bias(names[0]))


def test_ranks_may_differ_for_cat_and_svd() -> None:
    base, config = make_base("patterns")
    other = LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "k_proj", "down_proj"], use_rslora=True)
    names = [add(base, config, 0), add(base, other, 1)]
    for combination, rank in (("cat", None), ("svd", 20)):
        found = base.adapters.frozen(combined(base, names, [0.5, 0.5], combination, rank=rank), "candidate")
        assert_close(deltas(base, found), weighted(base, names, [0.5, 0.5]))
    assert_close(
        deltas(base, base.adapters.frozen(scaled(base, names[1], 1.5, names[0]), "candidate")),
        weighted(base, names, [-0.5, 1.5]),
    )


def test_members_and_candidates_go_through_the_base_together(gym: Any, make_population: Any) -> None:
    agents = make_population(2, lr=1e-2)
    for agent in agents:
        agent.set_hyperparameters({"lr": 1e-2 * (agent.index + 1)})
        agent.learn(gym.next_batch())
    base, names = agents[0].base, [agent.actor_adapter for agent in agents]
    frozen = [
        base.adapters.frozen(state, "candidate") for state in (combined(base, names), scaled(base, names[0], 1.3))
    ]
    assert base.router.can_route(base.network, [*names, *frozen])


DORA = {"r": 4, "target_modules": ["q_proj"], "use_dora": True}
BIAS = {"r": 4, "target_modules": ["q_proj"], "lora_bias": True}
TIED = {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
PLAIN = {"r": 4, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("configs", "arguments", "message"),
    [
        ([DORA, DORA], {}, "use_dora.*norm"),
        ([TIED, TIED], {}, "ensure_weight_tying"),
        ([PLAIN, {"r": 4, "target_modules": ["v_proj"]}], {}, "must be on the same layers"),
        ([PLAIN, {"r": 2, "target_modules": ["q_proj"]}], {"combination": "ties"}, r"\[4, 2\].*equal ones"),
        ([BIAS, BIAS], {"combination": "linear"}, "lora_bias.*use 'cat'"),
        ([PLAIN, PLAIN], {"combination": "tyes"}, "must be one of cat, svd.*mean 'ties'"),
        ([PLAIN, PLAIN], {"weights": [1.0]}, "one for each of the adapters"),
        ([], {}, "at least one"),
        ([PLAIN, PLAIN], {"weights": [1.0, float("nan")]}, r"weights\[1\]"),
        ([PLAIN, PLAIN], {"weights": [1.5, -0.5], "combination": "linear"}, "must not be negative"),
        ([PLAIN, PLAIN], {"density": 0.0}, "density"),
        ([PLAIN, PLAIN], {"rank": 0}, "rank"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    configs: list[dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    base, _ = make_base("llama")
    names = [add(base, LoraConfig(**config), seed) for seed, config in enumerate(configs)]
    before = base.adapters.names
    with pytest.raises(ConfigurationError, match=message):
        combined(base, names, **arguments)
    assert base.adapters.names == before


def test_what_cannot_be_scaled_is_refused() -> None:
    base, _ = make_base("llama")
    dora, plain = add(base, LoraConfig(**DORA), 0), add(base, LoraConfig(**PLAIN), 0)
    for arguments, message in (
        ((dora, 1.5), "use_dora"),
        ((plain, float("inf")), "factor"),
        (("actor-77", 1.5), "is not an adapter of this base"),
        ((plain, 1.5, dora), "use_dora"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            scaled(base, *arguments)
