"""Run folders: how their records are written and read."""

from __future__ import annotations

from evollm.runs.lineage import Lineage, read_lineage
from evollm.runs.lines import RecordFiles, read_lines

__all__ = ["Lineage", "RecordFiles", "read_lineage", "read_lines"]
