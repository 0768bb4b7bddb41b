"""Chat messages rendered to text by the model's chat template, with the characters of each assistant turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from evollm.data import clock
from evollm.data.cells import Message, UnusableRowError, is_learnt, is_learnt_in_part
from evollm.data.pairs import ChatPair, Spans, TextPair
from evollm.data.preference_rows import shared_length
from evollm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURNS_NOT_FOUND = (
    "with turns of others in a completion, which cannot be told from the assistant's, as the chat template writes "
    "these otherwise once more follows (put all but the last answer into the prompt)"
)
_Render: TypeAlias = Callable[[Sequence[Message], bool], str]


@dataclass(frozen=True)
class RenderedChat:
    """A row as the chat template renders it, special tokens included: tokenisation adds none.

    Attributes:
        row: Position of the row in the user's dataset.
        prompt: The messages before the completion, rendered with `add_generation_prompt=True`, as at inference.
        wholes: The whole conversations, prompt and completion: one, or two with the chosen side first.
        scored: For each whole conversation the spans of characters, in the completion, that the loss is over: the turns
            to be learnt. None: the whole completion.
    """

    row: int
    prompt: str
    wholes: tuple[str, ...]
    scored: tuple[Spans | None, ...] = ()

    @property
    def given(self) -> str:
        """The longest common beginning of the prompt and all whole conversations."""
        return self.prompt[: shared_length(self.prompt, *self.wholes)]

    def apart(self) -> TextPair:
        """Prompt and completions as separate texts, for an encoder-decoder model."""
        given = self.given
        scored = tuple(
            of_side and tuple((max(0, start - len(given)), end - len(given)) for start, end in of_side)
            for of_side in self.scored
        )
        chosen, *rejected = (whole[len(given) :] for whole in self.wholes)
        return TextPair(self.row, given, chosen, rejected[0] if rejected else None, scored)


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the tokenizer's chat template, or of all its templates, joined; "" without one."""
    template = tokenizer.chat_template
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")


def render_chat(pair: ChatPair, tokenizer: PreTrainedTokenizerBase) -> RenderedChat:
    """Render the messages of a row with the tokenizer's chat template.

    Raises:
        DataError: The tokenizer has no chat template.
        UnusableRowError: A completion holds turns that are not to be learnt, and those to be learnt are not found.
        Exception: The template refuses these messages or tools, with an exception of its own.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "tokenizer.chat_template",
            None,
            "the dataset holds chat messages; take the tokenizer of an instruct model, set tokenizer.chat_template, or "
            "hand in strings",
        )

    def render(messages: Sequence[Message], generation: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=None if pair.tools is None else list(pair.tools),
                tokenize=False,
                add_generation_prompt=generation,
                **clock.template_arguments(tokenizer.chat_template),
                **pair.template_kwargs,
            )
        )

    wholes = tuple(render([*pair.prompt, *side], False) for side in pair.completions)
    scored = tuple(
        _turns_of([*pair.prompt, *side], len(pair.prompt), whole, render, str(tokenizer.eos_token or ""))
        if is_learnt_in_part(side)
        else None
        for side, whole in zip(pair.completions, wholes, strict=True)
    )
    return RenderedChat(pair.row, render(pair.prompt, True), wholes, scored)


def _turns_of(messages: Sequence[Message], first: int, whole: str, render: _Render, eos: str) -> Spans:
    """The span of each turn to be learnt in a rendered conversation, whose completion begins with message `first`.

    A span begins behind the turn's header, where generation would begin, and includes what the template writes to end
    the turn.

    Raises:
        UnusableRowError: A turn cannot be found.
    """
    found: list[tuple[int, int]] = []
    end = 0
    for number in range(first, len(messages)):
        message = messages[number]
        if not is_learnt(message, messages[first]):
            continue
        start = _start_of_turn(message, render(messages[:number], False), render(messages[:number], True), whole)
        if start is None or start < end:
            raise UnusableRowError(TURNS_NOT_FOUND)
        end = _end_of_turn(message, start, render(messages[: number + 1], False), whole, eos) or 0
        if end <= start:
            raise UnusableRowError(TURNS_NOT_FOUND)
        # The first turn begins where the completion does.
        found.append((0 if number == first else start, end))
    return tuple(found)


def _start_of_turn(message: Message, before: str, asked: str, whole: str) -> int | None:
    """Where a turn begins in the whole rendered conversation; None if it cannot be found.

    `before` is the rendering of the messages before the turn, `asked` the same with the generation prompt.
    """
    if whole.startswith(asked):
        return len(asked)
    start = shared_length(asked, whole)
    if start < shared_length(before, asked):
        return None
    # The generation prompt may open a <think> block, and the answer may share its first characters.
    place = whole.find(_says(message), shared_length(before, whole))
    return start if place < 0 else min(start, place)


def _end_of_turn(message: Message, start: int, until: str, whole: str, eos: str) -> int | None:
    """Where a turn that begins at `start` ends in the whole rendered conversation; None if it cannot be found.

    `until` is the rendering of the messages up to this turn.
    """
    endings = [until]
    if eos and until.endswith(eos):
        endings.append(until.removesuffix(eos))  # Phi's template ends a conversation with an EOS of its own.
    for text in endings:
        if whole.startswith(text):
            return len(text)
    # Templates drop the reasoning of a turn that others follow, so that only the turn's end is the same in both.
    said = _says(message)
    for text in endings:
        turn = text[start:]
        kept = next((place for place in range(len(turn)) if whole.startswith(turn[place:], start)), len(turn))
        if said and said in turn[kept:]:
            return start + len(turn) - kept
    return None


def _says(message: Message) -> str:
    """The text of a message without its reasoning; for a message of tool calls alone the name of the first."""
    answer = str(message.get("content", "")).rpartition("</think>")[2].strip()
    for call in () if answer else message.get("tool_calls", ()):
        function = call.get("function", call)
        answer = answer or str(function.get("name", ""))
    return answer
