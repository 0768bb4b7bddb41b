"""The training loop."""

from evollm.runs.events import Callback
from evollm.training.train_llm import finetune, finetune_llm_preference, finetune_llm_sft

__all__ = ["Callback", "finetune", "finetune_llm_preference", "finetune_llm_sft"]
