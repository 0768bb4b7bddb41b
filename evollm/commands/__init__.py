"""The commands of the command line: each module adds one to the parser and calls the library."""

from __future__ import annotations

from evollm.commands import chat, demo, export, inspect, recipes, replay, report, resume, train, validate
from evollm.commands.parsing import AddCommand

# In the order of `evollm --help`.
COMMANDS: tuple[AddCommand, ...] = (
    demo.add_to,
    inspect.add_to,
    recipes.add_to,
    validate.add_to,
    train.add_to,
    resume.add_to,
    report.add_to,
    chat.add_to,
    export.add_to,
    replay.add_to,
)

__all__ = ["COMMANDS"]
