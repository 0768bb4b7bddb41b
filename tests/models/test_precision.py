"""Where a base lies and in which type, where that is left to the library."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from conftest import make_rows
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import evollm
from evollm import DPO, SFT, ConfigurationError
from evollm.models.loading import base_source, precision
from evollm.models.loading.precision import speedup, with_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDE = LlamaConfig(hidden_size=1024, intermediate_size=2816, dtype=torch.bfloat16)
NARROW = LlamaConfig(hidden_size=64, intermediate_size=128)


@pytest.fixture
def measured(monkeypatch) -> Any:
    """Says how much faster bfloat16 is, and notes what was asked."""
    asked: list[tuple[int, int]] = []

    def say(factor: float) -> list[tuple[int, int]]:
        monkeypatch.setattr(precision, "speedup", lambda *sizes: asked.append(sizes) or factor)
        return asked

    return say


@pytest.mark.parametrize(
    ("factor", "dtype"), [(4.7, "bfloat16"), (1.5, "bfloat16"), (1.4, "float32"), (0.2, "float32")]
)
def test_auto_takes_bf16_on_a_cpu_only_where_it_is_measured_to_be_faster(measured, factor: float, dtype: str) -> None:
    asked = measured(factor)
    assert with_dtype({"revision": "main"}, "auto", WIDE, CPU) == {"revision": "main", "dtype": dtype}
    assert asked == [(1024, 2816)]


def test_auto_takes_bf16_on_a_card_that_is_fast_at_it(monkeypatch) -> None:
    for fast, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast)
        assert with_dtype(None, "auto", NARROW, CUDA) == {"dtype": dtype}


@pytest.mark.parametrize(
    ("config", "model_config"),
    [
        (None, None),
        (NARROW, None),
        (LlamaConfig(hidden_size=1024, intermediate_size=2816, dtype="float64"), None),
        (LlamaConfig(hidden_size=1024, intermediate_size=2816, quantization_config={"quant_method": "gptq"}), None),
        (WIDE, {"quantization_config": {"load_in_4bit": True}}),
        (WIDE, {"gguf_file": "weights.gguf"}),
    ],
)
def test_auto_leaves_what_is_unknown_small_or_quantised_as_stored(measured, config: Any, model_config: Any) -> None:
    asked = measured(9.0)
    assert with_dtype(model_config, "auto", config, CPU) == (model_config or {})
    assert asked == []


@pytest.mark.parametrize("dtype", ["int8", "half", 16, torch.int64])
def test_a_dtype_that_is_none_is_refused_with_those_there_are(dtype: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"dtype.*'auto' or one of.*bfloat16"):
        with_dtype(None, dtype, WIDE, CPU)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_two_dtypes_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"stands in model_config as {name}"):
        with_dtype({name: torch.float32}, "bfloat16", WIDE, CPU)


def test_speedup_is_that_of_this_machine() -> None:
    assert 0.01 < speedup(64, 128) < 100


@pytest.mark.parametrize("agent_class", [DPO, SFT])
def test_a_base_is_loaded_in_the_dtype_that_is_asked_for_and_again_from_a_checkpoint(
    model_folder, tmp_path, agent_class: Any
) -> None:
    agent = agent_class(model_name=str(model_folder), dtype="bfloat16")
    assert agent.base.network.dtype == torch.bfloat16
    assert {p.dtype for p in agent.actor_parameters()} == {torch.float32}
    agent.save_checkpoint(str(tmp_path / "agent"))
    assert agent_class.load(str(tmp_path / "agent")).base.network.dtype == torch.bfloat16


def test_the_dtype_of_a_loaded_model_is_its_own(model_folder) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(ConfigurationError, match=r"dtype.*a loaded model has its own"):
        DPO(actor_network=model, dtype="auto")


def test_a_search_goes_on_in_the_dtype_that_it_began_in(model_folder, tmp_path, monkeypatch, measured) -> None:
    """A machine on which bfloat16 is slow resumes what one on which it is fast has begun."""
    monkeypatch.setattr(precision, "_FEWEST_WEIGHTS", 1)
    asked = measured(4.0)
    settings = {
        "population": 1,
        "max_steps": 2,
        "verbose": False,
        "test_data": make_rows(4, skip=8),
        "final_data": False,
    }
    first = evollm.tune(str(model_folder), make_rows(8), run_dir=tmp_path / "run", **settings)
    assert first.best.base.network.dtype == torch.bfloat16
    assert json.loads((tmp_path / "run" / "tune.json").read_text())["settings"]["dtype"] == "bfloat16"
    asked.clear()
    measured(0.2)
    settings = {**settings, "max_steps": 3, "dtype": "bfloat16"}
    again = evollm.tune(str(model_folder), make_rows(8), resume_from_checkpoint=tmp_path / "run", **settings)
    assert again.best.base.network.dtype == torch.bfloat16
    assert asked == []


def test_without_a_device_a_named_base_goes_to_a_card_and_a_loaded_one_stays(model_folder, monkeypatch) -> None:
    network = AutoModelForCausalLM.from_pretrained(model_folder)
    assert base_source.usable_device(None, None, network) == CPU
    assert base_source.usable_device(None, None) == (CUDA if torch.cuda.is_available() else CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert base_source.usable_device(None, None) == CUDA
    with pytest.warns(UserWarning, match="actor_network is on the CPU and stays there: pass device='cuda'"):
        assert base_source.usable_device(None, None, network) == CPU
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert base_source.usable_device(None, "cpu", network) == CPU
        assert base_source.usable_device(None, None, network.to("meta")) == torch.device("meta")


def test_configurations_of_all_kinds_have_widths() -> None:
    for name, sizes in {"t5": (512, 2048), "bart": (1024, 4096), "gpt2": (768, 3072), "gemma3": (2304, 9216)}.items():
        assert precision._widths(AutoConfig.for_model(name)) == sizes
