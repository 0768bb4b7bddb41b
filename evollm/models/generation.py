"""Answers of all members at once: samples that a run shows, lengths that a guard bounds, and what rewards score."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LogitsProcessorList, StopStringCriteria

from evollm.data.samples import IntArray
from evollm.models.calls import ALONE, Room, divided, step_tokens
from evollm.models.engine import Engine
from evollm.models.padding import PADDED, TOGETHER, Columns, greedy_search
from evollm.models.sampling import KeyedSampling, uniform_numbers
from evollm.models.shared_base import SharedBase

# Most tokens of prompts and answers in one call of `generate`, whose KV cache has to fit into memory.
_MOST_TOKENS = 16384
# The settings of transformers' `GenerationConfig` that change logits, with the values by which they do not.
_NEUTRAL: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "renormalize_logits": False,
    "remove_invalid_values": False,
}
# Those that look at a prompt's tokens or count them, and take padding for a part of it. Not the penalties of
# repetition, which ask which tokens there are: padding adds none.
_OF_PROMPTS = (
    "no_repeat_ngram_size",
    "min_length",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "guidance_scale",
    "watermarking_config",
    "encoder_no_repeat_ngram_size",
)
# Those of an encoder-decoder model, whose prompt is not among the decoder's tokens.
_OF_ENCODED_PROMPTS = ("guidance_scale", "encoder_no_repeat_ngram_size")


class Question(NamedTuple):
    """A prompt to be answered under an adapter.

    Attributes:
        adapter: Name of the adapter; None: the base without adapter.
        prompt: (P,) token ids.
        temperature: Divides the logits before a token is sampled; 0: greedy decoding.
        key: Seeds the random numbers of this answer: integers from 0 to 2^64 - 1. The same key gives the same numbers,
            whatever else is asked.
    """

    adapter: str | None
    prompt: IntArray
    temperature: float = 0.0
    key: tuple[int, ...] = ()


class GeneratedAnswer(NamedTuple):
    """An answer to a question.

    Attributes:
        ids: (T,) token ids without the prompt, 1 <= T <= `max_new_tokens`, the one that ends the answer included.
        ended: Whether the answer ended by itself, at a token or a string that ends answers, rather than at the limit.
    """

    ids: IntArray
    ended: bool


def answers_to(
    base: SharedBase,
    questions: Sequence[Question],
    tokenizer: Any,
    max_new_tokens: int,
    *,
    top_p: float = 1.0,
) -> list[GeneratedAnswer]:
    """Answer questions, greedily or by sampling, with the KV cache of transformers' `generate`.

    Adapters that may share a pass answer together, and so do prompts, of one length or padded, where a trial has found
    that to be right for this base: see `evollm.models.padding`. A sampled token is a function of
    the logits before it and of one number that the question's key determines: with the same key a question has the same
    answer alone and among others, up to the rounding of logits in batches of other shapes. The global random
    generators are not touched. Of the base's `generation_config` counts what ends an answer; not its `temperature`,
    `top_k`, `top_p`, `num_beams` and other ways of decoding, nor `max_time`. What changes logits, such as
    `repetition_penalty`, counts for greedy answers alone: sampled ones have the probabilities that the engine's
    log-probs say.

    Args:
        base: The shared base.
        questions: What to answer; they may differ in adapter, prompt, temperature and key.
        tokenizer: Its EOS ends an answer, and so does a token or string at which the base's `generation_config` stops.
            With such strings questions are answered one by one.
        max_new_tokens: Length limit of an answer, in tokens.
        top_p: Sampled tokens are the most probable ones with at least this probability together.

    Returns:
        The answers, in the order of the questions.

    Raises:
        ValueError: A temperature is negative or not finite, or `top_p` not in (0, 1].
    """
    for number, question in enumerate(questions):
        if not (math.isfinite(question.temperature) and question.temperature >= 0):
            raise ValueError(f"questions[{number}].temperature={question.temperature}: must be 0 or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0, and at most 1")
    found: dict[int, GeneratedAnswer] = {}
    for rows, members in _batches(base, questions, max_new_tokens):
        answers = _generate(base, [questions[row] for row in rows], members, tokenizer, max_new_tokens, top_p)
        found |= zip(rows, answers, strict=True)
    return [found[number] for number in range(len(questions))]


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
        tokenizer: Decodes the answers, and ends them as in `answers_to`.
        max_new_tokens: Length limit of an answer, in tokens.
        cut_mark: Text to append to an answer that reached the limit before it ended.

    Returns:
        For each adapter the answers, without their prompts and without special tokens.
    """

    def text_of(answer: GeneratedAnswer) -> str:
        text = text_of_answer(answer, tokenizer)
        return text if answer.ended else f"{text}{cut_mark}"

    found = _greedy(base, adapters, prompts, tokenizer, max_new_tokens)
    return [[text_of(answer) for answer in answers] for answers in found]


