"""What the losses of a pass read goes to its device once for all members."""

from __future__ import annotations

import numpy as np
import torch

from evollm.algorithms import loss_inputs
from evollm.algorithms.loss_inputs import LossTable
from evollm.data.samples import Batch, Sample
from evollm.models.logprobs import CompletionSums

SHAPES = ((2, 4, 2), (2, 1, 3), (5, 2, 6))
PAIRS = Batch([Sample.of(*(np.zeros(size, np.int64) for size in shape)) for shape in SHAPES])
LIKE = torch.zeros(1)


def sums(start: float) -> CompletionSums:
    chosen, rejected = torch.arange(start, start + 6, dtype=torch.float64).view(2, 3)
    return CompletionSums((chosen / 3, rejected / 3))


def test_members_get_the_inputs_of_their_own_reference_in_the_type_of_the_pass(monkeypatch) -> None:
    copied: list[torch.Size] = []
    monkeypatch.setattr(loss_inputs, "upload", lambda tensor, device: copied.append(tensor.shape) or tensor.to(device))
    one, other = sums(0), sums(100)
    table = LossTable(PAIRS, [one, other, one])
    for member, reference in enumerate([one, other, one]):
        found = table.inputs(member, [2, 0], LIKE)
        assert torch.equal(found.reference_chosen, reference.chosen[[2, 0]].float())
        assert torch.equal(found.reference_rejected, reference.rejected[[2, 0]].float())
        assert found.chosen_lengths.tolist() == [2.0, 4.0]
        assert found.rejected_lengths.tolist() == [6.0, 2.0]
    # Two lengths and two sums of two references, for two rows.
    assert copied == [(6, 2)]
    table.inputs(1, range(3), LIKE)
    assert torch.equal(table.inputs(1, range(3), LIKE.double()).reference_chosen, other.chosen)
    assert copied[1:] == [(6, 3), (6, 3)]
