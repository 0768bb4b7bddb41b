"""Is evollm's KTO update TRL's? Same answers, first adapter and optimizer; losses, norms and divergences compared.

Run it where `parity_trl.py` runs:

    python benchmarking/parity_trl_kto.py
    python benchmarking/parity_trl_kto.py --loss-type apo_zero_unpaired

The answers are sides of the pairs of `parity_trl.py`: two desirable ones for each undesirable one, with weights.
Exits with 1 when a loss or a divergence differs by more than 1e-4 (relative where it is above 1) or a gradient norm by
more than 1e-2, relative.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from parity_trl import CLIP, TOLERANCES, Curve, Row, report, short_rows
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import KTOConfig, KTOTrainer

from evollm import KTO, UnpairedGym
from evollm.algorithms.unpaired_losses import UNPAIRED_LOSSES
from evollm.data.samples import IntArray
from evollm.demo import demo_model


class RecordingTrainer(KTOTrainer):
    """TRL's trainer, keeping each step's loss to full precision."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Record the loss on the way out."""
        result = super().compute_loss(*args, **kwargs)
        self.losses.append((result[0] if isinstance(result, tuple) else result).item())
        return result


def main() -> int:
    """Compare and print; returns the exit status."""
    options = parse()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model_folder = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    pairs = short_rows(options.pairs, tokenizer, options.steps * options.batch_size, chat=False)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label}
        for row, label in zip(pairs, cycle([True, False, True]), strict=False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        ours, divergences, ordered = run_evollm(model_folder, tokenizer, rows, options, Path(folder))
        theirs, their_divergences = run_trl(model_folder, tokenizer, ordered, options, Path(folder))
    print(f"\n{options.loss_type}, weights {options.desirable_weight} and {options.undesirable_weight}")
    status = report(ours, theirs, *TOLERANCES["float32"])
    print(f"divergences of evollm: {', '.join(f'{value:.4f}' for value in divergences)}")
    largest = max(abs(our - their) for our, their in zip(divergences, their_divergences, strict=True))
    print(f"divergences within {largest:.1e} of TRL's")
    return status or int(largest > TOLERANCES["float32"][0] * max(1.0, *divergences))


def run_evollm(
    model_folder: str, tokenizer: Any, rows: list[Row], options: argparse.Namespace, folder: Path
) -> tuple[Curve, list[float], list[Row]]:
    """Train with evollm; returns each step's loss and norm, each step's divergence, and the rows in their order."""
    env = UnpairedGym(rows, None, tokenizer, data_batch_size_per_gpu=options.batch_size)
    agent = KTO(
        actor_network=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        lora_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        lr=options.lr,
        beta=options.beta,
        loss_type=options.loss_type,
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        max_grad_norm=CLIP,
        batch_size=options.batch_size,
        gradient_checkpointing=False,
    )
    agent.save_checkpoint(str(folder / "start"), save_optimizer=False)
    curve, divergences, ordered = [], [], []
    for _ in range(options.steps):
        batch = env.next_batch()
        ordered += [rows[position] for position in cast("IntArray", batch.rows)]
        metrics = agent.learn(batch)
        curve.append((metrics["loss"], metrics["grad_norm"]))
        divergences.append(metrics["kl"])
    return curve, divergences, ordered


def run_trl(
    model_folder: str, tokenizer: Any, rows: list[Row], options: argparse.Namespace, folder: Path
) -> tuple[Curve, list[float]]:
    """Train the same adapter with TRL on the same batches; returns losses and norms, and divergences."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "start" / "actor"), is_trainable=True)
    arguments = KTOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=CLIP,
        beta=options.beta,
        loss_type=options.loss_type,
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    RecordingTrainer.losses = []
    trainer = RecordingTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    norms, divergences = ([float(entry[name]) for entry in steps] for name in ("grad_norm", "kl"))
    return list(zip(trainer.losses, norms, strict=True)), divergences


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or name (default: the demo's)")
    parser.add_argument("--pairs", help="JSONL file of pairs as strings (default: the demo's)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss-type", choices=UNPAIRED_LOSSES, default="kto")
    parser.add_argument("--desirable-weight", type=float, default=0.7)
    parser.add_argument("--undesirable-weight", type=float, default=1.2)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
