"""Attention by the variable-length flash kernel, here a reference kernel on the CPU in its place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCABULARY, make_family
from flash_kernel import Kernel, on_the_cpu
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evollm import DPO
from evollm.data.samples import Batch, Sample
from evollm.models import attention, flash
from evollm.models.engine import Engine, Item, PassOptions
from evollm.models.logprobs import TokenLogprobs

CPU = torch.device("cpu")
# Some sides are longer than the small models' windows, some prompts shorter, two pairs have no rejected side.
SHAPES = [(9, 5, 3), (3, 1, 12), (14, 7, 7), (1, 2, 2), (6, 11, 1), (4, 9, 0), (6, 1, 0)]
FAMILIES = {"qwen2": [], "qwen2-window": [], "mistral-window": [], "gemma3": [], "gpt-neox": ["query_key_value"]}


def make_batch() -> Batch:
    rng = np.random.default_rng(0)
    pairs = [Sample.of(*(rng.integers(VOCABULARY, size=size) for size in shape if size)) for shape in SHAPES]
    return Batch(pairs)


def make_agents(model: Any, targets: list[str], **settings: Any) -> list[DPO]:
    targets = targets or ["q_proj", "k_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return [DPO(actor_network=model, lora_config=lora, index=seed, seed=seed, **settings) for seed in range(3)]


def logprobs_and_gradients(agents: list[DPO]) -> tuple[list[Tensor], list[Tensor]]:
    names = [agent.actor_adapter for agent in agents]
    options = PassOptions(gradient_checkpointing=agents[0].settings.gradient_checkpointing)

    def loss(members: Sequence[int], rows: Sequence[int], found: TokenLogprobs) -> Tensor:
        return sum((member.chosen * 1.3 - member.rejected).sum() for member in found.members)

    found = Engine.of(agents[0].base).backward(Item.on(make_batch(), names), options, loss)
    sums = [torch.stack(member.sums().columns) for member in found]
    return sums, [parameter.grad for agent in agents for parameter in agent.actor_parameters()]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_flash_kernel_gives_the_log_probs_and_gradients_of_one_sequence_after_the_other(
    family: str, gradient_checkpointing: bool
) -> None:
    results = []
    for kernel in (None, Kernel()):
        agents = make_agents(make_family(family), FAMILIES[family], gradient_checkpointing=gradient_checkpointing)
        engine = Engine.of(agents[0].base)
        assert engine.attention == ""
        if kernel is None:
            results.append(logprobs_and_gradients(agents))
            assert engine.attention == attention.ONE_BY_ONE
        else:
            with on_the_cpu(kernel, float64=1e-9):
                results.append(logprobs_and_gradients(agents))
            assert engine.attention == attention.FLASH
            assert engine.prepare([agent.actor_adapter for agent in agents], 1).reasons == ()
    torch.testing.assert_close(results[0], results[1], rtol=0.0, atol=1e-9)


# Its head has a soft cap too, and is not tiled.
@pytest.mark.filterwarnings("ignore:.*all logits are computed at once")
def test_what_has_a_soft_cap_does_not_go_through_the_flash_kernel() -> None:
    agents = make_agents(make_family("gemma2"), [])
    with on_the_cpu(Kernel(), float32=1e-4) as kernel:
        logprobs_and_gradients(agents)
    assert kernel.calls == 0
    assert Engine.of(agents[0].base).attention == attention.SOFT_CAPPED


@pytest.mark.parametrize(("size", "value_size"), [(64, 64), (128, 128), (80, 80), (20, 20), (24, 12), (8, 30)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_heads_of_any_size_go_through_the_flash_kernel(size: int, value_size: int, window: int | None) -> None:
    """More keys than queries, one query alone and grouped heads, against torch's own attention."""
    counts = [(6, 6), (2, 7), (1, 1), (1, 9)]
    queries, keys = zip(*counts, strict=True)
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 4, size), (23, 2, size), (23, 2, value_size)]
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    with on_the_cpu(Kernel(), float64=1e-9):
        sequences = flash.SequenceBounds.of(counts, CPU)
        found = flash.flash_attention(query, key, value, sequences, None, window)
        gradients = torch.autograd.grad(found.square().sum(), (query, key, value))
    parts = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    expected = torch.cat(
        [
            scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in three),
                attn_mask=flash.causal_mask(len(three[0]), len(three[1]), window, CPU),
                enable_gqa=True,
            ).transpose(0, 1)
            for three in parts
        ]
    )
    assert found.shape == (10, 4, value_size)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), (query, key, value)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 64, 80, 96, 128, 256])
