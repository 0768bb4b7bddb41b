"""Answers stop where those of `generate` stop."""

from __future__ import annotations

import re
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from evollm import DPO
from evollm.models import generation
from evollm.models.generation import greedy_answers


def says(model: Any, following: dict[int, int], first: int) -> None:
    """Make a model say one token after another."""
    own = model.forward

    def forward(self: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
        output = own(input_ids=input_ids, **inputs)
        output.logits[:, -1] = -50
        output.logits[:, -1, following.get(int(input_ids[0, -1]), first)] = 50
        return output

    model.forward = MethodType(forward, model)


@pytest.fixture
def ids(tokenizer) -> dict[str, int]:
    return {letter: tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "abc"}


def answers(agent: DPO, prompt: list[int], tokenizer: Any) -> tuple[list[int], str]:
    """The tokens that `generate` gives, and evollm's text."""
    inputs = torch.tensor([prompt])
    found = agent.base.network.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        tokenizer=tokenizer,
    )
    ((text,),) = greedy_answers(agent.base, [None], [np.array(prompt)], tokenizer, max_new_tokens=9)
    return found[0, len(prompt) :].tolist(), text


@pytest.mark.parametrize("listed", [True, False])
def test_answers_stop_at_each_token_that_ends_those_of_generate(make_model, tokenizer, ids, listed: bool) -> None:
    model = make_model()
    agent = DPO(actor_network=model)
    end = ids["b"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end] if listed else end
    says(model, {ids["a"]: end, end: ids["c"], ids["c"]: ids["c"]}, first=ids["a"])
    tokens, text = answers(agent, [ids["c"] + 1], tokenizer)
    assert tokens == [ids["a"], end]
    assert text == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_answers_stop_at_the_tokenizers_own_end_whatever_the_base_says(make_model, tokenizer, ids) -> None:
    model = make_model()
    agent = DPO(actor_network=model)
    model.generation_config.eos_token_id = ids["b"]
    says(model, {ids["a"]: tokenizer.eos_token_id, tokenizer.eos_token_id: ids["c"]}, first=ids["a"])
    ((text,),) = greedy_answers(agent.base, [None], [np.array([ids["c"] + 1])], tokenizer, max_new_tokens=9)
    assert text == "a"


def test_answers_stop_at_strings_that_end_those_of_generate(make_model, tokenizer, ids) -> None:
    model = make_model()
    agent = DPO(actor_network=model)
    model.generation_config.stop_strings = ["ab"]
    says(model, {ids["a"]: ids["b"], ids["b"]: ids["c"], ids["c"]: ids["c"]}, first=ids["a"])
    tokens, text = answers(agent, [ids["c"] + 1], tokenizer)
    assert tokens == [ids["a"], ids["b"]]
    assert text == "ab"


def test_an_answer_that_was_cut_and_no_other_has_the_mark(make_model, tokenizer, ids) -> None:
    model = make_model()
    agent = DPO(actor_network=model)
    says(model, {ids["a"]: ids["b"], ids["b"]: tokenizer.eos_token_id}, first=ids["a"])
    prompt = [np.array([ids["c"] + 1])]
    # The third token is the end.
    for length, text in ((1, "a…"), (2, "ab…"), (3, "ab"), (9, "ab")):
        assert greedy_answers(agent.base, [None], prompt, tokenizer, length, cut_mark="…") == [[text]]
    model.generation_config.stop_strings = ["ab"]
    assert greedy_answers(agent.base, [None], prompt, tokenizer, 2, cut_mark="…") == [["ab"]]
    assert greedy_answers(agent.base, [None], prompt, tokenizer, 1) == [["a"]]


@pytest.fixture
def differing(make_model) -> list[DPO]:
    """Three agents of two ranks that answer differently, on a base that would not end an answer by itself."""
    model = make_model()
    agents = [
        DPO(actor_network=model, index=index, lora_config=LoraConfig(r=rank))
        for index, rank in ((0, 4), (1, 8), (2, 8))
    ]
    generator = torch.Generator().manual_seed(1)
    for agent in agents:
        for parameter in agent.actor_parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.generation_config.eos_token_id = list(range(0, model.config.vocab_size, 9))
    return agents


def alone(agent: DPO, adapter: str | None, prompt: np.ndarray, tokenizer: Any) -> str:
    ((text,),) = greedy_answers(agent.base, [adapter], [prompt], tokenizer, 12, cut_mark="…")
    return text


def test_members_that_answer_together_say_what_each_says_alone(differing, tokenizer, monkeypatch) -> None:
    base = differing[0].base
    adapters = [None, *(agent.actor_adapter for agent in differing)]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, base.num_embeddings, size=size) for size in (3, 5, 3, 7, 3)]
    expected = [[alone(differing[0], adapter, prompt, tokenizer) for prompt in prompts] for adapter in adapters]
    calls = []
    own = base.network.generate
    monkeypatch.setattr(
        base.network, "generate", lambda **inputs: (calls.append(inputs["input_ids"].shape), own(**inputs))[1]
    )
    assert greedy_answers(base, adapters, prompts, tokenizer, 12, cut_mark="…") == expected
    assert len({tuple(texts) for texts in expected}) == 4
    assert {text.endswith("…") for texts in expected for text in texts} == {True, False}
    # After two trials of padding for each of two ranks: the base, and the three members together.
    assert calls[4:] == [(5, 7), (15, 7)]
    monkeypatch.setattr(generation, "_MOST_TOKENS", 40)
    calls.clear()
    assert greedy_answers(base, adapters, prompts, tokenizer, 12, cut_mark="…") == expected
    assert max(rows * (length + 12) for rows, length in calls) <= 40


def test_answers_that_a_string_ends_are_generated_one_by_one(differing, tokenizer, monkeypatch) -> None:
    base = differing[0].base
    adapters = [agent.actor_adapter for agent in differing]
    prompts = [np.array([7, 8, 9]), np.array([9, 8, 7])]
    words = {text for texts in greedy_answers(base, adapters, prompts, tokenizer, 12) for text in texts}
    string = next(found[0] for text in sorted(words) if (found := re.search("[a-z]{3}", text)))
    base.network.generation_config.stop_strings = [string]
    expected = [[alone(differing[0], adapter, prompt, tokenizer) for prompt in prompts] for adapter in adapters]
    assert greedy_answers(base, adapters, prompts, tokenizer, 12, cut_mark="…") == expected
    ended = [text for texts in expected for text in texts if string in text]
    assert ended
    assert not {*ended} & words
    assert not any(text.endswith("…") for text in ended)
