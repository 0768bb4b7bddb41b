"""The report of a run: read it as plain data, and write it as one page."""

from evollm.report.findings import gain_of
from evollm.report.read import read_run
from evollm.report.record import Ended, Evolution, Lap, Life, RunRecord, Sample, Scored, StepLine
from evollm.report.statistics import Interval, few_rows, paired_difference, score_interval
from evollm.report.style import require_matplotlib
from evollm.report.write import write_report

__all__ = [
    "Ended",
    "Evolution",
    "Interval",
    "Lap",
    "Life",
    "RunRecord",
    "Sample",
    "Scored",
    "StepLine",
    "few_rows",
    "gain_of",
    "paired_difference",
    "read_run",
    "require_matplotlib",
    "score_interval",
    "write_report",
]
