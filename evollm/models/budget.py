"""How many tokens to have in flight, where the user does not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from evollm.models.shared_base import SharedBase

# Beyond these a pass gets no faster: on a CPU its activations have long left the caches, on a GPU its cores are busy.
_ENOUGH_TOKENS = {("cpu", True): 1024, ("cpu", False): 2048, ("cuda", True): 16384, ("cuda", False): 32768}
# Of the memory that is free; the rest is for gradients, moments and what the allocator wastes.
_SHARE = 0.6
_FEWEST_TOKENS = 256


@dataclass
class SavedBytes:
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""

    total: int = 0


@contextmanager
def count_saved_bytes() -> Iterator[SavedBytes]:
    """Count what forward passes inside the block save; each storage once."""
    saved, seen = SavedBytes(), set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter) and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            saved.total += storage.nbytes()
        # Of an operation's own output this would keep the graph, which keeps the output: neither would ever be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def default_budget(base: SharedBase, saved_per_token: float, *, training: bool, tiled: bool) -> int:
    """Tokens in flight that are enough for full speed and fit into the free memory, a power of two.

    Args:
        base: The base.
        saved_per_token: Bytes that a pass saves for each token; see `count_saved_bytes`.
        training: Whether there will be a backward pass.
        tiled: Whether the logits of all tokens never exist at once.
    """
    config = base.network.config
    # What lives for a moment: some hidden states of one layer, and float32 logits with their softmax.
    passing = 64 * 4 * int(getattr(config, "hidden_size", 1024)) + (0 if tiled else 12 * base.num_embeddings)
    affordable = _SHARE * _free_memory(base.device) / (saved_per_token + passing)
    enough = _ENOUGH_TOKENS.get((base.device.type, training), _ENOUGH_TOKENS["cpu", training])
    tokens = _FEWEST_TOKENS
    while 2 * tokens <= min(enough, affordable):
        tokens *= 2
    return tokens


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)
