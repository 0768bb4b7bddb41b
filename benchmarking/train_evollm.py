"""Train a population with evollm on given rows: the worker of throughput.py, with the options of the peers' workers.

The result file also holds the seconds of each phase, the rate of matrix products measured between steps, and the share
of the floor (see floor.py) that training reaches.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from floor import Costs, gemm_rate
from peaks import peak_rss_mib
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from evollm import DPO, PreferenceGym
from evollm.algorithms import dpo_step, step
from evollm.data.samples import Batch
from evollm.models.engine import Engine


class Phases:
    """Seconds spent in functions, by the name of a phase; what one phase calls of another counts for the inner one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Count calls of `owner.name` as this phase."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()

        setattr(owner, name, timed)

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def main() -> None:
    """Train, and write the result file."""
    options = _parse()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line) for line in options.test_rows.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    env = PreferenceGym(rows, held_out, tokenizer, data_batch_size_per_gpu=options.batch_size)
    agents = DPO.population(
        options.members,
        actor_network=AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype),
        lora_config=LoraConfig(
            r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        lr=options.lr,
        beta=options.beta,
        nll_alpha=0.0,
        max_grad_norm=1.0,
        batch_size=options.batch_size,
        gradient_checkpointing=False,
        token_budget=options.token_budget,
    )
    costs, engine = Costs.of(agents[0]), Engine.of(agents[0].base)
    device, dtype = agents[0].device, agents[0].base.network.dtype
    # In the order of the rows, as the peers train.
    size = options.batch_size
    batches = [Batch(env.train_pairs[i : i + size]) for i in range(0, len(env.train_pairs), size)]
    started = time.perf_counter()
    # A fast path is tried once for each base and length; like loading, this is not part of the training.
    engine.prepare([agents[0].actor_adapter], max(pair.longest_sequence for pair in env.all_pairs))
    seconds_probe = time.perf_counter() - started

    phases = Phases()
    phases.wrap(dpo_step, "learn_together", "forward")
    phases.wrap(dpo_step, "reference_logprobs", "reference")
    phases.wrap(torch.Tensor, "backward", "backward")
    phases.wrap(step, "_apply_gradient", "optimizer")
    seconds, operations, rates, losses = 0.0, 0.0, [], []
    for _ in range(options.epochs):
        for batch in batches:
            rates.append(gemm_rate(costs, min(1024, int(batch.num_tokens.sum())), device, dtype))
            started = time.perf_counter()
            metrics = dpo_step.learn_together(agents, batch)
            seconds += time.perf_counter() - started
            operations += len(agents) * costs.training(batch)
            losses.append([member["loss"] for member in metrics])
    rates.append(gemm_rate(costs, 1024, device, dtype))
    rate = sum(rates) / len(rates)
    training = seconds - phases.seconds["reference"]
    peak = peak_rss_mib()
    spent = dict(phases.seconds)
    started = time.perf_counter()
    dpo_step.evaluate_together(agents, env)
    spent["evaluation"] = time.perf_counter() - started
    result = {
        "library": "evollm",
        "versions": {name: version(name) for name in ("evollm", "torch", "transformers", "peft")},
        "threads": options.threads,
        "members": len(agents),
        "pairs": len(env.train_pairs),
        "epochs": options.epochs,
        "member_pairs": len(agents) * len(env.train_pairs) * options.epochs,
        "seconds_total": seconds,
        "seconds_reference": spent["reference"],
        "seconds_probe": seconds_probe,
        "seconds_phases": spent,
        "evaluated_member_pairs": len(agents) * len(env.test_pairs),
        "gemm_gflops": rate / 1e9,
        "share_of_floor": operations / rate / training,
        "peak_mib": peak,
        "losses": losses,
        "settings": {
            "token_budget": options.token_budget or "default",
            "dtype": str(dtype),
            "lora_dtype": str(agents[0].actor_parameters()[0].dtype),
        },
    }
    options.out.write_text(json.dumps(result, indent=1))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of prompt, chosen, rejected, in training order")
    parser.add_argument("--test-rows", type=Path, required=True, help="the same, to evaluate on")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
