from __future__ import annotations

import io
import re
import sys

import pytest
from conftest import make_rows
from tokenizers_for_tests import chatml_tokenizer

from evollm import PreferenceGym
from evollm.pace import Pace, counted, progress_told, spoken


class Clock:
    """Time that goes by in steps."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.now = 0.0
        self.seconds = seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def said(total: int, seconds_a_step: float, done: int = 0) -> list[int]:
    """The steps after which a line comes."""
    clock = Clock()
    pace = Pace(total, done, clock)
    lines = []
    for step in range(done + 1, total + 1):
        clock.now += seconds_a_step
        if pace.is_due(step):
            lines.append(step)
    return lines


@pytest.mark.parametrize(
    ("total", "seconds"), [(40, 0.1), (40, 1), (40, 100), (1000, 0.05), (1000, 3), (100_000, 0.01), (100_000, 2)]
)
def test_lines_come_now_and_then_and_never_for_every_step(total, seconds) -> None:
    steps = said(total, seconds)
    assert len(steps) <= min(total / 2, 330)
    gaps = [later - sooner for sooner, later in zip([0, *steps], [*steps, total], strict=True)]
    # Nobody waits longer than half a minute, or a fiftieth of the time so far, or a step and the one after it.
    longest = max(30, total * seconds / 50)
    assert max(gaps) * seconds <= longest + 2 * seconds
    # What takes minutes says how far it is each twentieth.
    if total * seconds > 100 and total > 100:
        assert max(gaps) <= total / 20 + 1


def test_nothing_is_said_of_what_takes_a_moment() -> None:
    assert said(40, 0.01) == []
    assert said(1, 100) == []


def test_the_time_left_is_that_at_the_pace_so_far() -> None:
    clock = Clock()
    pace = Pace(100, 40, clock)
    assert pace.left(40) == ""
    clock.now = 60
    assert pace.left(50) == "about 5 min left"
    assert [spoken(seconds) for seconds in (3.4, 119, 150, 4800)] == ["3 s", "119 s", "2 min", "1 h 20 min"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("told", [True, False])
def test_rows_are_counted_for_whoever_waits(monkeypatch, told) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_told(told):
        # Ten seconds a row or so.
        assert list(counted(range(100), 100, "rows tokenised", Clock(5))) == list(range(100))
    lines = sys.stderr.getvalue().splitlines()
    assert told == bool(lines)
    if told:
        assert 10 < len(lines) < 60
        assert all(line.startswith("rows tokenised: ") and line.endswith(" left") for line in lines)


def test_in_a_terminal_one_line_changes_and_goes(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_told():
        list(counted(range(100), 100, "rows tokenised", Clock(0.5)))
        shown = sys.stderr.getvalue()
        assert "\n" not in shown
        assert "\rrows tokenised: 50 of 100, " in shown
        assert shown.endswith("\r\x1b[K")
        # Nothing of what is quick.
        monkeypatch.setattr(sys, "stderr", Terminal())
        list(counted(range(100), 100, "rows tokenised"))
        assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize("rows", ["strings", "messages"])
def test_a_gym_counts_its_rows_and_scripts_hear_nothing_of_it(monkeypatch, rows) -> None:
    monkeypatch.setattr("evollm.pace.INTERVAL", 0.0)
    pairs = make_rows(40)
    if rows == "messages":
        sides = ("chosen", "rejected")
        pairs = [
            {"prompt": [{"role": "user", "content": row["prompt"]}]}
            | {side: [{"role": "assistant", "content": row[side]}] for side in sides}
            for row in pairs
        ]
    for told in (True, False):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        with progress_told(told):
            PreferenceGym(pairs, None, chatml_tokenizer())
        for what in ("rows written out", "rows tokenised"):
            assert bool(re.search(rf"{what}: \d+ of 40, about \d s left\n", sys.stderr.getvalue())) == told
