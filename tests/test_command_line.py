"""Commands that are printed are taken by a shell, and by the command line, as they were meant."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from evollm.checks import expanded
from evollm.command_line import command, place, setting
from evollm.config import override

NAMES = (
    *("my run", "my $(run)'s", 'a "b"', "-x", "~", "~root", "#1", "a: b", "[x]", "true", "12", "null", "ü日", "a\\b"),
    *("/abs/plain", "/abs/with space: x", "&a", "*b", "!c", "a`b`", "x;y|z", "%h", "a=b"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_path_arrives_as_it_is(name: str) -> None:
    program, verb, run, *settings = shlex.split(command("resume", place(name), setting("elite_path", name)))
    assert (program, verb) == ("evollm", "resume")
    for arrived in (run, *override({}, settings).values()):
        assert isinstance(arrived, str)
        assert not arrived.startswith("-")
        assert Path(expanded(arrived)) == Path(name)
