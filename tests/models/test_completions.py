"""Samples with any number of completions: the prompt once, and each completion as if it were the only one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from families import make_family
from peft import LoraConfig
from torch import Tensor

from evollm import DPO, DataError
from evollm.data import Batch, Sample
from evollm.models import ReferenceCache
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.fast_paths import FastPaths
from evollm.models.layouts import layout_for, lone_layout
from evollm.models.layouts.layout import Layout
from evollm.models.logprobs import CompletionSums, TokenLogprobs, pieces_of

VOCABULARY = 160
THREE = [(6, 5, 3, 4), (2, 1, 7, 2), (9, 4, 4, 8)]
UNEVEN = [(6, 5, 3, 4), (2, 7), (9, 4, 4), (3, 2, 5, 1, 6)]


def make_batch(shapes: Sequence[tuple[int, ...]], seed: int = 0) -> Batch:
    """Each with a token that is not scored, where a completion has several."""
    rng, samples = np.random.default_rng(seed), []
    for shape in shapes:
        sample = Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape))
        masks = [np.arange(size) != 1 for size in shape[1:]]
        samples.append(sample.with_mask(np.concatenate(masks)))
    return Batch(samples)


def make_agents(family: str) -> list[DPO]:
    targets = ["q", "v"] if family == "t5" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = make_family(family)
    return [DPO(actor_network=model, lora_config=lora, index=seed, seed=seed) for seed in range(2)]


def by_layout(agent: DPO, layout: Layout, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """The log-probs of tokens in the order of places, and the gradient of a loss in which each weighs differently."""
    laid = layout.lay_out(batch, [agent.actor_adapter])
    with agent.base.active(agent.actor_adapter) as network, laid.passing(1):
        found = TokenLogprobs(laid.read(network, 1), laid.pieces)
        tokens = found.values[0, found.index_of(pieces_of(batch))]
        loss = (tokens * torch.arange(1, len(tokens) + 1)).sum()
        gradients = torch.autograd.grad(loss, agent.actor_parameters())
    return [tokens.detach()], list(gradients)


@pytest.mark.parametrize("shapes", [THREE, UNEVEN, [(4, 6), (3, 2)]], ids=["three", "uneven", "one"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_any_number_of_completions_has_the_log_probs_of_lone_sequences(family: str, shapes: list) -> None:
    (agent, _), batch = make_agents(family), make_batch(shapes)
    base = agent.base
    expected = by_layout(agent, lone_layout(base), batch)
    for paths in (FastPaths(), FastPaths(tiled_head=False), FastPaths(False), FastPaths(False, False)):
        if paths.tiled_head and family == "gemma2":
            continue  # Its logits have a soft cap.
        found = by_layout(agent, layout_for(base, paths), batch)
        # gemma2 computes its attention's softmax in float32.
        bounds = {"rtol": 1e-3, "atol": 1e-5} if family == "gemma2" else {"rtol": 1e-8, "atol": 1e-9}
        torch.testing.assert_close(found, expected, **bounds)


def test_a_prompt_with_three_completions_is_packed_once() -> None:
    (agent, _), batch = make_agents("llama"), make_batch(THREE)
    assert layout_for(agent.base, FastPaths()).lay_out(batch, []).num_tokens == sum(map(sum, THREE))


def test_the_engine_sums_each_completion_and_no_budget_changes_them() -> None:
    agents, batch = make_agents("llama"), make_batch(UNEVEN)
    engine, items = Engine.of(agents[0].base), Item.on(batch, [agent.actor_adapter for agent in agents])
    expected = engine.logprobs(items, PassOptions())
    for member in expected:
        sums = member.sums(up_to_shorter=True)
        assert len(sums.columns) == 4
        assert [column[1].item() for column in sums.columns[1:]] == [0.0] * 3
        tokens_of = member.values.split([piece.length for piece in member.pieces])
        for (row, place, _), tokens in zip(member.pieces, tokens_of, strict=True):
            shortest = min(batch[row].num_scored)
            torch.testing.assert_close(sums.columns[place][row], tokens.sum(), rtol=0, atol=1e-12)
            torch.testing.assert_close(sums.up_to_shorter[place][row], tokens[:shortest].sum(), rtol=0, atol=1e-12)
    for options in (PassOptions(token_budget=1), PassOptions(max_pairs=2)):
        for found, wanted in zip(engine.logprobs(items, options), expected, strict=True):
            torch.testing.assert_close(found.values, wanted.values, rtol=0, atol=1e-10)


def test_members_may_have_different_batches() -> None:
    """Each learns what it learns with its batch alone, though they share passes."""
    agents = make_agents("llama")
    names, batches = [agent.actor_adapter for agent in agents], [make_batch(THREE), make_batch(UNEVEN, seed=1)]
    engine = Engine.of(agents[0].base)

    def loss(items: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        weights = 1.0 + torch.tensor(rows)
        parts = [(1 + item) * (weights * m.chosen).sum() for item, m in zip(items, found.members, strict=True)]
        return torch.stack(parts).sum()

    def learnt(items: list[Item], numbers: list[int]) -> list[Tensor]:
        for agent in agents:
            agent.optimizer.zero_grad(set_to_none=True)
        found = engine.backward(items, PassOptions(), lambda given, *rest: loss([numbers[n] for n in given], *rest))
        gradients = [p.grad for n in numbers for p in agents[n].actor_parameters()]
        return [*(member.values for member in found), *gradients]

    items = [Item(*of) for of in zip(names, batches, strict=True)]
    together, alone = learnt(items, [0, 1]), [learnt([item], [number]) for number, item in enumerate(items)]
    expected = [*alone[0][:1], *alone[1][:1], *alone[0][1:], *alone[1][1:]]
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-10)


def test_references_of_samples_with_other_numbers_of_completions_share_a_file(tmp_path) -> None:
    batch, cache, again = make_batch(UNEVEN), ReferenceCache(), ReferenceCache()

    def compute(missing: Batch, numbers: Sequence[int]) -> list[CompletionSums]:
        columns = [torch.arange(len(missing)) + 10.0 * place for place in range(4)]
        counts = torch.tensor([len(sample.completions) for sample in missing])
        return [CompletionSums(tuple(column * (counts > place) for place, column in enumerate(columns)))] * len(numbers)

    (expected,) = cache.get(["a"], batch, compute)
    assert expected.columns[3].tolist() == [0.0, 0.0, 0.0, 33.0]
    cache.save(tmp_path / "kept")
    again.load(tmp_path / "kept")
    (found,) = again.get(["a"], batch, compute=lambda *_: pytest.fail("they are known"))
    assert [column.tolist() for column in found.columns] == [column.tolist() for column in expected.columns]
    (alone,) = again.get(["a"], batch.select([1]), compute=lambda *_: pytest.fail("they are known"))
    assert [column.tolist() for column in alone.columns] == [[1.0]]


def test_samples_of_which_one_goes_on_are_not_the_same() -> None:
    ids = [np.arange(size) for size in (3, 2, 4, 5)]
    keys = {Sample.of(*ids[:count]).key for count in (2, 3, 4)} | {Sample.of(*ids[:2], ids[3]).key}
    assert len(keys) == 4


@pytest.mark.parametrize("sizes", [(0, 3), (0,), (3, 0), (3, 2, 0)])
def test_a_sample_without_a_prompt_or_with_an_empty_completion_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="at least one token"):
        Sample.of(*map(np.arange, sizes))
