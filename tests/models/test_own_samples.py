"""Members that have samples of their own share passes, and get what they get one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import VOCABULARY, make_family
from members import EXACT, MIXED, SHAPES, make_agents, make_batch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from evollm import DPO
from evollm.data.samples import Batch
from evollm.models.blocks import shared_passes
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.layouts import packed as packing
from evollm.models.logprobs import TokenLogprobs
from evollm.models.runner import Runner


def own_batches(count: int = 4) -> list[Batch]:
    """Batches of other tokens, lengths and numbers of rows."""
    shapes = [SHAPES, SHAPES[1:], [*SHAPES[:3], (8, 9, 4)], SHAPES[2:]]
    return [make_batch(seed, own) for seed, own in enumerate(shapes[:count])]


def numbers_of(agents: Sequence[DPO], batches: Sequence[Batch], options: PassOptions) -> list[Tensor]:
    """Log-probs of each item, expert loads, and the gradients of a loss that tells all apart."""
    engine = Engine.of(agents[0].base)
    items = [Item(agent.actor_adapter, batch) for agent, batch in zip(agents, batches, strict=True)]

    def loss(numbers: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        weights = torch.tensor(rows) + 1.0
        parts = [
            (weights * (one.chosen - 0.3 * one.rejected)).sum() + (0.0 if one.loads is None else one.loads[:, 1].sum())
            for one in found.members
        ]
        return torch.stack([(number + 1) * part for number, part in zip(numbers, parts, strict=True)]).sum()

    for parameter in (p for agent in agents for p in agent.actor_parameters()):
        parameter.grad = None
    forward = engine.logprobs(items, options)
    trained = engine.backward(items, options, loss)
    loads = [one.loads for one in (*forward, *trained) if one.loads is not None]
    gradients = [p.grad.clone() for agent in agents for p in agent.actor_parameters()]
    return [one.values for one in (*forward, *trained)] + loads + gradients


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of members of the passes."""
    seen: list[int] = []
    original = Runner._pass

    def record(self: Runner, few: Any, numbers: Sequence[int], *others: Any) -> TokenLogprobs:
        seen.append(len(numbers))
        return original(self, few, numbers, *others)

    monkeypatch.setattr(Runner, "_pass", record)
    return seen


def one_after_the_other(agent: DPO) -> None:
    Engine.of(agent.base)._run_own = lambda *others: {}  # type: ignore[method-assign]


def test_they_get_what_they_get_one_after_the_other(passes) -> None:
    """In float64; ranks, alphas, tokens, lengths and numbers of rows differ, and so does every bound of the passes."""
    bounds = [{}, {"token_budget": 60}, {"token_budget": 170, "gradient_checkpointing": True}, {"max_pairs": 2}]
    results, counts = [], []
    for apart in (False, True):
        agents = make_agents(make_family("llama"))
        if apart:
            one_after_the_other(agents[0])
        for bound in bounds:
            passes.clear()
            results.append(numbers_of(agents, own_batches(), PassOptions(temperature=0.7, **bound)))
            counts.append([*passes])
    for together, alone in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(together, alone, **EXACT)
    assert (counts[0], counts[2]) == ([4] * 2, [2] * 4)
    assert (counts[4], counts[6]) == ([1] * 8, [1] * 8)
    assert len(counts[3]) < len(counts[7])


