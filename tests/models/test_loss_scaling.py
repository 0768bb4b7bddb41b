"""Gradients through a float16 base are those of its weights in float32, however small or large the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_family
from peft import LoraConfig
from torch import Tensor

from evollm import DPO, SFT
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch, Sample
from evollm.models import loss_scaling
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fast_paths import FastPaths
from evollm.models.logprobs import TokenLogprobs
from evollm.models.loss_scaling import ScaledBackward, scale_exponent

# float16 has eleven digits; some hundred operations lie behind a gradient.
ROUNDING = 0.02
TINY, HUGE = 1e-9, 1e5


SHAPES = [(9, 5, 3), (3, 1, 12), (14, 7, 7), (1, 2, 2), (6, 11, 1)]
TARGETS = {"gpt-neox": ["query_key_value"], "t5": ["q", "wo"], "openai-gpt": ["c_attn"]}


def make_batch(shapes: Sequence[tuple[int, int, int]] = SHAPES) -> Batch:
    rng = np.random.default_rng(0)
    pairs = [Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape if size)) for shape in shapes]
    return Batch(pairs)


def half_agents(dtype: torch.dtype = torch.float16, family: str = "llama", members: int = 2, **settings) -> list[DPO]:
    """Agents on a base with the values of float16, in that type or another."""
    model = make_family(family).half().to(dtype)
    lora = LoraConfig(
        r=4,
        target_modules=TARGETS.get(family, ["q_proj", "v_proj", "down_proj"]),
        # As after some training: without it B is 0, and A gets no gradient.
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return [DPO(actor_network=model, lora_config=lora, index=seed, seed=seed, **settings) for seed in range(members)]


def gradients(agents: Sequence[DPO], weights: Sequence[float], batch: Batch | None = None, **options) -> list[Tensor]:
    """Each member's gradient, as one vector in float64, of a loss that is a sum over pairs under a weight."""

    def loss(members: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        factors = 1.0 + torch.tensor(rows)
        parts = [(factors * (one.chosen - 0.3 * one.rejected)).sum() for one in found.members]
        return torch.stack([weights[member] * part for member, part in zip(members, parts, strict=True)]).sum()

    for agent in agents:
        agent.optimizer.zero_grad(set_to_none=True)
    names = [agent.actor_adapter for agent in agents]
    Engine.of(agents[0].base).backward(Item.on(batch or make_batch(), names), PassOptions(**options), loss)
    return [torch.cat([p.grad.flatten() for p in agent.actor_parameters()]).double() for agent in agents]


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("largest", "exponent"), [(1.0, -1), (0.5, 0), (0.75, 0), (3.0, -2), (2.0**-30, 29), (0.0, 0), (math.inf, 0)]
)
def test_the_largest_comes_to_between_a_half_and_one(largest: float, exponent: int) -> None:
    assert scale_exponent(largest) == exponent
    assert scale_exponent(math.nan) == 0
    assert scale_exponent(1e-45) == loss_scaling._LARGEST_EXPONENT


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "t5", "openai-gpt"])
@pytest.mark.parametrize("options", [{}, {"token_budget": 20}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*(share their prompt|fan_in_fan_out):UserWarning")
def test_gradients_in_float16_are_those_in_float32_whatever_a_members_loss_weighs(
    monkeypatch, family: str, options
) -> None:
    weights = [TINY, HUGE]
    expected = gradients(half_agents(torch.float32, family), weights, **options)
    found = gradients(half_agents(family=family), weights, **options)
    assert [gap(one, other) < ROUNDING for one, other in zip(found, expected, strict=True)] == [True, True]
    monkeypatch.setattr(loss_scaling, "scale_exponent", lambda largest: 0)
    unscaled = gradients(half_agents(family=family), weights, **options)
    assert gap(unscaled[0], expected[0]) > 0.5


def test_a_scale_changes_no_digit() -> None:
    """A loss that is smaller by a power of two has a gradient that is smaller by it, to the bit; passes add up so."""
    agents = half_agents()
    for options in ({}, {"token_budget": 20}):
        one = gradients(agents, [1.0, 1.0], **options)
        other = gradients(agents, [2.0**-40, 2.0**20], **options)
        torch.testing.assert_close(other, [one[0] * 2.0**-40, one[1] * 2.0**20], rtol=0.0, atol=0.0)


def test_passes_add_up_under_scales_of_their_own() -> None:
    """The second pass's gradient is a millionth of the first one's and must not vanish beside another pass's scale."""
    agents, batch = half_agents(members=1), make_batch()

    def of_rows(weights: Sequence[float]) -> Tensor:
        def loss(members: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
            return (torch.tensor([weights[row] for row in rows]) * found.of(0).chosen).sum()

        agents[0].optimizer.zero_grad(set_to_none=True)
        options = PassOptions(max_pairs=1, token_budget=64)
        Engine.of(agents[0].base).backward(Item.on(batch, [agents[0].actor_adapter]), options, loss)
        return torch.cat([p.grad.flatten() for p in agents[0].actor_parameters()]).double()

    small = [1e-9 * (row > 0) for row in range(len(batch))]
    alone = of_rows(small)
    assert float(alone.norm()) > 0
    # The first row's gradient, of either sign, drops out of the mean; float32 rounds what is left of the sum.
    with_first = [(of_rows([sign, *small[1:]])) for sign in (1e-6, -1e-6)]
    assert gap((with_first[0] + with_first[1]) / 2, alone) < 1e-3


def test_a_small_beta_learns_in_float16_as_in_float32(monkeypatch) -> None:
    """64 pairs, beta 1e-4: log-probs have gradients of 8e-7, and states of less than float16 has."""
    batch = make_batch(shapes=[(5, 4, 3)] * 64)
    norms = {}
    for name, dtype in (("float32", torch.float32), ("scaled", torch.float16), ("unscaled", torch.float16)):
        if name == "unscaled":
            monkeypatch.setattr(loss_scaling, "scale_exponent", lambda largest: 0)
        agents = half_agents(dtype, beta=1e-4, nll_alpha=0.0, batch_size=64)
        norms[name] = [metrics["grad_norm"] for metrics in learn_together(agents, batch)]
    assert norms["scaled"] == pytest.approx(norms["float32"], rel=ROUNDING)
    assert norms["unscaled"] != pytest.approx(norms["float32"], rel=0.2)


def test_a_gradient_that_exceeds_float16_is_computed_again_under_a_smaller_scale(monkeypatch) -> None:
    """Only the member's whose gradient it is; the other's is what it was."""
    attempts, plain, batch = [], ScaledBackward.attempt, make_batch([(9, 5, 3)] * 40)

    def attempt(*args) -> bool:
        attempts.append(plain(*args))
        return attempts[-1]

    monkeypatch.setattr(ScaledBackward, "attempt", attempt)
    results = []
    for dtype, large in ((torch.float32, True), (torch.float16, True), (torch.float16, False)):
        agents = half_agents(dtype)
        with torch.no_grad():
            for name, parameter in agents[1].base.adapters.parameters(agents[1].actor_adapter).items():
                # The product stays, and so do the outputs; what B gets is multiplied by what A gives.
                parameter.mul_(2.0 ** (14 if "lora_A" in name else -14) if large else 1.0)
        results.append(gradients(agents, [1.0, 1.5], batch, token_budget=2048))
    assert attempts == [True, False, False]
    expected, found, other = results
    # B is so small here that it is denormal in float16.
    assert gap(found[1], expected[1]) < 2 * ROUNDING
    assert torch.equal(found[0], other[0])


def test_what_no_scale_helps_is_noticed_as_divergence(monkeypatch) -> None:
    agents, attempts, plain = half_agents(lr=1e-3), [], ScaledBackward.attempt
    monkeypatch.setattr(ScaledBackward, "attempt", lambda *args: attempts.append(1) or plain(*args))
    with torch.no_grad():
        for parameter in agents[1].actor_parameters():
            parameter.fill_(torch.nan)
    before = [p.detach().clone() for p in agents[0].actor_parameters()]
    metrics = learn_together(agents, make_batch())
    assert [agent.diverged for agent in agents] == [False, True]
    assert math.isfinite(metrics[0]["grad_norm"])
    assert not math.isfinite(metrics[1]["grad_norm"])
    assert any(not torch.equal(p, q) for p, q in zip(agents[0].actor_parameters(), before, strict=True))
    # Of log-probs that are NaN: no other scale was tried.
    assert attempts == [1]


def test_what_exceeds_float16_under_every_scale_is_handed_on(monkeypatch) -> None:
    agents, attempts, plain = half_agents(members=1), [], ScaledBackward.attempt
    monkeypatch.setattr(ScaledBackward, "attempt", lambda *args: attempts.append(1) or plain(*args))
    monkeypatch.setattr(loss_scaling, "_all_finite", lambda gradients: False)
    gradients(agents, [1.0])
    assert len(attempts) == 1 + loss_scaling._STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_bases_are_left_alone(monkeypatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(ScaledBackward, "attempt", None)
    agents = half_agents(dtype)
    assert all(float(one.norm()) > 0 for one in gradients(agents, [1.0, 1.0]))


@pytest.mark.parametrize("alone", [False, True])
def test_examples_learn_in_float16(alone: bool) -> None:
    """Their rejected sides depend on nothing, and of sequences that go by themselves they need no gradient."""
    batch = make_batch(shapes=[(4, 5, 0), (2, 3, 0)])
    losses = []
    agent = SFT(actor_network=make_family("llama").half(), lr=1e-2)
    if alone:
        paths = FastPaths(False, False, False, 64, explicit_positions=False, implicit_positions=False)
        Engine.of(agent.base).prepare = lambda members, length: paths  # type: ignore
    for _ in range(4):
        losses.append(agent.learn(batch)["loss"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
