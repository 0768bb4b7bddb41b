"""The command line: parses, calls the library. Each command is a module of `evollm.commands`."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from evollm import __version__
from evollm.commands import COMMANDS
from evollm.errors import EvoLLMError, one_line

INTERRUPTED = 128 + signal.SIGINT
# What a shell makes of a program that SIGPIPE ends.
UNREAD = 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Returns:
        0; 1 after an error of evollm or of the file system, 130 after Ctrl-C, and 141 when whoever read the output has
        closed it.
    """
    options = _parser().parse_args(arguments)
    # The bars and remarks of loading are nothing that somebody who typed a command can act on.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _survive_any_text()
    try:
        options.run(options)
        sys.stdout.flush()
    except EvoLLMError as error:
        print(f"evollm: {one_line(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        _give_up_output()
        return UNREAD
    except OSError as error:
        print(f"evollm: {_described(error)}", file=sys.stderr)
        _give_up_output()
        return 1
    except KeyboardInterrupt:
        print("evollm: interrupted; evollm resume RUN goes on with a run that has saved a checkpoint", file=sys.stderr)
        return INTERRUPTED
    return 0


def _survive_any_text() -> None:
    """Show what the terminal cannot write, and read what is no text, as question marks or the like."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _described(error: OSError) -> str:
    """What the system says, such as `my-run/config.json: No space left on device`."""
    parts = (error.filename, error.strerror or str(error) or type(error).__name__)
    return one_line(": ".join(str(part) for part in parts if part is not None))


def _give_up_output() -> None:
    """Leave nothing that Python would fail to write, and complain of, when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evollm", description="Preference-tune language models with a population of agents on one base."
    )
    parser.add_argument("--version", action="version", version=f"evollm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser
