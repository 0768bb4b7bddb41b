"""The count of floating-point operations, by hand and against torch's own counter."""

from __future__ import annotations

import numpy as np
import pytest
from families import make_family
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from evollm import DPO, SFT
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch, Completion, Sample
from evollm.models.engine import Engine, Item

pytestmark = pytest.mark.usefixtures("every_probe")


def make_batch() -> Batch:
    """Two pairs of 8 + 5 + 3 tokens, of which one chosen token is not scored."""
    rng = np.random.default_rng(0)
    first, second = (Sample.of(*(rng.integers(3, 90, size=size) for size in (8, 5, 3))) for _ in range(2))
    mask = np.array([True, True, False, True, True])
    return Batch([first, Sample(second.prompt_ids, (Completion(second.chosen_ids, mask), second.completions[1]))])


def test_a_step_costs_what_is_counted_by_hand(make_agent) -> None:
    agent, batch = make_agent(), make_batch()
    # A Llama of width 32: q and o 32 x 32, k and v 16 x 32, gate, up and down 48 x 32, in each of two layers.
    layers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    # Rank 4 on q (32 -> 32), v (32 -> 16) and down (48 -> 32).
    adapter = 2 * 4 * (32 + 32 + 32 + 16 + 48 + 32)
    head = 32 * agent.base.network.config.vocab_size
    tokens, scored = 2 * (8 + 5 + 3), 2 * (5 + 3) - 1
    agent.learn(batch)
    found = agent.base.flops.take()
    assert found.pop("probe") > 0
    assert found == {
        "references": tokens * (2 * layers + 2 * adapter) + 2 * head * scored,
        "training": tokens * (4 * layers + 6 * adapter) + 4 * head * scored,
    }
    agent.learn(batch)
    assert agent.base.flops.take() == {"training": found["training"]}, "references are known, the probe has been made"


def test_members_are_counted_each_and_their_common_reference_once(make_population) -> None:
    counts = []
    for size in (1, 3):
        agents = make_population(size)
        learn_together(agents, make_batch())
        counts.append(agents[0].base.flops.take())
    alone, together = counts
    assert together == {**alone, "training": 3 * alone["training"]}


WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS = {
    "llama": (lambda: LlamaConfig(vocab_size=128, num_key_value_heads=2, **WIDE), 0.1),
    "gpt2": (lambda: GPT2Config(vocab_size=128, n_embd=128, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2), 0.06),
}


@pytest.mark.parametrize("family", MODELS)
def test_the_count_is_that_of_torch_but_for_half_of_lora_and_the_first_layer(family) -> None:
    """Torch does not count the scores of packed attention, nor the products of routed LoRA that are added in place, and
    knows that no gradient leaves the first layer. Without LoRA and backward pass both counts are equal."""
    make, tolerance = MODELS[family]
    model = AutoModelForCausalLM.from_config(make()).float()
    agent = DPO(actor_network=model, lora_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    batch, engine = make_batch(), Engine.of(agent.base)
    agent.learn(batch)
    passes = {
        "training": (tolerance, lambda: agent.learn(batch)),
        "evaluation": (tolerance, lambda: engine.logprobs([Item(agent.actor_adapter, batch)], agent.pass_options)),
        "references": (0, lambda: engine.logprobs([Item(None, batch)], agent.pass_options, "references")),
    }
    for kind, (most, run) in passes.items():
        agent.base.flops.take()
        with FlopCounterMode(display=False) as counter:
            run()
        assert agent.base.flops.take() == {kind: pytest.approx(counter.get_total_flops(), rel=most)}


def test_prompts_pass_the_encoder_and_completions_the_decoder() -> None:
    agent = DPO(
        actor_network=make_family("t5").float(),
        lora_config=LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"),
    )
    # In each of two layers: q, k, v and o 32 x 32, wi and wo 48 x 32; the decoder attends twice, and q has an adapter.
    encoder, decoder = 2 * (4 * 32 * 32 + 2 * 48 * 32), 2 * (8 * 32 * 32 + 2 * 48 * 32)
    prompts, completions, scored = 2 * 8, 2 * (5 + 3), 2 * (5 + 3) - 1
    head = 32 * agent.base.network.config.vocab_size
    found = agent.base.flops.of(make_batch(), agent.actor_adapter)
    by_prompts, by_completions = encoder + 2 * 2 * 64, decoder + 2 * 2 * 2 * 64
    assert found == 2 * (prompts * by_prompts + completions * by_completions + head * scored)


def test_a_token_passes_the_experts_that_it_is_sent_to() -> None:
    found = []
    for experts in (2, 4):
        config = MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=experts, **WIDE)
        agent = SFT(actor_network=AutoModelForCausalLM.from_config(config).float())
        found.append(agent.base.flops.of(make_batch(), None))
    # Two of them each time; the router itself is left out.
    assert found[0] == found[1]
    attention, expert = 2 * 128 * 128 + 2 * 64 * 128, 3 * 256 * 128
    assert found[0] == 2 * (32 * 4 * (attention + 2 * expert) + 128 * 96 * 15)
