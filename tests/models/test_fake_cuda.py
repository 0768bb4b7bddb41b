"""What runs on a GPU, on fake tensors: shapes, dtypes and devices are checked and nothing is computed.

A CUDA build of torch is needed, a GPU is not. Without one torch's engine for backward passes does not start, so that
backward functions are called by hand.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, Qwen2Config

from evollm import DPO
from evollm.data.samples import Batch, Sample
from evollm.models import attention, flash, head, shared_base
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.layouts.packed import PackedLayout
from evollm.models.passes import FewSamples
from evollm.models.probe import FastPaths

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch"),
    # Of fake tensors themselves.
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_card(monkeypatch) -> None:
    """Stand in for what asks the driver."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("size", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_flash_operator_takes_grouped_heads_and_is_differentiable(dtype, size: int, window: int | None) -> None:
    with FakeTensorMode():
        query, key, value = (
            torch.randn(length, heads, size, device=CUDA, dtype=dtype).requires_grad_()
            for length, heads in ((5, 4), (12, 2), (12, 2))
        )
        bounds = flash.SequenceBounds.of([(4, 4), (1, 8)], CUDA)
        output = flash.flash_attention(query, key, value, bounds, 0.3, window)
        assert (output.shape, output.device, output.dtype) == (query.shape, CUDA, dtype)
        assert output.grad_fn is not None
        gradients = output.grad_fn(torch.ones_like(output))
        assert [gradient.shape for gradient in gradients[:3]] == [query.shape, key.shape, value.shape]
        assert all((gradient.device, gradient.dtype) == (CUDA, dtype) for gradient in gradients[:3])


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pass_on_a_gpu_goes_through_the_flash_kernel_in_half_precision(
    monkeypatch, dtype: torch.dtype, gradient_checkpointing: bool
) -> None:
    pretend(monkeypatch)
    pairs = [Sample.of(*map(np.arange, shape)) for shape in ((5, 3, 4), (2, 6, 1), (3, 4))]
    batch = Batch(pairs)
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(CUDA):
            config = Qwen2Config(vocab_size=64, num_hidden_layers=2, **shape)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        agents = [DPO(actor_network=model, lora_config=lora, index=seed, seed=seed, device="cuda") for seed in range(2)]
        names = [agent.actor_adapter for agent in agents]
        engine = Engine.of(agents[0].base)
        few = FewSamples(agents[0].base, PackedLayout(agents[0].base, tiled_head=True), batch, names, stacking=True)
        half = dtype == torch.bfloat16
        with few.forward([0, 1], recompute=gradient_checkpointing) as found:
            assert len(found.members) == 2
            for column in (column for member in found.members for column in member.sums().columns):
                assert (column.shape, column.device, column.requires_grad) == ((3,), CUDA, True)
        assert few.attention == (attention.FLASH if half else attention.ONE_BY_ONE)

        engine.prepare = lambda members, length: FastPaths(longest=64)  # type: ignore
        slow = pytest.warns(UserWarning, match="load it with dtype='bfloat16'")
        with contextlib.nullcontext() if half else slow:
            parts = engine.logprobs(Item.on(batch, [*names, None]), PassOptions(token_budget=64))
        for part in parts:
            assert part.chosen.device == part.rejected.device == torch.device("cpu")
        assert engine.attention == few.attention


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for what needs a driver, or numbers."""

    def apply(self: nn.Module, function, recurse: bool = True) -> nn.Module:
        for child in self.children():
            child._apply(function)
        for name, parameter in self.named_parameters(recurse=False):
            moved = nn.Parameter(function(parameter.detach()), requires_grad=parameter.requires_grad)
            self._parameters[name] = moved
        for name, buffer in self.named_buffers(recurse=False):
            self._buffers[name] = function(buffer)
        return self

    monkeypatch.setattr(nn.Module, "_apply", apply)
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(shared_base, "weights_fingerprint", lambda model: "of no numbers")
    monkeypatch.setattr(flash, "_try_kernel", lambda *_: [0.0])
    monkeypatch.setattr(head, "takes_kernel", lambda logits: False)
    flash.why_not_flash.cache_clear()
    attention._warn_of_slow_attention.cache_clear()
    monkeypatch.setattr(flash, "why_not_flash", flash.why_not_flash.__wrapped__)
    monkeypatch.setattr(attention, "why_not_flash", flash.why_not_flash)
