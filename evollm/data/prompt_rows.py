"""Rows with a prompt alone, as text or as chat messages, for algorithms that learn from their own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from evollm.checks import optional_whole_number
from evollm.data.cells import PROMPT_ROLES, Row, UnusableRowError, template_arguments
from evollm.data.loading import NUM_PREVIEWS
from evollm.data.pairs import ChatPair, TextPair, in_form
from evollm.data.prompts import context_of, remarks_of, require_no_template
from evollm.data.row_report import DataReport, PromptPreview, count_rows, form_of, template_hint, warning_about
from evollm.data.rows import OTHERS, DroppedRows, RowFormat, read_dataset, read_rows
from evollm.data.samples import IntArray, Sample
from evollm.data.shapes import PROMPT
from evollm.data.token_cache import TokenizedSplit
from evollm.data.tokenization import NO_PROMPT, as_written, context_limit, cut_prompt, prompt_ids
from evollm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys of a sample's `extras`: the prompt as the row has it, text or messages, and the row's further columns.
ASKED, COLUMNS = "prompt", "columns"
EMPTY_PROMPT = "empty prompt"
ENDS_WITH_ANSWER = "the prompt ends with the assistant's turn, so that there is nothing to answer"


def _to_prompt(number: int, row: Row) -> TextPair | ChatPair:
    context, others = context_of(row), row.get(OTHERS, {})
    if isinstance(context.prompt, str) and not context.spoken:
        require_no_template(row)
        if not context.prompt.strip():
            raise UnusableRowError(EMPTY_PROMPT)
        return TextPair(number, context.prompt, "", remarks=remarks_of(row), others=others)
    messages = context.messages()
    if not any(str(message.get("content", "")).strip() for message in messages):
        raise UnusableRowError(EMPTY_PROMPT)
    if messages[-1]["role"] not in PROMPT_ROLES:
        raise UnusableRowError(ENDS_WITH_ANSWER)
    arguments, plain = template_arguments(row), None
    if isinstance(context.prompt, str) and not any(arguments.values()):
        plain = TextPair(number, context.text([""]), "", others=others)
    return ChatPair(number, messages, (), **arguments, remarks=remarks_of(row), plain=plain, others=others)


PROMPTS = RowFormat("prompt", PROMPT, _to_prompt)


def load_prompts(
    dataset: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context_length: int | None = None,
    row_format: RowFormat = PROMPTS,
    encoder_decoder: bool = False,
    set_name: str = "",
    **of_completions: Any,
) -> tuple[list[Sample], DataReport]:
    """Turn a dataset of prompts into token ids.

    Strings get the ids that they have in front of a completion in `evollm.data.tokenization.tokenize_pairs`. Messages
    are rendered with `add_generation_prompt=True`.

    Args:
        dataset: What [`evollm.data.rows.read_dataset`][] takes, with a column `prompt` of strings or of lists of
            `{"role", "content"}` messages; `system`, `history`, `tools` and `chat_template_kwargs` are read as for
            completions. All other columns are kept.
        tokenizer: The model's tokenizer; it needs an EOS token, and a chat template for messages.
        name: Name of the split, such as "train".
        max_context_length: Most tokens of a prompt; longer ones are cut from the left. None: the tokenizer's
            `model_max_length`, if there is a limit.
        row_format: `PROMPTS`, with a mapping of columns.
        encoder_decoder: Whether to tokenise for an encoder-decoder model.
        set_name: Name of the set, for one of several; messages name it too.
        **of_completions: Options of `load_pairs` that say nothing of prompts.

    Returns:
        Samples without completions in the dataset's order, whose `extras` have the prompt as it was given (`ASKED`) and
        the row's other columns by name (`COLUMNS`), and a report.

    Raises:
        ConfigurationError: The length is out of range, or the tokenizer has no EOS token.
        DataError: The dataset cannot be read, lacks a column, or holds no usable prompt.
    """
    del of_completions
    limit = optional_whole_number("max_context_length", max_context_length, 2) or context_limit(tokenizer)
    argument = f"{name}_dataset.{set_name}" if set_name else f"{name}_dataset"
    has_template = bool(tokenizer.chat_template)
    rows = read_rows(dataset, argument, row_format)
    given, dropped = read_dataset(rows, argument, row_format)
    whole = tokenize_prompts(given, tokenizer, encoder_decoder=encoder_decoder)
    for reason, numbers in whole.dropped.items():
        dropped.setdefault(reason, []).extend(numbers)
    unused = {row for numbers in whole.dropped.values() for row in numbers}
    kept = [pair for pair in given if pair.row not in unused]
    samples: list[Sample] = []
    num_cut = 0
    for sample in whole.pairs:
        excess = 0 if limit is None else max(0, len(sample.prompt_ids) - limit)
        samples.append(cut_prompt(sample, excess, tokenizer.bos_token_id) if excess else sample)
        num_cut += bool(excess)
    report = _report(f"{name}, {set_name}" if set_name else name, kept, dropped, num_cut, has_template)
    if samples and name == "train":
        report = replace(report, template_hint=template_hint(report.form, kept, rows, tokenizer))
    if not samples:
        raise DataError(argument, f"{report.num_dropped} rows", f"no usable prompt ({report}); correct the rows")
    return samples, report


def tokenize_prompts(
    prompts: Sequence[TextPair | ChatPair], tokenizer: PreTrainedTokenizerBase, *, encoder_decoder: bool = False
) -> TokenizedSplit:
    """Tokenise prompts, which are not cut; see `load_prompts`."""
    split, has_template = TokenizedSplit(), bool(tokenizer.chat_template)
    for pair in prompts:
        try:
            ids = _ids_of(in_form(pair, has_template), tokenizer, encoder_decoder)
        except UnusableRowError as unusable:
            split.drop(str(unusable), pair.row)
            continue
        split.pairs.append(Sample(ids, (), pair.row, {ASKED: pair.asked, COLUMNS: dict(pair.others)}))
    return split


def _ids_of(pair: TextPair | ChatPair, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool) -> IntArray:
    if isinstance(pair, TextPair):
        ids = prompt_ids(pair.prompt, tokenizer, encoder_decoder=encoder_decoder)
    else:
        text = as_written(pair, tokenizer).prompt
        found: Mapping[str, Any] = tokenizer(text, add_special_tokens=encoder_decoder, verbose=False)
        ids = np.array(found["input_ids"], dtype=np.int64)
    if not len(ids):
        raise UnusableRowError(NO_PROMPT)
    return ids


def _report(
    name: str, kept: list[TextPair | ChatPair], dropped: DroppedRows, num_cut: int, has_template: bool
) -> DataReport:
    places = sorted({number * len(kept) // NUM_PREVIEWS for number in range(NUM_PREVIEWS)}) if kept else []
    return DataReport(
        name,
        len(kept),
        count_rows(dropped),
        num_cut,
        tuple(PromptPreview(place, kept[place].question, kept[place].turns) for place in places),
        PROMPTS.noun,
        warning_about(kept),
        form=form_of(kept, has_template),
        prompts=tuple(pair.asked for pair in kept),
    )
