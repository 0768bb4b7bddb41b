"""One padded sequence prompt + completion for each completion: the plain layout, for every causal model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from evollm.data.samples import Batch, BoolArray, IntArray
from evollm.models.grouping import padded_groups
from evollm.models.load_balancing import Span, padded_spans
from evollm.models.logprobs import (
    CompletionSums,
    Pieces,
    TokenLogprobs,
    hidden_states,
    linear_head,
    logits_at,
    padded,
    pieces_of,
)
from evollm.models.readings import LOGPROBS, Reading
from evollm.models.upload import upload_arrays


@dataclass(frozen=True)
class PaddedSequences:
    """The completions of B samples as S sequences: all first completions, then all second ones.

    Attributes:
        input_ids: (S, T) token ids, padded on the right.
        attention_mask: (S, T) 1 for tokens, 0 for padding.
        completion_mask: (S, T - 1) True where position t predicts a scored token t + 1.
        pieces: The S completions of scored tokens, in the order of the sequences.
    """

    input_ids: IntArray
    attention_mask: IntArray
    completion_mask: BoolArray
    pieces: Pieces

    @classmethod
    def of(cls, batch: Batch) -> PaddedSequences:
        """Lay out a batch."""
        pieces = pieces_of(batch, by_place=True)
        sides = [(batch[piece.row].prompt_ids, batch[piece.row].completions[piece.place]) for piece in pieces]
        input_ids, attention_mask = padded([np.concatenate([prompt, side.ids]) for prompt, side in sides])
        scored, _ = padded([np.concatenate([np.zeros(len(prompt)), side.scored]) for prompt, side in sides])
        return cls(input_ids, attention_mask, scored[:, 1:].astype(np.bool_), pieces)


def completion_logprobs(
    network: nn.Module,
    batch: Batch,
    device: torch.device,
    *,
    explicit_positions: bool = True,
    tiled_head: bool = False,
) -> CompletionSums:
    """Sum the log-probabilities of each completion's scored tokens given all tokens before them.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t), the quantity of DPO (arXiv 2305.18290, equation 7). All
    completions share one forward pass.

    Args:
        network: A causal language model of transformers; its active adapters decide whose log-probs these are.
        batch: B samples.
        device: Where the network is.
        explicit_positions: Pass `position_ids` rather than leave them to the model.
        tiled_head: Apply the head to tiles of the completions' hidden states; see `evollm.models.head`.

    Returns:
        A sum for each completion; differentiable where gradients are enabled.
    """
    laid = LaidOutPlain(PlainLayout(device, tiled_head, explicit_positions), batch)
    return TokenLogprobs(laid.read(network, 1), laid.pieces).of(0).sums()


@dataclass(frozen=True)
class PlainLayout:
    """One padded sequence for each completion; one member in a pass.

    Attributes:
        device: Where the network is.
        tiled_head: Apply the head to tiles of the hidden states; see `evollm.models.head`.
        explicit_positions: Pass `position_ids` rather than leave them to the model.
    """

    own_attention: ClassVar[bool] = True
    device: torch.device
    tiled_head: bool
    explicit_positions: bool

    def groups(self, batch: Batch, budget: int, most: int | None) -> list[list[int]]:
        """Passes of samples with similar lengths."""
        sequences = [len(sample.completions) * sample.longest_sequence for sample in batch]
        return padded_groups(sequences, budget, most)

    def lay_out(self, batch: Batch, members: Sequence[str | None]) -> LaidOutPlain:
        """Lay out a batch; the members do not matter."""
        del members
        return LaidOutPlain(self, batch)


class LaidOutPlain:
    """Samples laid out as padded sequences; see `evollm.models.layouts.layout.LaidOut`."""

    can_stack = False
    attention = ""

    def __init__(self, layout: PlainLayout, batch: Batch) -> None:
        self._layout = layout
        self._sequences = PaddedSequences.of(batch)
        self.num_tokens = self._sequences.input_ids.size

    @property
    def pieces(self) -> Pieces:
        """All first completions, then all second ones."""
        return self._sequences.pieces

    def passing(self, num_members: int, *, adapted: bool = True, whole: bool = False) -> AbstractContextManager[None]:
        """An empty context: this layout does not change the network."""
        del num_members, adapted, whole
        return nullcontext()

    def read(self, network: Any, num_members: int, reading: Reading = LOGPROBS) -> Tensor:
        """(1, C) log-probs, or what else `reading` reads."""
        assert num_members == 1
        ids, scored = self._sequences.input_ids, self._sequences.completion_mask
        columns = np.flatnonzero(scored.any(axis=0))
        # Indices of the C tokens rather than masks, of which a GPU would have to tell the host how many they select.
        sequence, position = np.nonzero(scored)
        if self._layout.tiled_head:
            index, targets = sequence * ids.shape[1] + position, ids[sequence, position + 1]
        else:
            index, targets = sequence * len(columns) + np.searchsorted(columns, position), ids[:, columns + 1]
        arrays = [array.ravel() for array in (ids, self._sequences.attention_mask, index, targets, columns)]
        input_ids, attention_mask, kept, wanted, at = upload_arrays(arrays, self._layout.device)
        input_ids, attention_mask = input_ids.view(ids.shape), attention_mask.view(ids.shape)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self._layout.explicit_positions and "position_ids" in inspect.signature(network.forward).parameters:
            inputs["position_ids"] = torch.arange(ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if self._layout.tiled_head:
            hidden = hidden_states(network, inputs).flatten(0, 1).index_select(0, kept)  # (C, D)
            return reading.of_hidden(hidden, linear_head(network), wanted).unsqueeze(0)
        found = reading.of_logits(logits_at(network, inputs, at), wanted.view(targets.shape))
        return found.flatten().index_select(0, kept).unsqueeze(0)

    def spans(self) -> list[Span]:
        """For each sequence a span of its tokens and a span of its padding."""
        lengths = self._sequences.attention_mask.sum(axis=1).tolist()
        parts = zip(self.pieces, lengths, strict=True)
        return [span for piece, length in parts for span in padded_spans(piece.row, length, max(lengths))]


def lone_logprobs(
    network: Any, prompt: IntArray, completion: IntArray, device: torch.device, reading: Reading = LOGPROBS
) -> Tensor:
    """(C,) log-probs of a completion's tokens, by a pass in which the network gets only the sequence's token ids."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]))[None].to(device)
    columns = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1, device=device)
    logits = logits_at(network, {"input_ids": ids, "use_cache": False}, columns)
    return reading.of_logits(logits, torch.from_numpy(completion)[None].to(device))[0]
