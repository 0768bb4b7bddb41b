"""The command line: parses, calls the library."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from evollm import __version__
from evollm.demo import resume_demo, run_demo
from evollm.errors import EvoLLMError
from evollm.inspection import inspect_data, print_inspection
from evollm.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    # The bars and remarks of loading are nothing that somebody who typed a command can act on.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        options.run(options)
    except EvoLLMError as error:
        print(f"evollm: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evollm", description="Preference-tune language models with a population of agents on one base."
    )
    parser.add_argument("--version", action="version", version=f"evollm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="evolve a population on a real 135M-parameter model and shipped pairs",
        description="Teach SmolLM2-135M-Instruct to answer briefly, with a population of DPO agents that evolves.",
    )
    demo.add_argument("--population", type=int, default=4, help="number of agents (default: %(default)s)")
    demo.add_argument("--generations", type=int, default=3, help="number of generations (default: %(default)s)")
    demo.add_argument("--run-dir", help="run folder (default: a new one in evollm-runs)")
    demo.add_argument("--seed", type=int, default=42, help="of data order, adapters, evolution (default: %(default)s)")
    demo.set_defaults(run=_demo)
    resume = commands.add_parser(
        "resume",
        help="go on with a run that was interrupted",
        description="Go on with an interrupted run from its newest whole checkpoint; it ends with the same bits.",
    )
    resume.add_argument("run_dir", help="run folder")
    resume.set_defaults(run=lambda options: resume_demo(options.run_dir))
    _add_report(commands)
    _add_inspect(commands)
    return parser


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="write a run's report.html: who won, why, and how sure that is",
        description="Write one page, which needs no network, from a run folder. The run may still be going on.",
    )
    report.add_argument("run_dir", help="run folder")
    report.add_argument("--output", metavar="FILE", help="the page, FILE.html (default: report.html in the run folder)")
    report.add_argument("--no-pictures", action="store_true", help="no PNG files beside the page; it has its figures")
    report.set_defaults(
        run=lambda options: print(write_report(options.run_dir, options.output, pictures=not options.no_pictures))
    )


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`evollm inspect`: what evollm understands of a dataset."""
    parser = commands.add_parser(
        "inspect",
        help="say what evollm understands of a dataset, before anything is trained on it",
        description="Read a dataset as a run would: rows kept and dropped with reasons, lengths, repetitions, three "
        "rows as the model sees them, and an estimate of the memory. No weights are loaded unless --estimate asks for "
        "it.",
    )
    parser.add_argument("data", help="a JSONL, Parquet or CSV file, or org/name of a dataset on the hub")
    parser.add_argument("--model", required=True, help="name or folder of the model, or of its tokenizer alone")
    parser.add_argument("--split", help="split of a dataset on the hub (default: train)")
    parser.add_argument("--sft", action="store_true", default=None, help="examples (default: what the columns say)")
    parser.add_argument("--against", help="another dataset: count the rows that are in both")
    parser.add_argument("--max-context-length", type=int, help="most tokens of prompt and longer completion")
    parser.add_argument("--min-completion-length", type=int, help="fewest tokens of a completion")
    parser.add_argument("--population", type=int, default=4, help="agents of the run (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of the run (default: %(default)s)")
    parser.add_argument("--estimate", action="store_true", help="load the weights and time a few steps of one agent")
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    arguments = {name: value for name, value in vars(options).items() if name != "run"}
    print_inspection(inspect_data(arguments.pop("data"), arguments.pop("model"), **arguments))


def _demo(options: argparse.Namespace) -> None:
    start = time.monotonic()
    print(
        "SmolLM2-135M-Instruct learns to answer briefly. The first run converts the model, which takes half a minute."
    )
    run_demo(options.population, options.generations, options.run_dir, options.seed)
    print(f"\nThe demo took {time.monotonic() - start:.0f} s.")