def text_of_answer(answer: GeneratedAnswer, tokenizer: Any) -> str:
    """The text of an answer, without special tokens and surrounding white space."""
    return str(tokenizer.decode(answer.ids, skip_special_tokens=True)).strip()


def greedy_lengths(
    base: SharedBase,
    adapters: Sequence[str | None],
    prompts: Sequence[IntArray],
    tokenizer: Any,
    max_new_tokens: int,
) -> list[list[int]]:
    """For each adapter the number of tokens of each of its `greedy_answers`, the one that ends an answer included."""
    found = _greedy(base, adapters, prompts, tokenizer, max_new_tokens)
    return [[len(answer.ids) for answer in answers] for answers in found]


def _greedy(
    base: SharedBase,
    adapters: Sequence[str | None],
    prompts: Sequence[IntArray],
    tokenizer: Any,
    max_new_tokens: int,
) -> list[list[GeneratedAnswer]]:
    """For each adapter its greedy answers to all prompts."""
    questions = [Question(adapter, prompt) for adapter, prompt in product(adapters, prompts)]
    found = answers_to(base, questions, tokenizer, max_new_tokens)
    count = len(prompts)
    return [found[number * count : (number + 1) * count] for number in range(len(adapters))]


def _batches(
    base: SharedBase, questions: Sequence[Question], max_new_tokens: int
) -> Iterator[tuple[list[int], list[str | None]]]:
    """The rows of each call of `generate`, as positions of questions, and the adapters of its equal blocks of rows.

    Greedy and sampled answers are not mixed, since the settings of the former do not count for the latter.
    """
    alike: dict[bool, dict[str | None, list[int]]] = {}
    for number, question in enumerate(questions):
        alike.setdefault(question.temperature > 0, {}).setdefault(question.adapter, []).append(number)
    lengths = [len(question.prompt) for question in questions]
    for sampled, asked in alike.items():
        room = _room(base, asked, lengths, max_new_tokens, sampled)
        # Rows without adapter are not routed.
        without: dict[str | None, list[int]] = {name: own for name, own in asked.items() if name is None}
        routed: dict[str | None, list[int]] = {name: own for name, own in asked.items() if name is not None}
        for group in (without, routed):
            for rows_of in divided(group, lengths, max_new_tokens, room):
                # Routed blocks have equal sizes: an adapter with fewer questions answers its last one several times.
                size = max(map(len, rows_of.values()))
                yield [row for own in rows_of.values() for row in own + own[-1:] * (size - len(own))], list(rows_of)


