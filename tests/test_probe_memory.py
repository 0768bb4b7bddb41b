"""A verdict of the probe is taken over from another test where the probe would find the same, and only there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from members import make_batch
from models.test_engine import break_path
from peft import LoraConfig
from probe_memory import ProbeMemory
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from evollm import DPO
from evollm.models import engine
from evollm.models.engine import Engine
from evollm.models.fast_paths import FastPaths

pytestmark = pytest.mark.usefixtures("every_probe")


@pytest.fixture
def memory(tmp_path, monkeypatch) -> ProbeMemory:
    """A memory of one's own, with the verdict on `make_agent()`."""
    memory = ProbeMemory(tmp_path)
    monkeypatch.setattr(engine, "probe", partial(memory.find, "probe"))
    return memory


def probed(agent: DPO) -> tuple[FastPaths, dict[str, int], str]:
    """The verdict, what was counted, and the name of the next adapter."""
    paths = Engine.of(agent.base).prepare([agent.actor_adapter], make_batch().longest_sequence)
    return paths, agent.base.flops.take(), agent.clone().actor_adapter


def test_a_verdict_is_taken_over_with_all_that_a_probe_leaves(memory, make_agent) -> None:
    first = probed(make_agent())
    assert memory.remembered == 0
    assert first[0].floor > 0
    assert first[1]["probe"] > 0
    assert probed(make_agent()) == first
    assert memory.remembered == 1


def test_a_model_is_the_same_wherever_it_was_loaded_from(memory, make_agent, model_folder: Path) -> None:
    folders = [model_folder, shutil.copytree(model_folder, model_folder.with_name("copy"))]
    first, second = (probed(make_agent(actor_network=None, model_name=str(folder))) for folder in folders)
    assert first == second
    assert memory.remembered == 1


def other_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3


def other_frequencies(model: Any) -> None:
    """Numbers that are in no file of the model."""
    model.model.rotary_emb.inv_freq *= 1.01


def other_attribute(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def other_setting(model: Any) -> None:
    model.config.use_cache = not model.config.use_cache


def hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *given: 2 * given[2])


def other_forward(model: Any) -> None:
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * plain(x)


def other_class(model: Any) -> None:
    class Own(nn.SiLU):
        pass

    model.model.layers[0].mlp.act_fn = Own()


@pytest.mark.parametrize(
    "change",
    [other_weight, other_frequencies, other_attribute, other_setting, hook, other_forward, other_class],
    ids=lambda change: change.__name__,
)
def test_another_base_is_probed(memory, make_agent, make_model, change: Callable[[Any], None]) -> None:
    probed(make_agent())
    model = make_model()
    change(model)
    probed(make_agent(actor_network=model))
    assert memory.remembered == 0


def test_other_adapters_lengths_and_code_are_probed(memory, make_agent, monkeypatch) -> None:
    probed(make_agent())
    agent = make_agent(lora_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    probed(agent)
    Engine.of(agent.base).prepare([agent.actor_adapter], 100)
    plain = LlamaMLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda mlp, x: plain(mlp, x) + 0)
        probed(make_agent())
    assert memory.remembered == 0
    break_path(monkeypatch, "leak")
    with pytest.warns(UserWarning, match="do not share their prompt"):
        assert not probed(make_agent())[0].shared_prompt
    assert memory.remembered == 0
