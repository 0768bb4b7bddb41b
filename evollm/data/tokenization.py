"""Pairs and examples of text or messages -> token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from evollm.data.cells import EMPTY_COMPLETION, UnusableRowError, require_unicode
from evollm.data.chat_template import RenderedChat, render_chat, template_source
from evollm.data.pairs import ChatPair, Spans, TextPair, in_form
from evollm.data.preference_rows import SAME_COMPLETIONS, shared_length
from evollm.data.rows import DroppedRows
from evollm.data.samples import BoolArray, IntArray, Sample
from evollm.data.template_check import QUESTION_SCORED, check_rendered
from evollm.data.token_cache import TokenizedSplit, cached
from evollm.errors import ConfigurationError, EvoLLMError
from evollm.pace import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = list[int]
Text: TypeAlias = TextPair | RenderedChat
# A pair, the ids of its prompt and completions, the mask of each completion, whether the prompt ids were shortened.
_Encoded: TypeAlias = tuple[Text, tuple[Ids, ...], list[BoolArray | None], bool]

PAIRS_PER_CALL = 512
# transformers sets model_max_length to about 1e30 for tokenizers without a limit.
LARGEST_REAL_LIMIT = 10**9
# Most characters that are quoted of a chat template's error message.
MOST_WORDS = 120

NO_PROMPT = "no prompt token"
TOO_LONG = "longer than max_context_length"
TOO_SHORT = "shorter than min_completion_length"
TEMPLATE_REFUSES = "refused by the chat template"
UNLIKE_INFERENCE = "whose prompt, as written for an answer, is not how the conversation begins, token for token"


def tokenize_pairs(
    pairs: Sequence[TextPair | ChatPair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_context_length: int | None = None,
    min_completion_length: int = 1,
    encoder_decoder: bool = False,
    cache_dir: Path | None = None,
) -> TokenizedSplit:
    """Tokenise pairs in batches.

    All sides of a pair get the same prompt ids: the longest common token prefix of prompt, prompt + chosen and, for a
    pair, prompt + rejected. A token that spans the boundary thereby belongs to the completions, and the ids of
    prompt + completion are those of the whole text.

    In a completion with several roles only the assistant's turns are scored, each with the end that the template
    writes. A token that spans the beginning of a turn belongs to the turn; a token that spans the end does not.

    The ids of messages are exactly those that `apply_chat_template` gives for the conversation, and the prompt is
    rendered from the messages before the completion with `add_generation_prompt=True`. The ids of strings start with
    one BOS if the tokenizer adds BOS to plain text, and each completion ends with one EOS.

    Args:
        pairs: Pairs of strings, or of messages for the tokenizer's chat template.
        tokenizer: The model's tokenizer.
        max_context_length: Most tokens of prompt + longer completion; None: no limit.
        min_completion_length: Fewest tokens of a completion, end tokens included.
        encoder_decoder: Tokenise prompt and completions, of strings and messages alike, as separate sequences with the
            tokenizer's own special tokens, for an encoder-decoder model: T5's prompts then end with EOS.
        cache_dir: Folder that keeps token ids between runs; see `cached`.

    Raises:
        ConfigurationError: The tokenizer has no EOS token.
        DataError: There are messages and the tokenizer has no chat template.
    """
    marks = _Marks.of(tokenizer)
    refused = TokenizedSplit()
    told = counted(pairs, len(pairs), "rows written out")
    texts = list(_as_text(told, tokenizer, refused, encoder_decoder))
    settings: dict[str, Any] = {
        "max_context_length": max_context_length,
        "min_completion_length": min_completion_length,
        "encoder_decoder": encoder_decoder,
    }
    make = partial(_tokenize, texts, tokenizer, marks, **settings)
    split = make() if cache_dir is None else cached(cache_dir, texts, tokenizer, settings, make)
    dropped = _merged(refused.dropped, split.dropped)
    unused = {row for rows in dropped.values() for row in rows}
    noted = {
        remark: used
        for remark, rows in _merged(refused.noted, split.noted).items()
        if (used := [row for row in rows if row not in unused])
    }
    if QUESTION_SCORED in noted:  # these rows need no second remark
        unlike = [row for row in noted.pop(UNLIKE_INFERENCE, []) if row not in noted[QUESTION_SCORED]]
        noted |= {UNLIKE_INFERENCE: unlike} if unlike else {}
    return replace(split, dropped=dropped, noted=noted)


def _merged(first: DroppedRows, second: DroppedRows) -> DroppedRows:
    return {reason: [*first.get(reason, ()), *second.get(reason, ())] for reason in first | second}


def _tokenize(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    marks: _Marks,
    *,
    max_context_length: int | None,
    min_completion_length: int,
    encoder_decoder: bool,
) -> TokenizedSplit:
    split = TokenizedSplit()
    encode = _encode_apart if encoder_decoder else _encode_pairs
    encoded = counted(encode(iter(texts), tokenizer), len(texts), "rows tokenised")
    for text, parts, masks, is_shortened in encoded:
        is_chat = isinstance(text, RenderedChat)  # A chat template writes BOS and EOS itself.
        prompt, *sides = parts if is_chat else marks.put_around(*parts, with_bos=not encoder_decoder)
        scored = [_as_long_as(side, mask) for side, mask in zip(sides, masks, strict=True)]
        reason = _fault(prompt, sides, scored, min_completion_length, nothing=0 if is_chat else 1)
        if reason is None:
            arrays = [np.array(ids, dtype=np.int64) for ids in (prompt, *sides)]
            pair = Sample.of(*arrays, row=text.row).with_mask(np.concatenate(scored))
            reason = _fit_into(split, pair, max_context_length, marks.bos_id)
        if reason is not None:
            split.drop(reason, text.row)
        elif is_shortened and is_chat:
            split.note(UNLIKE_INFERENCE, text.row)
    return split


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool = False) -> IntArray:
    """Tokenise a prompt string as `tokenize_pairs` does.

    Args:
        text: The prompt.
        tokenizer: The model's tokenizer.
        encoder_decoder: As for `tokenize_pairs`.

    Returns:
        (P,) token ids.
    """
    if encoder_decoder:
        ids = tokenizer(text, verbose=False)["input_ids"]
    else:
        ids = _Marks.of(tokenizer).one_bos(_encode([text], tokenizer)[0])
    return np.array(ids, dtype=np.int64)


def context_limit(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The tokenizer's `model_max_length`; None if the tokenizer has no limit."""
    stated = tokenizer.model_max_length
    return int(stated) if stated is not None and stated < LARGEST_REAL_LIMIT else None


