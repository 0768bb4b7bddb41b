"""A problem that is searched in seconds: rule-made pairs with noisy labels, and a two-layer model that knows topics.

Words belong to topics, and a text mostly stays with its topic; the model learns so much before. A completion is worth
the sum of its words' values, which depend mostly on their topics, and a bonus for each word of the prompt's topic: a
policy that drifts towards the valuable topics loses sight of the prompt. The better completion is chosen with the
probability of Bradley and Terry (1952): whoever knows all values agrees with 4 of 5 labels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evollm import HyperparameterConfig, RLParameter
from searching.problem import Sizes
from searching.records import Array

TOPICS, WORDS = 8, 64
PROMPT, COMPLETION = 6, (6, 10)
STAYS, ANSWERS = 0.8, 0.5
RELEVANCE, SHARPNESS = 0.8, 1.3
PRETRAINING_STEPS = 400
# Small models want larger rates.
BOUNDS = HyperparameterConfig(lr=RLParameter(5e-4, 1e-1), beta=RLParameter(0.03, 0.5), nll_alpha=RLParameter(0.01, 1.0))
SIZES = Sizes(train=512, selection=128, final=800, batch_size=16)
# Passes of many members, since one of few costs as much.
TOKEN_BUDGET = 16384


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs in random order."""
    rng = np.random.default_rng([seed, 3])
    topics, prompts = _prompts(rng, count)
    sides = [_completions(rng, topics) for _ in range(2)]
    first, second = (_worth(side, topics) for side in sides)
    is_first = rng.random(count) < 1 / (1 + np.exp(-SHARPNESS * (first - second)))
    chosen, rejected = (np.where(better[:, None], *sides) for better in (is_first, ~is_first))
    return [
        {"prompt": _spell(prompt), "chosen": " " + _spell(good), "rejected": " " + _spell(bad)}
        for prompt, good, bad in zip(prompts, chosen, rejected, strict=True)
    ]


def _prompts(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """(count,) topics and (count, PROMPT) words."""
    topics = rng.integers(TOPICS, size=count)
    return topics, _texts(rng, topics, PROMPT)


def _completions(rng: np.random.Generator, topics: Array) -> Array:
    """(count, longest) words, WORDS after the end; half of them begin with any topic."""
    begins = np.where(rng.random(len(topics)) < ANSWERS, topics, rng.integers(TOPICS, size=len(topics)))
    shortest, longest = COMPLETION
    lengths = rng.integers(shortest, longest + 1, size=len(topics))
    return np.where(np.arange(longest) < lengths[:, None], _texts(rng, begins, longest), WORDS)


def _texts(rng: np.random.Generator, topics: Array, length: int) -> Array:
    """(texts, length) words; the next is of the same topic with probability `STAYS`, and else of any."""
    columns = []
    for _ in range(length):
        topics = np.where(rng.random(len(topics)) < STAYS, topics, rng.integers(TOPICS, size=len(topics)))
        columns.append(topics * (WORDS // TOPICS) + rng.integers(WORDS // TOPICS, size=len(topics)))
    return np.stack(columns, axis=1)


def _worth(completions: Array, topics: Array) -> Array:
    """(count,) sums of values over the root of the length, so that labels of long completions are no surer."""
    rng = np.random.default_rng(7)
    of_topics = rng.permutation(np.linspace(-1, 1, TOPICS))
    values = np.append(of_topics.repeat(WORDS // TOPICS) + 0.3 * rng.standard_normal(WORDS), 0.0)
    relevant = completions // (WORDS // TOPICS) == topics[:, None]
    lengths = (completions < WORDS).sum(axis=1)
    return (values[completions] + RELEVANCE * relevant).sum(axis=1) / np.sqrt(lengths)


def _spell(words: Array) -> str:
    return " ".join(f"w{word}" for word in words if word < WORDS)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and the end."""
    words = {f"w{number}": number for number in range(WORDS)} | {"<eos>": WORDS}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


@cache
def network() -> Any:
    """The model, trained on texts without preferences."""
    config = LlamaConfig(
        vocab_size=WORDS + 16,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=WORDS,
        pad_token_id=WORDS,
    )
    rng = np.random.default_rng(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(PRETRAINING_STEPS):
            topics, prompts = _prompts(rng, 64)
            end = np.full((64, 1), WORDS)
            batch = torch.tensor(np.concatenate([prompts, _completions(rng, topics), end], axis=1))
            is_padding = torch.zeros_like(batch, dtype=torch.bool)
            is_padding[:, 1:] = (batch[:, 1:] == WORDS) & (batch[:, :-1] == WORDS)
            model(input_ids=batch, labels=batch.masked_fill(is_padding, -100)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.requires_grad_(False).eval()
