"""`evollm demo`: search with a population on the shipped pairs."""

from __future__ import annotations

import argparse
import time

from evollm.commands.ending import print_ending
from evollm.commands.parsing import Subparsers, add_command


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "demo",
        _run,
        help="search with a population on a real 135M-parameter model and shipped pairs",
        description="Teach SmolLM2-135M-Instruct to answer briefly, with a population of DPO agents that race.",
        example="evollm demo --run-dir my-demo",
    )
    parser.add_argument("--population", type=int, default=4, help="number of agents (default: %(default)s)")
    parser.add_argument("--generations", type=int, default=4, help="number of generations (default: %(default)s)")
    parser.add_argument(
        "--search",
        choices=("racing", "tournament"),
        default="racing",
        help="stop what loses, or evolve all agents to the end (default: %(default)s)",
    )
    parser.add_argument("--run-dir", help="run folder (default: a new one in evollm-runs)")
    parser.add_argument(
        "--seed", type=int, default=42, help="of data order, adapters, evolution (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the model; auto: what this machine is fastest in (default: %(default)s)",
    )


def _run(options: argparse.Namespace) -> None:
    start = time.monotonic()
    print(
        "SmolLM2-135M-Instruct learns to answer briefly. The first run converts the model, which takes half a minute."
    )
    from evollm.demo import run_demo

    result = run_demo(
        options.population, options.generations, options.run_dir, options.seed, options.dtype, options.search
    )
    print(f"\nThe demo took {time.monotonic() - start:.0f} s.")
    print_ending(result.run_dir, result.report)
