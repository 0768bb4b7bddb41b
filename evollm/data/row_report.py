"""The report on a dataset: how many rows are used, why others are not, and what is unusual about those that are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from evollm.data.pairs import ChatPair, TextPair, in_form
from evollm.data.rows import Rows
from evollm.data.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_ROWS = 5
FORMS = ("chat", "text", "mixed")
# Characters of a special token below which a text may contain the token by chance.
_SHORTEST_SPECIAL_TOKEN = 3


@dataclass(frozen=True)
class PromptPreview:
    """The prompt of one pair, to show to a person.

    Attributes:
        position: Position of the pair, or of the first answer of a pair in two, among the kept ones.
        question: The prompt if it is text, else the text of its last message.
        turns: Role and text of each message of a conversation; empty for a prompt that is text.
    """

    position: int
    question: str
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DataReport:
    """How many rows of a dataset are used, and why the others are not.

    Attributes:
        name: The split, such as "train".
        kept: Number of pairs (SFT examples, or KTO answers) that are used.
        dropped: For each reason the number of dropped rows and the first of their positions in the user's dataset.
        prompts_cut: Number of kept pairs whose prompt lost tokens on its left to fit `max_context_length`.
        previews: Prompts of some kept pairs, spread over the dataset.
        noun: "pair", "example" for SFT, or "answer" for KTO.
        warning: What is unusual about the kept rows themselves; "" if nothing is.
        noted: For each remark on what the chat template makes of kept rows, such as a text that it leaves out, the
            number of rows and the first of their positions.
        form: `chat` if all kept rows go through the chat template, `text` if none does, else `mixed`; "" without rows.
        template_hint: For rows of form `text` that look like questions and answers, how to pass them through the
            tokenizer's chat template; "" otherwise, and without a template.
        prompts: Of a held-out split the prompt of each pair, example or answer, as its row has it: a string, or a list
            of messages.
        sets: The reports of the sets that the split is made of, by their names; empty for one dataset.
    """

    name: str
    kept: int
    dropped: Mapping[str, tuple[int, tuple[int, ...]]]
    prompts_cut: int = 0
    previews: tuple[PromptPreview, ...] = ()
    noun: str = "pair"
    warning: str = ""
    noted: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    form: str = ""
    template_hint: str = ""
    prompts: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    sets: Mapping[str, DataReport] = field(default_factory=dict)

    @classmethod
    def joined(cls, name: str, sets: Mapping[str, DataReport]) -> DataReport:
        """The report of a split made of several sets, one after the other; what is said of rows names their set."""
        reports = sets.values()
        starts = accumulate((report.kept for report in reports), initial=0)
        return cls(
            name,
            sum(report.kept for report in reports),
            {f"{reason}, in {one}": rows for one, report in sets.items() for reason, rows in report.dropped.items()},
            sum(report.prompts_cut for report in reports),
            tuple(
                replace(preview, position=start + preview.position)
                for start, report in zip(starts, reports, strict=False)
                for preview in report.previews
            ),
            next(iter(reports)).noun,
            "; ".join(f"in {one} {report.warning}" for one, report in sets.items() if report.warning),
            {f"{remark}, in {one}": rows for one, report in sets.items() for remark, rows in report.noted.items()},
            "mixed" if len(forms := {report.form for report in reports} - {""}) > 1 else "".join(forms),
            next((report.template_hint for report in reports if report.template_hint), ""),
            tuple(prompt for report in reports for prompt in report.prompts),
            dict(sets),
        )

    @property
    def num_dropped(self) -> int:
        """Number of dropped rows."""
        return sum(count for count, _ in self.dropped.values())

    def __str__(self) -> str:
        parts = [f"{_counted(self.kept, self.noun)} kept"]
        if self.sets:
            parts[0] += f" ({', '.join(f'{report.kept} of {name}' for name, report in self.sets.items())})"
        if self.dropped:
            reasons = "; ".join(
                f"{count} {reason}: {listed(count, rows)}" for reason, (count, rows) in self.dropped.items()
            )
            parts.append(f"{self.num_dropped} dropped ({reasons})")
        if self.prompts_cut:
            parts.append(f"{_counted(self.prompts_cut, 'prompt')} cut")
        warnings = "; ".join(self.warnings)
        return f"{self.name}: {', '.join(parts)}{'; warning: ' if warnings else ''}{warnings}"

    @property
    def warnings(self) -> list[str]:
        """What is unusual about the kept rows, one entry for each fact."""
        plain = ["strings, which do not go through the chat template"] if self.template_hint else []
        return [*([self.warning] if self.warning else []), *plain, *self.remarks]

    @property
    def remarks(self) -> list[str]:
        """What the chat template does to kept rows, with counts and the first positions."""
        return [f"{count} {remark}: {listed(count, rows)}" for remark, (count, rows) in self.noted.items()]


def count_rows(rows_of: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """For each reason or remark the number of its rows and the first of their positions, from all positions."""
    return {reason: (len(rows), tuple(sorted(rows)[:FIRST_ROWS])) for reason, rows in rows_of.items()}


def warning_about(pairs: Sequence[TextPair | ChatPair]) -> str:
    """What is unusual about rows that are used; "" if nothing is."""
    found: list[str] = []
    of_text = [pair.row for pair in pairs if isinstance(pair, TextPair)]
    of_chat = [pair.row for pair in pairs if isinstance(pair, ChatPair)]
    if of_text and of_chat:
        found.append(
            f"{len(of_text)} are plain text ({listed(len(of_text), of_text[:FIRST_ROWS])}) and {len(of_chat)} are chat "
            f"messages ({listed(len(of_chat), of_chat[:FIRST_ROWS])}), and only these go through the chat template"
        )
    rows_of: dict[str, list[int]] = {}
    for pair in pairs:
        for remark in pair.remarks:
            rows_of.setdefault(remark, []).append(pair.row)
    found += [f"{len(rows)} with {remark}: {listed(len(rows), rows[:FIRST_ROWS])}" for remark, rows in rows_of.items()]
    return "; ".join(found)


def form_of(pairs: Sequence[TextPair | ChatPair], has_template: bool) -> str:
    """The form in which rows are learnt; see `DataReport.form`."""
    kinds = {"chat" if isinstance(in_form(pair, has_template), ChatPair) else "text" for pair in pairs}
    return "mixed" if len(kinds) > 1 else "".join(kinds)


def template_hint(
    form: str, pairs: Sequence[TextPair | ChatPair], rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> str:
    """How to pass rows of strings through the tokenizer's chat template; see `DataReport.template_hint`.

    Args:
        form: The rows' form.
        pairs: The rows that are used.
        rows: All rows.
        tokenizer: The model's tokenizer.

    Returns:
        "" also where the strings contain special tokens, since a chat template has written them already, and where they
        are learnt from their first token on, since such texts are no answers.
    """
    roles = rows.layouts[0].roles
    if form != "text" or not tokenizer.chat_template or "text" in roles:
        return ""
    text = f"{pairs[0].prompt}{pairs[0].chosen}"
    if any(len(token) >= _SHORTEST_SPECIAL_TOKEN and token in text for token in tokenizer.all_special_tokens):
        return ""
    if "prompt" not in roles:
        return 'hand in messages: {"prompt": [{"role": "user", "content": ...}], "chosen": [...], "rejected": [...]}'
    column = roles["prompt"]
    return (
        f"say columns={{'instruction': {column!r}}} (on a command line columns.instruction={column}): that is the "
        "user's turn then, and the answers are the assistant's"
    )


def count_seen(pairs: Sequence[Sample], others: Sequence[Sample]) -> int:
    """How many of the pairs are also among the others, with the same token ids."""
    if not pairs:
        return 0
    seen = {pair.key for pair in others}
    return sum(pair.key in seen for pair in pairs)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(count: int, rows: Sequence[int]) -> str:
    """The positions of `count` rows, of which `rows` has the first, such as `rows 3, 5, ...`."""
    numbers = ", ".join(map(str, rows))
    return f"{'row' if count == 1 else 'rows'} {numbers}{', ...' if count > len(rows) else ''}"
