"""Do KTO and GRPO learn what a rule rewards? The demo's model, the rule "short answers", prompts held out.

    python benchmarking/learns_a_rule.py kto
    python benchmarking/learns_a_rule.py grpo

The reward of an answer is minus its number of tokens over the limit of `--tokens`, so between -1 and 0. KTO sees the
sides of the demo's pairs, the shorter ones as desirable answers; GRPO answers the same prompts itself and sees rewards
alone. Printed are the mean reward of greedy answers to held-out prompts before and after, answers learnt from, and the
wall time. Exits with 1 when the held-out reward has not risen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from throughput import machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from evollm import GRPO, KTO, RewardGym, UnpairedGym, finetune_llm_kto, finetune_llm_reasoning
from evollm.demo import demo_model, demo_pairs
from evollm.models.generation import greedy_lengths

# Answers to a prompt.
GROUP = 4


def main() -> int:
    """Train, and compare held-out rewards; returns the exit status."""
    options = parse()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    folder = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    agent, env, learn, noun = LEARNERS[options.algorithm](model, tokenizer, options)
    # Both sides of a pair are rows of their own for KTO.
    prompts = list({tuple(row.prompt_ids): row.prompt_ids for row in env.test_pairs}.values())

    def reward() -> float:
        """The mean reward of greedy answers to the held-out prompts."""
        lengths = greedy_lengths(agent.base, [agent.actor_adapter], prompts, tokenizer, options.tokens)[0]
        return -sum(lengths) / len(lengths) / options.tokens

    before, start = reward(), time.perf_counter()
    answers = learn()
    seconds, after = time.perf_counter() - start, reward()
    print(f"{machine()}, float32")
    print(f"{agent.algorithm}: held-out reward {before:.3f} before, {after:.3f} after ({len(prompts)} prompts);")
    print(f"    {answers} {noun} in {options.steps} steps, {seconds:.0f} s")
    return int(after <= before)


def by_kto(model: Any, tokenizer: Any, options: argparse.Namespace) -> tuple[Any, Any, Callable[[], int], str]:
    """A KTO agent, its gym, and its training."""
    held_out = demo_pairs("selection")[: options.held_out]
    env = UnpairedGym(demo_pairs("train"), held_out, tokenizer, data_batch_size_per_gpu=options.batch_size)
    agent = KTO(actor_network=model, lr=options.lr, seed=options.seed)

    def learn() -> int:
        finetune_llm_kto([agent], env, max_steps=options.steps, verbose=False)
        return options.steps * options.batch_size

    return agent, env, learn, "labelled answers"


def by_grpo(model: Any, tokenizer: Any, options: argparse.Namespace) -> tuple[Any, Any, Callable[[], int], str]:
    """A GRPO agent, its gym, and its training."""

    def shortness(completions: list[str]) -> list[float]:
        return [-len(tokenizer(text)["input_ids"]) / options.tokens for text in completions]

    prompts, held_out = ([{"prompt": row["prompt"]} for row in demo_pairs(split)] for split in ("train", "selection"))
    held_out = held_out[: options.held_out]
    batch_size = max(1, options.batch_size // GROUP)
    env = RewardGym(prompts, held_out, tokenizer, shortness, data_batch_size_per_gpu=batch_size)
    agent = GRPO(
        actor_network=model,
        lr=options.lr,
        group_size=GROUP,
        max_completion_length=options.tokens,
        batch_size=batch_size,
        seed=options.seed,
    )

    def learn() -> int:
        finetune_llm_reasoning([agent], env, max_steps=options.steps, evaluation_interval=options.steps, verbose=False)
        return options.steps * batch_size * GROUP

    return agent, env, learn, f"own answers, {GROUP} to a prompt,"


LEARNERS = {"kto": by_kto, "grpo": by_grpo}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=LEARNERS)
    parser.add_argument("--model", help="model folder or name (default: the demo's)")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8, help="answers in a step")
    parser.add_argument("--held-out", type=int, default=24, help="prompts that are answered before and after")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
