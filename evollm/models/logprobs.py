"""Log-probs of completions: by the plain layout, which every faster one has to reproduce, and by packed pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evollm.data.samples import Batch, IntArray
from evollm.models.head import token_logprobs
from evollm.models.packing import PackedSamples


@dataclass(frozen=True)
class PairLogprobs:
    """Summed log-probabilities of B pairs' completions, in float32 or wider.

    Attributes:
        chosen: (B,) log pi(chosen | prompt), in nats.
        rejected: (B,) log pi(rejected | prompt), in nats; 0 where there is no rejected side.
        up_to_shorter: The same sums over the first tokens of each side, as many as the pair's shorter side has; None
            unless they were asked for.
        loads: (B, 2, E) what each pair adds to the loads of experts, None unless it was asked for; see
            `evollm.models.load_balancing`.
    """

    chosen: Tensor
    rejected: Tensor
    up_to_shorter: PairLogprobs | None = None
    loads: Tensor | None = None

    @property
    def columns(self) -> list[Tensor]:
        """All sums: two, or four with those up to the shorter side's length."""
        return [self.chosen, self.rejected, *(self.up_to_shorter.columns if self.up_to_shorter else ())]

    @classmethod
    def of(cls, columns: Sequence[Tensor], loads: Tensor | None = None) -> PairLogprobs:
        """From the `columns` of another one, and its loads."""
        return cls(columns[0], columns[1], cls.of(columns[2:]) if len(columns) > 2 else None, loads)  # noqa: PLR2004

    @property
    def tensors(self) -> list[Tensor]:
        """All sums, and the loads where there are any."""
        return [*self.columns, *([] if self.loads is None else [self.loads])]

    def like(self, tensors: Sequence[Tensor]) -> PairLogprobs:
        """The same with other `tensors`."""
        count = len(self.columns)
        return PairLogprobs.of(tensors[:count], *tensors[count:])

    @classmethod
    def join(cls, parts: Sequence[PairLogprobs], rows: Sequence[Sequence[int]]) -> PairLogprobs:
        """Put the pairs of several parts, each with the rows that it holds, into the order of the rows."""
        order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable")).to(parts[0].chosen.device)
        tensors = zip(*(part.tensors for part in parts), strict=True)
        return parts[0].like([torch.cat(column)[order] for column in tensors])

    def with_rows(self, rows: Sequence[int], other: PairLogprobs) -> PairLogprobs:
        """The same with the pairs of another one, in its order, at these rows."""
        places = torch.tensor(rows, device=self.chosen.device)
        columns = zip(self.columns, other.columns, strict=True)
        return PairLogprobs.of([column.index_copy(0, places, part) for column, part in columns])

    def weighted(self, tail_weight: float | None) -> PairLogprobs:
        """Sums in which tokens beyond the shorter side's length count that much; None: as the others do."""
        if tail_weight is None:
            return self
        assert self.up_to_shorter is not None
        shared = self.up_to_shorter
        return PairLogprobs(
            torch.lerp(shared.chosen, self.chosen, tail_weight), torch.lerp(shared.rejected, self.rejected, tail_weight)
        )


@dataclass(frozen=True)
class SequenceLayout:
    """The sides of B pairs as S sequences: the B chosen ones, then those rejected ones that are not empty.

    Attributes:
        input_ids: (S, T) token ids, padded on the right.
        attention_mask: (S, T) 1 where there is a token.
        completion_mask: (S, T - 1) True where position t predicts a completion's token t + 1 that is scored.
        rejected_rows: (S - B,) the pairs that the rejected sequences belong to.
    """

    input_ids: IntArray
    attention_mask: IntArray
    completion_mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    rejected_rows: IntArray


def two_sequences(batch: Batch) -> SequenceLayout:
    """Lay each pair out as two sequences, prompt + chosen and prompt + rejected; an SFT example as one."""
    rejected_rows = np.flatnonzero(batch.rejected_lengths)
    sides = [(sample.prompt_ids, sample.completions[0]) for sample in batch]
    sides += [(batch[row].prompt_ids, batch[row].completions[1]) for row in rejected_rows.tolist()]
    sequences = [np.concatenate([prompt, side.ids]) for prompt, side in sides]
    lengths = np.array([len(sequence) for sequence in sequences])
    masks = [side.scored for _, side in sides]

    input_ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    scored = np.zeros(input_ids.shape, dtype=np.bool_)
    for row, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        input_ids[row, : len(sequence)] = sequence
        scored[row, len(sequence) - len(mask) : len(sequence)] = mask
    columns = np.arange(input_ids.shape[1])
    return SequenceLayout(
        input_ids=input_ids,
        attention_mask=(columns < lengths[:, None]).astype(np.int64),
        completion_mask=scored[:, 1:],
        rejected_rows=rejected_rows,
    )


