"""Greedy generation, for the samples that a run shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from evollm.data.samples import IntArray
from evollm.models.shared_base import SharedBase


def greedy_answers(
    base: SharedBase,
    adapter: str | None,
    prompts: Sequence[IntArray],
    tokenizer: Any,
    max_new_tokens: int = 64,
    cut_mark: str = "",
) -> list[str]:
    """Generate a completion of each prompt by greedy decoding.

    Args:
        base: The shared base.
        adapter: Name of the adapter to use; None: the base without adapter.
        prompts: Token ids, (P_i,) each.
        tokenizer: Decodes the answers. An answer ends at its EOS, or at a token or string at which the base's
            `generation_config` stops.
        max_new_tokens: Length limit of an answer, in tokens.
        cut_mark: Text to append to an answer that reached the limit before it ended.

    Returns:
        The answers, without their prompts and without special tokens.
    """
    answers = []
    ends = _ends(base, tokenizer)
    stop_strings = tuple(_as_list(getattr(base.network.generation_config, "stop_strings", None)))
    for answer in _generated(base, adapter, prompts, tokenizer, max_new_tokens):
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        ended = len(answer) < max_new_tokens or int(answer[-1]) in ends or text.endswith(stop_strings)
        answers.append(text if ended else f"{text}{cut_mark}")
    return answers


def greedy_lengths(
    base: SharedBase, adapter: str | None, prompts: Sequence[IntArray], tokenizer: Any, max_new_tokens: int
) -> list[int]:
    """The number of tokens of each answer of `greedy_answers`, the one that ends it included."""
    return [len(answer) for answer in _generated(base, adapter, prompts, tokenizer, max_new_tokens)]


def _generated(
    base: SharedBase, adapter: str | None, prompts: Sequence[IntArray], tokenizer: Any, max_new_tokens: int
) -> Iterator[torch.Tensor]:
    """The token ids of each answer, (T,) with T <= `max_new_tokens`."""
    ends = _ends(base, tokenizer)
    with base.active(adapter) as network, torch.no_grad():
        for prompt in prompts:
            input_ids = torch.from_numpy(prompt).to(base.device).unsqueeze(0)  # (1, P)
            output = cast(Any, network).generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
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
            yield output[0, 1 if base.is_encoder_decoder else len(prompt) :]


def _ends(base: SharedBase, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer, the tokenizer's EOS first."""
    listed = _as_list(getattr(base.network.generation_config, "eos_token_id", None))
    return list(dict.fromkeys(int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None))


def _as_list(value: Any) -> list[Any]:
    """A list of a setting that is None, one value or a list of values."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
