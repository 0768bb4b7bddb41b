"""The exchange of log-probs between processes that each compute a share of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evollm.data.samples import Batch
from evollm.models.load_balancing import LoadBalancing
from evollm.models.logprobs import TokenLogprobs, pieces_of
from evollm.processes import Processes


def from_all_processes(
    result: TokenLogprobs | None,
    own: Sequence[int],
    batch: Batch,
    values: torch.Tensor,
    balancing: LoadBalancing | None,
) -> TokenLogprobs:
    """Exchange log-probs so that each process has those of all samples.

    Args:
        result: The log-probs of this process's samples; None without samples.
        own: Rows of this process's samples, in the order of `result`.
        batch: All samples.
        values: (M, C) zeros, the buffer of the all-reduce.
        balancing: The auxiliary loss whose expert loads are exchanged too; None: no loads.
    """
    whole, loads = TokenLogprobs(values, pieces_of(batch)), None
    if result is not None:
        values[:, whole.index_of(result.pieces)] = result.values.to(values)
    Processes.present().add_up(values)
    if balancing is not None:
        shape = len(values), len(batch), 2, balancing.experts
        loads = torch.zeros(shape, dtype=torch.float64, device=values.device)
        if result is not None and result.loads is not None:
            loads[:, list(own)] = result.loads.to(loads)
        Processes.present().add_up(loads)
        loads = loads.cpu()
    return TokenLogprobs(values.cpu(), whole.pieces, loads)