# ------------------------------------------------------------------------------------------------------- text to ids


def _as_text(
    pairs: Iterable[TextPair | ChatPair],
    tokenizer: PreTrainedTokenizerBase,
    split: TokenizedSplit,
    encoder_decoder: bool,
) -> Iterator[Text]:
    template = template_source(tokenizer)
    for pair in (in_form(pair, bool(tokenizer.chat_template)) for pair in pairs):
        if isinstance(pair, TextPair):
            yield pair
            continue
        try:
            chat = as_written(pair, tokenizer)
            found = check_rendered(pair, chat, template)
        except UnusableRowError as unusable:
            split.drop(str(unusable), pair.row)
            continue
        for remark in found:
            split.note(remark, pair.row)
        if encoder_decoder and chat.given != chat.prompt:
            split.note(UNLIKE_INFERENCE, pair.row)
        yield chat.apart() if encoder_decoder else chat


def as_written(pair: ChatPair, tokenizer: PreTrainedTokenizerBase) -> RenderedChat:
    """The row as rendered by the chat template; `UnusableRowError` if rendering fails."""
    try:
        chat = render_chat(pair, tokenizer)
    except (EvoLLMError, UnusableRowError):
        raise
    except Exception as error:  # The code of a template may raise anything.
        raise UnusableRowError(f"{TEMPLATE_REFUSES} ({shorten(str(error), MOST_WORDS)})") from error
    require_unicode("".join(_whole_texts(chat)))  # including the text of tools
    return chat


