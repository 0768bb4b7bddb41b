r"""Train one adapter with TRL's DPOTrainer on given rows, in their order, and write what it took.

Run it in the environment that make_environments.py made:

    .peers/trl/bin/python benchmarking/peers/train_trl.py --model FOLDER --rows rows.jsonl --adapter FOLDER \
        --out trl.json --threads 2

Sigmoid loss, AdamW without weight decay, constant learning rate, no gradient checkpointing, no truncation. The
reference is the base model, with the adapter off, as TRL does it for an adapter of its own (`peft_config`).

With a base in bfloat16 PEFT keeps the LoRA weights in float32, and TRL's default, `bf16=True`, computes their products
in bfloat16 (autocast); with `--no-autocast` PEFT casts their inputs to float32.

`seconds_total` is the reference pass, where it comes first (`--precompute`), and `DPOTrainer.train()`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from argparse import BooleanOptionalAction
from typing import Any

import worker
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer


class TimedTrainer(DPOTrainer):
    """TRL's trainer, keeping the loss of every forward pass and the time of the reference pass."""

    seconds_reference: float | None = None

    def __init__(self, **arguments: Any) -> None:
        self.losses: list[float] = []
        super().__init__(**arguments)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        # TRL runs it in the constructor.
        start = time.perf_counter()
        result = super()._precompute_ref_logps(*args, **kwargs)
        self.seconds_reference = time.perf_counter() - start
        return result

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Record the loss on the way out."""
        result = super().compute_loss(*args, **kwargs)
        self.losses.append((result[0] if isinstance(result, tuple) else result).item())
        return result


def main() -> int:
    """Train and write the result; returns the exit status."""
    parser = worker.parser(__doc__)
    parser.add_argument(
        "--precompute",
        action=BooleanOptionalAction,
        default=True,
        help="reference log-probabilities once, before training (TRL's best for several epochs), or in every step",
    )
    parser.add_argument(
        "--autocast",
        action=BooleanOptionalAction,
        default=True,
        help="with a base in bfloat16 also LoRA's products in bfloat16 (TRL's default), or in float32",
    )
    options = parser.parse_args()
    quiet()
    rows = worker.read_rows(options)
    model, tokenizer = worker.load_model(options)
    accumulation = options.batch_size // options.micro_batch
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=options.dtype == "bfloat16" and options.autocast,
            gradient_checkpointing=False,
            max_length=None,
            per_device_train_batch_size=options.micro_batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=options.epochs,
            train_sampling_strategy="sequential",
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=worker.MAX_GRAD_NORM,
            beta=options.beta,
            loss_type=["sigmoid"],
            precompute_ref_log_probs=options.precompute,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = TimedTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=worker.lora_config(options),
        )
        trainer.remove_callback(PrinterCallback)
        # Not a PeftModel: TRL would copy its adapter and run the copy in the reference pass.
        worker.load_adapter(trainer.model, options, "default")
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    worker.write_result(
        options,
        "trl",
        len(rows),
        seconds + (trainer.seconds_reference or 0.0),
        trainer.seconds_reference,
        worker.step_means(trainer.losses, accumulation),
        {
            "precompute": options.precompute,
            "optimizer": arguments.optim.value,
            "reference": "base, adapter off",
            "autocast": arguments.bf16,
            "lora_dtype": worker.lora_dtype(trainer.model),
        },
    )
    return 0


def quiet() -> None:
    """No progress bars and no notices about deprecated options."""
    warnings.simplefilter("ignore")
    os.environ["TQDM_DISABLE"] = "1"  # TRL's bar over the reference pass
    disable_progress_bars()
    transformers_logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
