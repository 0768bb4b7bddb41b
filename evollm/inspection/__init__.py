"""Inspection of a dataset before training: columns, dropped rows, lengths, and estimates of memory and time."""

from __future__ import annotations

from evollm.inspection.forecast import Forecast
from evollm.inspection.inspect import inspect_data
from evollm.inspection.printing import print_inspection
from evollm.inspection.result import Fit, Inspection, Lengths, RenderedRow, SetShare

__all__ = ["Fit", "Forecast", "Inspection", "Lengths", "RenderedRow", "SetShare", "inspect_data", "print_inspection"]
