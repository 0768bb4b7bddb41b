"""`evollm validate`: check what `evollm train` would do, without training."""

from __future__ import annotations

import argparse

from evollm.commands.arguments import add_config, config_of
from evollm.commands.parsing import Subparsers, add_command


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "validate",
        _run,
        help="check a YAML file or a recipe with its data and model, without training",
        description="Load data and model, check everything that train would check, and say what train would do.",
        example="evollm validate my-run.yaml num_epochs=3",
    )
    add_config(parser)


def _run(options: argparse.Namespace) -> None:
    config = config_of(options)
    from evollm.tuning import validate

    print(validate(**config))
    print("Everything fits: evollm train would begin.")
