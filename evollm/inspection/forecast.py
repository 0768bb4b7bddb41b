"""What a run would take: memory from the model's configuration, time from a few steps of one agent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from evollm.algorithms import Algorithm
from evollm.data.batch import PreferenceBatch, TokenizedPair
from evollm.models.budget import count_saved_bytes, should_recompute, tokens_in_flight, tokens_that_fit
from evollm.models.pretrained import auto_class, load_base_model

# Of the LoRA configuration that agents have by default.
RANK = 16
# A weight, its gradient and Adam's two moments, in float32.
BYTES_PER_TRAINED = 16
BYTES_PER_FROZEN = 4
# Enough for the rate of a full pass, and over in some seconds.
TIMED_TOKENS = 256
# A forward pass takes about a third of the time of forward and backward pass, and references need one.
REFERENCE_SHARE = 1 / 3


@dataclass(frozen=True)
class Forecast:
    """An estimate of what a run takes on this machine, with the default LoRA on all linear layers.

    Attributes:
        population: Agents of the run.
        epochs: Its epochs.
        base_bytes: The base's weights.
        adapter_parameters: Parameters of one adapter.
        activation_bytes: What one pass keeps for its backward pass: measured, or a rough formula.
        memory_bytes: All of it: base, 16 bytes for each trained parameter, one frozen reference, activations.
        free_bytes: Memory that is free here now.
        seconds: Time of the run without evaluations; None when it was not measured.
    """

    population: int
    epochs: int
    base_bytes: int
    adapter_parameters: int
    activation_bytes: int
    memory_bytes: int
    free_bytes: int
    seconds: float | None


def forecast(
    model: str,
    config: Any,
    pairs: Sequence[TokenizedPair],
    algorithm: Algorithm,
    *,
    population: int,
    epochs: int,
    measured: bool,
) -> Forecast | None:
    """Estimate a run on these rows; None if nothing but a tokenizer is there, or it is no language model.

    Args:
        model: Name or folder of the base.
        config: Its configuration; None where there is none.
        pairs: The rows.
        algorithm: How agents learn from them.
        population: Agents.
        epochs: Epochs.
        measured: Load the weights and time a few steps of one agent.

    Raises:
        ConfigurationError: `measured`, and the model cannot be loaded.
    """
    seconds = None
    if measured:
        shapes: Any = load_base_model(model)
        config = shapes.config
    elif config is None:
        return None
    else:
        try:
            with torch.device("meta"):
                shapes = auto_class(config).from_config(config)
        except Exception:  # Whatever a configuration of another kind of model makes the library raise.
            return None
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in shapes.parameters())
    adapter = adapter_parameters(shapes)
    longest = max(pair.num_tokens for pair in pairs)
    free_bytes = int(psutil.virtual_memory().available)
    saved_per_token = _rough_activations(config, longest, free_bytes)
    if measured:
        per_token, saved_per_token = _measure(shapes, pairs, algorithm)
        passes = population * epochs + (REFERENCE_SHARE if algorithm.has_reference else 0)
        seconds = per_token * sum(pair.num_tokens for pair in pairs) * passes
    # On a CPU; a row that is longer is a pass of its own.
    fitting = tokens_in_flight(tokens_that_fit(free_bytes, saved_per_token), "cpu", training=True)
    activations = int(saved_per_token * max(fitting, longest))
    references = BYTES_PER_FROZEN * adapter if algorithm.has_reference else 0
    return Forecast(
        population=population,
        epochs=epochs,
        base_bytes=base_bytes,
        adapter_parameters=adapter,
        activation_bytes=activations,
        memory_bytes=base_bytes + BYTES_PER_TRAINED * adapter * population + references + activations,
        free_bytes=free_bytes,
        seconds=seconds,
    )


def adapter_parameters(model: Any) -> int:
    """Parameters of a LoRA of rank 16 on all linear layers but the head."""
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]
    return sum(RANK * sum(layer.weight.shape) for layer in layers)


def _rough_activations(config: Any, longest: int, free_bytes: int) -> float:
    """Bytes for a token: all that the layers keep; where memory is short, a state of each and all that one keeps."""
    config = config.get_text_config()
    hidden, layers = int(getattr(config, "hidden_size", 1024)), int(getattr(config, "num_hidden_layers", 32))
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layer = 4 * (20 * hidden + 6 * inner)
    if should_recompute(tokens_that_fit(free_bytes, layers * layer), "cpu", None, longest):
        return 4 * hidden * layers + layer
    return layers * layer


def usual_pairs(pairs: Sequence[TokenizedPair], tokens: int) -> list[TokenizedPair]:
    """Rows of usual length: from the one in the middle on, as many as have so many tokens together, at least one."""
    ordered = sorted(pairs, key=lambda pair: pair.num_tokens)
    few = [ordered[len(ordered) // 2]]
    for pair in ordered[len(ordered) // 2 + 1 :]:
        if sum(one.num_tokens for one in few) + pair.num_tokens > tokens:
            break
        few.append(pair)
    return few


def _measure(model: Any, pairs: Sequence[TokenizedPair], algorithm: Algorithm) -> tuple[float, float]:
    """Seconds, and bytes kept, for a token that one agent learns from; of rows of usual length."""
    few = usual_pairs(pairs, TIMED_TOKENS)
    batch = PreferenceBatch.from_pairs(few)
    agent: Any = algorithm.agent(actor_network=model, batch_size=len(few))
    tokens = int(batch.num_tokens.sum())
    with count_saved_bytes() as saved:
        agent.learn(batch)
    start = time.perf_counter()
    agent.learn(batch)
    seconds = time.perf_counter() - start
    agent.release()
    return seconds / tokens, saved.total / tokens
