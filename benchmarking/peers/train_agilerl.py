r"""Train one adapter with AgileRL's DPO agent on given rows, in their order, and write what it took.

Run it in the environment that make_environments.py made:

    .peers/agilerl/bin/python benchmarking/peers/train_agilerl.py --model FOLDER --rows rows.jsonl --adapter FOLDER \
        --out agilerl.json --threads 2

Sigmoid loss without the likelihood term, AdamW without weight decay, constant learning rate, no gradient checkpointing,
no truncation. With a base in bfloat16 the LoRA weights stay in float32, and so do their products: AgileRL uses autocast
on a GPU only, and on a CPU PEFT casts their inputs. The reference is the base model, with
the adapter off, in every epoch; AgileRL's own training loop would copy the actor onto it after each.

AgileRL pads the rows of a `learn` call to their longest side, and computes the reference log-probabilities in every
call; gradients that do not yet make a step carry over into the next call. `--call` says how many pairs a call gets:
`micro-batch` has the least padding, `batch` the fewest calls (each begins with a full garbage collection).

`seconds_total` is the time of all calls of `learn`; batches are tokenized before. `seconds_reference` is AgileRL's own
measurement of its no-grad forward passes.
"""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import worker
from agilerl.algorithms.dpo import DPO
from agilerl.llm_envs.dataset_env import DatasetEnv
from datasets import Dataset


def main() -> int:
    """Train and write the result; returns the exit status."""
    parser = worker.parser(__doc__)
    parser.add_argument(
        "--call", choices=("micro-batch", "batch"), default="micro-batch", help="pairs in a call of `learn`"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = worker.read_rows(options)
    model, tokenizer = worker.load_model(options)
    pairs = options.micro_batch if options.call == "micro-batch" else options.batch_size
    agent = DPO(
        pad_token_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        actor_network=model,
        lora_config=worker.lora_config(options),
        batch_size=options.batch_size,
        micro_batch_size_per_gpu=options.micro_batch,
        lr=options.lr,
        beta=options.beta,
        nll_alpha=0.0,
        max_grad_norm=worker.MAX_GRAD_NORM,
        gradient_checkpointing=False,
        use_liger_loss=False,
        use_separate_reference_adapter=False,
        device="cpu",
    )
    worker.load_adapter(agent.actor, options, "actor")
    optimizer = agent.optimizer.optimizer
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # AgileRL keeps AdamW's default of 0.01 and has no option for it
    batches = tokenized(rows, tokenizer, pairs)
    losses, seconds_reference = [], 0.0
    start = time.perf_counter()
    for _ in range(options.epochs):
        for batch in batches:
            metrics = agent.learn(batch)
            # AgileRL adds up the mean losses of a call's forward passes and divides by the call's pairs.
            losses.append(metrics["loss"] * options.micro_batch)
            seconds_reference += metrics["learn_phase_no_grad_forward_s"]
    seconds = time.perf_counter() - start
    worker.write_result(
        options,
        "agilerl",
        len(rows),
        seconds,
        seconds_reference,
        worker.step_means(losses, options.batch_size // pairs),
        {
            "call": options.call,
            "optimizer": type(optimizer).__name__,
            "reference": "base, adapter off",
            "lora_dtype": worker.lora_dtype(agent.actor),
        },
    )
    return 0


def tokenized(rows: list[dict[str, str]], tokenizer: Any, pairs: int) -> list[dict[str, Any]]:
    """AgileRL's batches of the rows, in order: those of its test split, since it always shuffles the training split."""
    # AgileRL appends the end of text to completions that have one, too.
    end = tokenizer.eos_token or ""
    rows = [{**row, **{side: row[side].removesuffix(end) for side in ("chosen", "rejected")}} for row in rows]
    dataset = Dataset.from_list(rows)
    env = DatasetEnv(dataset, dataset, tokenizer, objective="preference", data_batch_size_per_gpu=pairs)
    with env.eval_mode():
        return [env.reset() for _ in range(len(rows) // pairs)]


if __name__ == "__main__":
    sys.exit(main())
