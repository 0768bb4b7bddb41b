"""What the commands share: how one is added to the parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
AddCommand: TypeAlias = Callable[[Subparsers], None]
Command: TypeAlias = Callable[[argparse.Namespace], None]
# What a parsed command line holds beside the command's arguments.
OWN = frozenset({"run", "command", "together"})


def add_command(
    commands: Subparsers,
    name: str,
    run: Command,
    *,
    help: str,
    description: str,
    example: str,
    together: bool = False,
) -> argparse.ArgumentParser:
    """Add a command to the parser.

    Args:
        commands: Where the command is added.
        name: What is typed.
        run: Carries it out; an `EvoLLMError` that it raises is printed as one line.
        help: One line for `evollm --help`.
        description: What it does, for its own `--help`.
        example: A command line; the names of files in it are the user's.
        together: Whether several processes, as torchrun starts them, carry it out together.

    Returns:
        The command's parser, to add arguments to.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, command=name, together=together)
    return parser
