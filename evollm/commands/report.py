"""`evollm report`: one page that shows a run."""

from __future__ import annotations

import argparse

from evollm.commands.parsing import Subparsers, add_command


def add_to(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        _run,
        help="write a run's report.html: who won, why, and how sure that is",
        description="Write one page, which needs no network, from a run folder. The run may still be going on.",
        example="evollm report my-run",
    )
    parser.add_argument("run_dir", metavar="RUN", help="run folder")
    parser.add_argument("--output", metavar="FILE", help="the page, FILE.html (default: report.html in the run folder)")
    parser.add_argument("--no-pictures", action="store_true", help="no PNG files beside the page; it has its figures")


def _run(options: argparse.Namespace) -> None:
    from evollm.report import write_report

    print(write_report(options.run_dir, options.output, pictures=not options.no_pictures))
