"""How fast do members answer, one after the other and together?

    python benchmarking/generation.py

Greedy answers to random prompts of one length, as a guard on their length samples them; interleaved. `--model` takes
another model folder (default: the demo's).
"""

from __future__ import annotations

import argparse
import time
import warnings
from datetime import date
from statistics import median

import numpy as np
import torch
from floor import synchronise
from synthetic import make_population
from throughput import machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from evollm.demo import demo_model
from evollm.models.generation import greedy_lengths


def main() -> None:
    """Time both ways and print tokens a second."""
    options = _parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    folder = options.model or str(demo_model())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype).to(options.device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    agents = make_population(model, options.members, device=options.device)
    base, adapters = agents[0].base, [agent.actor_adapter for agent in agents]
    # Random prompts rarely make a model end its answer, and equal lengths make the two ways comparable.
    model.generation_config.eos_token_id, tokenizer.eos_token = None, None
    rng = np.random.default_rng(0)
    prompts = list(rng.integers(model.config.vocab_size, size=(options.prompts, options.prompt_tokens)))

    def seconds(groups: list[list[str]]) -> float:
        synchronise(agents[0].device)
        started = time.perf_counter()
        for group in groups:
            for lengths in greedy_lengths(base, group, prompts, tokenizer, options.tokens):
                assert lengths == [options.tokens] * len(prompts)
        synchronise(agents[0].device)
        return time.perf_counter() - started

    ways = {"one by one": [[adapter] for adapter in adapters], "together": [adapters]}
    seconds([adapters])  # the probe
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, groups in ways.items():
            taken[name].append(seconds(groups))
    count = options.members * options.prompts * options.tokens
    print(f"{machine()}, {date.today()}, {model.dtype}, {options.members} members, {options.prompts} prompts")
    for name, times in taken.items():
        print(f"{name:>12}: {count / median(times):.0f} tokens/s")
    print(f"{median(taken['one by one']) / median(taken['together']):.2f} times as fast together")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo's)")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
