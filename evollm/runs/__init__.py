"""Run folders: their files, the events that are written to them, and the reader."""

from __future__ import annotations

from evollm.runs.lineage import HyperparameterSchedule, Lineage, read_lineage
from evollm.runs.lines import RecordFiles, read_lines
from evollm.runs.reader import has_ended, read_config, read_run
from evollm.runs.record import RunRecord

__all__ = [
    "HyperparameterSchedule",
    "Lineage",
    "RecordFiles",
    "RunRecord",
    "has_ended",
    "read_config",
    "read_lineage",
    "read_lines",
    "read_run",
]
