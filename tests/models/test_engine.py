"""The fast paths compute what the plain one computes: two padded sequences a pair, one member after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from documented import as_documented
from families import FAMILIES, make_family
from members import EXACT, MIXED, SHAPES, backward, make_agents, make_batch
from peft import LoraConfig
from snapshots import states_of
from torch import Tensor

from evollm import DPO
from evollm.algorithms.dpo_step import learn_together, logratios_together
from evollm.data.samples import Batch
from evollm.models import attention, readings
from evollm.models.adapters.stack import Stack
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fast_paths import FastPaths
from evollm.models.layouts import layout_for
from evollm.models.layouts import packed as packing


def only_plain(agent: DPO) -> None:
    """Let the base of this agent take no fast path from now on."""
    Engine.of(agent.base).prepare = lambda members, length: FastPaths(False, False, False, length)  # type: ignore


def state_of(agent: DPO) -> list[Tensor]:
    """Weights and moments."""
    moments = [state[key] for state in states_of(agent) for key in ("exp_avg", "exp_avg_sq")]
    return [p.detach() for p in agent.actor_parameters()] + moments


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("members", [MIXED, MIXED[:1]], ids=["four", "one"])
def test_stacked_members_learn_as_they_do_one_after_the_other(members, gradient_checkpointing: bool) -> None:
    """Five steps in float64, mixed ranks, alphas and hyperparameters; the second run takes no fast path at all."""
    results = []
    for plain in (False, True):
        agents = make_agents(make_family("llama"), members, gradient_checkpointing=gradient_checkpointing)
        if plain:
            only_plain(agents[0])
        metrics = [learn_together(agents, make_batch(seed)) for seed in range(5)]
        results.append((metrics, [state_of(agent) for agent in agents]))
    (fast_metrics, fast_states), (plain_metrics, plain_states) = results
    for fast, plain_ones in zip(fast_metrics, plain_metrics, strict=True):
        for found, expected in zip(fast, plain_ones, strict=True):
            assert found == pytest.approx(expected, rel=0, abs=1e-10)
    torch.testing.assert_close(fast_states, plain_states, **EXACT)


def test_stacked_gradients_are_the_members_own() -> None:
    gradients = []
    for plain in (False, True):
        agents = make_agents(make_family("llama"))
        if plain:
            only_plain(agents[0])
        gradients.append(backward(agents, make_batch()))
    torch.testing.assert_close(gradients[0], gradients[1], **EXACT)
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in gradients[0])


def test_members_share_the_pass_and_a_nan_stays_with_its_own() -> None:
    """The others are bit for bit those of the same pass with a healthy member in that place."""
    states = []
    for broken in (False, True):
        agents = make_agents(make_family("llama"))
        assert Engine.of(agents[0].base).prepare([a.actor_adapter for a in agents], 30).stacking
        learn_together(agents, make_batch(0))
        if broken:
            with torch.no_grad():
                agents[2].actor_parameters()[0].fill_(float("nan"))
        learn_together(agents, make_batch(1))
        assert [agent.diverged for agent in agents] == [False, False, broken, False]
        states.append([state_of(agent) for agent in agents if agent.index != 2])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_a_member_that_was_never_there_changes_nothing() -> None:
    states = []
    for numbers in ([0, 1, 2, 3], [0, 1, 3]):
        agents = make_agents(make_family("llama"))
        agents = [agents[number] for number in numbers]
        for seed in range(3):
            learn_together(agents, make_batch(seed))
        states.append([state_of(agent) for agent in agents if agent.index != 2])
    torch.testing.assert_close(states[0], states[1], **EXACT)


@pytest.fixture(scope="module")
def agents_and_gradients() -> tuple[list[DPO], list[Tensor]]:
    agents = make_agents(make_family("llama"))
    return agents, backward(agents, make_batch())


@pytest.mark.parametrize("token_budget", [1, 20, 40, 100, 10_000])
@pytest.mark.parametrize("max_pairs", [None, 1, 2])
def test_any_token_budget_gives_the_same_result(agents_and_gradients, token_budget: int, max_pairs: int | None) -> None:
    agents, expected = agents_and_gradients
    for parameter in (p for agent in agents for p in agent.actor_parameters()):
        parameter.grad = None
    found = backward(agents, make_batch(), PassOptions(token_budget=token_budget, max_pairs=max_pairs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def starts_at_first_adapter(base: Any, paths: FastPaths, batch: Batch, names: Sequence[str]) -> bool:
    laid = layout_for(base, paths).lay_out(batch, names)
    return isinstance(laid, packing.LaidOutPacked) and laid.can_stack


def test_no_pass_has_more_tokens_than_the_budget(monkeypatch) -> None:
    sizes = []
    original = packing.PackedSamples.of.__func__

    def record(cls: type, batch: Batch, device: torch.device) -> packing.PackedSamples:
        sizes.append(int(batch.num_tokens.sum()))
        return original(cls, batch, device)

    agents = make_agents(make_family("llama"))
    engine, names, batch = Engine.of(agents[0].base), [a.actor_adapter for a in agents], make_batch()
    engine.prepare(names, batch.longest_sequence)
    monkeypatch.setattr(packing.PackedSamples, "of", classmethod(record))
    engine.logprobs(Item.on(batch, names), PassOptions(token_budget=30))
    assert sum(sizes) == batch.num_tokens.sum()
    assert max(sizes) <= 30


TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "openai-gpt": ["c_attn", "c_proj"],
    "gpt-neox": ["query_key_value", "dense_4h_to_h"],
    "t5": "all-linear",
    "mt5": ["q", "v", "wo"],
    "bart": ["q_proj", "v_proj", "fc2"],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_log_probs_and_gradients_of_two_plain_sequences(family: str) -> None:
    # Two of them have no rejected side, as examples for SFT.
    results, batch = [], make_batch(shapes=[*SHAPES, (4, 9, 0), (6, 1, 0)])
    for plain in (False, True):
        agents = make_agents(make_family(family), targets=TARGETS.get(family), gradient_checkpointing=False)
        engine, names = Engine.of(agents[0].base), [agent.actor_adapter for agent in agents]
        if plain:
            only_plain(agents[0])
        else:
            paths = engine.prepare(names, batch.longest_sequence)
            assert as_documented(
                family,
                prompt_once=paths.shared_prompt,
                tiled_head=paths.tiled_head,
                members_together=paths.stacking,
                lower_layers_once=starts_at_first_adapter(agents[0].base, paths, batch, names),
            ), paths.reasons
        logprobs = engine.logprobs(Item.on(batch, [*names, None]), PassOptions())
        results.append(([(found.chosen, found.rejected) for found in logprobs], backward(agents, batch)))
    exact = EXACT if agents[0].base.network.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(results[0], results[1], **exact)


def test_a_base_that_cannot_share_prompts_is_said_to_be_one_once() -> None:
    agents = make_agents(make_family("openai-gpt"), targets=["c_attn"], gradient_checkpointing=False)
    with pytest.warns(UserWarning, match="chosen and rejected side do not share their prompt"):
        learn_together(agents, make_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_together(agents, make_batch())


@pytest.mark.parametrize(
    ("breakage", "lost"),
    [("positions", "shared_prompt"), ("leak", "shared_prompt"), ("routes", "stacking"), ("head", "tiled_head")],
)
def test_a_path_that_is_wrong_is_not_taken(monkeypatch, breakage: str, lost: str) -> None:
    """Each fast path made wrong in turn: the probe has to see it, and the results stay right."""
    batch, expected = make_batch(), None
    agents = make_agents(make_family("llama"))
    only_plain(agents[0])
    expected = [torch.stack(ratios) for ratios in logratios_together(agents, batch)]

    agents = make_agents(make_family("llama"))
    break_path(monkeypatch, breakage)
    with pytest.warns(UserWarning, match="off by"):
        paths = Engine.of(agents[0].base).prepare([a.actor_adapter for a in agents], batch.longest_sequence)
    assert not getattr(paths, lost)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [torch.stack(ratios) for ratios in logratios_together(agents, batch)]
    torch.testing.assert_close(found, expected, **EXACT)


def break_path(monkeypatch: pytest.MonkeyPatch, breakage: str) -> None:
    if breakage == "positions":
        original: Callable[..., Any] = packing.PackedSamples.of.__func__

        def shifted(cls: type, batch: Batch, device: torch.device) -> packing.PackedSamples:
            packed = original(cls, batch, device)
            packed.position_ids[0, -batch.rejected_lengths[-1] :] += 1
            return packed

        monkeypatch.setattr(packing.PackedSamples, "of", classmethod(shifted))
    elif breakage == "leak":
        mask = attention.PackedSequences.mask

        def leaking(self: attention.PackedSequences, queries: int, keys: int, window: int | None) -> Tensor | None:
            found = mask(self, queries, keys, window)
            return None if found is None else torch.ones_like(found)

        monkeypatch.setattr(attention.PackedSequences, "mask", leaking)
    elif breakage == "routes":
        own = Stack.weights
        monkeypatch.setattr(Stack, "weights", lambda *args: tuple(weights.flip(0) for weights in own(*args)))
    else:
        monkeypatch.setattr(readings, "token_logprobs", lambda *args: -args[0].pow(2).sum(dim=1))


def test_a_probe_vouches_for_no_longer_pair_than_it_tried() -> None:
    agent = make_agents(make_family("llama"), MIXED[:1])[0]
    engine = Engine.of(agent.base)
    assert engine.prepare([agent.actor_adapter], 40).shared_prompt
    (known,) = engine.paths.values()
    assert known.longest == 64
    engine.prepare([agent.actor_adapter], 65)
    # A shorter one is not judged by what came before.
    engine.prepare([agent.actor_adapter], 50)
    assert [known.longest for known in engine.paths.values()] == [64, 128]


def test_a_probe_leaves_nothing_behind() -> None:
    agent = make_agents(make_family("llama"), MIXED[:1])[0]
    before = agent.base.adapters.names
    Engine.of(agent.base).prepare([agent.actor_adapter], 40)
    assert agent.base.adapters.names == before
    assert agent.base.adapters.active == agent.actor_adapter


@pytest.mark.parametrize("variant", [{"use_dora": True}, {"lora_bias": True}])
def test_other_variants_of_lora_go_one_by_one_and_are_right(variant: dict[str, bool]) -> None:
    results, batch = [], make_batch()
    for plain in (False, True):
        model = make_family("llama")
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **variant)
        agents = [DPO(actor_network=model, lora_config=lora, index=index, lr=1e-2) for index in range(3)]
        if plain:
            only_plain(agents[0])
            learn_together(agents, batch)
        else:
            with pytest.warns(UserWarning, match="members go one by one"):
                learn_together(agents, batch)
        results.append([state_of(agent) for agent in agents])
    torch.testing.assert_close(results[0], results[1], **EXACT)


def test_members_on_other_modules_share_a_pass() -> None:
    results, batch = [], make_batch()
    for plain in (False, True):
        model = make_family("llama")
        agents = [
            make_agents(model, MIXED[:1], targets=["q_proj"])[0],
            make_agents(model, MIXED[1:2], targets=["up_proj", "q_proj"])[0],
        ]
        if plain:
            only_plain(agents[0])
        results.append(backward(agents, batch))
    torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_members_with_adapters_on_the_embeddings_do_not_share_them() -> None:
    """Nothing in front of the layers is the same for all members then."""
    results, batch = [], make_batch()
    for plain in (False, True):
        agents = make_agents(make_family("llama"), targets=["embed_tokens", "q_proj"], gradient_checkpointing=False)
        if plain:
            only_plain(agents[0])
        ratios = [torch.stack(found) for found in logratios_together(agents, batch)]
        results.append((ratios, backward(agents, batch)))
    torch.testing.assert_close(results[0], results[1], **EXACT)


def test_layers_below_the_first_adapter_run_once_for_all_members() -> None:
    calls = [0, 0]
    results = []
    for plain in (False, True):
        model = make_family("llama")
        lora = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
        agents = [DPO(actor_network=model, lora_config=lora, index=index, seed=index) for index in range(4)]
        engine, names = Engine.of(agents[0].base), [agent.actor_adapter for agent in agents]
        batch = make_batch()
        if plain:
            only_plain(agents[0])
        engine.prepare(names, batch.longest_sequence)
        calls[:] = [0, 0]
        hooks = [
            layer.mlp.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
            for number, layer in enumerate(model.model.layers)
        ]
        # Two members in a pass, so two passes.
        options = PassOptions(token_budget=2 * int(batch.num_tokens.sum()))
        engine.logprobs(Item.on(batch, names), options)
        if not plain:
            assert calls == [1, 2]
        for hook in hooks:
            hook.remove()
        results.append(backward(agents, batch, options))
    torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_members_share_a_quantised_base(tokenizer, gym, kind: str, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    settings = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    with torch.random.fork_rng():
        # Whether int8 finds outliers, and so parts the rows, depends on the weights.
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(tmp_path)
    quantised = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    gradients, batch = [], gym.next_batch()
    for plain in (False, True):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(**quantised), device_map="cpu", dtype=torch.float32
        )
        agents = make_agents(model, MIXED[:3], gradient_checkpointing=False)
        if plain:
            only_plain(agents[0])
        else:
            paths = Engine.of(agents[0].base).prepare([a.actor_adapter for a in agents], batch.longest_sequence)
            # LLM.int8() treats columns with outliers apart, so that a row depends on the rows beside it.
            assert paths.stacking or kind == "int8"
        gradients.append(backward(agents, batch))
    if kind == "nf4":
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
        return
    # It also rounds what goes into each layer to 8 bits.
    together, plain = (torch.cat([gradient.flatten() for gradient in found]) for found in gradients)
    assert (together - plain).norm() < 0.1 * plain.norm()
