"""Kernels of a layer that torch.compile has compiled, for launches.py, counted without a card.

Torch's inductor decides which operators share a kernel before it writes code for a device. So a small model of the same
layers, in bfloat16 on the CPU, is compiled and trained for a step, and the kernels are counted in the code that was
written for its layers. On a card one of them may be split into two (a long reduction); that is not seen. What the
layers do outside of their graphs, attention and the adding up of gradients, and inside of the operator for routed LoRA,
is counted on a pretended card, as everything in launches.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import torch
from gpu import random_model
from pretended_card import CARD, pretended_card
from synthetic import Shape, make_population
from torch._inductor.graph import GraphLowering

from evollm.algorithms.dpo_step import learn_together
from evollm.models.adapters.routed_lora import GraphLora
from evollm.models.attention import PackedSequences, SampleLengths

# The layers' sizes do not matter: what is fused hangs on the order of the operators.
_SIZES = (64, 128, 2, 4, 2, True)
_FUSED = re.compile(r"^ +cpp_fused\w*\(", re.MULTILINE)
_LORA = re.compile(r"^ +buf\d+ = torch\.ops\.evollm\.(routed_lora|routed_lora_backward)\.default\(", re.MULTILINE)


def compiled_layer() -> dict[str, int]:
    """Kernels of one layer in a training pass, forward and backward.

    Returns:
        `fused`: those that inductor writes; `lora`: those of the routed LoRA layers; `attention`; and `layer`, the sum.
    """
    graphs = _layer_graphs()
    calls = Counter(kind for code in graphs for kind in _LORA.findall(code))
    assert calls["routed_lora"] == calls["routed_lora_backward"], "a routed layer has lost its backward pass"
    fused = sum(len(_FUSED.findall(code)) for code in graphs)
    found = {"fused": fused, "lora": calls["routed_lora"] * kernels_of_lora(), "attention": _kernels(_attention)}
    return {**found, "layer": sum(found.values())}


def _layer_graphs() -> list[str]:
    """What inductor writes for a layer: the bodies of its functions, which all layers share."""
    torch._dynamo.reset()
    agents = make_population(random_model(_SIZES, 512, torch.device("cpu"), torch.bfloat16), 3)
    batch = Shape(8, 6, 7).batch(2, 500)
    # What precedes training, such as the probe, is not to be compiled.
    learn_together(agents, batch)
    agents[0].base.compile("default")
    codes: list[str] = []
    with patch.object(GraphLowering, "save_output_code", staticmethod(codes.append)):
        learn_together(agents, batch)
    return [code[code.index("def call(") :] for code in codes]


def kernels_of_lora() -> int:
    """Kernels of a routed layer in a graph, both ways, and of the adding up of its gradients."""
    return _kernels(_lora)


def _kernels(prepare: Callable[[], Callable[[], object]]) -> int:
    """What a function launches; what precedes it is not counted."""
    with pretended_card(lambda frame: ("", "")) as counts:
        run = prepare()
        counts.clear()
        run()
        return counts.kernels.total()


def _tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=CARD)


def _lora() -> Callable[[], object]:
    x, down, up = (_tensor(*shape).requires_grad_() for shape in ((2, 9, 8), (2, 4, 8), (2, 8, 4)))
    lora, towards = GraphLora(down, up, None, 2.0), _tensor(2, 9, 8)
    weight = _tensor(8, 8)
    totals = [torch.empty(one.shape, device=CARD) for one in (down, up)]

    def run() -> None:
        _, *gradients = torch.autograd.grad(lora(x, weight, None), (x, down, up), towards)
        for total, gradient in zip(totals, gradients, strict=True):
            total.add_(gradient)

    return run


def _attention() -> Callable[[], object]:
    lengths = tuple(SampleLengths(5, (3, 4)) for _ in range(2))
    varlen = PackedSequences(lengths, CARD).varlen
    states = [_tensor(2, heads, 24, 8).requires_grad_() for heads in (4, 2, 2)]
    towards = _tensor(2, 24, 4, 8)
    # What all layers share.
    varlen.attend(*states, None, None)
    return lambda: torch.autograd.grad(varlen.attend(*states, None, None), states, towards)
