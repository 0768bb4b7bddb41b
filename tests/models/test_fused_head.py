"""The Triton kernel of the head: what it gives, and that it is not taken where it cannot be or is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from evollm.models import fused_head, head
from evollm.models.head import token_logprobs

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
KERNEL = "evollm.models.head_kernel"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    "interpret",
    ["1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_the_kernel_gives_what_torchs_operators_give(interpret: str) -> None:
    """Logits of any vocabulary, layout and value: the cases in tests/head_kernel_cases.py."""
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": FOLDERS}
    if interpret == "1":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/head_kernel_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


COMPILE = """
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from evollm.models.head_kernel import _log_softmax_row

types = {"logits": "*" + sys.argv[1], "targets": "*i64", "logprobs": "*fp32", "stride": "i32"}
for capability in (80, 90):
    for overwrite in (False, True):
        fixed = {"vocabulary": 151_936, "overwrite": overwrite, "block": 8192}
        source = ASTSource(_log_softmax_row, types | dict.fromkeys(fixed, "constexpr"), fixed)
        assert compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 16}).asm["cubin"]
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_triton_compiles_the_kernel_for_ampere_and_hopper(tmp_path, dtype: str) -> None:
    """The interpreter takes what the compiler refuses; this needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": FOLDERS}
    command = [sys.executable, "-c", COMPILE, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


@dataclass
class Kernel:
    """The kernel by its definition; its faults are those that a trial must find.

    Attributes:
        target_by: Added to the targets.
        unread: Logits at the end of a row that are not read.
        unshifted: No logit is subtracted before exp.
        half: The sum is made in bfloat16.
        p_rounded: p is rounded before 1 is subtracted.
        kept: The logits are not overwritten.
        hides_nan: What is not finite becomes 0.
        nats: Added to the log-probs.
        raises: What is raised at a launch.
        calls: Launches so far.
    """

    target_by: int = 0
    unread: int = 0
    unshifted: bool = False
    half: bool = False
    p_rounded: bool = False
    kept: bool = False
    hides_nan: bool = False
    nats: float = 0.0
    raises: Exception | None = None
    calls: int = 0

    def log_softmax_rows(self, logits: Tensor, targets: Tensor, logprobs: Tensor, *, overwrite: bool) -> None:
        self.calls += 1
        if self.raises is not None:
            raise self.raises
        wanted = ((targets + self.target_by) % logits.shape[1]).unsqueeze(1)
        read = logits.float()
        read[:, logits.shape[1] - self.unread :] = -torch.inf
        largest = torch.zeros(len(logits), 1) if self.unshifted else read.amax(dim=1, keepdim=True)
        every = (read - largest).exp()
        total = every.bfloat16().sum(dim=1, keepdim=True).float() if self.half else every.sum(dim=1, keepdim=True)
        found = (read.gather(1, wanted) - largest - total.log()).squeeze(1) + self.nats
        logprobs.copy_(found.nan_to_num() if self.hides_nan else found)
        if overwrite and not self.kept:
            p = (every / total).to(logits.dtype if self.p_rounded else torch.float32)
            logits.copy_(p.scatter_add_(1, wanted, torch.full_like(p, -1.0)[:, :1]))


@contextmanager
def on_the_cpu(kernel: Kernel | None) -> Iterator[None]:
    """Let the head ask for this kernel on the CPU inside the block; None: Triton is not there."""
    modules = {KERNEL: SimpleNamespace(log_softmax_rows=kernel.log_softmax_rows)} if kernel else {"triton": None}
    fused_head.why_not_fused.cache_clear()
    fused_head._warn_of_slow_head.cache_clear()
    try:
        with patch.dict(sys.modules, modules), patch.object(fused_head, "_DEVICES", ("cuda", "cpu")):
            if kernel is None:
                sys.modules.pop(KERNEL, None)
            yield
    finally:
        fused_head.why_not_fused.cache_clear()
        fused_head._warn_of_slow_head.cache_clear()


def logprobs_and_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Of 23 tokens in tiles of 10."""
    monkeypatch.setattr(head, "TILE_BYTES", 10 * 4 * 300)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 12, generator=generator).to(dtype) for size in (23, 300))
    hidden.requires_grad_()
    found = token_logprobs(hidden, weight, None, torch.randint(300, (23,), generator=generator))
    return found.detach(), torch.autograd.grad(found, hidden, torch.linspace(-2, 3, 23))[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_by_a_kernel_gives_the_log_probs_and_gradients_of_its_tiles(monkeypatch, dtype: torch.dtype) -> None:
    expected = logprobs_and_gradient(dtype, monkeypatch)
    kernel = Kernel()
    with on_the_cpu(kernel):
        found = logprobs_and_gradient(dtype, monkeypatch)
    assert kernel.calls == 2 + 3, "two in the trial, and one for each tile"
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-5)
    rounding = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=4 * rounding, atol=rounding)


