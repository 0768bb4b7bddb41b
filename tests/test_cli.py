"""The program `evollm` against pipes that close, disks that are full, and text that is none."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evollm import cli
from evollm.commands import recipes

EVOLLM = [sys.executable, "-c", "import sys; from evollm.cli import main; sys.exit(main())"]


def evollm(*arguments: str, **settings) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **settings.pop("environment", {})}
    return subprocess.run([*EVOLLM, *arguments], env=environment, check=False, stderr=subprocess.PIPE, **settings)


def own_lines(said: bytes) -> list[bytes]:
    return [line for line in said.splitlines() if b"kernels" not in line]


def test_a_reader_that_has_enough_is_no_fault() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        found = evollm("recipes", stdout=closed)
    assert found.returncode == 128 + signal.SIGPIPE
    assert own_lines(found.stderr) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_onto_a_full_disk_is_one_line_and_status_1() -> None:
    with Path("/dev/full").open("wb") as full:
        found = evollm("recipes", stdout=full)
    assert found.returncode == 1
    assert own_lines(found.stderr) == [b"evollm: No space left on device"]


def test_what_the_terminal_cannot_write_is_a_question_mark() -> None:
    run = "from evollm import cli; from evollm.commands import recipes; recipes.recipe_text = lambda name: 'né日\\n'; "
    program = [sys.executable, "-c", f"{run}cli.main(['recipes', 'x'])"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(program, env=environment, check=True, capture_output=True).stdout == b"n??\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "run/config.json"),
            "run/config.json: No space left on device",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "my\nrun"), "my run: Permission denied"),
        (TimeoutError(), "TimeoutError"),
        (OSError("gone"), "gone"),
    ],
)
def test_what_the_file_system_refuses_is_one_line_and_status_1(monkeypatch, capsys, error, line) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(recipes, "recipe_names", fail)
    assert cli.main(["recipes"]) == 1
    assert capsys.readouterr().err == f"evollm: {line}\n"