def completion_logprobs(
    network: nn.Module,
    batch: Batch,
    device: torch.device,
    *,
    explicit_positions: bool = True,
    tiled_head: bool = False,
    up_to_shorter: bool = False,
) -> PairLogprobs:
    """Sum the log-probabilities of each completion's scored tokens given all tokens before them.

    log pi(y | x) = sum_t log pi(y_t | x, y_<t), the quantity of DPO (arXiv 2305.18290, equation 7). Chosen and
    rejected go through one forward pass.

    Args:
        network: A causal language model of transformers; its active adapters decide whose log-probs these are.
        batch: B pairs.
        device: Where the network is.
        explicit_positions: Pass `position_ids` rather than leave them to the model.
        tiled_head: Apply the head to tiles of the completions' hidden states; see `evollm.models.head`.
        up_to_shorter: Give the sums up to the shorter side's length too.

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
    sizes = layout.completion_mask.sum(axis=1).tolist()
    if tiled_head:
        hidden = _hidden_states(network, inputs)[:, :-1][mask]  # (C, D)
        head = linear_head(network)
        found = token_logprobs(hidden, head.weight, head.bias, input_ids[:, 1:][mask])
        sums = torch.stack([part.sum() for part in found.split(sizes)])
    else:
        columns = torch.from_numpy(np.flatnonzero(layout.completion_mask.any(axis=0))).to(device)
        token_sums = target_logprobs(_logits(network, inputs, columns), input_ids[:, columns + 1])
        # where() rather than a product: an infinite log-prob in the padding must not turn the sum into NaN.
        sums = torch.where(mask[:, columns], token_sums, token_sums.new_zeros(())).sum(dim=1)
        found = token_sums[mask[:, columns]] if up_to_shorter else token_sums
    rejected_rows = torch.from_numpy(layout.rejected_rows).to(device)

    def by_pair(sums: Tensor, shared: PairLogprobs | None = None) -> PairLogprobs:
        rejected = sums.new_zeros(len(batch)).index_copy(0, rejected_rows, sums[len(batch) :])
        return PairLogprobs(sums[: len(batch)], rejected, shared)

    if not up_to_shorter:
        return by_pair(sums)
    shorter = shorter_lengths(batch)
    lengths = [*shorter, *shorter[layout.rejected_rows]]
    first = [part[:length] for part, length in zip(found.split(sizes), lengths, strict=True)]
    return by_pair(sums, by_pair(torch.stack([part.sum() for part in first])))


def lone_logprobs(
    network: nn.Module, batch: Batch, device: torch.device, *, up_to_shorter: bool = False
) -> PairLogprobs:
    """The same, each sequence in a pass of its own in which the network gets nothing but its token ids.

    What the network makes of a sequence when nobody tells it more: the fixed_reference for every other layout.
    """

    def token_sums(prompt: IntArray, side: IntArray) -> Tensor:
        inputs = {"input_ids": torch.from_numpy(np.concatenate([prompt, side]))[None].to(device), "use_cache": False}
        columns = torch.arange(len(prompt) - 1, len(prompt) + len(side) - 1, device=device)
        return target_logprobs(_logits(network, inputs, columns), torch.from_numpy(side)[None].to(device))[0]

    return sums_by_pair(batch, token_sums, up_to_shorter=up_to_shorter)


def sums_by_pair(
    batch: Batch,
    token_sums: Callable[[IntArray, IntArray], Tensor],
    *,
    up_to_shorter: bool,
) -> PairLogprobs:
    """The sums of B pairs from a function that gives (side,) log-probs of a prompt's and a side's tokens."""
    found = []
    for row in range(len(batch)):
        sides = []
        for completion in batch[row].completions:
            side = token_sums(batch[row].prompt_ids, completion.ids)
            sides.append(side if completion.mask is None else side[torch.from_numpy(completion.mask).to(side.device)])
        chosen, rejected = sides if len(sides) > 1 else (sides[0], sides[0].new_zeros(0))
        shorter = min(len(chosen), len(rejected))
        ends = (None, shorter) if up_to_shorter else (None,)
        found.append([side[:end].sum() for end in ends for side in (chosen, rejected)])
    return PairLogprobs.of([torch.stack(column) for column in zip(*found, strict=True)])


def shorter_lengths(batch: Batch) -> IntArray:
    """(B,) scored tokens of each pair's shorter side."""
    return np.minimum(batch.chosen_scored, batch.rejected_scored)


def packed_logprobs(
    network: nn.Module, packed: PackedSamples, num_members: int, *, tiled_head: bool, up_to_shorter: bool = False
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
    # Two of each sample: a second completion that it has not has no token.
    counts = iter(packed.scored)
    scored = [n for size in packed.lengths for n in [*islice(counts, len(size.completions)), 0][:2]]
    # Sums of slices, not an index_add: that adds in any order on a GPU.
    parts = found.split(scored, dim=1)
    sums = torch.stack([part.sum(dim=1) for part in parts], dim=1)  # (M, 2B)
    if not up_to_shorter:
        return [PairLogprobs(chosen=row[0::2], rejected=row[1::2]) for row in sums]
    pairs = zip(scored[0::2], scored[1::2], strict=True)
    lengths = [min(pair) for pair in pairs for _ in range(2)]
    first = [part[:, :length].sum(dim=1) for part, length in zip(parts, lengths, strict=True)]
    both = torch.stack([sums, torch.stack(first, dim=1)], dim=1)  # (M, 2, 2B)
    return [PairLogprobs.of([side for row in rows for side in (row[0::2], row[1::2])]) for rows in both]


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
