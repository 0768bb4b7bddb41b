"""Chat messages -> text, exactly as the model's chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evollm.data import clock
from evollm.data.cells import Message
from evollm.data.rows import ChatPair, TextPair
from evollm.data.sources import shared_length
from evollm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RenderedChat:
    """Conversations as the chat template writes them, special tokens included: nothing is added to their tokens.

    Attributes:
        row: Position of the row in the user's dataset.
        prompt: The messages before the completion, and what opens an answer: what the model is given at inference.
        wholes: The one or two whole conversations, that of the chosen side first.
    """

    row: int
    prompt: str
    wholes: tuple[str, ...]

    @property
    def given(self) -> str:
        """What all conversations begin with and the prompt too."""
        return self.prompt[: shared_length(self.prompt, *self.wholes)]

    def apart(self) -> TextPair:
        """Prompt and completions by themselves, for a model to which they are two sequences."""
        given = self.given
        return TextPair(self.row, given, *(whole[len(given) :] for whole in self.wholes))


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the tokenizer's chat template, of all of them if there are several; "" if there is none."""
    template = tokenizer.chat_template
    return "\n".join(map(str, template.values())) if isinstance(template, Mapping) else str(template or "")


def render_chat(pair: ChatPair, tokenizer: PreTrainedTokenizerBase) -> RenderedChat:
    """Write messages out as the model's chat template has them.

    Raises:
        DataError: The tokenizer has no chat template.
        Exception: The template does not take these messages or tools.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "tokenizer.chat_template",
            None,
            "the dataset holds chat messages; take the tokenizer of an instruct model, set tokenizer.chat_template, or "
            "hand in strings",
        )

    def render(messages: Sequence[Message], generation: bool = False) -> str:
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

    wholes = tuple(render([*pair.prompt, *side]) for side in pair.completions)
    return RenderedChat(pair.row, render(pair.prompt, generation=True), wholes)
