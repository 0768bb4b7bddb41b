"""The Triton kernel of the head against torch's operators: on a GPU, or in Triton's interpreter on a CPU.

Triton has to know before its import that it is to interpret, so tests/models/test_fused_head.py runs this file in a
process of its own.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

import evollm.public  # noqa: F401
from evollm.models import fused_head, head

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of sums of up to 262,144 terms in float32, in whichever order.
BOUNDS = {"rtol": 4e-6, "atol": 1e-5}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _kernel_on_this_device(monkeypatch) -> None:
    monkeypatch.setattr(fused_head, "_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(head, "_is_card", lambda device: True)
    fused_head.why_not_fused.cache_clear()


def test_importing_evollm_does_not_import_the_kernel() -> None:
    assert "evollm.models.head_kernel" not in sys.modules


def rows(count: int, vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(count, vocabulary, generator=generator)
    return logits.to(DEVICE, dtype), torch.randint(vocabulary, (count,), generator=generator).to(DEVICE)


def compare(logits: Tensor, targets: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compare the kernel with the tiles, and give its log-probs and what it leaves in the logits."""
    expected = torch.empty(len(logits), device=DEVICE)
    excess = head._log_softmax_rows(logits.clone(), targets, expected, overwrite=True).to(logits.dtype)
    kept = logits.clone()
    found = torch.full_like(expected, 7.0)
    fused_head.log_softmax_rows(logits, targets, found, overwrite=False)
    torch.testing.assert_close(found, expected, **BOUNDS, equal_nan=True)
    torch.testing.assert_close(logits, kept, rtol=0, atol=0, equal_nan=True)
    found.fill_(7.0)
    fused_head.log_softmax_rows(logits, targets, found, overwrite=True)
    torch.testing.assert_close(found, expected, **BOUNDS, equal_nan=True)
    limits = torch.finfo(logits.dtype)
    smallest = limits.smallest_normal * limits.eps
    torch.testing.assert_close(logits, excess, rtol=limits.eps + 1e-5, atol=smallest + slack, equal_nan=True)
    return found, logits


@pytest.mark.parametrize("vocabulary", [1, 2, 50, 64, 1000, 8192, 8193, 20_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabularies_of_any_size(dtype: torch.dtype, vocabulary: int) -> None:
    compare(*rows(5, vocabulary, dtype))


@pytest.mark.parametrize("vocabulary", [151_936, 256_000, 262_144])
def test_large_vocabularies(vocabulary: int) -> None:
    compare(*rows(2, vocabulary))


def test_rows_that_do_not_follow_each_other() -> None:
    whole, targets = rows(4, 1007)
    before = whole.clone()
    compare(whole[:, :1000], targets.remainder(1000))
    assert torch.equal(whole[:, 1000:], before[:, 1000:])
    compare(whole[::2, :50], torch.stack([targets, targets])[:, :2].t()[:, 0].remainder(50))


def test_targets_that_do_not_follow_each_other() -> None:
    logits, targets = rows(4, 100)
    spread = torch.stack([targets, targets], dim=1)[:, 0]
    assert not spread.is_contiguous()
    compare(logits, spread)


def test_more_logits_than_32_bits_can_count() -> None:
    """Rows at 0, 2^30 and 2^31; what lies between is never written, and so takes no memory on a CPU."""
    logits, targets = rows(3, 100)
    apart = torch.empty(2**31 + 100, dtype=logits.dtype, device=DEVICE).as_strided((3, 100), (2**30, 1))
    compare(apart.copy_(logits), targets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_excluded_tokens(dtype: torch.dtype) -> None:
    logits, targets = rows(4, 20_000, dtype)
    # More than one block, a target, and a whole row.
    logits[0, :10_000] = -torch.inf
    targets[0] = 15_000
    logits[1, targets[1]] = -torch.inf
    logits[2] = -torch.inf
    found, excess = compare(logits, targets)
    assert found[[0, 3]].isfinite().all()
    assert found[1] == -torch.inf
    assert found[2].isnan()
    assert excess[2].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 9000, 19_999])
def test_what_is_not_finite_gives_nan_in_its_row_alone(value: float, column: int) -> None:
    logits, targets = rows(3, 20_000)
    logits[1, column] = value
    found, excess = compare(logits, targets)
    assert found.isnan().tolist() == [False, True, False]
    assert excess.isnan().all(dim=1).tolist() == [False, True, False]
    assert not excess[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_rows_keep_the_digits_of_p_minus_1(dtype: torch.dtype) -> None:
    logits, targets = rows(8, 1000, dtype)
    logits[torch.arange(8), targets] = (logits.float().logsumexp(dim=1) + torch.linspace(0, 8, 8, device=DEVICE)).to(
        dtype
    )
    # Near 1 float32 itself has seven digits.
    _, excess = compare(logits, targets, slack=5e-7)
    assert (excess[torch.arange(8), targets] < 0).all()


def test_a_target_outside_the_vocabulary_has_no_log_prob() -> None:
    logits, _ = rows(2, 100)
    found = torch.zeros(2, device=DEVICE)
    fused_head.log_softmax_rows(logits, torch.tensor([100, -1], device=DEVICE), found, overwrite=True)
    assert found.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [50, 8193])
def test_the_kernel_passes_its_trial(dtype: torch.dtype, vocabulary: int) -> None:
    assert fused_head.why_not_fused(DEVICE, dtype, vocabulary) == ""


@pytest.mark.parametrize("count", [0, 1, 23])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_and_gradients_of_the_head(monkeypatch, dtype: torch.dtype, count: int) -> None:
    monkeypatch.setattr(head, "tile_bytes", lambda device: 10 * 4 * 300)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 12, generator=generator).to(DEVICE, dtype) for size in (count, 300))
    targets = torch.randint(300, (count,), generator=generator).to(DEVICE)
    bias, upstream = torch.ones(300).to(DEVICE, dtype), torch.linspace(-2, 3, count, device=DEVICE)
    results = []
    for devices in (("cuda", "cpu"), ()):
        monkeypatch.setattr(fused_head, "_DEVICES", devices)
        states = hidden.clone().requires_grad_()
        logprobs = head.token_logprobs(states, weight, bias, targets)
        results.append((logprobs.detach(), *torch.autograd.grad(logprobs, states, upstream)))
    (found, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=4 * rounding, atol=rounding)
