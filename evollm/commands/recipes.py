"""`evollm recipes`: list the recipes, or print one."""

from __future__ import annotations

import argparse

from evollm.commands.parsing import Subparsers, add_command
from evollm.recipes import recipe_names, recipe_purpose, recipe_text


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "recipes",
        _run,
        help="list the configurations that come with evollm, or print one",
        description="List the configurations that come with evollm, or print one, to start a file of your own from.",
        example="evollm recipes population > my-run.yaml",
    )
    parser.add_argument("name", nargs="?", help="the recipe to print")


def _run(options: argparse.Namespace) -> None:
    if options.name is not None:
        print(recipe_text(options.name), end="")
        return
    for name in recipe_names():
        print(f"{name:16}{recipe_purpose(name)}")
