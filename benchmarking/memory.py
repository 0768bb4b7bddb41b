"""How much more memory does a population take than one agent, and than what it has to hold?

Trains 1 and N agents for two steps, each in a process of its own, and compares the peaks, with each other and with

    base + agents x 16 bytes x adapter parameters (weight, gradient, two moments) + activations of one pass

What the interpreter and its libraries take before the model is loaded is left out of both.

    python benchmarking/memory.py

`--model` takes another model folder; the default is the demo's model (`make demo` installs it). The peers' peaks are
in throughput.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import numpy as np
import psutil
from peaks import MIB, peak_rss_mib
from throughput import DTYPES, chosen_dtype, machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from evollm import DPO, PreferenceGym
from evollm.algorithms.dpo_step import learn_together
from evollm.data.samples import Batch
from evollm.demo import demo_model, demo_pairs
from evollm.models.budget import count_saved_bytes


def measure(model_folder: str, dtype: str, agents: int, batch_size: int, budget: int) -> dict[str, float]:
    """Train `agents` agents for two steps in this process; sizes in MiB."""
    before = psutil.Process().memory_info().rss / MIB
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    base_size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    env = PreferenceGym(demo_pairs("train"), None, tokenizer, data_batch_size_per_gpu=batch_size)
    population = DPO.population(agents, actor_network=model, lr=1e-4, gradient_checkpointing=False, token_budget=budget)
    for _ in range(2):
        learn_together(population, env.next_batch())
    peak = peak_rss_mib()
    base = population[0].base
    # A pass as full as the budget allows, by itself.
    few = Batch(env.train_pairs)
    few = few.select(list(range(int((np.cumsum(few.num_tokens) <= budget).sum()))))
    with count_saved_bytes() as saved:
        population[0].learn(few)
    adapters = {id(p): p for name in base.adapters.names for p in base.adapters.parameters(name).values()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters() if id(p) not in adapters}
    return {
        "agents": agents,
        "peak_mib": peak - before,
        "activations_mib": saved.total * budget / int(few.num_tokens.sum()) / MIB,
        "tokens": budget,
        "base_mib": base_size / MIB,
        "base_storages": len(storages),
        "adapter_mib": sum(p.numel() * p.element_size() for p in population[0].actor_parameters()) / MIB,
    }


def main() -> None:
    """Measure each size in a fresh process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo's)")
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--token-budget", type=int, default=1024, help="the default on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base; auto: what evollm takes")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = options.model or str(demo_model())
    if options.measure:
        transformers_logging.disable_progress_bar()
        sizes = (options.measure, options.batch_size, options.token_budget)
        print(json.dumps(measure(model, options.dtype, *sizes)))
        return
    dtype, rows = chosen_dtype(options.dtype, model), []
    for agents in (1, options.agents):
        command = [sys.executable, __file__, "--model", model, "--dtype", dtype, "--measure", str(agents)]
        command += ["--batch-size", str(options.batch_size), "--token-budget", str(options.token_budget)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    one, many = rows
    print(f"{machine()}; {dtype}; batch {options.batch_size}")
    print(f"base {one['base_mib']:.0f} MiB in {many['base_storages']} storages with {many['agents']} agents", end=" ")
    print(f"({one['base_storages']} with one); an adapter {one['adapter_mib']:.1f} MiB")
    for row in rows:
        held = row["base_mib"] + 4 * row["agents"] * row["adapter_mib"] + row["activations_mib"]
        print(
            f"{row['agents']:>3} agents: peak {row['peak_mib']:.0f} MiB, {row['peak_mib'] / held:.2f} x the sum: "
            f"{held:.0f} MiB, of which activations of {row['tokens']} tokens {row['activations_mib']:.0f}"
        )
    more = (many["peak_mib"] - one["peak_mib"]) / (many["agents"] - 1)
    print(f"peak ratio {many['peak_mib'] / one['peak_mib']:.2f}; each further agent {more:.0f} MiB", end=" ")
    print(f"= {more / one['adapter_mib']:.1f} adapters (weight, gradient and two moments are 4)")


if __name__ == "__main__":
    main()
