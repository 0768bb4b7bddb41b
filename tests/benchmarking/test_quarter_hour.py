"""A quarter of an hour with a card, at a toy size on the CPU: nothing that stops a part loses another's results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import gpu_quarter_hour
import pytest
import search
from gpu_quarter_hour import CALLS, SEARCHES, SECONDS
from quarter_hour import carrying
from quarter_hour.carrying import CarryingError
from quarter_hour.checks import attention
from quarter_hour.parts import searches
from quarter_hour.running import Place
from quarter_hour.tables import tables
from result_lines import read

FOLDER = Path(__file__).resolve().parents[2] / "benchmarking"


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parent)])}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# In one process, so that the libraries are imported once.
CALL_ALL = """
import sys
from gpu_quarter_hour import CALLS, main
if __name__ == "__main__":
    out, keep = sys.argv[1:]
    for number in CALLS:
        limit = ["--limit", "attention=0.01"] if number == 5 else []
        main(["call", str(number), "--toy", "--out", out, "--keep", keep, *limit])
    main(["table", out])
"""


def test_all_calls_run_at_toy_size_and_a_part_at_its_limit_loses_nothing(tmp_path) -> None:
    done = run(CALL_ALL, tmp_path / "out", tmp_path / "keep")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {number: read(tmp_path / "out" / f"call-{number}.jsonl") for number in CALLS}
    for number, parts in CALLS.items():
        status = {row["part"]: row["status"] for row in rows[number] if row["kind"] == "status"}
        killed = {part.name for part in parts if number == 5 and part.name == "attention"}
        expected = {part.name: "killed after 0.01 s" if part.name in killed else "done" for part in parts}
        assert status == expected, (tmp_path / "out" / f"call-{number}.log").read_text()[-3000:]
    every = [row for number in CALLS for row in rows[number]]
    skipped = {row["why"] for row in every if row["kind"] == "skipped"}
    no_pairs = "no pairs were brought: gpu_quarter_hour.py prepare FOLDER --pairs FILE ..."
    assert skipped == {no_pairs, *({"TRL is not installed"} if find_spec("trl") is None else set())}
    speed = [row for row in every if row["kind"] == "speed" and row["case"] != "TRL"]
    assert [row["case"] for row in speed] == ["together", "one", "in a loop", *["together", "one"] * 2, "compiled"]
    for row in speed:
        assert {"busy", "of_floor", "attention", "rate"} <= row.keys()
    assert all(row["right"] for row in every if row["kind"] == "packed against plain")
    assert [row["equal"] for row in every if row["kind"] == "same step twice"] == [True, True]
    assert "Self CPU" in (tmp_path / "out" / "call-1-profile.txt").read_text()
    table = done.stdout.rpartition("call 5: ")[2]
    for title in ("Throughput", "A small model", "The same steps again", "The probe's verdict", "The demo"):
        assert f"### {title}" in table
    assert "call-5, attention: killed after 0.01 s" in table


def test_attention_is_compared_with_float64(tmp_path) -> None:
    attention(Place("attention", "call-1", tmp_path, tmp_path, True))
    rows = read(tmp_path / "call-1.jsonl")
    assert {(row["window"], row["right"]) for row in rows} == {(None, True), (9, True)}
    assert all(0 < error < 0.01 for row in rows for error in row["errors"].values())


PARTS = """
import os, signal, sys, time
from pathlib import Path
from quarter_hour.running import Part, Place, UnavailableError, run_parts

def fine(place, value):
    print("in the log")
    place.write("found", value=value)

def hang(place):
    place.write("found", value="before hanging")
    time.sleep(600)

def crash(place):
    place.write("found", value="before crashing")
    os.kill(os.getpid(), signal.SIGSEGV)

def fail(place):
    raise ValueError("so it is")

def lack(place):
    raise UnavailableError("no such thing")

if __name__ == "__main__":
    out = Path(sys.argv[1])
    limits = {"hang": 5, "crash": 60, "fail": 60, "lack": 60}
    parts = [Part(name, f"parts:{name}", 1, limit) for name, limit in limits.items()]
    parts.append(Part("fine", "parts:fine", 1, 60, {"value": 1}))
    run_parts(parts, Place("all", "call-1", out, out, True), float(sys.argv[2]))