def test_logits_that_nobody_differentiates_are_not_overwritten() -> None:
    asked = []
    with on_the_cpu(Kernel()), torch.no_grad():
        assert fused_head.why_not_fused(CPU, torch.float32, 50) == ""
        with patch.object(head, "log_softmax_rows", lambda *args, overwrite: asked.append(overwrite)):
            token_logprobs(torch.ones(3, 4), torch.ones(50, 4), None, torch.zeros(3, dtype=torch.long))
    assert asked == [False]


def test_float64_does_not_go_through_the_kernel(monkeypatch) -> None:
    kernel = Kernel()
    with on_the_cpu(kernel):
        logprobs_and_gradient(torch.float64, monkeypatch)
    assert kernel.calls == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 50, 8193, 151_936])
def test_a_kernel_that_is_right_is_taken(dtype: torch.dtype, vocabulary: int) -> None:
    before = torch.get_rng_state()
    with on_the_cpu(Kernel()), torch.inference_mode():
        assert fused_head.why_not_fused(CPU, dtype, vocabulary) == ""
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [300, 151_936])
@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"target_by": 1}, "its log-probs were wrong"),
        ({"unread": 1}, "its log-probs were wrong"),
        ({"unshifted": True}, "its log-probs were wrong"),
        ({"half": True}, "its log-probs were wrong"),
        ({"hides_nan": True}, "its log-probs were wrong"),
        ({"nats": 1e-3}, "its log-probs were wrong"),
        ({"nats": float("nan")}, "its log-probs were wrong"),
        ({"kept": True}, "its gradients were wrong"),
        ({"raises": RuntimeError("Failed to find C compiler.\nand more")}, "RuntimeError: Failed to find C compiler."),
        ({"raises": OSError("  ")}, "Triton says: OSError: "),
    ],
    ids=str,
)
def test_a_kernel_that_is_wrong_is_not_taken_and_the_reason_is_kept(dtype, vocabulary, faults, reason: str) -> None:
    kernel = Kernel(**faults)
    with on_the_cpu(kernel):
        assert fused_head.why_not_fused(CPU, dtype, vocabulary).endswith(reason)
        calls = kernel.calls
        assert fused_head.why_not_fused(CPU, dtype, vocabulary).endswith(reason)
        assert kernel.calls == calls > 0


@pytest.mark.parametrize("vocabulary", [300, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_that_rounds_p_before_it_subtracts_1_is_not_taken(dtype: torch.dtype, vocabulary: int) -> None:
    with on_the_cpu(Kernel(p_rounded=True)):
        assert fused_head.why_not_fused(CPU, dtype, vocabulary) == "in a trial its gradients were wrong"


FALLBACKS = {
    "no Triton": (None, "ModuleNotFoundError"),
    "no compiler": (
        Kernel(raises=RuntimeError("Failed to find C compiler")),
        "RuntimeError: Failed to find C compiler",
    ),
    "wrong": (Kernel(nats=1.0), "its log-probs were wrong"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_without_the_kernel_the_tiles_are_used_and_one_warning_says_why(monkeypatch, case: str) -> None:
    kernel, reason = FALLBACKS[case]
    expected = logprobs_and_gradient(torch.bfloat16, monkeypatch)
    with on_the_cpu(kernel):
        with pytest.warns(UserWarning, match=f"the Triton kernel is not taken .*{reason}") as caught:
            found = logprobs_and_gradient(torch.bfloat16, monkeypatch)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logprobs_and_gradient(torch.bfloat16, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_trial_that_runs_out_of_memory_is_made_again() -> None:
    kernel = Kernel(raises=torch.OutOfMemoryError("CUDA out of memory"))
    with on_the_cpu(kernel):
        with pytest.raises(torch.OutOfMemoryError):
            fused_head.why_not_fused(CPU, torch.float32, 50)
        kernel.raises = None
        assert fused_head.why_not_fused(CPU, torch.float32, 50) == ""


@pytest.mark.parametrize(
    ("asked", "reason"),
    [((CPU, torch.bfloat16, 50), "CUDA"), ((torch.device("cuda"), torch.float64, 50), "not torch.float64")],
    ids=["device", "dtype"],
)
def test_logits_that_the_kernel_does_not_take_are_not_tried(asked, reason: str) -> None:
    assert reason in fused_head.why_not_fused(*asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_what_torch_says_of_a_device_that_is_not_there_is_kept() -> None:
    assert "says: " in fused_head.why_not_fused(torch.device("cuda"), torch.bfloat16, 50)
