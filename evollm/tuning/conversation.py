"""A conversation with the base and one with the best agent of a run, from the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evollm.tuning.winner import Winner

Messages = list[dict[str, str]]
# Messages of a turn: a question and its answer.
_TURN = 2


@dataclass(frozen=True)
class Turn:
    """The answers to a prompt.

    Attributes:
        answers: Of the base, and of the agent.
        forgotten: Messages that were left out at the beginning, since the conversation is longer than the context.
    """

    answers: tuple[str, str]
    forgotten: int = 0


class Conversation:
    """Asks the base and the agent, and keeps the turns of both.

    Args:
        winner: Base and agent.
        max_new_tokens: Longest answer, in tokens.
        uses_template: Whether a prompt is a user's message for the chat template, not a text to be continued.
        keeps: Whether a prompt follows the turns before it. Never without the template.
    """

    def __init__(self, winner: Winner, max_new_tokens: int, *, uses_template: bool, keeps: bool) -> None:
        self.uses_template = uses_template
        self.keeps = keeps and uses_template
        self._winner = winner
        self._max_new_tokens = max_new_tokens
        # The messages of the base's conversation, and of the agent's.
        self._said: tuple[Messages, Messages] = ([], [])

    def clear(self) -> None:
        """Begin anew."""
        self._said = ([], [])

    def ask(self, prompt: str) -> Turn:
        """Both answers to a prompt.

        Raises:
            ConfigurationError: The prompt is too long, or the chat template refuses the conversation, or there is none.
        """
        ask, longest = self._winner.answer, self._max_new_tokens
        if not self.uses_template:
            return Turn((ask(prompt, longest, tuned=False), ask(prompt, longest, tuned=True)))
        answers, forgotten = [], 0
        for is_tuned, said in zip((False, True), self._said, strict=True):
            messages = [*said, {"role": "user", "content": prompt}]
            first = self._first_that_fits(messages)
            answer = ask(messages[first:], longest, tuned=is_tuned)
            forgotten = max(forgotten, first)
            answers.append(answer)
            if self.keeps:
                said[:] = [*messages[first:], {"role": "assistant", "content": answer}]
        return Turn((answers[0], answers[1]), forgotten)

    def _first_that_fits(self, messages: Sequence[dict[str, str]]) -> int:
        """The index of the first message from which conversation and answer fit into the context."""
        limit = self._winner.agent.base.max_positions
        first = 0
        while limit is not None and first + _TURN < len(messages):
            if len(self._winner.prompt_ids(messages[first:])) + self._max_new_tokens <= limit:
                break
            first += _TURN
        return first