def make_experts() -> MixtralForCausalLM:
    """A small model, in float32 since the experts' kernel takes no float64, with the auxiliary loss of its routers."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.3, initializer_range=0.2)
    return MixtralForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_on_the_head_and_expert_loads_are_the_members_own(passes) -> None:
    """The head is applied to blocks of equally many tokens there; what fills blocks up loads no expert."""
    for make, targets in (
        (lambda: make_family("llama"), ["q_proj", "lm_head"]),
        (make_experts, ["q_proj", "v_proj"]),
    ):
        results = []
        for apart in (False, True):
            agents = make_agents(make(), MIXED[:3], targets, gradient_checkpointing=False)
            if apart:
                one_after_the_other(agents[0])
            passes.clear()
            balancing = agents[0].base.load_balancing
            assert (balancing is None) == ("lm_head" in targets)
            results.append(numbers_of(agents, own_batches(3), PassOptions(balancing=balancing)))
            assert passes == ([1] * 6 if apart else [3, 3])
        exact = EXACT if balancing is None else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(results[0], results[1], **exact)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "targets", "broken"),
    [(lambda: make_family("llama"), None, 3), (make_experts, ["q_proj", "v_proj"], 1)],
)
def test_a_nan_stays_with_its_member(make, targets, broken: int, passes) -> None:
    """The others have the bits that they have beside a healthy member, also one of whom more is filled up."""
    results = []
    for is_broken in (False, True):
        agents = make_agents(make(), targets=targets, gradient_checkpointing=False)
        if is_broken:
            with torch.no_grad():
                agents[broken].actor_parameters()[0].fill_(float("nan"))
        passes.clear()
        found = numbers_of(agents, own_batches(), PassOptions(balancing=agents[0].base.load_balancing))
        assert passes == [4, 4]
        gradients = [torch.cat([p.grad.flatten() for p in agent.actor_parameters()]) for agent in agents]
        # Log-probs and expert loads, of one member after the other each.
        others = found[: -sum(len(agent.actor_parameters()) for agent in agents)]
        by_member = [[*others[number :: len(agents)], gradients[number]] for number in range(len(agents))]
        assert bool(torch.cat([one.flatten() for one in by_member.pop(broken)]).isnan().any()) == is_broken
        results.append(by_member)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_one_adapter_on_several_batches_reads_them_as_one(passes) -> None:
    """As the reference of several members does."""
    agents, batches = make_agents(make_family("llama"), MIXED[:1]), own_batches()
    engine = Engine.of(agents[0].base)
    for adapter in (agents[0].actor_adapter, None):
        passes.clear()
        found = engine.logprobs([Item(adapter, batch) for batch in batches], PassOptions())
        assert passes == [1]
        alone = [engine.logprobs([Item(adapter, batch)], PassOptions())[0] for batch in batches]
        assert [one.pieces for one in found] == [one.pieces for one in alone]
        torch.testing.assert_close([one.values for one in found], [one.values for one in alone], **EXACT)


def test_members_fill_a_pass_up_to_the_budget_and_no_block_is_mostly_filling(monkeypatch) -> None:
    tokens = [50, 50, 40, 60, 50, 10]
    groups = [[[0], [1]], [[2]], [[3], [4]], [[5]]]

    def passes(budget: int) -> list[list[int]]:
        return [[row for block in blocks for row in block.rows] for blocks in shared_passes(groups, tokens, budget)]

    # The second turn: members 0 and 2 do not stand side by side. A block of 10 tokens is not filled up to 60.
    assert passes(1000) == [[0, 2, 3], [5], [1], [4]]
    assert passes(120) == [[0, 2], [3], [5], [1], [4]]
    assert passes(1) == [[0], [2], [3], [5], [1], [4]]

    sizes = []
    original = packing.PackedSamples.of.__func__

    def record(cls: type, *arguments: Any) -> packing.PackedSamples:
        found = original(cls, *arguments)
        sizes.append(found.input_ids.numel())
        return found

    agents = make_agents(make_family("llama"))
    items = [Item(agent.actor_adapter, batch) for agent, batch in zip(agents, own_batches(), strict=True)]
    Engine.of(agents[0].base).prepare([item.adapter for item in items], 30)
    monkeypatch.setattr(packing.PackedSamples, "of", classmethod(record))
    Engine.of(agents[0].base).logprobs(items, PassOptions(token_budget=170))
    assert len(sizes) == 2
    assert max(sizes) <= 170
