"""A problem that is searched in seconds: rule-made pairs with noisy labels, and a two-layer model that knows the words.

A completion is worth the mean of its words' values plus a bonus for words that it takes from the prompt; the better
one is chosen with the probability of Bradley and Terry (1952), so that labels are wrong as often as people's are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evollm import HyperparameterConfig, RLParameter

WORDS = 48
PROMPT, COMPLETION = 6, (4, 8)
# Of a word, by its number modulo their count.
VALUES = np.array([1.0, -1.0, 0.5, -0.5])
SHARPNESS = 5.0
BONUS = 1.0
PRETRAINING_STEPS = 400
# Small models want larger rates.
BOUNDS = HyperparameterConfig(lr=RLParameter(1e-4, 3e-2), beta=RLParameter(0.03, 0.5), nll_alpha=RLParameter(0.01, 1.0))


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs in random order."""
    rng = np.random.default_rng([seed, 3])
    return [_row(rng) for _ in range(count)]


def _row(rng: np.random.Generator) -> dict[str, str]:
    prompt = rng.integers(WORDS, size=PROMPT)
    sides = [rng.permutation(np.concatenate([_text(rng), rng.choice(prompt, rng.integers(3))])) for _ in range(2)]
    first, second = (_worth(side, prompt) for side in sides)
    if rng.random() > 1 / (1 + np.exp(-SHARPNESS * (first - second))):
        sides.reverse()
    chosen, rejected = (" " + _spell(side) for side in sides)
    return {"prompt": _spell(prompt), "chosen": chosen, "rejected": rejected}


def _worth(words: np.ndarray, prompt: np.ndarray) -> float:
    return float(VALUES[words % len(VALUES)].mean() + BONUS * np.isin(words, prompt).mean())


def _text(rng: np.random.Generator) -> np.ndarray:
    """Words in which each is likely to be followed by its neighbours."""
    words = [int(rng.integers(WORDS))]
    for _ in range(int(rng.integers(*COMPLETION)) - 1):
        words.append(int(words[-1] + rng.integers(1, 6)) % WORDS if rng.random() < 0.7 else int(rng.integers(WORDS)))
    return np.array(words)


def _spell(words: np.ndarray) -> str:
    return " ".join(f"w{word}" for word in words)


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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in _texts(PRETRAINING_STEPS, 64):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def _texts(count: int, size: int) -> Iterator[torch.Tensor]:
    """Batches of prompts with a completion that takes words from the prompt or not."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        lines = []
        for _ in range(size):
            row = _row(rng)
            line = [
                int(word[1:])
                for word in f"{row['prompt']}{row['rejected' if rng.random() < 0.5 else 'chosen']}".split()
            ]
            lines.append([*line, *[WORDS] * (PROMPT + COMPLETION[1] + 3 - len(line))])
        yield torch.tensor(lines)
