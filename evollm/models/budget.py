"""Defaults that follow the free memory: tokens in a forward pass, and whether activations are recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from evollm.models.head import extra_bytes
from evollm.models.shared_base import SharedBase

# Tokens in a pass, by device type and training, beyond which its speed per token no longer grows.
_ENOUGH_TOKENS = {("cpu", True): 1024, ("cpu", False): 2048, ("cuda", True): 16384, ("cuda", False): 32768}
# Budgets are multiples of this many tokens, by device type, so that a little more free memory changes no pass. Without
# an entry they are powers of two.
_STEP = {"cuda": 1024}
# Rows whose log-probs are computed at a time without gradients, by device type: enough to fill passes of that size.
# Without an entry, as many as are trained on at a time.
_ROWS_AT_A_TIME = {"cuda": 64}
# Share of the free memory; the rest is for gradients, moments and fragmentation.
_SHARE = 0.6
_FEWEST_TOKENS = 256
# Share of `_ENOUGH_TOKENS` from which on recomputing costs more time than larger passes gain.
_ENOUGH_TO_KEEP = 0.25


@dataclass
class SavedBytes:
    """Bytes of the tensors that autograd saves in a forward pass, without parameters."""

    total: int = 0


@contextmanager
def count_saved_bytes(*, keep: bool = True) -> Iterator[SavedBytes]:
    """Count the bytes that autograd saves in the block's forward passes, each storage once.

    Args:
        keep: Whether the tensors are saved. False: a pass takes as little memory as one without gradients, and has no
            backward pass.
    """
    saved = SavedBytes()
    # By address, which another tensor may get when a storage is freed; hence the weak references.
    seen: dict[int, StorageWeakRef] = {}

    def pack(tensor: Tensor) -> Tensor | None:
        storage = tensor.untyped_storage()
        known = seen.get(storage.data_ptr())
        if not isinstance(tensor, torch.nn.Parameter) and (known is None or known.expired()):
            seen[storage.data_ptr()] = StorageWeakRef(storage)
            saved.total += storage.nbytes()
        # Detached, since an operation that saves its own output would form a reference cycle with its graph node.
        return tensor.detach() if keep else None

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def default_budget(base: SharedBase, saved_per_token: float, *, training: bool, tiled: bool) -> int:
    """Tokens of a pass: enough for full speed if they fit into the free memory; see `tokens_in_flight`.

    Args:
        base: The base.
        saved_per_token: Bytes that autograd saves for each token; see `count_saved_bytes`.
        training: Whether there will be a backward pass.
        tiled: Whether logits are computed in tiles, so that those of all tokens never exist at once.
    """
    affordable = affordable_tokens(base, saved_per_token, tiled=tiled)
    return tokens_in_flight(affordable, base.device.type, training=training)


def tokens_in_flight(affordable: int, device_type: str, *, training: bool) -> int:
    """Tokens of a pass, as of `default_budget`, if `affordable` tokens fit into the free memory.

    On a CPU a power of two, on a GPU a multiple of 1024, or a power of two below it.
    """
    most = min(affordable, _enough_tokens(device_type, training=training))
    step = _STEP.get(device_type)
    if step and most >= step:
        return most // step * step
    tokens = _FEWEST_TOKENS
    while 2 * tokens <= most:
        tokens *= 2
    return tokens


def rows_at_a_time(device_type: str, batch_size: int) -> int:
    """Rows whose log-probs are computed at a time without gradients; `batch_size` is that of training."""
    return max(batch_size, _ROWS_AT_A_TIME.get(device_type, 0))


def tokens_that_fit(free_bytes: int, bytes_per_token: float) -> int:
    """Tokens that a pass may have with this much free memory."""
    return int(_SHARE * free_bytes / bytes_per_token)


def affordable_tokens(base: SharedBase, saved_per_token: float, *, tiled: bool) -> int:
    """Tokens that fit into the free memory; see `default_budget` for the arguments."""
    config = base.network.config
    # Temporary tensors: hidden states within a layer, and float32 logits with their softmax.
    temporary = 64 * 4 * int(getattr(config, "hidden_size", 1024)) + (0 if tiled else 12 * base.num_embeddings)
    free = _free_memory(base.device) - (extra_bytes(base.device) if tiled else 0)
    return tokens_that_fit(max(0, free), saved_per_token + temporary)


def tokens_to_keep(device_type: str, token_budget: int | None, longest: int) -> int:
    """Tokens whose activations must fit into memory for a training pass at full speed.

    Args:
        device_type: Device type of the base, such as `cuda`.
        token_budget: The user's limit of tokens in a pass; None: a default that follows the memory.
        longest: Tokens of the longest pair.

    Returns:
        The budget, or without one a quarter of the tokens that are enough for full speed; at least `longest`, since a
        pair is never divided.
    """
    enough = token_budget or int(_ENOUGH_TO_KEEP * _enough_tokens(device_type, training=True))
    return max(enough, longest)


def should_recompute(affordable: int, device_type: str, token_budget: int | None, longest: int) -> bool:
    """Whether activations should be recomputed in the backward pass if `affordable` tokens fit into the free memory."""
    return affordable < tokens_to_keep(device_type, token_budget, longest)


def _enough_tokens(device_type: str, *, training: bool) -> int:
    return _ENOUGH_TOKENS.get((device_type, training), _ENOUGH_TOKENS["cpu", training])


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)
