"""Search with a population on the shipped pairs: what `evollm demo` does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from evollm.checks import whole_number
from evollm.demo.model import demo_model
from evollm.models.loading.precision import AUTO
from evollm.tuning import TuneResult, tune

PAIRS = Path(__file__).parent / "pairs"


def demo_pairs(split: str) -> list[dict[str, Any]]:
    """The shipped preference pairs, as chat messages.

    Args:
        split: `train`, `selection` or `final`; no prompt is in two of them.
    """
    return [json.loads(line) for line in (PAIRS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def run_demo(
    population: int = 4,
    generations: int = 4,
    run_dir: str | os.PathLike[str] | None = None,
    seed: int = 42,
    dtype: str = AUTO,
    search: str = "racing",
) -> TuneResult:
    """Teach a 135M-parameter model to answer briefly, and find the hyperparameters for it.

    Args:
        population: Number of agents, at least 2.
        generations: Number of generations, at least 2, with a decision of the search between each two.
        run_dir: Run folder, by default a new one in `evollm-runs`.
        seed: Seeds data order, adapters and evolution.
        dtype: Type of the base, as for `DPO`.
        search: Name of the search strategy.
    """
    # Before the model is converted, which takes half a minute.
    for name, value, minimum in (("population", population, 2), ("generations", generations, 2), ("seed", seed, 0)):
        whole_number(name, value, minimum)
    return tune(
        str(demo_model()),
        str(PAIRS / "train.jsonl"),
        test_data=str(PAIRS / "selection.jsonl"),
        final_data=str(PAIRS / "final.jsonl"),
        population=population,
        generations=generations,
        evo_steps=3,
        data_batch_size_per_gpu=6,
        lr=8e-5,
        beta=0.1,
        nll_alpha=0.5,
        hp_config={"lr": [2e-5, 2e-4], "beta": [0.05, 0.5], "nll_alpha": [0.2, 2]},
        gradient_checkpointing=False,
        dtype=dtype,
        seed=seed,
        search=search,
        run_dir=run_dir,
    )
