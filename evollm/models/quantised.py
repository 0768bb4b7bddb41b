"""Quantised bases: keeping 4-bit layers trainable, and checking the gradients through quantised layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evollm.errors import ConfigurationError
from evollm.quiet import CAST, hold_back

# Largest relative error of a gradient. In bfloat16 rounding gives less than 0.01, and a gradient that belongs to other
# weights 0.7 or more.
_TOLERANCE = 0.05
# Number of columns of the weights that are compared, and number of rows of the input.
_COLUMNS, _ROWS = 64, 4
_RELOAD = (
    "load the base again and build the agents on it before it computes anything without gradients, "
    "or give its name as model_name"
)


def keep_differentiable(model: nn.Module) -> None:
    """Stop 4-bit layers of bitsandbytes from packing their weights for inference.

    On CPUs with AVX512-BF16 such a layer in evaluation mode rewrites its weights, at its first input that requires no
    gradient, for a product that has no backward pass. Packing rounds the scales of the weights and cannot be undone.

    Raises:
        ConfigurationError: A layer has been packed already.
    """
    for name, layer in quantised_layers(model):
        hold_back(CAST)
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            fix = f"its 4-bit weights were packed for inference and can no longer be trained through: {_RELOAD}"
            raise ConfigurationError("actor_network", name, fix)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def check_gradients(model: nn.Module) -> None:
    """Compare the gradient through one quantised layer of each class with that layer's own weights.

    Raises:
        ConfigurationError: They differ by more than rounding.
    """
    checked = set()
    for name, layer in quantised_layers(model):
        if type(layer) in checked or layer.weight.is_meta:
            continue
        checked.add(type(layer))
        error = gradient_error(layer)
        if not error <= _TOLERANCE:
            fix = (
                f"its gradient is off by {error:.0%} of what its {type(layer).__name__} weights give on "
                f"{layer.weight.device}: use another version of the quantiser's library, another quantization_config, "
                "or none"
            )
            raise ConfigurationError("actor_network", name, fix)


def gradient_error(layer: Any) -> float:
    """Relative error of a linear layer's gradient with respect to its input x, given the weights of its forward pass.

    Applied to unit vectors, a layer of any quantiser gives columns of its dequantised weights W (out, in). The gradient
    of sum(G * layer(x)) with respect to x must be G W.
    """
    device = layer.weight.device
    generator = torch.Generator().manual_seed(0)
    columns = torch.randperm(layer.in_features, generator=generator)[:_COLUMNS]
    units = torch.zeros(1, len(columns) + 1, layer.in_features)  # The last row stays 0, for the bias.
    units[0, torch.arange(len(columns)), columns] = 1
    with torch.no_grad():
        outputs = layer(units.to(device))[0]
    weights = (outputs[:-1] - outputs[-1]).T.float()  # (out, columns)
    x = torch.randn(1, _ROWS, layer.in_features, generator=generator).to(device).requires_grad_()
    output_gradient = torch.randn(1, _ROWS, layer.out_features, generator=generator).to(device)
    with torch.enable_grad():
        value = (layer(x) * output_gradient).sum()
        # A layer without a backward pass gives a value that does not depend on x in autograd's graph.
        gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
        found = (torch.zeros_like(x) if gradient is None else gradient)[0, :, columns.to(device)]
    expected = output_gradient[0] @ weights
    return float((found - expected).norm() / expected.norm())


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The quantised linear layers of a model, with their names."""
    for name, module in model.named_modules() if getattr(model, "is_quantized", False) else ():
        weight = getattr(module, "weight", None)
        # Quantised weights are of a subclass of Parameter, or hold integer codes.
        quantised = isinstance(weight, Tensor) and not (type(weight) is nn.Parameter and weight.is_floating_point())
        if quantised and hasattr(module, "in_features"):
            yield name, module
