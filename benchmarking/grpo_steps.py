"""How fast do GRPO members learn from answers of their own, together and one after the other, and with how much memory?

    python benchmarking/grpo_steps.py

Answers are random tokens of random lengths, other ones for each member, with random rewards, so that sampling is left
out (generation.py times it) and lengths do not drift; interleaved. A step is the reference's log-probs, forward,
backward and update. Memory is the peak of a process of its own, on a GPU of the allocator, without what the
interpreter and its libraries take before the model is loaded. `--model` takes another model folder (default: the
demo's).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from datetime import date
from statistics import median

import numpy as np
import psutil
import torch
from floor import synchronise
from peaks import MIB, peak_elsewhere, peak_mib
from throughput import machine
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from evollm import GRPO
from evollm.algorithms.grpo_step import learn_each
from evollm.algorithms.policy_losses import group_advantages
from evollm.algorithms.rollouts import ROLLOUT, Rollout
from evollm.data.samples import Batch, Completion, Sample
from evollm.demo import demo_model


def make_agents(options: argparse.Namespace, members: int) -> list[GRPO]:
    """Members with different learning rates on one base."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(options.device)
    settings = {"group_size": options.answers, "max_completion_length": options.tokens, "batch_size": options.prompts}
    agents = GRPO.population(members, actor_network=model, device=options.device, **settings)
    for number, agent in enumerate(agents):
        agent.lr = 1e-5 * (1 + number)
    return agents


def answers_of(member: int, options: argparse.Namespace, vocabulary: int) -> Batch:
    """Prompts that all members have, with random answers of one member."""
    prompts, rng = np.random.default_rng(0), np.random.default_rng([1, member])
    rewards = rng.normal(size=(options.prompts, options.answers))
    advantages = group_advantages(rewards, "group")
    samples = []
    for row, own in enumerate(rewards):
        lengths = rng.integers(1, options.tokens + 1, size=options.answers)
        completions = tuple(Completion(rng.integers(vocabulary, size=length)) for length in lengths)
        rollout = Rollout(own, own[:, None], ("random",), advantages[row], lengths < options.tokens)
        prompt = prompts.integers(vocabulary, size=options.prompt_tokens)
        samples.append(Sample(prompt, completions, row, {ROLLOUT: rollout}))
    return Batch(samples)


def learn(groups: Sequence[Sequence[int]], agents: Sequence[GRPO], batches: Sequence[Batch]) -> float:
    """Seconds in which each group of members makes one step, one group after the other."""
    synchronise(agents[0].device)
    started = time.perf_counter()
    for group in groups:
        learn_each([agents[number] for number in group], [batches[number] for number in group])
    synchronise(agents[0].device)
    return time.perf_counter() - started


def main() -> None:
    """Time both ways, measure memory in processes of their own, and print seconds and ratios."""
    options = _parse()
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(peak(options)))
        return
    agents = make_agents(options, options.members)
    vocabulary = agents[0].base.network.config.vocab_size
    batches = [answers_of(member, options, vocabulary) for member in range(options.members)]
    everybody = [*range(options.members)]
    ways = {"one by one": [[number] for number in everybody], "together": [everybody]}
    learn([everybody], agents, batches)  # the probe
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, groups in ways.items():
            taken[name].append(learn(groups, agents, batches))
    tokens = [int(batch.num_tokens.sum()) for batch in batches]
    print(f"{machine()}, {date.today()}, {agents[0].base.network.dtype}, {options.members} members")
    print(f"{options.prompts} prompts x {options.answers} answers, {min(tokens)} to {max(tokens)} tokens of a member")
    for name, times in taken.items():
        print(f"{name:>12}: {median(times):.3f} s a step of all members")
    print(f"{median(taken['one by one']) / median(taken['together']):.2f} times as fast together")
    one, many = (peak_elsewhere(members) for members in (1, options.members))
    print(f"peak of 1 member {one:.0f} MiB, of {options.members} together {many:.0f} MiB: {many / one:.2f} times")


def peak(options: argparse.Namespace) -> float:
    """Peak MiB of this process when its members make two steps together."""
    before = psutil.Process().memory_info().rss / MIB
    agents = make_agents(options, options.measure)
    vocabulary = agents[0].base.network.config.vocab_size
    batches = [answers_of(member, options, vocabulary) for member in range(options.measure)]
    for _ in range(2):
        learn([range(options.measure)], agents, batches)
    return peak_mib(agents[0].base.device.type, before)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo's)")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--answers", type=int, default=4, help="answers to a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or str(demo_model())
    return options


if __name__ == "__main__":
    main()
