"""Estimates of a run: memory from the model's configuration, time from a measured step of one agent."""

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
from evollm.data.samples import Batch, Sample
from evollm.models.budget import count_saved_bytes, should_recompute, tokens_in_flight, tokens_that_fit
from evollm.models.loading.pretrained import auto_class, load_base_model

# The rank of the agents' default LoRA configuration.
RANK = 16
# A weight, its gradient and Adam's two moments, in float32.
BYTES_PER_TRAINED = 16
BYTES_PER_FROZEN = 4
# Tokens of the timed batch: enough to reach the speed of a full pass, few enough to take only seconds.
TIMED_TOKENS = 256
# The forward pass of the reference takes about a third of the time of a forward and backward pass.
REFERENCE_SHARE = 1 / 3


@dataclass(frozen=True)
class Forecast:
    """An estimate of a run's memory and time on this machine, with the default LoRA on all linear layers.

    Attributes:
        population: Agents of the run.
        epochs: Epochs of the run.
        base_bytes: Memory of the base's weights.
        adapter_parameters: Parameters of one adapter.
        activation_bytes: Memory of the activations saved for one backward pass: measured, or by a rough formula.
        memory_bytes: The sum of base, 16 bytes for each trained parameter, one frozen reference, and activations.
        free_bytes: Free memory at present.
        seconds: Time of the run without evaluations; None if no step was timed.
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
    pairs: Sequence[Sample],
    algorithm: Algorithm,
    *,
    population: int,
    epochs: int,
    measured: bool,
    epoch_tokens: int | None = None,
) -> Forecast | None:
    """Estimate a run's memory and time; None if the model has no configuration, or is not a language model.

    Args:
        model: Name or folder of the base.
        config: The base's configuration; None if there is none.
        pairs: The tokenised rows.
        algorithm: The algorithm of the agents.
        population: Number of agents.
        epochs: Number of epochs.
        measured: Whether to load the weights and time a step of one agent; otherwise `Forecast.seconds` is None.
        epoch_tokens: Tokens of an epoch; None: those of all rows.

    Raises:
        ConfigurationError: `measured` is True, and the model cannot be loaded.
    """
    seconds = None
    if measured:
        network: Any = load_base_model(model)
        config = network.config
    elif config is None:
        return None
    else:
        try:
            with torch.device("meta"):
                network = auto_class(config).from_config(config)
        except Exception:  # transformers raises errors of many types for models that are not language models
            return None
    base_bytes = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    adapter = adapter_parameters(network)
    longest = max(pair.num_tokens for pair in pairs)
    free_bytes = int(psutil.virtual_memory().available)
    saved_per_token = _rough_activations(config, longest, free_bytes)
    if measured:
        per_token, saved_per_token = _measure(network, pairs, algorithm)
        passes = population * epochs + (REFERENCE_SHARE if algorithm.has_reference else 0)
        seconds = per_token * (epoch_tokens or sum(pair.num_tokens for pair in pairs)) * passes
    # The default token budget of a CPU; a row above the budget gets a pass of its own.
    budget = tokens_in_flight(tokens_that_fit(free_bytes, saved_per_token), "cpu", training=True)
    activations = int(saved_per_token * max(budget, longest))
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
    """Return the number of parameters of a LoRA of rank 16 on all linear layers except the head."""
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]
    return sum(RANK * sum(layer.weight.shape) for layer in layers)


def _rough_activations(config: Any, longest: int, free_bytes: int) -> float:
    """Bytes of activations per token: all layers or, with checkpointing, the inputs of all layers and one layer."""
    config = config.get_text_config()
    hidden, layers = int(getattr(config, "hidden_size", 1024)), int(getattr(config, "num_hidden_layers", 32))
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    layer = 4 * (20 * hidden + 6 * inner)
    if should_recompute(tokens_that_fit(free_bytes, layers * layer), "cpu", None, longest):
        return 4 * hidden * layers + layer
    return layers * layer


def usual_pairs(pairs: Sequence[Sample], tokens: int) -> list[Sample]:
    """Return the row of median length and the next longer rows, up to `tokens` tokens in all but at least one row."""
    ordered = sorted(pairs, key=lambda pair: pair.num_tokens)
    chosen = [ordered[len(ordered) // 2]]
    for pair in ordered[len(ordered) // 2 + 1 :]:
        if sum(one.num_tokens for one in chosen) + pair.num_tokens > tokens:
            break
        chosen.append(pair)
    return chosen


def _measure(model: Any, pairs: Sequence[Sample], algorithm: Algorithm) -> tuple[float, float]:
    """Measure one agent's seconds and activation bytes per training token, on rows of about median length."""
    usual = usual_pairs(pairs, TIMED_TOKENS)
    batch = Batch(usual)
    agent: Any = algorithm.agent(actor_network=model, batch_size=len(usual))
    tokens = int(batch.num_tokens.sum())
    with count_saved_bytes() as saved:
        agent.learn(batch)
    start = time.perf_counter()
    agent.learn(batch)
    seconds = time.perf_counter() - start
    agent.release()
    return seconds / tokens, saved.total / tokens
