"""What is read off a pass of the network at the positions that predict scored tokens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from evollm.models.head import divergences_of, token_divergences, token_logprobs
from evollm.models.logprobs import token_logprobs_of


class Reading(Protocol):
    """From hidden states and a head, or from logits where the head is not applied in tiles, to a number per token."""

    def of_hidden(self, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        """(n, D) hidden states and (n,) tokens -> (n,)."""

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(..., V) logits and (...) tokens -> (...)."""


class LogprobReading:
    """The log-probs of the tokens.

    Args:
        temperature: Divides the logits.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self._temperature = temperature

    def of_hidden(self, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        """(n,) log-probs, differentiable."""
        return token_logprobs(hidden, head.weight, head.bias, targets, self._temperature)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(...) log-probs, differentiable."""
        return token_logprobs_of(logits, targets, self._temperature)


LOGPROBS = LogprobReading()


class RecordedStates:
    """Keeps what a pass of the reference gives, in the order of the calls; the numbers per token are zeros.

    Attributes:
        states: (n, D) hidden states or (..., V) logits of each call.
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def of_hidden(self, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        """Keep the hidden states."""
        del head
        return self.of_logits(hidden, targets)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Keep the logits."""
        self.states.append(logits)
        return logits.new_zeros(targets.shape)


class DivergenceReading:
    """KL(pi || ref) of the next token, for passes that make the same calls as the reference's pass.

    Args:
        reference: The recorded pass of the reference, of one member.
    """

    def __init__(self, reference: RecordedStates) -> None:
        self._states = iter(reference.states)

    def of_hidden(self, hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
        """(n,) divergences in nats; n is a multiple of the reference's, one block for each member."""
        del targets
        reference = next(self._states)
        blocks = reference.repeat(len(hidden) // len(reference), 1)
        return token_divergences(hidden, blocks, head.weight, head.bias)

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(...) divergences in nats; the first dimension is a multiple of the reference's."""
        del targets
        reference = next(self._states)
        blocks = reference.repeat(len(logits) // len(reference), *[1] * (reference.ndim - 1))
        return divergences_of(logits, blocks)
