"""What is printed after a run: where it is, and what to type next."""

from __future__ import annotations

import os
from pathlib import Path

from evollm.command_line import command, place


def print_ending(run_dir: Path, report: Path | None, trusted: bool = False) -> None:
    """Say where a run that has ended lies, and how it goes on from there.

    Args:
        run_dir: The run folder.
        report: Its page, None where none was written.
        trusted: Whether code that comes with the base was run.
    """
    from evollm.checkpoints.steps import has_populations
    from evollm.tuning.arguments_file import known_of, place_of

    print(f"\nRun folder: {run_dir}")
    if report is not None:
        print(f"Report: {report}")
    print("Next:")
    run = place(run_dir)
    known = known_of(run_dir)
    lines = [] if report is not None else [command("report", run)]
    elite = known.elsewhere.get("elite_path")
    inner = {name: place_of(run_dir, known, name) for name in ("elite_path", "checkpoint_path")}
    if not elite and not inner["elite_path"].is_dir() and not has_populations(inner["checkpoint_path"]):
        print("\n".join(f"  {line}" for line in lines) or "  nothing: the run kept no agent to ask or to export")
        return
    more = [*(["--elite", place(elite)] if elite else []), *(["--trust-remote-code"] if trusted else [])]
    for line in (*lines, command("chat", run, *more), command("export", run, "--to", _free("my-model"), *more)):
        print(f"  {line}")


def _free(name: str) -> str:
    """The name, with a number where it exists already in the working folder."""
    number = 2
    found = name
    while os.path.lexists(found):
        found = f"{name}-{number}"
        number += 1
    return found
