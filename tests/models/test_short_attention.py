"""Attention in bfloat16 on a CPU: short sequences have a backward pass in float32 and unchanged outputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from evollm.models.attention import _SHORT, _attend


@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (12, 40), (_SHORT, _SHORT)])
def test_the_backward_pass_of_short_attention_is_more_exact_and_its_output_the_same(queries, keys) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, h, n, 16).bfloat16().requires_grad_() for h, n in ((4, queries), (2, keys), (2, keys))]
    mask = None if queries == keys else torch.ones(keys, keys, dtype=torch.bool).tril()[-queries:]
    arguments = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
    output = _attend(*inputs, mask, None, None)
    plain = scaled_dot_product_attention(*inputs, **arguments)
    assert torch.equal(output, plain)
    assert torch.equal(output, _attend(*(one.detach() for one in inputs), mask, None, None))

    weights = torch.randn_like(plain)
    exact = torch.autograd.grad(
        scaled_dot_product_attention(*(one.double() for one in inputs), **arguments), inputs, weights.double()
    )
    found, rounded = (torch.autograd.grad(one, inputs, weights) for one in (output, plain))
    for ours, torchs, right in zip(found, rounded, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        ours_off, torchs_off = ((one.double() - right.double()).norm() for one in (ours, torchs))
        assert ours_off == torchs_off if queries >= _SHORT else ours_off < 0.5 * torchs_off
