"""Run folders: how their records are written and read."""

from __future__ import annotations

from evollm.runs.lineage import Lineage, Schedule, read_lineage
from evollm.runs.lines import RecordFiles, read_lines
from evollm.runs.reader import has_ended, read_config, read_run
from evollm.runs.record import RunRecord

__all__ = [
    "Lineage",
    "RecordFiles",
    "RunRecord",
    "Schedule",
    "has_ended",
    "read_config",
    "read_lineage",
    "read_lines",
    "read_run",
]
