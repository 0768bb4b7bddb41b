"""TRL's DPOTrainer, timed by its steps rather than by `train()`, most of which is set-up in a short run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from steps import StepClock, StepTimes
from torch.utils.data import SequentialSampler
from trl import DPOConfig, DPOTrainer


class InOrderTrainer(DPOTrainer):
    """TRL's trainer, without shuffling."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    lora: LoraConfig,
    batch_size: int,
    times: StepTimes,
    *,
    warmed: Callable[[], None],
    timed: Callable[[], None],
) -> None:
    """Train one adapter on rows, in their order, once; the reference is computed beforehand."""
    on_cpu = times.device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrderTrainer(
            model=model,
            args=DPOConfig(
                output_dir=folder,
                use_cpu=on_cpu,
                bf16=not on_cpu and torch.cuda.is_bf16_supported(),
                gradient_checkpointing=False,
                max_length=None,
                per_device_train_batch_size=batch_size,
                num_train_epochs=1,
                precompute_ref_log_probs=True,
                learning_rate=1e-4,
                max_grad_norm=1.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[StepClock(times, warmed, timed)],
        )
        trainer.train()
