"""Inspects a dataset: columns, dropped rows, lengths and repetitions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evollm.algorithms import algorithm_named
from evollm.checks import boolean, optional_whole_number, whole_number
from evollm.data.mixing import shares
from evollm.data.row_report import count_seen
from evollm.data.rows import RowFormat
from evollm.data.samples import Completion, Sample
from evollm.data.shapes import PAIR, PROMPT
from evollm.data.unpaired_rows import Balance
from evollm.errors import ConfigurationError
from evollm.inspection.forecast import forecast
from evollm.inspection.reading import Read, Reader, read_data
from evollm.inspection.result import Inspection, Lengths, RenderedRow, SetShare
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
    grpo: bool = False,
    dataset_weights: Mapping[str, float] | None = None,
) -> Inspection:
    """Inspect a dataset: the rows that are used, their lengths in tokens, and the tokens that enter the loss.

    Args:
        data: A dataset, as `PreferenceGym`, `UnpairedGym`, `SFTGym` or `RewardGym` takes it.
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
        grpo: Whether the rows are prompts alone, which GRPO answers. There is no estimate then: what a run takes are
            its answers.
        dataset_weights: As for the gyms, for `data={"a": rows, "b": rows}`: the shares of the sets are counted, and the
            time is that of epochs as the weights make them.

    Raises:
        ConfigurationError: An argument is invalid, or the model's tokenizer cannot be loaded.
        DataError: A dataset cannot be read, lacks a column or has no row.
    """
    boolean("estimate", estimate)
    if boolean("grpo", grpo):
        _check_prompts(sft, min_completion_length, estimate)
    if split is not None and dataset_weights is not None:
        raise ConfigurationError("split", split, "is for one dataset: write it behind the name of each, org/name:split")
    max_context_length = optional_whole_number("max_context_length", max_context_length, 2)
    min_completion_length = optional_whole_number("min_completion_length", min_completion_length, 1) or 1
    population, epochs = whole_number("population", population, 1), whole_number("epochs", epochs, 1)
    tokenizer = _tokenizer(model)
    config = find_config(model) if isinstance(model, str | os.PathLike) else None
    reader = Reader(tokenizer, max_context_length, min_completion_length, is_encoder_decoder(config))
    read, row_format, algorithm = read_data(
        _with_split(data, split), reader, sft=sft, grpo=grpo, columns=columns, weights=dataset_weights
    )
    others = None if against is None else reader.samples(against, "against", row_format)
    pairs, limit = read.pairs, reader.limit
    sets = _sets(read, dataset_weights or {})
    chosen_longer, rejected_longer = _longer_sides(pairs, row_format)
    num_tokens = sum(pair.num_tokens for pair in pairs)
    is_foreseen = isinstance(model, str | os.PathLike) and pairs and not grpo
    return Inspection(
        report=read.report,
        columns={role: column for layout in read.layouts for role, column in layout.roles.items()},
        unused=tuple(dict.fromkeys(name for layout in read.layouts for name in layout.unused)),
        lengths=_lengths(pairs, row_format),
        num_tokens=num_tokens,
        prompt_share=sum(len(pair.prompt_ids) for pair in pairs) / max(1, num_tokens),
        limit=limit,
        fits=tuple(reader.fit(read.whole, one) for one in sorted({*USUAL_LIMITS, *([limit] if limit else [])})),
        **_repetitions(pairs),
        overlap=None if others is None else count_seen(pairs, others),
        chosen_longer=chosen_longer,
        rejected_longer=rejected_longer,
        examples=_rendered(pairs, tokenizer),
        forecast=forecast(
            str(model),
            config,
            pairs,
            algorithm,
            population=population,
            epochs=epochs,
            measured=estimate,
            epoch_tokens=round(sum(one.epoch_tokens for one in sets.values())) if sets else None,
        )
        if is_foreseen
        else None,
        balance=_balance(read, sets) if algorithm is algorithm_named("kto") and pairs else None,
        sets=sets,
    )


def _check_prompts(sft: object, min_completion_length: object, estimate: bool) -> None:
    """Refuse arguments that say nothing of prompts alone."""
    reasons = {
        "sft": (sft, "examples have completions, and prompts alone have none: leave out sft or grpo"),
        "min_completion_length": (min_completion_length, "prompts alone have no completion: leave it out"),
        "estimate": (estimate or None, "what GRPO takes is known from its answers alone: run a few steps (max_steps)"),
    }
    for name, (value, fix) in reasons.items():
        if value is not None:
            raise ConfigurationError(name, value, fix)


def _balance(read: Read, sets: Mapping[str, SetShare]) -> Balance:
    """How many of the labels are desirable; of several sets in an epoch, on average over epochs."""
    if not any(one.drawn for one in sets.values()):
        return Balance.of(read.labels)
    desirable = undesirable = 0.0
    for name, one in sets.items():
        found = Balance.of(read.by_set[name].labels)
        desirable += found.desirable * one.drawn / one.rows
        undesirable += found.undesirable * one.drawn / one.rows
    return Balance(desirable, undesirable)


def _sets(read: Read, weights: Mapping[str, float]) -> dict[str, SetShare]:
    """The share of each of several sets."""
    sizes = {name: len(one.pairs) for name, one in read.by_set.items()}
    # A set without a row is a finding: the epoch of the others would be another one.
    drawn = shares(sizes, dict(weights)) if sizes and all(sizes.values()) else dict.fromkeys(sizes, 0)
    return {
        name: SetShare(
            weight=float(weights[name]),
            rows=sizes[name],
            num_dropped=one.report.num_dropped,
            drawn=drawn[name],
            num_tokens=sum(pair.num_tokens for pair in one.pairs),
        )
        for name, one in read.by_set.items()
    }


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


def _lengths(pairs: Sequence[Sample], row_format: RowFormat) -> dict[str, Lengths]:
    if not pairs:
        return {}
    if row_format.kind is PROMPT:
        return {"prompt": Lengths.of([len(pair.prompt_ids) for pair in pairs])}
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
        # Prompts alone may differ in what the reward functions get.
        counts["duplicates"] += bool(sides) and (prompt, *sides) in seen
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


def _rendered(pairs: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> tuple[RenderedRow, ...]:
    """Decode a few rows, evenly spaced over the dataset."""
    places = sorted({number * len(pairs) // NUM_RENDERED for number in range(NUM_RENDERED)}) if pairs else []
    return tuple(_rendered_row(pairs[place], tokenizer) for place in places)


def _rendered_row(pair: Sample, tokenizer: PreTrainedTokenizerBase) -> RenderedRow:
    chosen, rejected, *_ = *(_side(side, tokenizer) for side in pair.completions), None, None
    return RenderedRow(
        row=-1 if pair.row is None else pair.row,
        prompt=str(tokenizer.decode(pair.prompt_ids)),
        chosen=chosen,
        rejected=rejected,
        num_scored=sum(pair.num_scored),
        set_name=pair.set_name,
    )


def _side(side: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a completion; tokens that are not scored are between `▐` and `▌`."""
    cuts = np.flatnonzero(np.diff(side.scored)) + 1
    parts = zip(np.split(side.ids, cuts), np.split(side.scored, cuts), strict=True)
    texts = ((str(tokenizer.decode(part)), bool(scored.all())) for part, scored in parts)
    return "".join(text if is_scored else f"▐{text}▌" for text, is_scored in texts)