"""


@pytest.fixture
def broken_parts(tmp_path):
    """Run parts that hang, crash, fail and lack something before one that works; processes as on a card."""
    (tmp_path / "parts.py").write_text(PARTS)
    search = os.pathsep.join([str(tmp_path), str(FOLDER)])

    def run_them(seconds: float) -> tuple[str, list[dict[str, object]]]:
        command = [sys.executable, str(tmp_path / "parts.py"), str(tmp_path), str(seconds)]
        environment = os.environ | {"PYTHONPATH": search}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout, read(tmp_path / "call-1.jsonl")

    return run_them


def test_a_part_that_hangs_crashes_or_fails_loses_no_result(broken_parts, tmp_path) -> None:
    output, rows = broken_parts(60)
    assert [row["value"] for row in rows if row["kind"] == "found"] == ["before hanging", "before crashing", 1]
    status = {row["part"]: row["status"] for row in rows if row["kind"] == "status"}
    assert status == {
        "hang": "killed after 5 s",
        "crash": "failed (exit code -11)",
        "fail": "failed (exit code 1)",
        "lack": "done",
        "fine": "done",
    }
    assert "ValueError: so it is" in output, "why a part failed is on the console"
    assert "in the log" in (tmp_path / "call-1.log").read_text()
    assert "time.sleep(600)" in output or "in hang" in output, "where a part hung is on the console"
    told = tables(rows)
    assert "call-1, lack: left out, no such thing" in told
    assert "call-1, crash: failed (exit code -11)" in told


def test_what_no_time_is_left_for_is_not_begun(broken_parts) -> None:
    _, rows = broken_parts(5.5)
    status = {row["part"]: row["status"] for row in rows if row["kind"] == "status"}
    assert set(status.values()) == {"killed after 5 s", "not begun: no time is left"}
    assert status["fine"] == "not begun: no time is left"


def test_a_call_that_is_made_again_loses_nothing_of_the_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_quarter_hour, "run_parts", lambda parts, place, *_: place.write("found", value=place.run))
    for _ in range(2):
        with mock.patch.dict(os.environ):
            gpu_quarter_hour.main(["call", "3", "--toy", "--out", str(tmp_path), "--keep", str(tmp_path)])
    found = {path.name: [row["value"] for row in read(path)] for path in tmp_path.glob("*.jsonl")}
    assert found == {"call-3.jsonl": ["call-3"], "call-3-again-1.jsonl": ["call-3-again-1"]}


@pytest.fixture
def halves(tmp_path) -> Path:
    wheel = tmp_path / "model-1-py3-none-any.whl"
    wheel.write_bytes(os.urandom(100_001))
    carrying.split(wheel, [tmp_path / "carried" / half for half in carrying.HALVES])
    return tmp_path


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_file_carried_in_halves_is_joined_whichever_came_first(halves, order) -> None:
    sizes = [carrying.size_mib(halves / "carried" / half) for half in carrying.HALVES]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    first, second = (halves / "carried" / carrying.HALVES[number] for number in order)
    second.rename(halves / "later")
    carrying.keep_halves(halves / "carried", halves / "kept")
    with pytest.raises(CarryingError, match="of the 2 parts of model-1-py3"):
        carrying.join(halves / "kept", halves / "joined")
    (halves / "later").rename(second)
    for path in first.iterdir():
        path.unlink()
    carrying.keep_halves(halves / "carried", halves / "kept")
    joined = carrying.join(halves / "kept", halves / "joined")
    assert joined.read_bytes() == (halves / "model-1-py3-none-any.whl").read_bytes()


def test_a_half_that_was_damaged_is_not_joined(halves) -> None:
    carrying.keep_halves(halves / "carried", halves / "kept")
    path = halves / "kept" / "model-1-py3-none-any.whl.2of2"
    damaged = bytearray(path.read_bytes())
    damaged[0] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(CarryingError, match="is damaged"):
        carrying.join(halves / "kept", halves / "joined")
    with pytest.raises(CarryingError, match="holds parts of 0 files"):
        carrying.join(halves / "nowhere", halves / "joined")


def test_what_is_carried_is_pinned_and_a_call_fits_its_time() -> None:
    versions = carrying.pinned()
    assert all(re.fullmatch(r"\d+(\.\d+)+", versions[name]) for name in (*carrying.CARRIED, carrying.DEMO_MODEL))
    for number, parts in CALLS.items():
        # The machine is given back after four minutes, and killing a part can take ten seconds.
        assert number == SEARCHES or sum(part.expected for part in parts) < SECONDS - 20
        assert all(part.expected < part.limit for part in parts)
    assert SECONDS + 10 < 240


def test_the_searches_of_call_4_are_asked_for_as_search_takes_them(tmp_path, monkeypatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").touch()
    monkeypatch.setenv("EVOLLM_PAIRS", str(tmp_path))
    monkeypatch.delenv("EVOLLM_SEARCH", raising=False)
    monkeypatch.setattr("quarter_hour.parts._demo_folder", lambda: tmp_path)
    asked = []
    monkeypatch.setattr(search, "main", lambda arguments: asked.append(search._parse(arguments)))
    place = Place("searches", "call-4", tmp_path, tmp_path, toy=True)
    searches(place)
    monkeypatch.setenv("EVOLLM_SEARCH", "record --seeds 1 2 --jobs 4")
    searches(place)
    default, own = asked
    assert (default.what, default.strategies) == (["record", "run"], ["tournament"])
    assert [path.name for path in default.data] == ["a.jsonl", "b.jsonl"]
    assert (own.what, own.seeds, own.jobs) == (["record"], [1, 2], 4)


def test_rows_become_tables_with_the_ratio_to_trl_on_the_same_card() -> None:
    def row(case: str, rate: float, machine: str = "H100") -> dict[str, object]:
        same = {"run": "call-1", "part": "x", "kind": "speed", "shape": "0.5B", "batch_size": 8, "machine": machine}
        return {**same, "case": case, "rate": rate, "members": 8 if case == "together" else 1, "busy": None}

    unknown = {**row("one", 1), "kind": "new"}
    told = tables([row("together", 230.0), row("TRL", 50.0), row("TRL", 100.0, "H200"), unknown])
    lines = [line.split(" | ") for line in told.splitlines() if "0.5B" in line]
    assert [line[2:5] for line in lines] == [
        ["together, 8 members", "230", "4.6"],
        ["TRL", "50", "1.0"],
        ["TRL", "100", "1.0"],
    ]
