"""Whole runs in one call, and what is done with them afterwards."""

from __future__ import annotations

from evollm.tuning.tune import TuneResult, tune, validate

__all__ = ["TuneResult", "tune", "validate"]