def test_a_kernel_that_is_right_is_taken(dtype: torch.dtype, size: int) -> None:
    before = torch.get_rng_state()
    with on_the_cpu(Kernel()), torch.no_grad():
        assert flash.why_not_flash(CPU, dtype, size) == ""
    with on_the_cpu(Kernel()), torch.inference_mode():
        assert flash.why_not_flash(CPU, dtype, size) == ""
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"corner": 0}, "off by"),
        ({"window_by": 1}, "off by"),
        ({"window_by": -1}, "off by"),
        ({"scale": 0.125}, "off by"),
        ({"gradient": 0.0}, "off by 100%"),
        ({"gradient": float("nan")}, "off by nan%"),
        ({"raises": "no kernel image is available\nand more"}, "RuntimeError: no kernel image is available"),
        ({"raises": "  "}, "RuntimeError: "),
    ],
    ids=str,
)
def test_a_kernel_that_is_wrong_is_not_taken_and_the_reason_is_kept(dtype, faults: dict[str, Any], reason: str) -> None:
    with on_the_cpu(Kernel(**faults)) as kernel:
        assert reason in flash.why_not_flash(CPU, dtype, 64)
        calls = kernel.calls
        assert f"torch {torch.__version__}" in flash.why_not_flash(CPU, dtype, 64)
        assert kernel.calls == calls > 0


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ((CPU, torch.bfloat16, 64), "CUDA"),
        ((torch.device("cuda"), torch.float32, 64), "load the base with dtype='bfloat16'"),
        ((torch.device("cuda"), torch.bfloat16, 264), "at most 256"),
    ],
    ids=["device", "dtype", "head"],
)
def test_heads_that_the_kernel_does_not_take_are_not_tried(asked: tuple[Any, ...], reason: str) -> None:
    assert reason in flash.why_not_flash(*asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_what_torch_says_of_a_device_that_is_not_there_is_kept() -> None:
    """In the words of torch's build: not compiled with CUDA, or no driver."""
    assert "says: " in flash.why_not_flash(torch.device("cuda"), torch.bfloat16, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
def test_torchs_own_kernel_is_taken(dtype: torch.dtype, size: int) -> None:
    assert flash.why_not_flash(torch.device("cuda"), dtype, size) == ""


def test_a_gpu_without_the_kernel_is_warned_of_once_with_the_reason(monkeypatch) -> None:
    agents = make_agents(make_family("qwen2"), [])
    monkeypatch.setattr(attention, "SLOW_WITHOUT_FLASH", ("cuda", "cpu"))
    with on_the_cpu(Kernel(raises="only supports Ampere GPUs or newer"), float64=1e-9):
        with pytest.warns(UserWarning, match=r"slow on a GPU.*only supports Ampere") as caught:
            logprobs_and_gradients(agents)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logprobs_and_gradients(agents)
    assert Engine.of(agents[0].base).attention == attention.ONE_BY_ONE


def test_the_kernel_may_be_tried_inside_a_checkpointed_layer() -> None:
    """As in a run that is resumed: its fast paths are known, so that nothing is probed before the first step."""
    results = []
    for tried_before in (True, False):
        agents = make_agents(make_family("qwen2"), [], gradient_checkpointing=True)
        with on_the_cpu(Kernel(), float64=1e-9):
            engine = Engine.of(agents[0].base)
            engine.prepare([agent.actor_adapter for agent in agents], make_batch().longest_sequence)
            engine.budgets.budgets[True, True, True] = 1024
            if not tried_before:
                flash.why_not_flash.cache_clear()
            results.append(logprobs_and_gradients(agents))
    torch.testing.assert_close(results[0], results[1], rtol=0.0, atol=0.0)
