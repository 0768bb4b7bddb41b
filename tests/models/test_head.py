from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from evollm.models import head
from evollm.models.head import divergences_of, token_divergences, token_logprobs

VOCABULARY, WIDTH, COUNT = 50, 12, 23


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, WIDTH, generator=generator).to(dtype) for size in (COUNT, VOCABULARY))
    bias = torch.randn(VOCABULARY, generator=generator).to(dtype)
    return hidden.requires_grad_(), weight, bias, torch.randint(VOCABULARY, (COUNT,), generator=generator)


@pytest.fixture(params=["cpu", "card"])
def device(request, monkeypatch) -> None:
    """The CPU's way and the card's, on a CPU."""
    if request.param == "card":
        monkeypatch.setattr(head, "_is_card", lambda device: True)
        monkeypatch.setattr(head, "tile_bytes", lambda device: head.TILE_BYTES)


@pytest.mark.parametrize("rows_in_a_tile", [1, 4, 23, 100])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("device")
def test_tiled_log_probs_are_those_of_log_softmax(monkeypatch, rows_in_a_tile: int, with_bias: bool) -> None:
    monkeypatch.setattr(head, "TILE_BYTES", rows_in_a_tile * 4 * VOCABULARY)
    hidden, weight, bias, targets = inputs()
    used = bias if with_bias else None
    upstream = torch.linspace(-2, 3, COUNT, dtype=torch.float64)

    found = token_logprobs(hidden, weight, used, targets)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)
    logits = torch.nn.functional.linear(hidden, weight, used)
    expected = logits.log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("device")
def test_log_probs_of_a_bfloat16_head_are_float32() -> None:
    hidden, weight, _, targets = inputs(torch.bfloat16)
    found = token_logprobs(hidden, weight, None, targets)
    logits = torch.nn.functional.linear(hidden, weight).double()
    expected = logits.log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_log_probs_of_a_bfloat16_head_at_a_temperature_are_those_of_its_logits(temperature: float) -> None:
    hidden, weight, _, targets = inputs(torch.bfloat16)
    found = token_logprobs(8 * hidden, weight, None, targets, temperature=temperature)
    logits = torch.nn.functional.linear(8 * hidden, weight).double() / temperature
    expected = logits.log_softmax(dim=1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.usefixtures("device")
def test_nothing_is_kept_for_a_gradient_that_nobody_wants() -> None:
    hidden, weight, _, targets = inputs()
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, None, targets).requires_grad


@pytest.mark.usefixtures("device")
def test_the_gradient_of_a_confident_bfloat16_head_is_not_noise() -> None:
    """p is 0.998 or so: with p rounded to 1 before the subtraction nothing would be left of 1 - p."""
    _, weight, _, targets = inputs(torch.bfloat16)
    confident = (weight[targets].float() * 1.2).bfloat16().detach().requires_grad_()
    found = token_logprobs(confident, weight, None, targets)
    assert float(found.exp().median()) > 0.99
    (gradient,) = torch.autograd.grad(found.sum(), confident)
    logits = torch.nn.functional.linear(confident, weight).float()
    excess = torch.nn.functional.one_hot(targets, VOCABULARY) - logits.softmax(dim=1)
    expected = excess @ weight.float()
    error = (gradient.float() - expected).norm(dim=1) / expected.norm(dim=1)
    # A few tokens are so sure that float32 itself cannot tell p from 1.
    assert float(error.median()) < 0.01


@pytest.mark.parametrize("rows_in_a_tile", [1, 4, 100])
def test_tiled_divergences_are_those_of_the_whole_distributions(monkeypatch, rows_in_a_tile: int) -> None:
    monkeypatch.setattr(head, "TILE_BYTES", rows_in_a_tile * 4 * VOCABULARY)
    hidden, weight, bias, _ = inputs()
    hidden = hidden.detach()
    reference = hidden + torch.linspace(0, 0.5, COUNT, dtype=torch.float64)[:, None]
    found = token_divergences(hidden, reference, weight, bias)
    policy, frozen = ((states @ weight.T + bias).softmax(dim=1) for states in (hidden, reference))
    torch.testing.assert_close(found, (policy * (policy / frozen).log()).sum(dim=1), rtol=0, atol=1e-10)
    assert found[0] == 0
    assert (found[1:] > 0).all()


def test_a_token_that_the_policy_excludes_adds_nothing_to_the_divergence() -> None:
    """pi = (1/2, 1/2, 0), ref = (1/4, 1/4, 1/2): KL = log 2."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert divergences_of(*logits).item() == pytest.approx(0.693147, abs=1e-6)


def test_tiles_on_a_card_follow_its_memory(monkeypatch) -> None:
    card = torch.device("cuda")
    for gigabytes, rows in ((80, 2204), (24, 661), (4, 220)):
        about = SimpleNamespace(total_memory=gigabytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, about=about: about)
        assert head.tile_bytes(card) // (4 * 152_200) == rows
        assert head.extra_bytes(card) == 3 * (head.tile_bytes(card) - head.TILE_BYTES)
    assert head.tile_bytes(torch.device("cpu")) == head.TILE_BYTES
    assert head.extra_bytes(torch.device("cpu")) == 0
