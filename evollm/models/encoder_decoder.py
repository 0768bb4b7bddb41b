"""Encoder-decoder models (T5, BART): the encoder reads the prompt, the decoder writes each side.

A prompt and a completion are two sequences here. The decoder's first input is the model's own start token, and from
then on it is given the completion's tokens: input t predicts token t. So a pair needs no special attention to share
its prompt: the encoder runs once for each prompt, and both sides attend to what it gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from evollm.data.samples import Batch, BoolArray, IntArray
from evollm.errors import ConfigurationError
from evollm.models.head import token_logprobs
from evollm.models.logprobs import PairLogprobs, linear_head, shorter_lengths, sums_by_pair, target_logprobs


def is_encoder_decoder(config: Any) -> bool:
    """Whether a configuration is that of an encoder-decoder model."""
    return bool(getattr(config, "is_encoder_decoder", False))


def start_token(network: Any) -> int:
    """The id of the decoder's first input.

    Raises:
        ConfigurationError: The model names none.
    """
    for config in (network.config, getattr(network, "generation_config", None)):
        found = getattr(config, "decoder_start_token_id", None)
        if found is not None:
            return int(found)
    fix = "the decoder needs a first input: set model.config.decoder_start_token_id (T5's is its pad_token_id)"
    raise ConfigurationError("actor_network.config.decoder_start_token_id", None, fix)


def longest_side(batch: Batch) -> int:
    """Tokens of the longest sequence that the encoder or the decoder gets."""
    return int(max(batch.prompt_lengths.max(), batch.chosen_lengths.max(), batch.rejected_lengths.max()))


def padded_lengths(batch: Batch, *, shared_prompt: bool) -> IntArray:
    """(B, 2) tokens that each pair has in the encoder and in the decoder, its two sides padded to the longer one."""
    sides = 1 + (batch.rejected_lengths > 0)
    prompts = batch.prompt_lengths * (1 if shared_prompt else sides)
    return np.stack([prompts, sides * np.maximum(batch.chosen_lengths, batch.rejected_lengths)], axis=1)


@dataclass(frozen=True)
class EncodedPairs:
    """B pairs as E sequences of the encoder and S of the decoder: B chosen sides, then the rejected sides there are.

    Attributes:
        prompt_ids: (E, P) the prompts, padded on the right; E is B where the sides share them, else S.
        prompt_mask: (E, P) 1 where there is a token.
        decoder_ids: (S, T) the start token and each side without its last token, padded on the right.
        decoder_mask: (S, T) 1 where there is a token.
        predicting: (S, T) True where a token predicts a scored token of the side.
        targets: (C,) the scored tokens of all sides.
        sizes: S numbers of them.
        shorter: S numbers of the shorter sides of the pairs that they belong to.
        rejected_rows: (S - B,) the pairs that the rejected sides belong to.
        num_pairs: B.
        shared_prompt: Whether the two sides of a pair share one encoded prompt.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    decoder_ids: Tensor
    decoder_mask: Tensor
    predicting: Tensor
    targets: Tensor
    sizes: tuple[int, ...]
    shorter: tuple[int, ...]
    rejected_rows: Tensor
    num_pairs: int
    shared_prompt: bool

    @classmethod
    def of(cls, batch: Batch, device: torch.device, start: int, *, shared_prompt: bool) -> EncodedPairs:
        """Lay out a batch on a device; `start` is the decoder's first input."""
        rejected_rows = np.flatnonzero(batch.rejected_lengths)
        completions = [sample.completions[0] for sample in batch]
        completions += [batch[row].completions[1] for row in rejected_rows.tolist()]
        sides, masks = [side.ids for side in completions], [side.scored for side in completions]
        prompts = [sample.prompt_ids for sample in batch]
        if not shared_prompt:
            prompts += [batch[row].prompt_ids for row in rejected_rows.tolist()]
        first, shorter = np.array([start]), shorter_lengths(batch)
        prompt_ids, prompt_mask = _padded(prompts, device)
        decoder_ids, decoder_mask = _padded([np.concatenate([first, side[:-1]]) for side in sides], device)
        return cls(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            decoder_ids=decoder_ids,
            decoder_mask=decoder_mask,
            predicting=_padded(masks, device)[0].bool(),
            targets=torch.from_numpy(np.concatenate(sides)[np.concatenate(masks)]).to(device),
            sizes=tuple(int(mask.sum()) for mask in masks),
            shorter=(*shorter.tolist(), *shorter[rejected_rows].tolist()),
            rejected_rows=torch.from_numpy(rejected_rows).to(device),
            num_pairs=len(batch),
            shared_prompt=shared_prompt,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of a pass over these pairs, padding included."""
        return self.prompt_ids.numel() + self.decoder_ids.numel()


def encoder_decoder_logprobs(
    network: Any,
    pairs: EncodedPairs,
    num_members: int = 1,
    *,
    tiled_head: bool = False,
    up_to_shorter: bool = False,
) -> list[PairLogprobs]:
    """Sum the log-probabilities of each side's scored tokens given the prompt and all tokens of the side before them.

    Args:
        network: A sequence-to-sequence language model of transformers.
        pairs: B pairs. Without a shared prompt each side is a plain sequence of its own, by the model's own pass.
        num_members: M members, to whose adapters blocks of rows have been routed; 1 for several needs a shared prompt.
        tiled_head: Apply the head to tiles of the decoder's hidden states; see `evollm.models.head`.
        up_to_shorter: Give the sums up to the shorter side's length too.

    Returns:
        (B,) sums for each member; differentiable where gradients are enabled.
    """
    inputs = {
        "decoder_input_ids": pairs.decoder_ids.repeat(num_members, 1),
        "decoder_attention_mask": pairs.decoder_mask.repeat(num_members, 1),
        "use_cache": False,
        **_encoder_inputs(network, pairs, num_members),
    }
    predicting = pairs.predicting.repeat(num_members, 1)  # (M S, T)
    targets = pairs.targets.repeat(num_members)
    if tiled_head:
        head = linear_head(network)
        with _identity(head):
            hidden = network(**inputs).logits[predicting]  # (M C, D)
        found = token_logprobs(hidden, head.weight, head.bias, targets)
    else:
        found = target_logprobs(network(**inputs).logits[predicting], targets)
    parts = found.view(num_members, -1).split(pairs.sizes, dim=1)
    columns = _by_pair(torch.stack([part.sum(dim=1) for part in parts], dim=1), pairs)
    if up_to_shorter:
        first = [part[:, :length].sum(dim=1) for part, length in zip(parts, pairs.shorter, strict=True)]
        columns += _by_pair(torch.stack(first, dim=1), pairs)
    return [PairLogprobs.of(member) for member in zip(*columns, strict=True)]


def lone_encoder_decoder_logprobs(
    network: Any, batch: Batch, device: torch.device, *, up_to_shorter: bool = False
) -> PairLogprobs:
    """The same, each side in a pass of its own in which the network gets nothing but its token ids.

    The network itself makes the decoder's inputs of the side: see `evollm.models.logprobs.lone_logprobs`.
    """

    def token_sums(prompt: IntArray, side: IntArray) -> Tensor:
        ids, labels = (torch.from_numpy(part)[None].to(device) for part in (prompt, side))
        return target_logprobs(network(input_ids=ids, labels=labels, use_cache=False).logits, labels)[0]

    return sums_by_pair(batch, token_sums, up_to_shorter=up_to_shorter)


def _by_pair(sums: Tensor, pairs: EncodedPairs) -> list[Tensor]:
    """From (M, S) sums of sides to (M, B) of chosen and of rejected sides, 0 where there is none."""
    chosen, rejected = sums.split([pairs.num_pairs, len(pairs.rejected_rows)], dim=1)
    return [chosen, sums.new_zeros(chosen.shape).index_copy(1, pairs.rejected_rows, rejected)]


def _encoder_inputs(network: Any, pairs: EncodedPairs, num_members: int) -> dict[str, Any]:
    """What the decoder attends to: the prompts of its rows, or what the encoder made of them once."""
    mask = pairs.prompt_mask.repeat(num_members, 1)
    inputs = {"input_ids": pairs.prompt_ids.repeat(num_members, 1), "attention_mask": mask}
    if not pairs.shared_prompt:
        return inputs
    encoded = network.get_encoder()(**inputs).last_hidden_state  # (M B, P, D)

    def for_sides(rows: Tensor) -> Tensor:
        """From (M B, ...) to (M S, ...)."""
        blocks = rows.view(num_members, pairs.num_pairs, *rows.shape[1:])
        return torch.cat([blocks, blocks.index_select(1, pairs.rejected_rows)], dim=1).flatten(0, 1)

    return {"encoder_outputs": BaseModelOutput(last_hidden_state=for_sides(encoded)), "attention_mask": for_sides(mask)}


def _padded(sequences: Sequence[IntArray | BoolArray], device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, L) ids and mask of n sequences."""
    lengths = np.array([len(sequence) for sequence in sequences])
    ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


@contextmanager
def _identity(head: nn.Module) -> Iterator[None]:
    """The head gives back what it gets, so that the model's logits are its input, scaled as the model scales it."""
    # An instance has a forward pass of its own where a library has wrapped it.
    own = head.__dict__.get("forward")
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
