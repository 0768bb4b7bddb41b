"""Reads a dataset as a gym does, and collects columns, dropped rows, lengths and repetitions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evollm.algorithms import Algorithm, algorithm_named
from evollm.checks import boolean, optional_whole_number, whole_number
from evollm.data.row_report import DataReport, count_rows, count_seen, form_of, template_hint, warning_about
from evollm.data.rows import ChatPair, DroppedRows, RowFormat, Rows, TextPair, read_dataset, read_rows
from evollm.data.samples import Completion, Sample
from evollm.data.shapes import PAIR
from evollm.data.token_cache import TokenizedSplit
from evollm.data.tokenization import TOO_LONG, context_limit, shortest_context, tokenize_pairs
from evollm.data.unpaired_rows import Balance
from evollm.errors import ConfigurationError, DataError
from evollm.inspection.forecast import forecast
from evollm.inspection.result import Fit, Inspection, Lengths, RenderedRow
from evollm.models.encoder_decoder import is_encoder_decoder
from evollm.models.loading.pretrained import find_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USUAL_LIMITS = (256, 512, 1024, 2048, 4096)
NUM_RENDERED = 3


def inspect_data(
    data: object,
    model: str | Path | PreTrainedTokenizerBase,
    *,
    split: str | None = None,
    sft: bool | None = None,
    max_context_length: int | None = None,
    min_completion_length: int | None = None,
    against: object | None = None,
    population: int = 4,
    epochs: int = 1,
    estimate: bool = False,
    columns: Mapping[str, Any] | None = None,
) -> Inspection:
    """Inspect a dataset: the rows that are used, their lengths in tokens, and the tokens that enter the loss.

    Args:
        data: A dataset, as `PreferenceGym`, `UnpairedGym` or `SFTGym` takes it.
        model: Name or folder of the model, whose tokenizer and configuration are read; or a tokenizer.
        split: Split of a dataset on the hub, by default `train`.
        sft: Whether the rows are examples for SFT; None: their columns decide, and of completions with labels, which
            KTO learns from, the labels are counted.
        max_context_length: As for the gyms.
        min_completion_length: As for the gyms.
        against: Another dataset, such as the held-out one, to count the rows that are in both.
        population: Agents of the run whose memory and time are estimated.
        epochs: Epochs of that run.
        estimate: Whether to load the model's weights and time a step of one agent, to estimate the run's time.
        columns: As for the gyms.

    Raises:
        ConfigurationError: An argument is invalid, or the model's tokenizer cannot be loaded.
        DataError: The dataset cannot be read, lacks a column or has no row.
    """
    boolean("estimate", estimate)
    max_context_length = optional_whole_number("max_context_length", max_context_length, 2)
    min_completion_length = optional_whole_number("min_completion_length", min_completion_length, 1) or 1
    population, epochs = whole_number("population", population, 1), whole_number("epochs", epochs, 1)
    tokenizer = _tokenizer(model)
    config = find_config(model) if isinstance(model, str | os.PathLike) else None
    tokenize = partial(
        tokenize_pairs,
        tokenizer=tokenizer,
        min_completion_length=min_completion_length,
        encoder_decoder=is_encoder_decoder(config),
    )
    rows, row_format, algorithm = _rows(_with_split(data, split), "data", sft, columns)
    raw, dropped = read_dataset(rows, "data", row_format)
    whole = tokenize(raw)
    others = None
    if against is not None:
        others = tokenize(read_dataset(against, "against", row_format)[0]).pairs
    unused = {row for rows in whole.dropped.values() for row in rows}
    texts = [text for text in raw if text.row not in unused]
    bos_id = tokenizer.bos_token_id
    limit = context_limit(tokenizer) if max_context_length is None else max_context_length
    kept = [n for n, pair in enumerate(whole.pairs) if limit is None or shortest_context(pair, bos_id) <= limit]
    used = [texts[n] for n in kept]
    form = form_of(used, bool(tokenizer.chat_template))
    report = _report(whole, dropped, texts, set(kept), row_format, _fit(whole.pairs, limit, bos_id))
    report = replace(report, form=form, template_hint=template_hint(form, used, rows, tokenizer))
    pairs = [whole.pairs[n] for n in kept]
    chosen_longer, rejected_longer = _longer_sides(pairs, row_format)
    roles = {role: column for layout in rows.layouts for role, column in layout.roles.items()}
    return Inspection(
        report=report,
        columns=roles,
        unused=tuple(dict.fromkeys(name for layout in rows.layouts for name in layout.unused)),
        lengths=_lengths(pairs, row_format),
        num_tokens=sum(pair.num_tokens for pair in pairs),
        prompt_share=sum(len(pair.prompt_ids) for pair in pairs) / max(1, sum(pair.num_tokens for pair in pairs)),
        limit=limit,
        fits=tuple(_fit(whole.pairs, usual, bos_id) for usual in sorted({*USUAL_LIMITS, *([limit] if limit else [])})),
        **_repetitions(pairs),
        overlap=None if others is None else count_seen(pairs, others),
        chosen_longer=chosen_longer,
        rejected_longer=rejected_longer,
        examples=_rendered(pairs, [text.row for text in used], tokenizer),
        forecast=forecast(str(model), config, pairs, algorithm, population=population, epochs=epochs, measured=estimate)
        if isinstance(model, str | os.PathLike) and pairs
        else None,
        balance=Balance.of([text.label for text in used]) if algorithm is algorithm_named("kto") and used else None,
    )


def _tokenizer(model: Any) -> PreTrainedTokenizerBase:
    if callable(model) and hasattr(model, "eos_token_id"):
        return model  # type: ignore[no-any-return]
    if not isinstance(model, str | os.PathLike):
        raise ConfigurationError("model", model, "must be the name or folder of a model, or a tokenizer")
    return load_tokenizer(model)  # type: ignore[no-any-return]


def _with_split(data: object, split: object) -> object:
    if split is None:
        return data
    if not isinstance(split, str) or not isinstance(data, str) or ":" in data or Path(data).suffix:
        raise ConfigurationError("split", split, "is for a dataset on the hub that is given by its name alone")
    return f"{data}:{split}"


def _rows(data: Any, field: str, sft: object, columns: object) -> tuple[Rows, RowFormat, Algorithm]:
    """Read the rows for the requested algorithm, or else for the first of DPO, KTO and SFT whose columns they have."""

    def read(algorithm: Algorithm) -> tuple[Rows, RowFormat, Algorithm]:
        row_format = algorithm.row_format.with_columns(columns)
        return read_rows(data, field, row_format), row_format, algorithm

    pairs, answers, examples = map(algorithm_named, ("dpo", "kto", "sft"))
    if sft is not None:
        return read(examples if boolean("sft", sft) else pairs)
    if hasattr(data, "__next__"):
        data = list(data)  # an iterator could not be read for both algorithms
    try:
        return read(pairs)
    except ConfigurationError as error:
        with suppress(ConfigurationError):
            return read(answers)
        try:
            return read(examples)
        except ConfigurationError as other:
            # Raise the error of the format for which the data, or the column mapping, was meant.
            is_sft = "SFTGym" in str(error) or (isinstance(other, DataError) and not isinstance(error, DataError))
            raise (other if is_sft else error) from None


def _report(
    whole: TokenizedSplit,
    dropped: DroppedRows,
    texts: Sequence[TextPair | ChatPair],
    kept: set[int],
    row_format: RowFormat,
    fit: Fit,
) -> DataReport:
    reasons = {reason: list(rows) for reason, rows in dropped.items()}
    too_long = [text.row for n, text in enumerate(texts) if n not in kept]
    for reason, rows in {**whole.dropped, **({TOO_LONG: too_long} if too_long else {})}.items():
        reasons.setdefault(reason, []).extend(rows)
    used = [text for n, text in enumerate(texts) if n in kept]
    numbers = {text.row for text in used}
    noted = {remark: left for remark, rows in whole.noted.items() if (left := [row for row in rows if row in numbers])}
    return DataReport(
        "data",
        len(used),
        count_rows(reasons),
        fit.prompts_cut,
        noun=row_format.noun,
        warning=warning_about(used),
        noted=count_rows(noted),
    )


def _fit(pairs: Sequence[Sample], limit: int | None, bos_id: int | None) -> Fit:
    if limit is None:
        return Fit(0, 0, 0)
    long = [pair for pair in pairs if pair.longest_sequence > limit]
    too_long = sum(shortest_context(pair, bos_id) > limit for pair in long)
    return Fit(limit, len(long) - too_long, too_long)


def _lengths(pairs: Sequence[Sample], row_format: RowFormat) -> dict[str, Lengths]:
    if not pairs:
        return {}
    chosen = [len(pair.chosen_ids) for pair in pairs]
    if row_format.kind is PAIR:
        sides = {"chosen": chosen, "rejected": [len(pair.rejected_ids) for pair in pairs]}
    else:
        sides = {"completion": chosen}
    columns = {"prompt": [len(pair.prompt_ids) for pair in pairs], **sides}
    columns["whole"] = [pair.num_tokens for pair in pairs]
    return {name: Lengths.of(column) for name, column in columns.items()}


def _repetitions(pairs: Sequence[Sample]) -> dict[str, int]:
    prompts: set[bytes] = set()
    seen: set[tuple[bytes, ...]] = set()
    counts = {"duplicates": 0, "repeated_prompts": 0, "contradictions": 0}
    for pair in pairs:
        prompt, *sides = (ids.tobytes() for ids in (pair.prompt_ids, *(side.ids for side in pair.completions)))
        counts["duplicates"] += (prompt, *sides) in seen
        counts["contradictions"] += len(sides) > 1 and (prompt, *sides[::-1]) in seen
        counts["repeated_prompts"] += prompt in prompts
        prompts.add(prompt)
        seen.add((prompt, *sides))
    return counts


def _longer_sides(pairs: Sequence[Sample], row_format: RowFormat) -> tuple[float | None, float | None]:
    """Shares of the pairs whose chosen, and whose rejected, side has more scored tokens; None for examples."""
    if row_format.kind is not PAIR or not pairs:
        return None, None
    excess = np.array([pair.num_scored[0] - pair.num_scored[1] for pair in pairs])
    return float((excess > 0).mean()), float((excess < 0).mean())


def _rendered(
    pairs: Sequence[Sample], rows: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[RenderedRow, ...]:
    """Decode a few rows, evenly spaced over the dataset."""
    places = sorted({number * len(pairs) // NUM_RENDERED for number in range(NUM_RENDERED)}) if pairs else []
    return tuple(
        RenderedRow(
            row=rows[place],
            prompt=str(tokenizer.decode(pairs[place].prompt_ids)),
            chosen=_side(pairs[place].completions[0], tokenizer),
            rejected=next((_side(side, tokenizer) for side in pairs[place].completions[1:]), None),
            num_scored=sum(pairs[place].num_scored),
        )
        for place in places
    )


def _side(side: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a completion; tokens that are not scored are between `▐` and `▌`."""
    cuts = np.flatnonzero(np.diff(side.scored)) + 1
    parts = zip(np.split(side.ids, cuts), np.split(side.scored, cuts), strict=True)
    texts = ((str(tokenizer.decode(part)), bool(scored.all())) for part, scored in parts)
    return "".join(text if is_scored else f"▐{text}▌" for text, is_scored in texts)
