"""What a run leaves in memory once its result is dropped: nothing."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import make_rows

import evollm
from evollm import Callback, DivergedError
from evollm.models.budget import count_saved_bytes


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


class CtrlC(Callback):
    def on_step(self, event) -> None:
        raise KeyboardInterrupt


ENDINGS = {
    "whole": ({}, None),
    "diverged": ({"lr": 1e30, "max_grad_norm": 1e30}, DivergedError),
    "interrupted": ({"callbacks": [CtrlC()]}, KeyboardInterrupt),
    "interrupted, without checkpoints of layers": (
        {"callbacks": [CtrlC()], "gradient_checkpointing": False},
        KeyboardInterrupt,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_of_a_run_stays_when_its_result_is_dropped(model_folder, tmp_path, monkeypatch, ending) -> None:
    # Most of the time would go into the page.
    monkeypatch.setattr(sys.modules["evollm.tuning.tune"], "write_report", lambda run_dir: run_dir)
    changes, error = ENDINGS[ending]
    settings = {"population": 2, "max_steps": 3, "evo_steps": 2, "verbose": False, "num_sample_answers": 0, **changes}

    def run(name: str) -> None:
        with pytest.raises(error) if error else nullcontext():
            evollm.tune(str(model_folder), make_rows(24), run_dir=tmp_path / name, lora_config={"r": 4}, **settings)

    # What is made once in a process.
    run("first")
    before = live_tensors()
    run("second")
    assert live_tensors() <= before


def test_a_counted_pass_is_freed_without_a_backward_pass() -> None:
    weight = torch.ones(3, requires_grad=True)
    before = live_tensors()
    with count_saved_bytes() as saved:
        # exp() saves its own output.
        weight.exp().sum()
    assert saved.total == 3 * 4
    assert live_tensors() == before
    with count_saved_bytes():
        loss = weight.exp().sum()
    loss.backward()
    torch.testing.assert_close(weight.grad, weight.detach().exp())
