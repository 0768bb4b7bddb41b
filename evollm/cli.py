"""The command line: parses, calls the library. Each command is a module of `evollm.commands`.

Nothing that is slow to import is imported here: help, versions and mistakes are answered without torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

# The statuses that a shell gives to programs that SIGINT and SIGPIPE end.
INTERRUPTED = 128 + 2
UNREAD = 128 + 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Returns:
        0; 1 after an error of evollm or of the file system, 130 after Ctrl-C, and 141 when whoever read the output has
        closed it.
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt as stopped:
        # Also while a command imports torch. A run that is interrupted puts the command that resumes it into `stopped`.
        from evollm.commands.launch import is_main  # noqa: PLC0415

        if is_main():
            print(": ".join(filter(None, ("evollm: interrupted", str(stopped)))), file=sys.stderr)
        return INTERRUPTED


def _run(arguments: Sequence[str] | None) -> int:
    from evollm.commands.launch import check_launch, is_main, say_error  # noqa: PLC0415
    from evollm.commands.remarks import own_warnings_only  # noqa: PLC0415 - main() must be there before Ctrl-C
    from evollm.errors import EvoLLMError, one_line  # noqa: PLC0415
    from evollm.pace import progress_told  # noqa: PLC0415

    _survive_any_text()
    try:
        try:
            with contextlib.nullcontext() if is_main() else _silent():
                options = _parsed(arguments)
            check_launch(options.command, together=options.together)
            with own_warnings_only(), progress_told(is_main()):
                options.run(options)
        finally:
            sys.stdout.flush()
    except EvoLLMError as error:
        say_error(f"evollm: {one_line(str(error))}")
        return 1
    except BrokenPipeError:
        _give_up_output()
        return UNREAD
    except OSError as error:
        say_error(f"evollm: {_described(error)}")
        _give_up_output()
        return 1
    return 0


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Print nothing inside the block: the main process of a launch has the same to say."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; exits with status 2, as argparse does, where it is not understood."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        takes_values = "config" in options or "overrides" in options
        hint = "; a setting is given without dashes, as key=value: lr=1e-4" if takes_values else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return options


def _survive_any_text() -> None:
    """Replace characters that the terminal cannot write, and bytes that are no text, instead of failing at them."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _described(error: OSError) -> str:
    """What the system says, such as `my-run/config.json: No space left on device`."""
    from evollm.errors import one_line  # noqa: PLC0415

    parts = (error.filename, error.strerror or str(error) or type(error).__name__)
    return one_line(": ".join(str(part) for part in parts if part is not None))


def _give_up_output() -> None:
    """Flush standard output, or send it nowhere: Python would print a traceback if it could not flush at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    import argparse  # noqa: PLC0415

    from evollm import __version__  # noqa: PLC0415
    from evollm.commands import COMMANDS  # noqa: PLC0415

    parser = argparse.ArgumentParser(
        prog="evollm", description="Preference-tune language models with a population of agents on one base."
    )
    parser.add_argument("--version", action="version", version=f"evollm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    return parser
