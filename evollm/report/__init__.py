"""The report of a run: one HTML page with pictures, drawn from the run folder alone."""

from evollm.report.findings import gain_of
from evollm.report.statistics import Interval, few_rows, paired_difference, score_interval
from evollm.report.style import require_matplotlib
from evollm.report.write import write_report
from evollm.runs.reader import read_run
from evollm.runs.record import RunRecord, Scored

__all__ = [
    "Interval",
    "RunRecord",
    "Scored",
    "few_rows",
    "gain_of",
    "paired_difference",
    "read_run",
    "require_matplotlib",
    "score_interval",
    "write_report",
]
