"""`evollm chat`: talk with the base and the best agent, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from evollm.checks import whole_number
from evollm.commands.arguments import add_elite, add_model, add_run, add_trust
from evollm.commands.parsing import Subparsers, add_command
from evollm.errors import ConfigurationError, shown

if TYPE_CHECKING:
    from rich.console import Console

    from evollm.tuning.conversation import Conversation
    from evollm.tuning.winner import Winner

CLEAR = "/clear"
ENDS = ("/exit", "/quit")


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "chat",
        _run,
        help="talk with the base and the best agent of a run, side by side",
        description="Ask the base and the best agent of a run, and see their likeliest answers side by side.\n"
        "Lines from the terminal or a file are the turns of one conversation if the run's rows were messages: /clear\n"
        "begins a new one, and /exit or an end of file ends. Each --prompt, and every line if the run's rows were\n"
        "strings, is answered by itself.",
        example='evollm chat my-run --prompt "What is tea?"',
    )
    add_run(parser)
    parser.add_argument("--prompt", action="append", help="what to ask, by itself; may be given several times")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer, in tokens (default: %(default)s)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="no chat template, whatever the run's rows were")
    form.add_argument("--template", action="store_true", help="the chat template, whatever the run's rows were")
    parser.add_argument("--no-history", action="store_true", help="answer each line by itself")
    add_model(parser)
    add_elite(parser)
    add_trust(parser)


def _run(options: argparse.Namespace) -> None:
    whole_number("max_new_tokens", options.max_new_tokens, 1)
    from rich.console import Console

    from evollm.tuning.conversation import Conversation
    from evollm.tuning.winner import open_winner

    winner = open_winner(options.run_dir, options.model, options.trust_remote_code, options.elite)
    uses_template = options.template or (winner.uses_template and not options.raw)
    keeps = uses_template and not options.no_history and not options.prompt
    talk = Conversation(winner, options.max_new_tokens, uses_template=uses_template, keeps=keeps)
    console = Console(emoji=False)
    console.print(_form(winner, talk), highlight=False, markup=False, soft_wrap=True)
    for given in options.prompt or _typed():
        # An argument of bytes that are no UTF-8 holds lone surrogates, which no tokenizer takes.
        prompt = given.encode(errors="replace").decode()
        if prompt == CLEAR and not options.prompt:
            talk.clear()
            print("A new conversation." if keeps else "There is nothing to clear: each line is answered by itself.")
            continue
        try:
            _print_turn(console, talk, prompt)
        except ConfigurationError as error:
            # In a terminal the user can ask again.
            if options.prompt or not _is_terminal():
                raise
            print(f"evollm: {error}")


def _print_turn(console: Console, talk: Conversation, prompt: str) -> None:
    """Ask, and show both answers."""
    from rich.table import Table
    from rich.text import Text

    turn = talk.ask(prompt)
    if turn.forgotten:
        print(f"(longer than the model's context: without the first {turn.forgotten} messages)")
    table = Table("base", "winner", title=Text(shown(prompt)), title_justify="left", expand=True, show_lines=True)
    table.add_row(*(Text(shown(answer) or "(empty)") for answer in turn.answers))
    console.print(table)


def _form(winner: Winner, talk: Conversation) -> str:
    """A line that says whether prompts go through the chat template, and whether turns follow each other."""
    learnt = {
        "chat": "The run's rows were messages",
        "text": "The run's rows were strings",
        "mixed": "The run's rows were partly messages, partly strings",
        "": "The run does not say what its rows were",
    }[winner.form]
    how = "prompts go through the chat template" if talk.uses_template else "prompts are continued as they are"
    turns = "lines are the turns of a conversation" if talk.keeps else "each is answered by itself"
    return f"{learnt}: {how}, and {turns}."


def _typed() -> Iterator[str]:
    """The lines of standard input that are not empty, up to one that ends the conversation."""
    if _is_terminal():
        print(f"Ask something; {CLEAR} begins anew, {ENDS[0]} or an end of file (Ctrl-D) ends.")
    for line in sys.stdin:
        text = line.strip()
        if text in ENDS:
            return
        if text:
            yield text


def _is_terminal() -> bool:
    return sys.stdin.isatty()