def _room(
    base: SharedBase, asked: Mapping[str | None, list[int]], lengths: Sequence[int], max_new_tokens: int, sampled: bool
) -> Room:
    """What a call of `generate` may have, for questions by adapter."""
    own = {lengths[row] for rows in asked.values() for row in rows}
    # A string stops its own row only, and what `generate` puts after it cannot be told from an answer.
    if sum(map(len, asked.values())) == 1 or stop_strings(base):
        return ALONE
    engine, longest = Engine.of(base), max(own) + max_new_tokens
    paths = engine.prepare(list(asked), longest)
    if paths.goes_alone(explicit_positions=True):
        return ALONE
    may_pad = len(own) > 1 and (sampled or not _reads_padding(base))
    if may_pad and engine.answers(PADDED, list(asked), longest):
        return Room(_MOST_TOKENS, step_tokens(base.device.type) * max_new_tokens, paths.stacking)
    return Room(_MOST_TOKENS, 0, paths.stacking) if engine.answers(TOGETHER, list(asked), longest) else ALONE


def _generate(
    base: SharedBase,
    questions: Sequence[Question],
    members: Sequence[str | None],
    tokenizer: Any,
    max_new_tokens: int,
    top_p: float,
) -> list[GeneratedAnswer]:
    """The answers to the questions of one call of `generate`: M equal blocks, one for each member, or [None]."""
    ends, strings = ending_tokens(base, tokenizer), stop_strings(base)
    columns = Columns.of(base, [question.prompt for question in questions])
    names = [name for name in members if name is not None]
    passing = base.routed(base.adapters.stack(names)) if len(names) > 1 else base.active(members[0])
    sampled = questions[0].temperature > 0
    chooses = _sampling(questions, max_new_tokens, top_p, columns.start, base.device) if sampled else None
    with passing as network, torch.no_grad(), _unchanged_logits(base) if sampled else nullcontext():
        output = greedy_search(
            network,
            columns,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else None,
            # `generate` needs it for stop strings.
            tokenizer=tokenizer,
            logits_processor=chooses,
        )

    def answer_of(row: torch.Tensor) -> GeneratedAnswer:
        answer = row[columns.start :].tolist()
        length = next((n for n, token in enumerate(answer, 1) if token in ends), len(answer))
        ended = length < max_new_tokens or answer[length - 1] in ends
        if not ended and strings:
            ended = bool(StopStringCriteria(tokenizer, strings)(row[None], None))
        return GeneratedAnswer(np.array(answer[:length], dtype=np.int64), ended)

    return [answer_of(row) for row in output.cpu()]


def _reads_padding(base: SharedBase) -> bool:
    """Whether a setting of the base's `generation_config` would take padding for a part of prompts."""
    config = base.network.generation_config
    names = _OF_ENCODED_PROMPTS if base.is_encoder_decoder else _OF_PROMPTS
    return any(getattr(config, name, None) not in (None, _NEUTRAL[name]) for name in names)


@contextmanager
def _unchanged_logits(base: SharedBase) -> Iterator[None]:
    """Without the settings of the base's `generation_config` that change logits."""
    config = base.network.generation_config
    before = {name: getattr(config, name) for name in _NEUTRAL if hasattr(config, name)}
    for name in before:
        setattr(config, name, _NEUTRAL[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _sampling(
    questions: Sequence[Question], max_new_tokens: int, top_p: float, start: int, device: torch.device
) -> LogitsProcessorList:
    """What chooses the tokens of sampled answers."""
    numbers = np.stack([uniform_numbers(question.key, max_new_tokens) for question in questions])
    temperatures = [float(question.temperature) for question in questions]
    return LogitsProcessorList([KeyedSampling(numbers, temperatures, top_p, start, device)])


def ending_tokens(base: SharedBase, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer, the tokenizer's EOS first."""
    listed = _as_list(getattr(base.network.generation_config, "eos_token_id", None))
    return list(dict.fromkeys(int(token) for token in (tokenizer.eos_token_id, *listed) if token is not None))


def stop_strings(base: SharedBase) -> list[str]:
    """Strings that end an answer."""
    return _as_list(getattr(base.network.generation_config, "stop_strings", None))


def _as_list(value: Any) -> list[Any]:
    """A list of a setting that is None, one value or a list of values."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
