"""Records of a run: what a full disk or a kill spoils is at most a line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from evollm import CheckpointError
from evollm.runs import RecordFiles, read_lines
from evollm.runs.lines import record_line

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def records(tmp_path) -> RecordFiles:
    return RecordFiles(tmp_path)


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_lines(path)]


def test_half_a_line_spoils_no_other_and_comes_when_there_is_room(records, tmp_path, monkeypatch) -> None:
    """The disk takes a part of a line, then nothing, then all again."""
    path, write = tmp_path / "metrics.jsonl", os.write
    records.append("metrics.jsonl", kind="step", step=1)
    room = [7]

    def write_until_full(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise FULL
        part, room[0] = content[: room[0]], 0
        return write(descriptor, part)

    with monkeypatch.context() as full:
        full.setattr(os, "write", write_until_full)
        with pytest.warns(UserWarning, match="cannot be written: .*No space left.* as soon as there is room"):
            records.append("metrics.jsonl", kind="step", step=2)
        # Said once: another warning would fail the test.
        records.append("metrics.jsonl", kind="step", step=3)
        assert steps(path) == [1]
    records.append("timing.jsonl", kind="step", step=3)
    assert steps(path) == [1, 2, 3]


def test_records_that_find_no_room_to_the_end_are_said_to_be_lost(records, monkeypatch) -> None:
    def full(*_: object) -> int:
        raise FULL

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="cannot be written"):
        records.append("metrics.jsonl", kind="step", step=1)
    records.append("lineage.jsonl", kind="founders")
    with pytest.warns(UserWarning, match=r"lacks the last records of lineage\.jsonl, metrics\.jsonl"):
        records.close()


def test_records_are_on_disk_after_a_flush(records, tmp_path, monkeypatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    for name in ("metrics.jsonl", "timing.jsonl"):
        records.append(name, kind="step", step=1)
    records.flush()
    assert sorted(flushed) == [str(tmp_path / "metrics.jsonl"), str(tmp_path / "timing.jsonl")]
    records.flush()
    assert len(flushed) == 2


@pytest.mark.parametrize(
    "damage", [b"3", b"[]", b"{}", b'{"kind": 3}', b'{"step": 1', b"\xff\xfe", b"[" * 100_000, b'{"kind": "st\0ep"']
)
def test_a_damaged_line_costs_itself_and_is_said(tmp_path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [record_line({"kind": "step", "step": step}) for step in (1, 2)]
    path.write_bytes(whole[0] + damage + b"\n" + whole[1])
    with pytest.warns(UserWarning, match=r"metrics.jsonl is damaged in line 2: left out"):
        assert steps(path) == [1, 2]
    # At the end it is what a kill leaves.
    path.write_bytes(whole[0] + whole[1] + damage)
    assert steps(path) == [1, 2]


def test_what_is_no_file_is_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "pipe", "."):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_lines(tmp_path / name)
