"""Sampled answers have the model's distribution, and depend on their own key alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from evollm import DPO
from evollm.models.generation import Question, answers_to, greedy_answers, text_of_answer
from evollm.models.sampling import chosen_tokens, uniform_numbers
from evollm.models.shared_base import SharedBase

LIMIT = 8


@pytest.fixture
def base(make_model) -> SharedBase:
    """A base with three members of two ranks that answer differently, and that ends answers now and then."""
    model = make_model(dtype=torch.float64)
    agents = [
        DPO(actor_network=model, index=index, lora_config=LoraConfig(r=rank))
        for index, rank in ((0, 4), (1, 8), (2, 8))
    ]
    generator = torch.Generator().manual_seed(1)
    for agent in agents:
        for parameter in agent.actor_parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = list(range(0, model.config.vocab_size, 9))
    base = agents[0].base
    # The agents must live as long as their adapters are used.
    base.agents = agents  # type: ignore[attr-defined]
    return base


def members(base: SharedBase) -> list[str]:
    return [agent.actor_adapter for agent in base.agents]  # type: ignore[attr-defined]


def prompts_of(base: SharedBase) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, base.num_embeddings, size=size) for size in (3, 5, 3)]


def asked_of(base: SharedBase) -> list[Question]:
    """Questions of the base and all members: greedy ones and two samples of each prompt."""
    return [
        Question(adapter, prompt, temperature, (7, row, sample))
        for adapter in [None, *members(base)]
        for row, prompt in enumerate(prompts_of(base))
        for sample, temperature in enumerate((0.0, 0.7, 1.5))
    ]


def same(mine: Any, theirs: Any) -> bool:
    return mine.ids.tolist() == theirs.ids.tolist() and mine.ended == theirs.ended


def test_an_answer_is_the_same_alone_among_others_and_in_another_order(base, tokenizer) -> None:
    asked = asked_of(base)
    together = answers_to(base, asked, tokenizer, LIMIT)
    alone = [answers_to(base, [question], tokenizer, LIMIT)[0] for question in asked[::3] + asked[1::3]]
    assert all(map(same, together[::3] + together[1::3], alone))
    order = random.Random(0).sample(range(len(asked)), len(asked))
    shuffled = answers_to(base, [asked[place] for place in order], tokenizer, LIMIT)
    assert all(same(together[place], answer) for place, answer in zip(order, shuffled, strict=True))
    # Members need not be asked the same, nor equally often.
    some = [question for number, question in enumerate(asked) if number % 5 in (0, 3)]
    expected = [answer for number, answer in enumerate(together) if number % 5 in (0, 3)]
    assert all(map(same, answers_to(base, some, tokenizer, LIMIT), expected))
    # The same key has the same numbers under another member; others differ, and so do temperatures.
    assert len({tuple(answer.ids) for answer in together}) > len(asked) * 0.8


def test_greedy_answers_are_unaffected_by_sampled_ones_in_the_same_call(base, tokenizer) -> None:
    greedy = [one for one in asked_of(base) if one.temperature == 0]
    adapters, prompts = [None, *members(base)], prompts_of(base)
    mixed = answers_to(base, asked_of(base), tokenizer, LIMIT)[::3]
    expected = [text for texts in greedy_answers(base, adapters, prompts, tokenizer, LIMIT) for text in texts]
    assert [text_of_answer(answer, tokenizer) for answer in mixed] == expected
    assert all(map(same, answers_to(base, greedy, tokenizer, LIMIT), mixed))


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_first_tokens_have_the_probabilities_of_the_softmax(base, tokenizer, top_p: float) -> None:
    adapter, prompt, temperature, count = members(base)[1], prompts_of(base)[0], 2.0, 4000
    asked = [Question(adapter, prompt, temperature, (number,)) for number in range(count)]
    found = np.array([answer.ids[0] for answer in answers_to(base, asked, tokenizer, 1, top_p=top_p)])
    with base.active(adapter) as network, torch.no_grad():
        logits = network(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].double()
    probabilities = (logits / temperature).softmax(-1).numpy()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
        assert len(kept) > 3
        assert set(found) <= set(kept.tolist())
        probabilities = np.where(np.isin(np.arange(len(probabilities)), kept), probabilities, 0)
        probabilities /= probabilities.sum()
    shares = np.bincount(found, minlength=len(probabilities)) / count
    errors = np.sqrt(probabilities * (1 - probabilities) / count)
    assert np.abs(shares - probabilities).max() < 0.04
    assert (np.abs(shares - probabilities) <= 5 * errors + 1 / count).all()


def test_numbers_depend_on_every_part_of_a_key_and_not_on_how_many_are_drawn() -> None:
    keys = [(), (0,), (0, 0), (1,), (1, 0), (0, 1), (2**32,), (2**64 - 1,), (2**32 - 1, 2**32 - 1)]
    assert len({tuple(uniform_numbers(key, 3)) for key in keys}) == len(keys)
    assert uniform_numbers((3, 4), 5).tolist() == uniform_numbers((3, 4), 50)[:5].tolist()


def test_the_extreme_numbers_choose_tokens_that_can_be_chosen() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]]).repeat(2, 1)
    numbers = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert chosen_tokens(scores, numbers, torch.ones(2).double(), 1.0).tolist() == [1, 2]
    assert chosen_tokens(scores, numbers, torch.ones(2).double(), 1e-9).tolist() == [2, 2]


def test_sampling_leaves_the_global_generators_alone(base, tokenizer) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    answers_to(base, asked_of(base), tokenizer, 3)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_answers_end_at_tokens_strings_and_the_limit(base, tokenizer) -> None:
    asked = [one for one in asked_of(base) if one.temperature]
    ends = {*base.network.generation_config.eos_token_id, tokenizer.eos_token_id}
    found = answers_to(base, asked, tokenizer, LIMIT)
    for answer in found:
        assert answer.ended == (answer.ids[-1] in ends)
        assert answer.ended or len(answer.ids) == LIMIT
        assert not ends & {*answer.ids[:-1].tolist()}
    assert {answer.ended for answer in found} == {True, False}
    longest = max(found, key=lambda answer: len(answer.ids))
    question = asked[next(number for number, answer in enumerate(found) if answer is longest)]
    string = tokenizer.decode(longest.ids[:3])[1:]
    base.network.generation_config.stop_strings = [string]
    for limit in (3, LIMIT):
        (answer,) = answers_to(base, [question], tokenizer, limit)
        assert answer.ended
        assert len(answer.ids) <= 3
        assert string in tokenizer.decode(answer.ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 3.0},
        {"forced_eos_token_id": 9},
        {"suppress_tokens": [*range(5, 40)]},
        {"min_new_tokens": 6, "no_repeat_ngram_size": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_change_logits_count_for_greedy_answers_alone(base, tokenizer, settings) -> None:
    asked = asked_of(base)
    before = answers_to(base, asked, tokenizer, LIMIT)
    config = base.network.generation_config
    for name, value in settings.items():
        setattr(config, name, value)
    after = answers_to(base, asked, tokenizer, LIMIT)
    is_same = [same(*both) for both in zip(before, after, strict=True)]
    assert all(kept for kept, question in zip(is_same, asked, strict=True) if question.temperature)
    assert not all(kept for kept, question in zip(is_same, asked, strict=True) if not question.temperature)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(("temperature", "top_p"), [(-0.1, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_impossible_settings_are_refused(base, tokenizer, temperature: float, top_p: float) -> None:
    with pytest.raises(ValueError, match="temperature=" if top_p == 1 else "top_p="):
        answers_to(base, [Question(None, prompts_of(base)[0], temperature)], tokenizer, 2, top_p=top_p)
