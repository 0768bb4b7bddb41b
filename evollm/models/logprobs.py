"""Log-probs of scored tokens, their sums over completions, and their computation from a network's outputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from evollm.data.samples import Batch, IntArray


class Piece(NamedTuple):
    """A contiguous range of log-probs: the scored tokens of one completion.

    Attributes:
        row: Index of the sample in its batch.
        place: Index of the completion in its sample.
        length: Number of scored tokens.
    """

    row: int
    place: int
    length: int


Pieces = tuple[Piece, ...]


def pieces_of(batch: Batch, *, by_place: bool = True) -> Pieces:
    """The pieces of a batch: all first completions, then all second ones; sample by sample if `by_place` is False."""
    found = [Piece(row, place, n) for row, sample in enumerate(batch) for place, n in enumerate(sample.num_scored)]
    return tuple(sorted(found, key=lambda piece: (piece.place, piece.row)) if by_place else found)


@dataclass(frozen=True, eq=False)
class CompletionSums:
    """Log-probs of B samples' completions, in nats.

    Attributes:
        columns: For each place (B,) log pi(completion | prompt), summed over scored tokens; 0 where a sample has no
            completion at this place.
        up_to_shorter: Like `columns`, but over the first tokens only, as many as the sample's shortest completion has;
            None if not requested.
    """

    columns: tuple[Tensor, ...]
    up_to_shorter: tuple[Tensor, ...] | None = None

    @property
    def chosen(self) -> Tensor:
        """(B,) sums of the first completions."""
        return self.columns[0]

    @property
    def rejected(self) -> Tensor:
        """(B,) sums of the second completions; `IndexError` if no sample has any."""
        return self.columns[1]

    def map(self, change: Callable[[Tensor], Tensor]) -> CompletionSums:
        """A copy with `change` applied to each (B,) tensor."""
        shorter = None if self.up_to_shorter is None else tuple(map(change, self.up_to_shorter))
        return CompletionSums(tuple(map(change, self.columns)), shorter)

    def with_rows(self, rows: Sequence[int], other: CompletionSums) -> CompletionSums:
        """A copy in which the samples of `other`, in their order, replace these rows."""
        places = torch.tensor(rows)

        def of(columns: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # A place that no sample of `other` has is already zero at these rows.
            changed = [column.index_copy(0, places, part) for column, part in zip(columns, others, strict=False)]
            return (*changed, *columns[len(others) :])

        shorter = None
        if self.up_to_shorter is not None and other.up_to_shorter is not None:
            shorter = of(self.up_to_shorter, other.up_to_shorter)
        return CompletionSums(of(self.columns, other.columns), shorter)

    def weighted(self, tail_weight: float | None) -> CompletionSums:
        """Sums in which tokens beyond the shortest completion's length are weighted by `tail_weight`; None: by 1."""
        if tail_weight is None:
            return self
        assert self.up_to_shorter is not None
        pairs = zip(self.up_to_shorter, self.columns, strict=True)
        return CompletionSums(tuple(torch.lerp(shared, whole, tail_weight) for shared, whole in pairs))


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Log-probs of the scored tokens of B samples under each of M members that share the batch.

    Attributes:
        values: (M, C) in nats, in float32 or wider.
        pieces: The completions whose tokens `values` holds, in that order.
        loads: (M, B, 2, E) contribution of each sample to the expert loads, None if not requested; see
            `evollm.models.load_balancing`.
    """

    values: Tensor
    pieces: Pieces
    loads: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """`values`, and `loads` unless None."""
        return [self.values, *([] if self.loads is None else [self.loads])]

    def like(self, tensors: Sequence[Tensor]) -> TokenLogprobs:
        """A copy with other `tensors`."""
        return TokenLogprobs(tensors[0], self.pieces, *tensors[1:])

    @property
    def num_rows(self) -> int:
        """B."""
        return 1 + max(piece.row for piece in self.pieces)

    def of(self, member: int) -> MemberLogprobs:
        """The log-probs under one of the members."""
        return MemberLogprobs(self, member)

    @property
    def members(self) -> list[MemberLogprobs]:
        """The log-probs under each member."""
        return [self.of(member) for member in range(len(self.values))]

    @cached_property
    def sums(self) -> tuple[Tensor, ...]:
        """For each place (M, B) sums over completions; see `CompletionSums.columns`."""
        # Sums of slices for all members at once: index_add is nondeterministic on a GPU.
        return self._by_place([part.sum(dim=1) for part in self._parts])

    @cached_property
    def sums_up_to_shorter(self) -> tuple[Tensor, ...]:
        """Like `sums`, but only up to the length of each sample's shortest completion."""
        shortest: dict[int, int] = {}
        for piece in self.pieces:
            shortest[piece.row] = min(piece.length, shortest.get(piece.row, piece.length))
        parts = zip(self._parts, self.pieces, strict=True)
        return self._by_place([part[:, : shortest[piece.row]].sum(dim=1) for part, piece in parts])

    def member_sums(
        self, change: Callable[[Tensor], Tensor] | None = None, *, up_to_shorter: bool = False
    ) -> tuple[tuple[Tensor, ...], ...]:
        """For each place and each member (B,) sums, of `sums` or `sums_up_to_shorter`.

        Args:
            change: A function of each number, applied to the sums of all members at once; None: no change.
            up_to_shorter: Which sums.
        """
        kind = change, up_to_shorter
        if kind not in self._member_sums:
            columns = self.sums_up_to_shorter if up_to_shorter else self.sums
            # unbind() rather than an index for each member, whose backward pass adds up M tensors.
            changed = (column if change is None else change(column) for column in columns)
            self._member_sums[kind] = tuple(column.unbind() for column in changed)
        return self._member_sums[kind]

    @cached_property
    def _member_sums(self) -> dict[tuple[object, bool], tuple[tuple[Tensor, ...], ...]]:
        return {}

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.values.split([piece.length for piece in self.pieces], dim=1)
        return parts

    def _by_place(self, sums: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(M,) sums of the pieces -> (M, B) sums for each place."""
        stacked = torch.stack(list(sums), dim=1)
        columns = []
        for place in range(1 + max(piece.place for piece in self.pieces)):
            numbers = [number for number, piece in enumerate(self.pieces) if piece.place == place]
            rows = [self.pieces[number].row for number in numbers]
            step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
            steps = range(numbers[0], numbers[0] + step * len(numbers), step)
            if rows == [*range(self.num_rows)] and numbers == [*steps]:
                columns.append(stacked[:, steps.start : steps.stop : step])
                continue
            into, out = (torch.tensor(index, device=stacked.device) for index in (rows, numbers))
            zeros = stacked.new_zeros(len(stacked), self.num_rows)
            columns.append(zeros.index_copy(1, into, stacked.index_select(1, out)))
        return tuple(columns)

    def index_of(self, pieces: Iterable[Piece]) -> Tensor:
        """(C',) columns of `values` that hold the tokens of these pieces."""
        ends = np.cumsum([piece.length for piece in self.pieces])
        start = {piece[:2]: end - piece.length for piece, end in zip(self.pieces, ends.tolist(), strict=True)}
        index = np.concatenate([np.arange(piece.length) + start[piece[:2]] for piece in pieces])
        return torch.from_numpy(index).to(self.values.device)


@dataclass(frozen=True, eq=False)
class MemberLogprobs:
    """Log-probs of the scored tokens of B samples under one of the members that share the batch.

    Attributes:
        found: The log-probs under all members, which are summed in one operation.
        member: Position of this member.
    """

    found: TokenLogprobs
    member: int

    @property
    def values(self) -> Tensor:
        """(C,) log-probs of the tokens of `pieces`."""
        return self.found.values[self.member]

    @property
    def pieces(self) -> Pieces:
        """The completions whose tokens `values` holds, in that order."""
        return self.found.pieces

    @property
    def loads(self) -> Tensor | None:
        """(B, 2, E) expert loads; None if not requested."""
        return None if self.found.loads is None else self.found.loads[self.member]

    @property
    def chosen(self) -> Tensor:
        """(B,) sums over the first completions."""
        return self.found.member_sums()[0][self.member]

    @property
    def rejected(self) -> Tensor:
        """(B,) sums over the second completions; `IndexError` if no sample has any."""
        return self.found.member_sums()[1][self.member]

    def sums(self, *, up_to_shorter: bool = False, change: Callable[[Tensor], Tensor] | None = None) -> CompletionSums:
        """The sums over each completion.

        Args:
            up_to_shorter: Whether to include the sums up to the shortest completion's length.
            change: A function of each sum, applied to those of all members at once; None: no change.
        """
        columns = [column[self.member] for column in self.found.member_sums(change)]
        if not up_to_shorter:
            return CompletionSums(tuple(columns))
        shorter = self.found.member_sums(change, up_to_shorter=True)
        return CompletionSums(tuple(columns), tuple(column[self.member] for column in shorter))


def of_all_members(parts: Sequence[TokenLogprobs]) -> TokenLogprobs:
    """Concatenate different members' log-probs of the same samples."""
    if len(parts) == 1:
        return parts[0]
    return parts[0].like([torch.cat(column) for column in zip(*(part.tensors for part in parts), strict=True)])


def joined(parts: Sequence[TokenLogprobs], rows: Sequence[Sequence[int]]) -> TokenLogprobs:
    """Concatenate the same members' log-probs of different samples, in the batch's order, by place, on the CPU.

    Args:
        parts: Log-probs under the same members.
        rows: For each part the rows of its samples in the batch; the parts need not cover all rows.
    """
    held = zip(parts, rows, strict=True)
    pieces = tuple(piece._replace(row=numbers[piece.row]) for part, numbers in held for piece in part.pieces)
    # One copy to the CPU, which waits until all passes are done.
    whole = TokenLogprobs(torch.cat([part.values for part in parts], dim=1).cpu(), pieces)
    wanted = tuple(sorted(pieces, key=lambda piece: (piece.place, piece.row)))
    loads = None
    if parts[0].loads is not None:
        order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable"))
        loads = torch.cat([part.loads for part in parts if part.loads is not None], dim=1).cpu()[:, order]
    return TokenLogprobs(whole.values.index_select(1, whole.index_of(wanted)), wanted, loads)


# ------------------------------------------------------------------------------------------------- from a network


def token_logprobs_of(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log softmax(logits / temperature) at the targets, (..., T, V) and (..., T) -> (..., T), at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        logits = logits / temperature
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def hidden_states(network: Any, inputs: dict[str, Any]) -> Tensor:
    """(rows, T, D) last hidden states, the input of the head."""
    hidden = network.base_model(**inputs).last_hidden_state
    assert isinstance(hidden, Tensor)
    return hidden


def linear_head(network: Any) -> nn.Linear:
    """The network's head, which must be a plain `nn.Linear`, for example without an adapter.

    Raises:
        TypeError: The head is another module.
    """
    head = network.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError(f"the head is a {type(head).__name__}")
    return head


def logits_at(network: nn.Module, inputs: dict[str, Any], columns: Tensor) -> Tensor:
    """(rows, columns, V) logits at these columns, by the network's own forward pass."""
    if "logits_to_keep" not in inspect.signature(network.forward).parameters:
        logits = network(**inputs).logits[:, columns]
    else:
        logits = network(**inputs, logits_to_keep=columns).logits
    assert isinstance(logits, Tensor)
    return logits


def padded(sequences: Sequence[np.ndarray[Any, Any]]) -> tuple[IntArray, IntArray]:
    """(n, L) n sequences, padded on the right with zeros, and their (n, L) mask, 1 for tokens."""
    lengths = np.array([len(sequence) for sequence in sequences])
    ids = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
