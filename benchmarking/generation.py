"""How fast do members answer, one after the other and together, and how much more memory do they take than one?

    python benchmarking/generation.py
    python benchmarking/generation.py --prompts 16 --prompt-tokens-spread 48

Answers to random prompts of one length, as a guard on their length or a judge samples them; interleaved. With a spread
their lengths differ by up to that many tokens to each side, as real ones do, and a third way has members together
without padding: prompts of one length at a time. Memory is the peak of a process of its own, on a GPU of the allocator,
without what the interpreter and its libraries take before the model is loaded. `--temperature 1` samples answers.
`--model` takes another model folder (default: the demo's).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from statistics import median

import numpy as np
import psutil
import torch
from floor import synchronise
from peaks import MIB, peak_elsewhere, peak_mib
from synthetic import make_population
from throughput import machine
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from evollm import DPO
from evollm.demo import demo_model
from evollm.models.engine import Engine
from evollm.models.generation import Question, answers_to
from evollm.models.padding import PADDED


@dataclass(frozen=True)
class Asked:
    """Agents with prompts that all of them answer."""

    agents: Sequence[DPO]
    prompts: Sequence[np.ndarray]
    tokenizer: object
    tokens: int
    temperature: float

    @classmethod
    def of(cls, options: argparse.Namespace, members: int) -> Asked:
        """Load the model and draw the prompts."""
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).to(options.device)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        agents = make_population(model, members, device=options.device)
        # Random prompts rarely make a model end its answer, and equal lengths make the two ways comparable.
        model.generation_config.eos_token_id, tokenizer.eos_token = None, None
        rng = np.random.default_rng(0)
        spread = options.prompt_tokens_spread
        lengths = options.prompt_tokens + rng.integers(-spread, spread, size=options.prompts, endpoint=True)
        prompts = [rng.integers(model.config.vocab_size, size=max(1, length)) for length in lengths]
        return cls(agents, prompts, tokenizer, options.tokens, options.temperature)

    def answer(self, groups: Sequence[Sequence[DPO]]) -> float:
        """Seconds in which each group of agents answers all prompts, one group after the other."""
        synchronise(self.agents[0].device)
        started = time.perf_counter()
        for group in groups:
            questions = [
                Question(agent.actor_adapter, prompt, self.temperature, (row,))
                for agent in group
                for row, prompt in enumerate(self.prompts)
            ]
            found = answers_to(self.agents[0].base, questions, self.tokenizer, self.tokens)
            assert all(len(one.ids) == self.tokens for one in found)
        synchronise(self.agents[0].device)
        return time.perf_counter() - started


@contextmanager
def unpadded(agents: Sequence[DPO]) -> Iterator[None]:
    """Inside the block only prompts of one length are answered together."""
    engine = Engine.of(agents[0].base)
    engine.answers = lambda way, members, length: way != PADDED  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.answers


def main() -> None:
    """Time both ways, measure memory in processes of their own, and print tokens a second and ratios."""
    options = _parse()
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(peak(options)))
        return
    asked = Asked.of(options, options.members)
    ways = {"one by one": [[agent] for agent in asked.agents], "together": [asked.agents]}
    if options.prompt_tokens_spread:
        ways["unpadded"] = [asked.agents]
    started = time.perf_counter()
    asked.answer([asked.agents])
    first = time.perf_counter() - started
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, groups in ways.items():
            with unpadded(asked.agents) if name == "unpadded" else nullcontext():
                taken[name].append(asked.answer(groups))
    dtype = asked.agents[0].base.network.dtype
    how = f"sampled at temperature {options.temperature:g}" if options.temperature else "greedy"
    print(f"{machine()}, {date.today()}, {dtype}, {options.members} members, {options.prompts} prompts, {how}")
    print(f"prompts of {', '.join(str(len(prompt)) for prompt in asked.prompts)} tokens, answers of {options.tokens}")
    count = options.members * options.prompts * options.tokens
    for name, times in taken.items():
        print(f"{name:>12}: {count / median(times):.0f} tokens/s")
    print(f"{median(taken['one by one']) / median(taken['together']):.2f} times as fast together")
    if "unpadded" in taken:
        print(f"{median(taken['unpadded']) / median(taken['together']):.2f} times as fast as unpadded")
    print(f"the probes, once: {first - median(taken['together']):.1f} s")
    one, many = (peak_elsewhere(members) for members in (1, options.members))
    print(f"peak of 1 member {one:.0f} MiB, of {options.members} together {many:.0f} MiB: {many / one:.2f} times")


def peak(options: argparse.Namespace) -> float:
    """Peak MiB of this process when its members answer together."""
    before = psutil.Process().memory_info().rss / MIB
    asked = Asked.of(options, options.measure)
    asked.answer([asked.agents])
    return peak_mib(asked.agents[0].base.device.type, before)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the demo's)")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens-spread", type=int, default=0, help="0: prompts of one length")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
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