def _encode_pairs(texts: Iterator[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Encoded]:
    """Each pair with its ids and masks."""
    while chunk := list(islice(texts, PAIRS_PER_CALL)):
        encoded = iter(_encode([text for pair in chunk for text in _whole_texts(pair)], tokenizer))
        for pair in chunk:
            whole = list(islice(encoded, len(_whole_texts(pair))))
            parts = _at_shared_prompt(pair, whole, tokenizer)
            starts = [len(parts[0])] * (len(parts) - 1)
            texts_of_sides = _whole_texts(pair)[1:]
            masks = _masks(pair.scored, texts_of_sides, whole[1:], starts, partial(_encode, tokenizer=tokenizer))
            yield pair, parts, masks, len(parts[0]) < len(whole[0])


def _encode_apart(texts: Iterator[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Encoded]:
    """Like `_encode_pairs` for an encoder-decoder model, with the special tokens of inputs and of targets."""

    def encode(texts: list[str]) -> list[Ids]:
        return [list(ids) for ids in tokenizer(text_target=texts, verbose=False)["input_ids"]]

    for pair in cast("Iterator[TextPair]", texts):
        prompt = tokenizer(pair.prompt, verbose=False)["input_ids"]
        targets = encode(list(pair.completions))
        masks = _masks(pair.scored, pair.completions, targets, [0] * len(targets), encode)
        yield pair, (list(prompt), *targets), masks, False


def _masks(
    scored: Sequence[Spans | None],
    wholes: Sequence[str],
    ids: Sequence[Ids],
    starts: Sequence[int],
    encode: Callable[[list[str]], list[Ids]],
) -> list[BoolArray | None]:
    """The mask of each side, None if all tokens are scored, from the side's turns, whole text, ids and first index."""
    sides = zip(scored or [None] * len(ids), wholes, ids, starts, strict=True)
    return [
        None if not of_side else _mask(of_side, text, whole, start, encode) for of_side, text, whole, start in sides
    ]


def _mask(scored: Spans, text: str, ids: Ids, start: int, encode: Callable[[list[str]], list[Ids]]) -> BoolArray:
    ends = encode([text[:place] for span in scored for place in span])
    places = iter([shared_length(part, ids) for part in ends])
    mask = np.zeros(len(ids), np.bool_)
    for begin, end in scored:
        first, last = next(places), next(places)
        mask[first if begin else start : len(ids) if end == len(text) else last] = True
    return mask[start:]


def _as_long_as(ids: Ids, mask: BoolArray | None) -> BoolArray:
    """A side's mask at the length of `ids`, which may have gained an EOS or lost the tokens after an EOS."""
    if mask is None:
        return np.ones(len(ids), np.bool_)
    return np.concatenate([mask, mask[-1:]])[: len(ids)]


def _whole_texts(pair: Text) -> list[str]:
    if isinstance(pair, RenderedChat):
        return [pair.prompt, *pair.wholes]
    return [pair.prompt, *(pair.prompt + completion for completion in pair.completions)]


def _at_shared_prompt(pair: Text, whole: list[Ids], tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, ...]:
    prompt, *sides = whole
    end = shared_length(*whole)
    if end or isinstance(pair, RenderedChat):
        return prompt[:end], *(ids[end:] for ids in sides)
    # A completion merges with the prompt's only token. Tokenise both separately, rather than leave an empty prompt.
    return prompt, *_encode(list(pair.completions), tokenizer)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Ids]:
    # verbose=False: no warning about model_max_length, since long prompts are cut afterwards.
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]


# ---------------------------------------------------------------------------------------------------- BOS, EOS, lengths


