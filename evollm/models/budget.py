"""How many tokens to have in flight, where the user does not say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from evollm.models.shared_base import SharedBase

# Beyond these a pass gets no faster: on a CPU its activations have long left the caches, on a GPU its cores are busy.
_ENOUGH_TOKENS = {("cpu", True): 1024, ("cpu", False): 2048, ("cuda", True): 16384, ("cuda", False): 32768}
# Of the memory that is free; the rest is for gradients, moments and what the allocator wastes.
_SHARE = 0.6
_FEWEST_TOKENS = 256
# Of the tokens that are enough: with so many in a pass, recomputing to have more of them costs more than it gains.
_ENOUGH_TO_KEEP = 0.25


@dataclass
class SavedBytes:
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""

    total: int = 0


@contextmanager
def count_saved_bytes(*, keep: bool = True) -> Iterator[SavedBytes]:
    """Count what forward passes inside the block save; each storage once.

    Args:
        keep: Save it, for a backward pass. False: a pass takes no more memory than one without gradients.
    """
    saved = SavedBytes()
    # By address; of what is not kept another tensor may come to lie there.
    seen: dict[int, StorageWeakRef] = {}

    def pack(tensor: Tensor) -> Tensor | None:
        storage = tensor.untyped_storage()
        known = seen.get(storage.data_ptr())
        if not isinstance(tensor, torch.nn.Parameter) and (known is None or known.expired()):
            seen[storage.data_ptr()] = StorageWeakRef(storage)
            saved.total += storage.nbytes()
        # Of an operation's own output this would keep the graph, which keeps the output: neither would ever be freed.
        return tensor.detach() if keep else None

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
    affordable = affordable_tokens(base, saved_per_token, tiled=tiled)
    return tokens_in_flight(affordable, base.device.type, training=training)


def tokens_in_flight(affordable: int, device_type: str, *, training: bool) -> int:
    """What is enough for full speed on such a device and fits, with `affordable` tokens in memory, a power of two."""
    tokens, enough = _FEWEST_TOKENS, _enough_tokens(device_type, training=training)
    while 2 * tokens <= min(enough, affordable):
        tokens *= 2
    return tokens


def tokens_that_fit(free_bytes: int, bytes_per_token: float) -> int:
    """Tokens for which a pass should take memory, where so much is free."""
    return int(_SHARE * free_bytes / bytes_per_token)


def affordable_tokens(base: SharedBase, saved_per_token: float, *, tiled: bool) -> int:
    """Tokens that fit into the free memory; see `default_budget` for the arguments."""
    config = base.network.config
    # What lives for a moment: some hidden states of one layer, and float32 logits with their softmax.
    passing = 64 * 4 * int(getattr(config, "hidden_size", 1024)) + (0 if tiled else 12 * base.num_embeddings)
    return tokens_that_fit(_free_memory(base.device), saved_per_token + passing)


def tokens_to_keep(device_type: str, token_budget: int | None, longest: int) -> int:
    """Tokens whose activations must fit into memory for a training pass at full speed.

    Args:
        device_type: Of the base, such as `cuda`.
        token_budget: Most tokens in a pass, as the user gave it; None: a default that follows the memory.
        longest: Tokens of the longest pair.

    Returns:
        The budget, or a quarter of what is enough there; at least the longest pair, which goes into a pass undivided.
    """
    enough = token_budget or int(_ENOUGH_TO_KEEP * _enough_tokens(device_type, training=True))
    return max(enough, longest)


def should_recompute(affordable: int, device_type: str, token_budget: int | None, longest: int) -> bool:
    """Whether activations are to be computed again, with `affordable` tokens in memory; see `tokens_to_keep`."""
    return affordable < tokens_to_keep(device_type, token_budget, longest)


def _enough_tokens(device_type: str, *, training: bool) -> int:
    return _ENOUGH_TOKENS.get((device_type, training), _ENOUGH_TOKENS["cpu", training])


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated there."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)
