"""`evollm resume`: go on with a run that was interrupted."""

from __future__ import annotations

import argparse

from evollm.commands.parsing import Subparsers, add_command
from evollm.demo import resume_demo


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "resume",
        _run,
        help="go on with a run that was interrupted",
        description="Go on with an interrupted run from its newest whole checkpoint; it ends with the same bits.",
        example="evollm resume evollm-runs/20261121-101500-000000",
    )
    parser.add_argument("run_dir", help="run folder")


def _run(options: argparse.Namespace) -> None:
    resume_demo(options.run_dir)
