"""Log-probs of completions: by the plain layout, which every faster one has to reproduce, and by packed pairs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evollm.data.batch import IntArray, PreferenceBatch
from evollm.models.head import token_logprobs
from evollm.models.packing import PackedPairs


@dataclass(frozen=True)
class PairLogprobs:
    """Summed log-probabilities of B pairs' completions, in float32 or wider.

    Attributes:
        chosen: (B,) log pi(chosen | prompt), in nats.
        rejected: (B,) log pi(rejected | prompt), in nats; 0 where there is no rejected side.
    """

    chosen: Tensor
    rejected: Tensor

    @classmethod
    def join(cls, parts: Sequence[PairLogprobs], rows: Sequence[Sequence[int]]) -> PairLogprobs:
        """Put the pairs of several parts, each with the rows that it holds, into the order of the rows."""
        order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable")).to(parts[0].chosen.device)
        return cls(
            torch.cat([part.chosen for part in parts])[order], torch.cat([part.rejected for part in parts])[order]
        )


@dataclass(frozen=True)
class SequenceLayout:
    """The sides of B pairs as S sequences: the B chosen ones, then those rejected ones that are not empty.

    Attributes:
        input_ids: (S, T) token ids, padded on the right.
        attention_mask: (S, T) 1 where there is a token.
        completion_mask: (S, T - 1) True where position t predicts a completion's token t + 1.
        rejected_rows: (S - B,) the pairs that the rejected sequences belong to.
    """

    input_ids: IntArray
    attention_mask: IntArray
    completion_mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    rejected_rows: IntArray


def two_sequences(batch: PreferenceBatch) -> SequenceLayout:
    """Lay each pair out as two sequences, prompt + chosen and prompt + rejected; an SFT example as one."""
    pairs = [batch.pair(row) for row in range(len(batch))]
    rejected_rows = np.flatnonzero(batch.rejected_lengths)
    sequences = [np.concatenate([pair.prompt_ids, pair.chosen_ids]) for pair in pairs]
    sequences += [np.concatenate([pairs[row].prompt_ids, pairs[row].rejected_ids]) for row in rejected_rows]
    lengths = np.array([len(sequence) for sequence in sequences])
    prompt_lengths = np.concatenate([batch.prompt_lengths, batch.prompt_lengths[rejected_rows]])

    input_ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    columns = np.arange(input_ids.shape[1])
    targets = columns[1:]
    return SequenceLayout(
        input_ids=input_ids,
        attention_mask=(columns < lengths[:, None]).astype(np.int64),
        completion_mask=(targets >= prompt_lengths[:, None]) & (targets < lengths[:, None]),
        rejected_rows=rejected_rows,
    )


def completion_logprobs(
    network: nn.Module,
    batch: PreferenceBatch,
    device: torch.device,
    *,
    explicit_positions: bool = True,
    tiled_head: bool = False,
) -> PairLogprobs:
    """Sum the log-probabilities of each completion's tokens given all tokens before them.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t), the quantity of DPO (arXiv 2305.18290, equation 7). Chosen and
    rejected go through one forward pass.

    Args:
        network: A causal language model of transformers; its active adapters decide whose log-probs these are.
        batch: B pairs.
        device: Where the network is.
        explicit_positions: Pass `position_ids` rather than leave them to the model.
        tiled_head: Apply the head to tiles of the completions' hidden states; see `evollm.models.head`.

    Returns:
        Two sums for each pair; differentiable where gradients are enabled.
    """
    layout = two_sequences(batch)
    input_ids = torch.from_numpy(layout.input_ids).to(device)
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": torch.from_numpy(layout.attention_mask).to(device),
        "use_cache": False,
    }
    if explicit_positions and "position_ids" in inspect.signature(network.forward).parameters:
        inputs["position_ids"] = torch.arange(input_ids.shape[1], device=device).expand_as(input_ids)

    mask = torch.from_numpy(layout.completion_mask).to(device)
    if tiled_head:
        hidden = _hidden_states(network, inputs)[:, :-1][mask]  # (C, D)
        head = linear_head(network)
        found = token_logprobs(hidden, head.weight, head.bias, input_ids[:, 1:][mask])
        sizes = layout.completion_mask.sum(axis=1).tolist()
        sums = torch.stack([part.sum() for part in found.split(sizes)])
    else:
        columns = torch.from_numpy(np.flatnonzero(layout.completion_mask.any(axis=0))).to(device)
        token_sums = target_logprobs(_logits(network, inputs, columns), input_ids[:, columns + 1])
        # where() rather than a product: an infinite log-prob in the padding must not turn the sum into NaN.
        sums = torch.where(mask[:, columns], token_sums, token_sums.new_zeros(())).sum(dim=1)
    rejected = sums.new_zeros(len(batch))
    rejected = rejected.index_copy(0, torch.from_numpy(layout.rejected_rows).to(device), sums[len(batch) :])
    return PairLogprobs(chosen=sums[: len(batch)], rejected=rejected)


def packed_logprobs(
    network: nn.Module, packed: PackedPairs, num_members: int, *, tiled_head: bool
) -> list[PairLogprobs]:
    """The same for packed pairs and each of M members, whose rows have been routed.

    Returns:
        (B,) sums for each member.
    """
    inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
    if tiled_head:
        hidden = _hidden_states(network, inputs).index_select(1, packed.predicting)  # (M, C, D)
        head = linear_head(network)
        targets = packed.targets.repeat(num_members)
        found = token_logprobs(hidden.flatten(0, 1), head.weight, head.bias, targets).view(num_members, -1)
    else:
        logits = _logits(network, inputs, packed.predicting)  # (M, C, V)
        found = target_logprobs(logits, packed.targets.expand(num_members, -1))
    sizes = [size for pair in packed.lengths for size in (pair.chosen, pair.rejected)]
    # Sums of slices, not an index_add: that adds in any order on a GPU.
    sums = torch.stack([part.sum(dim=1) for part in found.split(sizes, dim=1)], dim=1)  # (M, 2B)
    return [PairLogprobs(chosen=row[0::2], rejected=row[1::2]) for row in sums]


def _hidden_states(network: Any, inputs: dict[str, Any]) -> Tensor:
    """(rows, T, D) the last hidden states, as the head gets them."""
    hidden = network.base_model(**inputs).last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden


def linear_head(network: Any) -> nn.Linear:
    """The head as a plain linear layer; an adapter on it, for one, is none.

    Raises:
        TypeError: It is something else.
    """
    head = network.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError(f"the head is a {type(head).__name__}")
    return head


def _logits(network: nn.Module, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """(rows, columns, V) the network's own logits at these columns."""
    if "logits_to_keep" not in inspect.signature(network.forward).parameters:
        logits = network(**inputs).logits[:, columns]
    else:
        logits = network(**inputs, logits_to_keep=columns).logits
    assert isinstance(logits, Tensor)
    return logits


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log softmax(logits) at the targets, (B, T, V) and (B, T) -> (B, T), at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
