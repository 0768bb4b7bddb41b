"""What became of a dataset's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evollm.data.batch import TokenizedPair
from evollm.data.rows import ChatPair, TextPair, in_form

FIRST_ROWS = 5
# What rows are learnt as.
FORMS = ("chat", "text", "mixed")


@dataclass(frozen=True)
class Example:
    """The prompt of one pair as a person would read it.

    Attributes:
        position: The pair's position among the kept ones.
        question: The prompt, or its last message.
        turns: Role and text of each message of a conversation; none of a prompt that is text.
    """

    position: int
    question: str
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DataReport:
    """How many rows of a dataset became pairs, and why the others did not.

    Attributes:
        name: The split, such as "train".
        kept: Pairs that are used.
        dropped: For each reason how many rows it cost, and the positions of the first of them in the user's dataset.
        prompts_cut: Kept pairs whose prompt lost tokens on its left to fit `max_context_length`.
        examples: Some of the kept pairs' prompts, spread over the dataset, to show to a person.
        noun: What a pair is called: that of an SFT dataset is an "example".
        warning: What is strange about the kept pairs; "" when nothing is.
        form: What the kept rows are learnt as: `chat`, through the chat template; `text`, as strings; `mixed`.
        noted: For each remark about chat rows that are kept, such as what the chat template leaves out, how many they
            are, and the positions of the first of them.
        plain_text: What to do about rows of strings where the tokenizer has a chat template; "" otherwise.
    """

    name: str
    kept: int
    dropped: Mapping[str, tuple[int, tuple[int, ...]]]
    prompts_cut: int = 0
    examples: tuple[Example, ...] = ()
    noun: str = "pair"
    warning: str = ""
    noted: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    form: str = ""
    plain_text: str = ""

    @classmethod
    def from_rows(
        cls,
        name: str,
        kept: int,
        dropped_rows: Mapping[str, Sequence[int]],
        prompts_cut: int = 0,
        examples: Sequence[Example] = (),
        noun: str = "pair",
        warning: str = "",
        noted_rows: Mapping[str, Sequence[int]] | None = None,
        plain_text: str = "",
    ) -> DataReport:
        """Count the rows that were dropped and those with a remark, and keep the first few positions of each."""
        dropped, noted = _first(dropped_rows), _first(noted_rows or {})
        return cls(name, kept, dropped, prompts_cut, tuple(examples), noun, warning, noted, plain_text=plain_text)

    @property
    def num_dropped(self) -> int:
        """Rows that were dropped, for whatever reason."""
        return sum(count for count, _ in self.dropped.values())

    def __str__(self) -> str:
        parts = [f"{_counted(self.kept, self.noun)} kept"]
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
        """What is strange about the kept rows, a sentence each."""
        plain = ["strings, which do not go through the chat template"] if self.plain_text else []
        return [*([self.warning] if self.warning else []), *plain, *self.remarks]

    @property
    def remarks(self) -> list[str]:
        """What is strange about chat rows as the template writes them, with counts and the first rows."""
        return [f"{count} {remark}: {listed(count, rows)}" for remark, (count, rows) in self.noted.items()]


def _first(rows_of: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {reason: (len(rows), tuple(sorted(rows)[:FIRST_ROWS])) for reason, rows in rows_of.items()}


def mixture_warning(pairs: Sequence[TextPair | ChatPair]) -> str:
    """What to know of a dataset of text and of chat messages; "" for one of either kind."""
    of_chat = [pair.row for pair in pairs if isinstance(pair, ChatPair)]
    if len(of_chat) in (0, len(pairs)):
        return ""
    of_text = [pair.row for pair in pairs if isinstance(pair, TextPair)]
    return (
        f"{len(of_text)} are plain text ({listed(len(of_text), of_text[:FIRST_ROWS])}) and {len(of_chat)} are chat "
        f"messages ({listed(len(of_chat), of_chat[:FIRST_ROWS])}), and only these go through the chat template"
    )


def form_of(pairs: Sequence[TextPair | ChatPair], has_template: bool) -> str:
    """What rows are learnt as; see `DataReport.form`."""
    kinds = {"chat" if isinstance(in_form(pair, has_template), ChatPair) else "text" for pair in pairs}
    return "mixed" if len(kinds) > 1 else "".join(kinds)


def count_seen(pairs: Sequence[TokenizedPair], others: Sequence[TokenizedPair]) -> int:
    """How many of the pairs are, token for token, among the others."""
    if not pairs:
        return 0
    seen = {pair.key() for pair in others}
    return sum(pair.key() in seen for pair in pairs)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(count: int, rows: Sequence[int]) -> str:
    """So many rows, of which these are the first, such as `rows 3, 5, ...`."""
    numbers = ", ".join(map(str, rows))
    return f"{'row' if count == 1 else 'rows'} {numbers}{', ...' if count > len(rows) else ''}"
