"""Reads the rows of a dataset, or of each of several sets, as a gym does, before prompts are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evollm.algorithms import Algorithm, algorithm_named
from evollm.checks import boolean
from evollm.data.mixing import check_sets, checked_weights
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.prompt_rows import tokenize_prompts
from evollm.data.row_report import DataReport, count_rows, form_of, template_hint, warning_about
from evollm.data.rows import DroppedRows, RowFormat, Rows, read_dataset, read_rows
from evollm.data.samples import Sample
from evollm.data.shapes import PROMPT
from evollm.data.token_cache import TokenizedSplit
from evollm.data.tokenization import TOO_LONG, context_limit, shortest_context, tokenize_pairs
from evollm.errors import ConfigurationError, DataError
from evollm.inspection.result import Fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Read:
    """The rows of a dataset, or of several sets one after the other.

    Attributes:
        report: Rows kept and dropped, with the reasons; of several sets with the report of each.
        pairs: The samples that are used, with whole prompts.
        whole: These and the ones that are too long.
        layouts: The columns of each file.
        labels: The label of each sample that is used, if it has one.
        by_set: Of several sets what was read of each, by its name; else empty.
    """

    report: DataReport
    pairs: list[Sample]
    whole: list[Sample]
    layouts: list[Any]
    labels: list[float | None]
    by_set: Mapping[str, Read] = field(default_factory=dict)

    @classmethod
    def joined(cls, sets: Mapping[str, Read]) -> Read:
        """Several sets as one dataset."""
        named = {
            name: replace(
                read,
                pairs=[replace(pair, set_name=name) for pair in read.pairs],
                whole=[replace(pair, set_name=name) for pair in read.whole],
            )
            for name, read in sets.items()
        }
        reads = named.values()
        return cls(
            DataReport.joined("data", {name: read.report for name, read in named.items()}),
            [pair for read in reads for pair in read.pairs],
            [pair for read in reads for pair in read.whole],
            [layout for read in reads for layout in read.layouts],
            [label for read in reads for label in read.labels],
            named,
        )


@dataclass(frozen=True)
class Reader:
    """How rows are read.

    Attributes:
        tokenizer: The model's tokenizer.
        max_context_length: As for the gyms.
        min_completion_length: As for the gyms.
        encoder_decoder: As for the gyms.
    """

    tokenizer: PreTrainedTokenizerBase
    max_context_length: int | None
    min_completion_length: int
    encoder_decoder: bool

    @property
    def limit(self) -> int | None:
        """The `max_context_length` in effect, if any."""
        return context_limit(self.tokenizer) if self.max_context_length is None else self.max_context_length

    def read(self, data: object, field: str, row_format: RowFormat) -> Read:
        """Read a dataset.

        Raises:
            DataError: It cannot be read, lacks a column or has no row.
        """
        rows = read_rows(data, field, row_format)
        raw, dropped = read_dataset(rows, field, row_format)
        whole = self._tokenized(raw, row_format)
        unused = {row for rows in whole.dropped.values() for row in rows}
        texts = [text for text in raw if text.row not in unused]
        bos_id, limit = self.tokenizer.bos_token_id, self.limit
        is_prompt = row_format.kind is PROMPT  # which is cut, and never too long
        kept = [
            n
            for n, pair in enumerate(whole.pairs)
            if limit is None or is_prompt or shortest_context(pair, bos_id) <= limit
        ]
        used = [texts[n] for n in kept]
        report = _report(whole, dropped, texts, set(kept), row_format, self.fit(whole.pairs, limit))
        form = form_of(used, bool(self.tokenizer.chat_template))
        return Read(
            replace(report, form=form, template_hint=template_hint(form, used, rows, self.tokenizer)),
            [whole.pairs[n] for n in kept],
            list(whole.pairs),
            rows.layouts,
            [text.label for text in used],
        )

    def fit(self, pairs: Sequence[Sample], limit: int | None) -> Fit:
        """The effect of a `max_context_length`; see `Fit`."""
        if limit is None:
            return Fit(0, 0, 0)
        long = [pair for pair in pairs if pair.longest_sequence > limit]
        bos_id = self.tokenizer.bos_token_id
        too_long = sum(bool(pair.completions) and shortest_context(pair, bos_id) > limit for pair in long)
        return Fit(limit, len(long) - too_long, too_long)

    def samples(self, data: object, field: str, row_format: RowFormat) -> list[Sample]:
        """The samples of another dataset."""
        return self._tokenized(read_dataset(data, field, row_format)[0], row_format).pairs

    def _tokenized(self, raw: Sequence[TextPair | ChatPair], row_format: RowFormat) -> TokenizedSplit:
        if row_format.kind is PROMPT:
            return tokenize_prompts(raw, self.tokenizer, encoder_decoder=self.encoder_decoder)
        return tokenize_pairs(
            raw,
            self.tokenizer,
            min_completion_length=self.min_completion_length,
            encoder_decoder=self.encoder_decoder,
        )


def read_data(
    data: Any, reader: Reader, *, sft: object, grpo: bool, columns: object, weights: object
) -> tuple[Read, RowFormat, Algorithm]:
    """Read a dataset, or the sets that have weights, for the algorithm that is asked for, or that the columns are of.

    Raises:
        ConfigurationError: The sets and weights do not fit each other.
        DataError: A dataset cannot be read, lacks a column or has no row.
    """
    checked = checked_weights(weights)
    if checked is None:
        rows, row_format, algorithm = _rows(data, "data", sft, grpo, columns)
        return reader.read(rows, "data", row_format), row_format, algorithm
    check_sets("data", data, checked)
    (first, one), *others = data.items()
    rows, row_format, algorithm = _rows(one, f"data.{first}", sft, grpo, columns)
    sets = {first: rows, **{name: read_rows(rows, f"data.{name}", row_format) for name, rows in others}}
    reads = {name: reader.read(rows, f"data.{name}", row_format) for name, rows in sets.items()}
    return Read.joined(reads), row_format, algorithm


def _rows(data: Any, field: str, sft: object, grpo: bool, columns: object) -> tuple[Rows, RowFormat, Algorithm]:
    """Read the rows for the requested algorithm, or else for the first of DPO, KTO and SFT whose columns they have."""

    def read(algorithm: Algorithm) -> tuple[Rows, RowFormat, Algorithm]:
        row_format = algorithm.row_format.with_columns(columns)
        return read_rows(data, field, row_format), row_format, algorithm

    pairs, answers, examples, prompts = map(algorithm_named, ("dpo", "kto", "sft", "grpo"))
    if grpo:
        return read(prompts)
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
            wanted, hint = other if is_sft else error, ""
            with suppress(ConfigurationError):
                read(prompts)
                hint = "; prompts alone, which GRPO answers, are read with --grpo (grpo=True)"
            raise type(wanted)(wanted.field, wanted.value, wanted.fix + hint) from None


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
