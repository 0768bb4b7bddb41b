"""The command line: parses, calls the library. Each command is a module of `evollm.commands`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from evollm import __version__
from evollm.commands import COMMANDS
from evollm.errors import EvoLLMError

INTERRUPTED = 128 + signal.SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 after an error of evollm, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    # The bars and remarks of loading are nothing that somebody who typed a command can act on.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        options.run(options)
    except EvoLLMError as error:
        print(f"evollm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evollm: interrupted; evollm resume RUN goes on with a run that has saved a checkpoint", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evollm", description="Preference-tune language models with a population of agents on one base."
    )
    parser.add_argument("--version", action="version", version=f"evollm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser
