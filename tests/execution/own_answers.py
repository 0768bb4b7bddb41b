"""Populations whose algorithms need more than pairs: answers of their own with rewards, and labelled answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import make_rows

from evollm import GRPO, KTO, HyperparameterConfig, RewardGym, RLParameter, UnpairedGym


def brevity(completions: list[str]) -> list[float]:
    return [-float(len(completion)) for completion in completions]


def population(
    algorithm: str, folder: Path, lora: Any, tokenizer: Any, reward: Callable[..., Any] = brevity
) -> tuple[list[Any], Any]:
    """Four agents of GRPO or KTO on the model in a folder, and their gym."""
    rows, size = make_rows(18), {"data_batch_size_per_gpu": 4}
    shared = {
        "model_name": str(folder),
        "lora_config": lora,
        "lr": 1e-3,
        "hp_config": HyperparameterConfig(lr=RLParameter(1e-4, 1e-2), beta=RLParameter(0.01, 0.5)),
    }
    if algorithm == "grpo":
        prompts = [{"prompt": row["prompt"]} for row in rows]
        agents: list[Any] = GRPO.population(4, **shared, group_size=3, max_completion_length=4)
        return agents, RewardGym(prompts[:12], prompts[12:], tokenizer, reward, **size)
    answers = [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        for row in rows
        for good in (True, False)
    ]
    return KTO.population(4, **shared), UnpairedGym(answers[:24], answers[24:], tokenizer, **size)
