from __future__ import annotations

import importlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command_runs import MESSAGES, ROWS, train
from tokenizers_for_tests import chatml_tokenizer

from evollm.execution import worker as worker_module


@pytest.fixture
def workplace(make_model, tmp_path, monkeypatch) -> Path:
    """A working folder with a small chat model, and rows of strings and of messages."""
    # Drawing a report takes longer than these runs.
    tune = importlib.import_module("evollm.tuning.tune")
    monkeypatch.setattr(tune, "write_report", lambda run_dir: run_dir / "report.html")
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    chatml_tokenizer().save_pretrained("model")
    for name, rows in (("strings", ROWS), ("messages", MESSAGES)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def interrupted(workplace, monkeypatch) -> Any:
    """From arguments of a run to its status: it is stopped by a signal in a step, the third by default."""

    def begin(*arguments: str, step: int = 3, number: int = signal.SIGINT) -> int:
        learn_all, steps = worker_module.learn_all, []

        def stopping(*args: Any) -> Any:
            steps.append(1)
            if len(steps) == step:
                os.kill(os.getpid(), number)
            return learn_all(*args)

        with monkeypatch.context() as patch:
            patch.setattr(worker_module, "learn_all", stopping)
            return train(*arguments)

    return begin
