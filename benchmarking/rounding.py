"""How far rounding alone moves a model's log-probs, and how far its layouts are off: what the probe decides by.

    python benchmarking/rounding.py --model FOLDER --dtypes bfloat16 float32 --lengths 60 120 250

For each type and length: the rounding floor and the bound in nats (of short pairs; that of the long one may be larger),
how far a pass is off in which two members go through each other's adapters, and which fast paths are taken.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from synthetic import make_population
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from evollm.data.samples import Batch
from evollm.models import probe
from evollm.models.engine import Engine


def main() -> None:
    """Probe, and print a line for each type and length."""
    options = _parse()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print(f"{'dtype':>10}{'length':>8}{'floor':>11}{'bound':>11}{'swapped':>10}  paths")
    for dtype in options.dtypes:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype))
        agents = make_population(model, 2, gradient_checkpointing=False, device=options.device)
        for length in options.lengths:
            paths = Engine.of(agents[0].base).prepare([agent.actor_adapter for agent in agents], length)
            taken = ", ".join(name for name in ("shared_prompt", "tiled_head", "stacking") if getattr(paths, name))
            print(
                f"{dtype:>10}{length:>8}{paths.floor:>11.2g}{probe.BOUND * paths.floor:>11.2g}"
                f"{swapped(agents[0], length):>10.3g}  {'; '.join([taken, *paths.reasons])}",
                flush=True,
            )


@torch.no_grad()
def swapped(agent: Any, length: int) -> float:
    """How far log-probs are off, in nats, where two members go through each other's adapters."""
    base = agent.base
    pairs = probe.random_pairs(base, probe.probed_length(base, length))
    short = Batch(pairs[1:])
    with probe.random_adapters(base, base.adapters.config(agent.actor_adapter)) as members:
        probe.make_differ(base, members, short)
        right, wrong = (
            torch.cat(probe.packed_sums(base, names, short, tiled_head=True, routed=True, passes=2))
            for names in (members, members[::-1])
        )
    return float(probe.differences(right - wrong).max())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or hub name")
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float16", "float32"))
    parser.add_argument("--lengths", type=int, nargs="+", default=(60, 120, 250))
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
