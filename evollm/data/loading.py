"""Datasets -> samples of token ids with a report, for one split: reading, tokenising, labels, previews."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from evollm.checks import optional_whole_number, usable_path
from evollm.data.preference_rows import PAIRS
from evollm.data.row_report import DataReport, PromptPreview, count_rows, form_of, template_hint, warning_about
from evollm.data.rows import RowFormat, read_dataset, read_rows
from evollm.data.samples import LABEL, Sample
from evollm.data.tokenization import context_limit, tokenize_pairs
from evollm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts of a split that a report can show.
NUM_PREVIEWS = 12


def load_pairs(
    dataset: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_context_length: int | None = None,
    min_completion_length: int | None = None,
    row_format: RowFormat = PAIRS,
    encoder_decoder: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    set_name: str = "",
) -> tuple[list[Sample], DataReport]:
    """Turn a dataset of preference pairs, or of examples, into token ids.

    Args:
        dataset: See [`evollm.data.preference_rows.read_pairs`][] and [`evollm.data.completion_rows.read_examples`][].
        tokenizer: The model's tokenizer; it needs an EOS token, and a chat template when the dataset holds messages.
        name: Name of the split, such as "train"; messages name the argument `train_dataset`.
        max_context_length: Most tokens of prompt + longer completion. Longer prompts are cut from the left; pairs whose
            completion does not fit are dropped. None: the tokenizer's `model_max_length`, if there is a limit.
        min_completion_length: Pairs with a completion of fewer tokens, end tokens included, are dropped.
        row_format: Format of the rows: `PAIRS`, or `EXAMPLES` or `UNPAIRED`, which become samples with one completion.
        encoder_decoder: Whether to tokenise for an encoder-decoder model; see `tokenize_pairs`.
        cache_dir: Folder that keeps token ids between runs; None: no cache.
        set_name: Name of the set, for one of several; messages name it too.

    Returns:
        The samples in the dataset's order, and a report of dropped rows and cut prompts.

    Raises:
        ConfigurationError: A length is out of range or the tokenizer has no EOS token.
        DataError: The dataset cannot be read, lacks a column, or holds no usable pair.
    """
    max_context_length = optional_whole_number("max_context_length", max_context_length, 2)
    min_completion_length = optional_whole_number("min_completion_length", min_completion_length, 1)
    argument = f"{name}_dataset.{set_name}" if set_name else f"{name}_dataset"
    limit = context_limit(tokenizer) if max_context_length is None else max_context_length
    given = read_rows(dataset, argument, row_format)
    raw_pairs, dropped = read_dataset(given, argument, row_format)
    split = tokenize_pairs(
        raw_pairs,
        tokenizer,
        max_context_length=limit,
        min_completion_length=min_completion_length or 1,
        encoder_decoder=encoder_decoder,
        cache_dir=None if cache_dir is None else usable_path("cache_dir", cache_dir),
    )
    for reason, rows in split.dropped.items():
        dropped.setdefault(reason, []).extend(rows)
    unused = {row for rows in dropped.values() for row in rows}
    kept = [pair for pair in raw_pairs if pair.row not in unused]
    # Labels are added here because the token cache does not hold them.
    labels = {pair.row: pair.label for pair in kept if pair.label is not None}
    labelled = (replace(pair, extras={LABEL: labels[pair.row]}) if pair.row in labels else pair for pair in split.pairs)
    divided = [row_format.divided(sample) for sample in labelled]
    samples = [sample for parts in divided for sample in parts]
    starts = [0, *accumulate(map(len, divided))]
    places = sorted({number * len(kept) // NUM_PREVIEWS for number in range(NUM_PREVIEWS)}) if kept else []
    previews = [PromptPreview(starts[place], kept[place].question, kept[place].turns) for place in places]
    form = form_of(kept, bool(tokenizer.chat_template))
    report = DataReport(
        f"{name}, {set_name}" if set_name else name,
        len(samples),
        count_rows(dropped),
        split.prompts_cut,
        tuple(previews),
        row_format.noun,
        warning_about(kept),
        count_rows(split.noted),
        form,
        template_hint(form, kept, given, tokenizer) if name == "train" else "",
        () if name == "train" else tuple(pair.asked for pair, parts in zip(kept, divided, strict=True) for _ in parts),
    )
    if samples:
        return samples, report
    if split.shortest_overlong is None:
        raise DataError(
            argument, f"{report.num_dropped} rows", f"no usable {row_format.noun} ({report}); correct the rows"
        )
    origin = " (tokenizer.model_max_length)" if max_context_length is None else ""
    raise DataError(
        "max_context_length",
        limit,
        f"no {row_format.noun} of {argument} fits into this length{origin}: {report}; the shortest that would do for "
        f"one of them is {split.shortest_overlong}",
    )


def load_sets(
    load: Callable[..., tuple[list[Sample], DataReport]],
    sets: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    **settings: Any,
) -> tuple[list[Sample], DataReport]:
    """Turn several sets of rows into token ids.

    Args:
        load: Turns one set into token ids, as `load_pairs` does.
        sets: The dataset of each set by its name.
        tokenizer: The model's tokenizer.
        name: Name of the split.
        **settings: Further arguments of `load`.

    Returns:
        The samples of one set after the other, each with its position in its own dataset, and a report with those of
        the sets.
    """
    samples, reports = [], {}
    for set_name, dataset in sets.items():
        found, reports[set_name] = load(dataset, tokenizer, name=name, set_name=set_name, **settings)
        samples += [replace(sample, set_name=set_name) for sample in found]
    return samples, DataReport.joined(name, reports)
