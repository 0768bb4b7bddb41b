"""The training loop."""

from evollm.execution.carry_out import carry_out
from evollm.runs.events import Callback
from evollm.training.train_llm import (
    finetune,
    finetune_llm_kto,
    finetune_llm_preference,
    finetune_llm_reasoning,
    finetune_llm_sft,
)

__all__ = [
    "Callback",
    "carry_out",
    "finetune",
    "finetune_llm_kto",
    "finetune_llm_preference",
    "finetune_llm_reasoning",
    "finetune_llm_sft",
]
