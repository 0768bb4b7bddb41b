"""Greedy generation, for all members at once: the samples that a run shows, and the lengths that a guard bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, cast

import numpy as np
import torch

from evollm.data.samples import IntArray
from evollm.models.engine import Engine
from evollm.models.shared_base import SharedBase

# Most tokens of prompts and answers in one call of `generate`, whose KV cache has to fit into memory.
_MOST_TOKENS = 16384


def greedy_answers(
    base: SharedBase,
    adapters: Sequence[str | None],
    prompts: Sequence[IntArray],
    tokenizer: Any,
    max_new_tokens: int = 64,
    cut_mark: str = "",
) -> list[list[str]]:
    """Generate a completion of each prompt under each adapter by greedy decoding.

    Args:
        base: The shared base.
        adapters: Names of adapters; None: the base without adapter.
        prompts: Token ids, (P_i,) each.
        tokenizer: Decodes the answers. An answer ends at its EOS, or at a token or string at which the base's
            `generation_config` stops.
        max_new_tokens: Length limit of an answer, in tokens.
        cut_mark: Text to append to an answer that reached the limit before it ended.

    Returns:
        For each adapter the answers, without their prompts and without special tokens.
    """
    ends = _ends(base, tokenizer)
    stop_strings = tuple(_stop_strings(base))

    def text_of(answer: torch.Tensor) -> str:
        text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
        ended = len(answer) < max_new_tokens or int(answer[-1]) in ends or text.endswith(stop_strings)
        return text if ended else f"{text}{cut_mark}"

    found = _generated(base, adapters, prompts, tokenizer, max_new_tokens)
    return [[text_of(answer) for answer in answers] for answers in found]


def greedy_lengths(
    base: SharedBase,
    adapters: Sequence[str | None],
    prompts: Sequence[IntArray],
    tokenizer: Any,
    max_new_tokens: int,
) -> list[list[int]]:
    """For each adapter the number of tokens of each of its `greedy_answers`, the one that ends an answer included."""
    found = _generated(base, adapters, prompts, tokenizer, max_new_tokens)
    return [[len(answer) for answer in answers] for answers in found]


def _generated(
    base: SharedBase,
    adapters: Sequence[str | None],
    prompts: Sequence[IntArray],
    tokenizer: Any,
    max_new_tokens: int,
) -> list[list[torch.Tensor]]:
    """For each adapter the token ids of its answers, (T,) each with T <= `max_new_tokens`, on the CPU.

    Adapters that may share a pass answer together, and so do prompts of one length. Prompts of different lengths are
    not padded to one, since no architecture has been tried with padding on the left.
    """
    found: list[list[Any]] = [[None] * len(prompts) for _ in adapters]
    alike: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        alike.setdefault(len(prompt), []).append(number)
    for length, numbers in alike.items():
        for members, asked in _batches(base, adapters, numbers, length + max_new_tokens):
            ids = torch.from_numpy(np.stack([prompts[number] for number in asked]))
            answers = _generate(base, [adapters[member] for member in members], ids, tokenizer, max_new_tokens)
            for (member, number), answer in zip(product(members, asked), answers, strict=True):
                found[member][number] = answer
    return found


def _batches(
    base: SharedBase, adapters: Sequence[str | None], prompts: Sequence[int], length: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Positions of the adapters and the prompts of each call of `generate`, for sequences of up to `length` tokens."""
    several = len(adapters) * len(prompts) > 1
    # A string stops its own row only, and what `generate` puts after it cannot be told from an answer.
    paths = None if not several or _stop_strings(base) else Engine.of(base).prepare(adapters, length)
    most = max(1, _MOST_TOKENS // length) if paths and not paths.goes_alone(explicit_positions=True) else 1
    named = [number for number, name in enumerate(adapters) if name is not None]
    stacked = most if paths and paths.stacking else 1
    groups = [[number] for number, name in enumerate(adapters) if name is None]
    groups += [named[start : start + stacked] for start in range(0, len(named), stacked)]
    for members in groups:
        count = max(1, most // len(members))
        for start in range(0, len(prompts), count):
            yield members, prompts[start : start + count]


def _generate(
    base: SharedBase, members: Sequence[str | None], ids: torch.Tensor, tokenizer: Any, max_new_tokens: int
) -> list[torch.Tensor]:
    """The answers of the first member to all prompts, then those of the next.

    Args:
        base: The shared base.
        members: Names of M adapters, or [None].
        ids: (n, P) prompts.
        tokenizer: As of `greedy_answers`.
        max_new_tokens: As of `greedy_answers`.

    Returns:
        M n answers, (T,) each.
    """
    ends = _ends(base, tokenizer)
    rows = ids.repeat(len(members), 1).to(base.device)
    names = [name for name in members if name is not None]
    passing = base.routed(base.adapters.stack(names)) if len(names) > 1 else base.active(members[0])
    with passing as network, torch.no_grad():
        output = cast(Any, network).generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            # `generate` needs it for stop strings.
            tokenizer=tokenizer,
        )
    # A decoder's output begins with its own start token, not with the prompt.
    answers = output[:, 1 if base.is_encoder_decoder else ids.shape[1] :].cpu()
    lengths = [next((n for n, token in enumerate(row, 1) if token in ends), len(row)) for row in answers.tolist()]
    return [answer[:length] for answer, length in zip(answers, lengths, strict=True)]


def _ends(base: SharedBase, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer, the tokenizer's EOS first."""
    listed = _as_list(getattr(base.network.generation_config, "eos_token_id", None))
    return list(dict.fromkeys(int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None))


def _stop_strings(base: SharedBase) -> list[str]:
    """Strings that end an answer."""
    return _as_list(getattr(base.network.generation_config, "stop_strings", None))


def _as_list(value: Any) -> list[Any]:
    """A list of a setting that is None, one value or a list of values."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
