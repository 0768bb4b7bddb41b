"""Encoder-decoder models (T5, BART): the encoder reads the prompt, the decoder writes each completion.

A prompt and a completion are two sequences here. The decoder's inputs are the model's start token and then the
completion's tokens: input t predicts token t. Completions share their prompt without special attention: the encoder
runs once for each prompt, and all completions attend to the encoder's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from evollm.data.samples import Batch, IntArray
from evollm.models.grouping import padded_groups
from evollm.models.load_balancing import Span
from evollm.models.logprobs import Pieces, linear_head, padded, pieces_of
from evollm.models.readings import LOGPROBS, Reading
from evollm.models.upload import upload_arrays


@dataclass(frozen=True)
class EncoderDecoderLayout:
    """One padded decoder sequence for each completion; one padded encoder sequence for each prompt or each completion.

    Attributes:
        device: Where the network is.
        start: The decoder's first input.
        tiled_head: Apply the head to tiles of the decoder's hidden states; see `evollm.models.head`.
        shared_prompt: Whether the completions of a sample share one encoded prompt; else the model encodes the prompt
            again for each completion.
    """

    own_attention: ClassVar[bool] = True
    device: torch.device
    start: int
    tiled_head: bool
    shared_prompt: bool

    def groups(self, batch: Batch, budget: int, most: int | None) -> list[list[int]]:
        """Passes of samples with similar lengths."""
        counts = np.array([len(sample.completions) for sample in batch])
        longest = np.array([max(map(len, sample.completions)) for sample in batch])
        prompts = batch.prompt_lengths * (1 if self.shared_prompt else counts)
        return padded_groups(np.stack([prompts, counts * longest], axis=1), budget, most)

    def lay_out(self, batch: Batch, members: Sequence[str | None]) -> LaidOutEncoderDecoder:
        """Lay out a batch for passes of these members."""
        del members
        return LaidOutEncoderDecoder(self, batch)


class LaidOutEncoderDecoder:
    """B samples as E encoder sequences and S decoder sequences; see `evollm.models.layouts.layout.LaidOut`.

    Attributes:
        prompt_ids: (E, P) the prompts, padded on the right; E is B if completions share prompts, else S.
        prompt_mask: (E, P) 1 for tokens, 0 for padding.
        decoder_ids: (S, T) the start token and each completion without its last token, padded on the right.
        decoder_mask: (S, T) 1 for tokens, 0 for padding.
        predicting: (C,) indices of the inputs, among the S T of all, that predict a scored token.
        targets: (C,) the scored tokens of all completions.
        rows: (S,) rows of the completions' samples.
    """

    can_stack = True
    attention = ""

    def __init__(self, layout: EncoderDecoderLayout, batch: Batch) -> None:
        self._layout = layout
        self.pieces: Pieces = pieces_of(batch, by_place=True)
        sides = [batch[piece.row].completions[piece.place] for piece in self.pieces]
        rows = range(len(batch)) if layout.shared_prompt else [piece.row for piece in self.pieces]
        first = np.array([layout.start])
        prompts = padded([batch[row].prompt_ids for row in rows])
        decoded = padded([np.concatenate([first, side.ids[:-1]]) for side in sides])
        # Indices rather than a mask, of which a GPU would have to tell the host how many inputs it selects.
        predicting = np.flatnonzero(padded([side.scored for side in sides])[0])
        targets = np.concatenate([side.ids[side.scored] for side in sides])
        arrays = *prompts, *decoded, predicting, targets, np.array([piece.row for piece in self.pieces])
        tables = upload_arrays([array.ravel() for array in arrays], layout.device)
        self.prompt_ids, self.prompt_mask = (table.view(prompts[0].shape) for table in tables[:2])
        self.decoder_ids, self.decoder_mask = (table.view(decoded[0].shape) for table in tables[2:4])
        self.predicting, self.targets, self.rows = tables[4:]

    @property
    def num_tokens(self) -> int:
        """Tokens of a pass of one member, padding included."""
        return self.prompt_ids.numel() + self.decoder_ids.numel()

    def passing(self, num_members: int, *, adapted: bool = True, whole: bool = False) -> AbstractContextManager[None]:
        """An empty context: this layout does not change the network."""
        del num_members, adapted, whole
        return nullcontext()

    def read(self, network: Any, num_members: int, reading: Reading = LOGPROBS) -> Tensor:
        """(M, C) log-probs, or what else `reading` reads; several members need a shared prompt."""
        inputs = {
            "decoder_input_ids": self.decoder_ids.repeat(num_members, 1),
            "decoder_attention_mask": self.decoder_mask.repeat(num_members, 1),
            "use_cache": False,
            **self._encoder_inputs(network, num_members),
        }
        targets = self.targets.repeat(num_members)
        if not self._layout.tiled_head:
            return reading.of_logits(self._predicting(network(**inputs).logits), targets).view(num_members, -1)
        head = linear_head(network)
        with _identity(head):
            hidden = self._predicting(network(**inputs).logits)  # (M C, D)
        return reading.of_hidden(hidden, head, targets).view(num_members, -1)

    def _predicting(self, outputs: Tensor) -> Tensor:
        """(M S, T, D) -> (M C, D), the outputs that predict a scored token."""
        of_members = outputs.reshape(-1, self.decoder_ids.numel(), outputs.shape[-1])
        return of_members.index_select(1, self.predicting).flatten(0, 1)

    def _encoder_inputs(self, network: Any, num_members: int) -> dict[str, Any]:
        """The encoder's inputs for each decoder sequence, or the shared output of one encoder pass."""
        mask = self.prompt_mask.repeat(num_members, 1)
        inputs = {"input_ids": self.prompt_ids.repeat(num_members, 1), "attention_mask": mask}
        if not self._layout.shared_prompt:
            return inputs
        encoded = network.get_encoder()(**inputs).last_hidden_state  # (M B, P, D)

        def for_completions(rows: Tensor) -> Tensor:
            """(M B, ...) -> (M S, ...), the prompt of each completion."""
            blocks = rows.view(num_members, -1, *rows.shape[1:])
            num_prompts = blocks.shape[1]
            # The first completions use all prompts in order; only further completions need index_select.
            return torch.cat([blocks, blocks.index_select(1, self.rows[num_prompts:])], dim=1).flatten(0, 1)

        outputs = BaseModelOutput(last_hidden_state=for_completions(encoded))
        return {"encoder_outputs": outputs, "attention_mask": for_completions(mask)}

    def spans(self) -> list[Span]:
        """Not needed: `evollm.models.load_balancing` refuses encoder-decoder models."""
        raise NotImplementedError


def lone_encoder_decoder_logprobs(
    network: Any, prompt: IntArray, completion: IntArray, device: torch.device, reading: Reading = LOGPROBS
) -> Tensor:
    """(C,) log-probs of a completion's tokens, by a pass in which the network gets only token ids.

    The network derives the decoder's inputs from the completion.
    """
    ids, labels = (torch.from_numpy(part)[None].to(device) for part in (prompt, completion))
    return reading.of_logits(network(input_ids=ids, labels=labels, use_cache=False).logits, labels)[0]


@contextmanager
def _identity(head: nn.Module) -> Iterator[None]:
    """Make the head the identity inside the block, so that `logits` are the head's inputs, with the model's scaling."""
    # Libraries such as accelerate wrap a module by setting `forward` on the instance.
    own = head.__dict__.get("forward")
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
