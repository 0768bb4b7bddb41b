"""Log-probabilities of completions: the plain layout, which every faster one has to reproduce."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from evollm.data.batch import IntArray, PreferenceBatch


@dataclass(frozen=True)
class PairLogprobs:
    """Summed log-probabilities of B pairs' completions, in float32 or wider.

    Attributes:
        chosen: (B,) log pi(chosen | prompt), in nats.
        rejected: (B,) log pi(rejected | prompt), in nats.
    """

    chosen: Tensor
    rejected: Tensor

    @classmethod
    def concatenate(cls, parts: list[PairLogprobs]) -> PairLogprobs:
        """Join the pairs of several batches in order."""
        return cls(torch.cat([part.chosen for part in parts]), torch.cat([part.rejected for part in parts]))


@dataclass(frozen=True)
class SequenceLayout:
    """Both sides of B pairs as 2B sequences: the chosen ones first, padded on the right.

    Attributes:
        input_ids: (2B, T) token ids.
        attention_mask: (2B, T) 1 where there is a token.
        completion_mask: (2B, T - 1) True where position t predicts a completion's token t + 1.
    """

    input_ids: IntArray
    attention_mask: IntArray
    completion_mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def two_sequences(batch: PreferenceBatch) -> SequenceLayout:
    """Lay each pair out as two sequences, prompt + chosen and prompt + rejected."""
    pairs = [batch.pair(row) for row in range(len(batch))]
    sequences = [np.concatenate([pair.prompt_ids, pair.chosen_ids]) for pair in pairs]
    sequences += [np.concatenate([pair.prompt_ids, pair.rejected_ids]) for pair in pairs]
    lengths = np.array([len(sequence) for sequence in sequences])
    prompt_lengths = np.tile(batch.prompt_lengths, 2)

    input_ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    columns = np.arange(input_ids.shape[1])
    targets = columns[1:]
    return SequenceLayout(
        input_ids=input_ids,
        attention_mask=(columns < lengths[:, None]).astype(np.int64),
        completion_mask=(targets >= prompt_lengths[:, None]) & (targets < lengths[:, None]),
    )


def completion_logprobs(
    network: nn.Module, batch: PreferenceBatch, device: torch.device, *, explicit_positions: bool = True
) -> PairLogprobs:
    """Sum the log-probabilities of each completion's tokens given all tokens before them.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t), the quantity of DPO (arXiv 2305.18290, equation 7). Chosen and
    rejected go through one forward pass.

    Args:
        network: A causal language model of transformers; its active adapters decide whose log-probs these are.
        batch: B pairs.
        device: Where the network is.
        explicit_positions: Pass `position_ids` rather than leave them to the model.

    Returns:
        Two sums for each pair; differentiable where gradients are enabled.
    """
    layout = two_sequences(batch)
    first, last = _predicting_columns(layout)
    input_ids = torch.from_numpy(layout.input_ids).to(device)
    parameters = inspect.signature(network.forward).parameters
    inputs: dict[str, object] = {
        "input_ids": input_ids,
        "attention_mask": torch.from_numpy(layout.attention_mask).to(device),
        "use_cache": False,
    }
    if explicit_positions and "position_ids" in parameters:
        inputs["position_ids"] = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = torch.arange(first, last, device=device)
        logits = network(**inputs).logits  # (2B, last - first, V)
    else:
        logits = network(**inputs).logits[:, first:last]

    mask = torch.from_numpy(layout.completion_mask[:, first:last]).to(device)
    token_logprobs = _token_logprobs(logits, input_ids[:, first + 1 : last + 1])
    # where() rather than a product: an infinite log-prob in the padding must not turn the sum into NaN.
    sums = torch.where(mask, token_logprobs, token_logprobs.new_zeros(())).sum(dim=1)
    return PairLogprobs(chosen=sums[: len(batch)], rejected=sums[len(batch) :])


def _predicting_columns(layout: SequenceLayout) -> tuple[int, int]:
    """First and one past the last column that predicts a completion token in any row."""
    columns = np.flatnonzero(layout.completion_mask.any(axis=0))
    return int(columns[0]), int(columns[-1]) + 1


def _token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log softmax(logits) at the targets, (B, T, V) and (B, T) -> (B, T), at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
