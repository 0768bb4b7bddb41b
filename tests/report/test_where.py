from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evollm.report import read_run, write_report
from evollm.report.where import MAX_WRITTEN_SPANS, where_it_ran


def homes(*members: tuple[int, str, int, list[int]]) -> list[dict[str, Any]]:
    names = ("worker", "machine", "process", "members")
    return [dict(zip(names, one, strict=True)) for one in members]


LINES = [
    {"kind": "members", "step": 1, "workers": homes((0, "node1", 11, [2, 0]), (1, "<b>node2", 21, [1, 3]))},
    {"kind": "members", "step": 3, "workers": homes((0, "node1", 11, [0, 2]), (1, "<b>node2", 21, [4, 5]))},
    {
        **{"kind": "loss", "step": 4, "worker": 1, "machine": "<b>node2", "process": 21},
        **{"seconds": 61.5, "why": "the node died.", "replaced": False},
    },
    {"kind": "members", "step": 4, "workers": homes((0, "node1", 11, [0, 2]), (1, "node1", 11, [4, 5]))},
    {"kind": "members", "step": 5, "workers": homes((0, "node1", 11, [0, 2, 4, 5]))},
]


@pytest.fixture
def spread(evolved, tmp_path) -> Path:
    shutil.copytree(evolved, tmp_path / "run")
    (tmp_path / "run" / "workers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path / "run"


def test_the_page_says_who_ran_where_and_what_was_lost(spread, evolved) -> None:
    page = write_report(spread, pictures=False).read_text(encoding="utf-8")
    section = page[page.index('<section id="where">') : page.index('<section id="settings">')]
    rows = [
        '<td>node1</td><td class="number">11</td><td>0, 2 (steps 1 to 4); 0, 2, 4, 5 (steps 5 to 8)</td>',
        '<td>&lt;b&gt;node2</td><td class="number">21</td><td>1, 3 (steps 1 to 2); 4, 5 (step 3)</td>',
        '<td>node1</td><td class="number">11</td><td>4, 5 (step 4)</td>',
    ]
    places = [section.index(row) for row in rows]
    assert places == sorted(places)
    assert "2 machines; each trains" in section
    assert "One worker was lost, for which the run waited 62 s." in section
    assert "(the node died); its members went on with the other workers, after 62 s.</li>" in section
    # Nothing is said of a run in one place.
    assert where_it_ran(read_run(evolved)) is None
    (spread / "workers.jsonl").write_text(json.dumps(LINES[-1]) + "\n")
    assert where_it_ran(read_run(spread)) is None


def test_of_many_changes_the_last_ones_are_written(spread) -> None:
    lines = [
        {"kind": "members", "step": step, "workers": homes((0, "a", 1, [step]), (1, "a", 2, []))}
        for step in range(1, MAX_WRITTEN_SPANS + 3)
    ]
    (spread / "workers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = where_it_ran(read_run(spread))
    assert found is not None
    first, second = found["rows"]
    assert first["held"].startswith("..., 3 (step 3); 4 (step 4)")
    assert second["held"] == "none (steps 1 to 8)"


def test_damaged_lines_are_left_out(spread) -> None:
    lines = [{**LINES[2], "seconds": "nan"}, {**LINES[2], "worker": "x"}, {**LINES[0], "workers": [3]}, LINES[0]]
    (spread / "workers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "lo')
    record = read_run(spread)
    assert (len(record.placements), record.losses) == (1, [])
