"""The auxiliary load-balancing loss of a mixture of experts, used if the base's configuration enables it.

The loss is transformers' `load_balancing_loss_func` (Switch Transformer, arXiv 2101.03961, equations 4 to 6): E times
the sum over experts of f P, with f the share of tokens for which an expert is chosen, and P the expert's mean router
probability, both over all layers and tokens. The loss is not a mean over rows, but f and P are: each pass computes its
rows' contributions to f and P, and the loss is computed from the contributions of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from evollm.errors import ConfigurationError
from evollm.models.adapters.targets import text_config
from evollm.models.encoder_decoder import is_encoder_decoder

_SWITCH = "output_router_logits"
_COEFFICIENT = "router_aux_loss_coef"
# Lengths of the sequences on which the computed loss is compared with the model's own.
_TRIED = (9, 6)
_TOLERANCE = 1e-3


class Span(NamedTuple):
    """Contiguous tokens of a pass.

    Attributes:
        row: Index of their sample in its batch.
        weight: Weight of each token in the expert loads; 0 for padding.
        length: Number of tokens.
    """

    row: int
    weight: int
    length: int


def padded_spans(row: int, length: int, longest: int) -> list[Span]:
    """The span of a sequence's tokens and the span of its padding up to `longest`."""
    return [Span(row, 1, length), Span(row, 0, longest - length)]


# For each layer the logits of its router, (tokens, E).
RouterLogits = tuple[Tensor, ...]


@dataclass(frozen=True)
class LoadBalancing:
    """The load-balancing loss of a base.

    Attributes:
        coefficient: Weight of this loss when added to an objective's loss.
        experts: E, number of experts in a layer.
        per_token: Number of experts to which each token is routed.
    """

    coefficient: float
    experts: int
    per_token: int

    def loss(self, loads: Tensor) -> Tensor:
        """The loss of B rows, without its coefficient.

        Args:
            loads: (B, 2, E) for each row and expert the number of tokens that are routed to the expert, and the sum of
                the expert's router probabilities, both over tokens and layers.
        """
        chosen, probabilities = loads.sum(dim=0)
        tokens = chosen.sum() / self.per_token
        products: Tensor = chosen / tokens * (probabilities / tokens)
        return products.sum() * self.experts


def asked_for(network: PreTrainedModel) -> dict[str, Any]:
    """The configuration entries that enable the loss, by their own names; {} if the loss is disabled."""
    config = text_config(network.config)
    coefficient = getattr(config, _COEFFICIENT, None)
    return {_SWITCH: True, _COEFFICIENT: coefficient} if getattr(config, _SWITCH, False) and coefficient else {}


def load_balancing(network: PreTrainedModel) -> LoadBalancing | None:
    """The load-balancing loss of a base; None if the configuration does not enable it.

    Raises:
        ConfigurationError: The enabled loss cannot be computed, or differs from the model's own.
    """
    asked = asked_for(network)
    if not asked:
        return None
    field, otherwise = f"model.config.{_SWITCH}", "set it to False to train without that loss"
    if is_encoder_decoder(network.config):
        fix = f"the loss of routers is not computed for encoder-decoder models: {otherwise}"
        raise ConfigurationError(field, True, fix)
    try:
        found, ours, own = _tried(network, float(asked[_COEFFICIENT]))
    except Exception as error:  # A model that returns router logits in another format may raise anything.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = f"the loss of routers cannot be computed for {type(network).__name__} ({reason}): {otherwise}"
        raise ConfigurationError(field, True, fix) from error
    if not abs(ours - own) <= _TOLERANCE * abs(own):
        fix = f"{type(network).__name__}'s own loss of routers is {own:.4g} where {ours:.4g} is computed: {otherwise}"
        raise ConfigurationError(field, True, fix)
    return found


@torch.no_grad()
def _tried(network: Any, coefficient: float) -> tuple[LoadBalancing, float, float]:
    """The loss of a base, its value on a padded batch, and the value of the model's own loss there."""
    device = network.get_input_embeddings().weight.device
    mask = torch.arange(max(_TRIED)).lt(torch.tensor(_TRIED)[:, None]).long().to(device)
    ids = torch.arange(mask.numel(), device=device).view_as(mask) % network.get_input_embeddings().weight.shape[0]
    network.eval()
    with recorded(network) as calls:
        own = network(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss
    per_token = getattr(network, "num_experts_per_tok", None) or text_config(network.config).num_experts_per_tok
    found = LoadBalancing(coefficient, calls[0][0].shape[-1], per_token)
    spans = [span for row, count in enumerate(_TRIED) for span in padded_spans(row, count, mask.shape[1])]
    loads = row_loads(calls, spans, len(_TRIED), 1, per_token)[0]
    return found, found.loss(loads).item(), float(own)


@contextmanager
def recorded(network: Any) -> Iterator[list[RouterLogits]]:
    """Collect the router logits of each forward pass inside the block; the base must be set to return router logits."""
    calls: list[RouterLogits] = []
    hook = network.get_decoder().register_forward_hook(lambda _, __, output: calls.append(tuple(output.router_logits)))
    try:
        yield calls
    finally:
        hook.remove()


def row_loads(
    calls: Sequence[RouterLogits], spans: Sequence[Span], num_rows: int, num_members: int, per_token: int
) -> Tensor:
    """The contribution of each of B rows to the expert loads of M members.

    Args:
        calls: For each forward pass the router logits of each layer, (M n, E); the n of all passes add up to N.
        spans: The spans of the N tokens, in order.
        num_rows: B.
        num_members: M.
        per_token: Number of experts to which each token is routed.

    Returns:
        (M, B, 2, E), differentiable in the probabilities; see `LoadBalancing.loss`.
    """
    total: Tensor | None = None
    for layer in zip(*calls, strict=True):
        logits = torch.cat([part.reshape(num_members, -1, part.shape[-1]) for part in layer], dim=1)  # (M, N, E)
        probabilities = logits.softmax(dim=-1)
        chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(per_token, dim=-1).indices, 1)
        both = torch.stack([chosen, probabilities], dim=2)
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        total = both if total is None else total + both
    assert total is not None
    rows, weights, lengths = (np.array(column) for column in zip(*spans, strict=True))
    counts = np.zeros((num_rows, lengths.sum()))
    counts[np.repeat(rows, lengths), np.arange(lengths.sum())] = np.repeat(weights, lengths)
    # A matrix product, because index_add is nondeterministic on a GPU.
    return torch.einsum("bn,mnke->mbke", torch.from_numpy(counts).to(total), total)
