"""What both workers (train_trl.py, train_agilerl.py) share: options, rows, the first adapter and the result file.

Runs in the peers' environments: nothing here may import evollm.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

MAX_GRAD_NORM = 1.0


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that both workers take."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", required=True, help="model folder")
    result.add_argument("--rows", type=Path, required=True, help="JSONL of prompt, chosen, rejected, in training order")
    result.add_argument("--adapter", type=Path, required=True, help="folder of the fresh PEFT adapter to start from")
    result.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    result.add_argument("--batch-size", type=int, default=8, help="pairs in an optimizer step")
    result.add_argument("--micro-batch", type=int, default=1, help="pairs in a forward pass")
    result.add_argument("--epochs", type=int, default=2)
    result.add_argument("--lr", type=float, default=1e-4)
    result.add_argument("--beta", type=float, default=0.1)
    result.add_argument("--lora-rank", type=int, default=16)
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    return result


def read_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """The pairs, after a check that every step and every forward pass is a full one."""
    with options.rows.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows or len(rows) % options.batch_size or options.batch_size % options.micro_batch:
        raise SystemExit(
            f"{len(rows)} rows, --batch-size {options.batch_size}, --micro-batch {options.micro_batch}: "
            "each must be a multiple of the next"
        )
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def load_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base model on the CPU, and its tokenizer."""
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype), tokenizer


def lora_config(options: argparse.Namespace) -> LoraConfig:
    """The adapter's configuration, checked against the one in the folder."""
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=2 * options.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    saved = LoraConfig.from_pretrained(str(options.adapter))
    for name in ("r", "lora_alpha", "lora_dropout"):
        if getattr(saved, name) != getattr(config, name):
            raise SystemExit(f"{options.adapter}: {name} is {getattr(saved, name)}, not {getattr(config, name)}")
    return config


def load_adapter(model: Any, options: argparse.Namespace, name: str) -> None:
    """Copy the folder's weights into the model's adapter `name`.

    The adapter must be a fresh one (every B zero). The base model is then the reference, so that neither library has to
    run an adapter in its reference pass.
    """
    weights = load_peft_weights(str(options.adapter), device="cpu")
    if any(weight.any() for key, weight in weights.items() if "lora_B" in key):
        raise SystemExit(f"{options.adapter}: trained already (a B is not zero); a fresh adapter is needed")
    outcome = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in outcome.missing_keys if "lora_" in key and f".{name}." in key]
    if missing or outcome.unexpected_keys:
        raise SystemExit(f"{options.adapter}: does not fit: missing {missing}, unexpected {outcome.unexpected_keys}")


def lora_dtype(model: Any) -> str:
    """The dtype of the LoRA weights."""
    found = {str(weight.dtype) for name, weight in model.named_parameters() if "lora_" in name}
    return ", ".join(sorted(found))


def write_result(
    options: argparse.Namespace,
    library: str,
    rows: int,
    seconds_total: float,
    seconds_reference: float | None,
    losses: list[float],
    settings: dict[str, Any],
) -> None:
    """Write the result file; `losses` is the mean DPO loss of each optimizer step."""
    steps = options.epochs * (rows // options.batch_size)
    if len(losses) != steps:
        raise SystemExit(f"{len(losses)} losses for {steps} steps")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "library": library,
        "versions": {name: version(name) for name in (library, "torch", "transformers", "peft", "datasets")},
        "threads": torch.get_num_threads(),
        "pairs": rows,
        "epochs": options.epochs,
        "member_pairs": rows * options.epochs,
        "seconds_total": seconds_total,
        "seconds_reference": seconds_reference,
        "peak_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
        "losses": losses,
        "settings": {
            "batch_size": options.batch_size,
            "micro_batch": options.micro_batch,
            "lr": options.lr,
            "beta": options.beta,
            "lora_rank": options.lora_rank,
            "max_grad_norm": MAX_GRAD_NORM,
            "dtype": options.dtype,
            **settings,
        },
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"{library}: {result['member_pairs'] / seconds_total:.3f} pairs per second, "
        f"{result['peak_mib']:.0f} MiB, loss {losses[0]:.6f} -> {losses[-1]:.6f}"
    )


def step_means(losses: list[float], parts: int) -> list[float]:
    """Means of each `parts` neighbouring losses: an optimizer step's loss from its forward passes'."""
    return [sum(losses[start : start + parts]) / parts for start in range(0, len(losses), parts)]
