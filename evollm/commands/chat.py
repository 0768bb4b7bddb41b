"""`evollm chat`: ask the base and the best agent the same."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from evollm.checks import whole_number
from evollm.commands.arguments import add_elite, add_model, add_run, add_trust
from evollm.commands.parsing import Subparsers, add_command


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "chat",
        _run,
        help="ask the base and the best agent of a run, side by side",
        description="Ask the base and the best agent of a run, and see their likeliest answers side by side. Prompts "
        "come from --prompt,\nor one a line from the terminal or a file. Each is answered by itself.",
        example='evollm chat my-run --prompt "What is tea?"',
    )
    add_run(parser)
    parser.add_argument("--prompt", action="append", help="what to ask; may be given several times")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="no chat template: what a run on rows of strings, not messages, has learnt from",
    )
    add_model(parser)
    add_elite(parser)
    add_trust(parser)


def _run(options: argparse.Namespace) -> None:
    whole_number("max_new_tokens", options.max_new_tokens, 1)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from evollm.tuning.winner import open_winner

    winner = open_winner(options.run_dir, options.model, options.trust_remote_code, options.elite)
    console = Console()
    for given in options.prompt or _typed():
        # Of bytes that are no text a shell's argument holds halves of characters, which no tokenizer takes.
        prompt = given.encode(errors="replace").decode()
        answers = winner.answers(prompt, options.max_new_tokens, options.raw)
        table = Table("base", "winner", title=Text(prompt), title_justify="left", expand=True, show_lines=True)
        table.add_row(*map(Text, answers))
        console.print(table)


def _typed() -> Iterator[str]:
    """Lines of standard input that hold something."""
    if _is_terminal():
        print("Ask something; an end of file (Ctrl-D) ends.")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


def _is_terminal() -> bool:
    return sys.stdin.isatty()
