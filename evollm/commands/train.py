"""`evollm train`: a run from a YAML file or a recipe."""

from __future__ import annotations

import argparse

from evollm.commands.arguments import add_config, config_of, trusts
from evollm.commands.ending import print_ending
from evollm.commands.launch import is_main, leave, of_launch
from evollm.commands.parsing import Subparsers, add_command


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "train",
        _run,
        help="tune a model as a YAML file or a recipe says",
        description="Tune a model. Every key of the file is a parameter of evollm.tune or of the pieces that it puts "
        "together;\npaths are relative to the folder that you are in.",
        example="evollm train --recipe population model=my-model data=pairs.jsonl run_dir=my-run",
        together=True,
    )
    add_config(parser)


def _run(options: argparse.Namespace) -> None:
    # First, so that whatever follows is said once.
    launch = of_launch()
    config = config_of(options)
    from evollm.tuning import tune

    result = tune(**{**config, **launch})
    leave()
    if is_main():
        print_ending(result.run_dir, result.report, trusts(config))
