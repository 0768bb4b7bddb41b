"""Is evollm's GRPO update TRL's? Same answers, first adapter and optimizer; losses, norms and divergences compared.

Run it where `parity_trl.py` runs:

    python benchmarking/parity_trl_grpo.py
    python benchmarking/parity_trl_grpo.py --loss-type dr_grpo --scale-rewards none --beta 0
    python benchmarking/parity_trl_grpo.py --epochs 3 --temperature 0.8

evollm samples the answers; TRL gets them by its `rollout_func`, and computes rewards, advantages, old and reference
log-probs by itself. Exits with 1 when a loss or a divergence differs by more than 1e-5 or a gradient norm by more than
1e-2, relative. With `--epochs` both learn that often from the same answers, and means over the epochs are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from parity_trl import CLIP, TOLERANCES, Curve, Row, report, short_rows
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from evollm import GRPO, RewardGym
from evollm.algorithms.policy_losses import SCALES, TOKEN_WEIGHTS
from evollm.data.samples import Batch
from evollm.demo import demo_model

LOSS_BOUND = 1e-5


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """The share of vowels among the characters of an answer."""
    del columns
    return [sum(one in "aeiou" for one in text) / max(1, len(text)) for text in completions]


class RecordingTrainer(GRPOTrainer):
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
    tokenizer.chat_template = None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = short_rows(None, tokenizer, options.steps * options.batch_size, chat=False)
    rows: list[Row] = [{"prompt": row["prompt"]} for row in pairs]
    with tempfile.TemporaryDirectory() as folder:
        ours, divergences, batches = run_evollm(model_folder, tokenizer, rows, options, Path(folder))
        theirs, their_divergences = run_trl(model_folder, tokenizer, batches, rows, options, Path(folder))
    print(f"\n{options.loss_type}, scale_rewards {options.scale_rewards}, temperature {options.temperature}")
    status = report(ours, theirs, LOSS_BOUND, TOLERANCES["float32"][1])
    largest = max(abs(our - their) for our, their in zip(divergences, their_divergences, strict=True))
    print(f"divergences up to {max(divergences):.4f}, within {largest:.1e} of TRL's")
    return status or int(largest > LOSS_BOUND * max(1.0, *divergences))


def run_evollm(
    model_folder: str, tokenizer: Any, rows: list[Row], options: argparse.Namespace, folder: Path
) -> tuple[Curve, list[float], list[Batch]]:
    """Train with evollm; returns each step's loss and norm, each step's divergence, and the answers."""
    env = RewardGym(rows, None, tokenizer, vowels, data_batch_size_per_gpu=options.batch_size)
    agent = GRPO(
        actor_network=AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        lora_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        lr=options.lr,
        beta=options.beta,
        loss_type=options.loss_type,
        scale_rewards=options.scale_rewards,
        temperature=options.temperature,
        epsilon=options.epsilon,
        epsilon_high=options.epsilon_high,
        group_size=options.group_size,
        max_completion_length=options.tokens,
        max_grad_norm=CLIP,
        batch_size=options.batch_size,
        update_epochs=options.epochs,
        gradient_checkpointing=False,
    )
    agent.save_checkpoint(str(folder / "start"), save_optimizer=False)
    curve, divergences, batches = [], [], []
    for _ in range(options.steps):
        batch = agent.collect(env.next_batch(), env)
        batches.append(batch)
        metrics = agent.learn(batch)
        curve.append((metrics["loss"], metrics["grad_norm"]))
        divergences.append(metrics["kl"])
    return curve, divergences, batches


def run_trl(
    model_folder: str,
    tokenizer: Any,
    batches: list[Batch],
    rows: list[Row],
    options: argparse.Namespace,
    folder: Path,
) -> tuple[Curve, list[float]]:
    """Train the same adapter with TRL on the same answers; returns losses and norms, and divergences."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder / "start" / "actor"), is_trainable=True)
    given: Iterator[Batch] = iter(batches)

    def answered(prompts: list[str], trainer: Any) -> dict[str, Any]:
        del trainer
        samples = [(sample, answer) for sample in next(given) for answer in sample.completions]
        assert prompts == [rows[sample.row]["prompt"] for sample, _ in samples]
        return {
            "prompt_ids": [sample.prompt_ids.tolist() for sample, _ in samples],
            "completion_ids": [answer.ids.tolist() for _, answer in samples],
            "logprobs": None,
        }

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=options.batch_size * options.group_size,
        num_generations=options.group_size,
        num_iterations=options.epochs,
        steps_per_generation=1,
        max_steps=options.steps * options.epochs,
        max_completion_length=options.tokens,
        shuffle_dataset=False,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=CLIP,
        beta=options.beta,
        loss_type=options.loss_type,
        scale_rewards=options.scale_rewards,
        temperature=options.temperature,
        epsilon=options.epsilon,
        epsilon_high=options.epsilon_high,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    RecordingTrainer.losses = []
    trainer = RecordingTrainer(
        model=model,
        reward_funcs=vowels,
        args=arguments,
        train_dataset=Dataset.from_list([rows[sample.row or 0] for batch in batches for sample in batch]),
        processing_class=tokenizer,
        rollout_func=answered,
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    norms, divergences = ([float(entry.get(name, 0.0)) for entry in steps] for name in ("grad_norm", "kl"))
    means = [np.reshape(one, (options.steps, options.epochs)).mean(axis=1) for one in (trainer.losses, norms)]
    return list(zip(*(one.tolist() for one in means), strict=True)), np.reshape(
        divergences, (options.steps, options.epochs)
    ).mean(axis=1).tolist()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or name (default: the demo's)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2, help="prompts")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--epochs", type=int, default=1, help="optimizer steps on the same answers")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--epsilon", type=float, default=0.2)
    parser.add_argument("--epsilon-high", type=float, default=0.28)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--loss-type", choices=TOKEN_WEIGHTS, default="dapo")
    parser.add_argument("--scale-rewards", choices=SCALES, default="group")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
