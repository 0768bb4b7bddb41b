from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import evolve, tune_alone


@pytest.fixture(scope="session")
def evolved(tokenizer, tmp_path_factory) -> Path:
    """The folder of a run of four agents in which agent 1 diverges; to be read only."""
    return evolve(tokenizer, tmp_path_factory.mktemp("evolved") / "run")


@pytest.fixture(scope="session")
def alone(tokenizer, tmp_path_factory) -> Path:
    """The folder of a run of one SFT agent without final examples; to be read only."""
    return tune_alone(tokenizer, tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(autouse=True)
def quick_reports() -> None:
    """Here they are drawn."""
