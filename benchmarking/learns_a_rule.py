"""Do KTO and GRPO learn what a rule rewards? The demo's model, prompts held out.

    python benchmarking/learns_a_rule.py kto
    python benchmarking/learns_a_rule.py grpo

KTO learns "short answers": the reward is minus the number of tokens over their limit, and it sees the sides of the
demo's pairs, the shorter ones as desirable. GRPO learns "short words": the reward is minus the mean letters in
a word, and it answers the same prompts itself and sees rewards alone. (The model's own answers nearly all reach a limit
of tokens that a CPU has time for, and equal rewards teach nothing.) Printed are the mean reward of greedy answers to
held-out prompts before and after, answers learnt from, and the wall time. Exits with 1 when the reward has not risen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from throughput import machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from evollm import GRPO, KTO, RewardGym, UnpairedGym, finetune_llm_kto, finetune_llm_reasoning
from evollm.demo import demo_model, demo_pairs
from evollm.models.generation import greedy_answers, greedy_lengths

# Answers to a prompt.
GROUP = 8


def main() -> int:
    """Train, and compare held-out rewards; returns the exit status."""
    options = parse()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    folder = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (agent, env, learn, noun), reward_of = (
        LEARNERS[options.algorithm](model, tokenizer, options),
        RULES[options.algorithm],
    )
    # Both sides of a pair are rows of their own for KTO.
    prompts = list({tuple(row.prompt_ids): row.prompt_ids for row in env.test_pairs}.values())

    def reward() -> float:
        """The mean reward of greedy answers to the held-out prompts."""
        return reward_of(agent, prompts, tokenizer, options.tokens)

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
    prompts, held_out = ([{"prompt": row["prompt"]} for row in demo_pairs(split)] for split in ("train", "selection"))
    held_out = held_out[: options.held_out]
    batch_size = max(1, options.batch_size // GROUP)
    env = RewardGym(prompts, held_out, tokenizer, short_words, data_batch_size_per_gpu=batch_size)
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


def short_words(completions: list[str]) -> list[float]:
    """Minus the mean number of letters of a word of each text."""
    return [-float(np.mean([len(word) for word in text.split()] or [0.0])) for text in completions]


def shortness(agent: Any, prompts: Sequence[Any], tokenizer: Any, tokens: int) -> float:
    """Minus the mean number of tokens of the answers, over their limit."""
    return -float(np.mean(greedy_lengths(agent.base, [agent.actor_adapter], prompts, tokenizer, tokens)[0])) / tokens


def shortness_of_words(agent: Any, prompts: Sequence[Any], tokenizer: Any, tokens: int) -> float:
    """The mean of `short_words` over the answers."""
    return float(np.mean(short_words(greedy_answers(agent.base, [agent.actor_adapter], prompts, tokenizer, tokens)[0])))


LEARNERS = {"kto": by_kto, "grpo": by_grpo}
RULES = {"kto": shortness, "grpo": shortness_of_words}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line, or from these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=LEARNERS)
    parser.add_argument("--model", help="model folder or name (default: the demo's)")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, help="answers in a step (default: 8 of KTO, 32 of GRPO)")
    parser.add_argument("--held-out", type=int, default=24, help="prompts that are answered before and after")
    parser.add_argument("--tokens", type=int, help="longest answer (default: 64 of KTO, 16 of GRPO)")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    by_default = {"kto": (8, 64), "grpo": (32, 16)}[options.algorithm]
    options.batch_size, options.tokens = options.batch_size or by_default[0], options.tokens or by_default[1]
    return options


if __name__ == "__main__":
    sys.exit(main())