@dataclass(frozen=True)
class _Marks:
    """The BOS and EOS tokens of a tokenizer.

    Attributes:
        bos_id: The BOS id; None if there is no BOS.
        adds_bos: Whether the tokenizer adds BOS to plain text.
        eos_id: The EOS id, which may equal the id of BOS or padding.
        is_whitespace: Whether a token id decodes to whitespace only.
    """

    bos_id: int | None
    adds_bos: bool
    eos_id: int
    is_whitespace: Callable[[int], bool]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Marks:
        if tokenizer.eos_token_id is None:
            raise ConfigurationError(
                "tokenizer.eos_token",
                None,
                "a completion needs an end: set tokenizer.eos_token to the model's EOS token",
            )
        bos_id = tokenizer.bos_token_id
        return cls(
            bos_id=bos_id,
            adds_bos=bos_id is not None and list(tokenizer("a")["input_ids"])[:1] == [bos_id],
            eos_id=tokenizer.eos_token_id,
            is_whitespace=lru_cache(maxsize=None)(lambda token: not str(tokenizer.decode([token])).strip()),
        )

    def put_around(self, prompt: Ids, *completions: Ids, with_bos: bool) -> tuple[Ids, ...]:
        """Add BOS to a prompt, if `with_bos`, and EOS to each completion."""
        prompt = self.one_bos(prompt) if with_bos else prompt
        first, *others = map(self.one_eos, completions)
        if not prompt and not others:  # a text without prompt: its first token is the prompt
            return first[:1], first[1:]
        return prompt, first, *others

    def one_bos(self, ids: Ids) -> Ids:
        """The ids with exactly one BOS in front, if the tokenizer adds BOS; the text may already begin with BOS."""
        if not self.adds_bos:
            return ids
        brought = next((place for place, token in enumerate(ids) if token != self.bos_id), len(ids))
        return [cast("int", self.bos_id), *ids[brought:]]

    def one_eos(self, ids: Ids) -> Ids:
        """A completion's ids up to the first EOS of its tail of EOS and whitespace; a missing EOS is appended."""
        tail = len(ids)
        while tail and (ids[tail - 1] == self.eos_id or self.is_whitespace(ids[tail - 1])):
            tail -= 1
        end = next((place for place in range(tail, len(ids)) if ids[place] == self.eos_id), len(ids))
        return [*ids[:end], self.eos_id]


def _fault(
    prompt: Ids, completions: list[Ids], scored: list[BoolArray], min_completion_length: int, nothing: int
) -> str | None:
    """The reason why these ids are unusable, or None; a completion of `nothing` scored tokens is empty."""
    shortest = min(int(mask.sum()) for mask in scored)
    if completions[0] in completions[1:]:
        return SAME_COMPLETIONS
    if shortest <= nothing:
        return EMPTY_COMPLETION
    if not prompt:
        return NO_PROMPT
    return TOO_SHORT if shortest < min_completion_length else None


def _fit_into(split: TokenizedSplit, pair: Sample, limit: int | None, bos_id: int | None) -> str | None:
    """Add a pair to the split, with the prompt cut if necessary; returns the reason if the pair cannot fit."""
    if limit is not None and pair.longest_sequence > limit:
        needed = shortest_context(pair, bos_id)
        if needed > limit:
            split.shortest_overlong = min(needed, split.shortest_overlong or needed)
            return TOO_LONG
        pair = cut_prompt(pair, pair.longest_sequence - limit, bos_id)
        split.prompts_cut += 1
    split.pairs.append(pair)
    return None


def shortest_context(pair: Sample, bos_id: int | None) -> int:
    """Number of tokens of the longer completion, one prompt token and the prompt's BOS, if any."""
    kept_of_prompt = min(len(pair.prompt_ids), 1 + _opens_with(pair.prompt_ids, bos_id))
    return pair.longest_sequence - len(pair.prompt_ids) + kept_of_prompt


def cut_prompt(pair: Sample, excess: int, bos_id: int | None) -> Sample:
    """Remove `excess` tokens from the start of the prompt, after its BOS."""
    start = _opens_with(pair.prompt_ids, bos_id)
    return replace(pair, prompt_ids=np.delete(pair.prompt_ids, slice(start, start + excess)))


def _opens_with(ids: IntArray, bos_id: int | None) -> int:
    return int(bos_id is not None and ids[0] == bos_id)
