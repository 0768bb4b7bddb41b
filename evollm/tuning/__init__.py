"""Whole runs in one call, and what is done with them afterwards."""

from __future__ import annotations

from evollm.tuning.replay import ReplayResult, replay
from evollm.tuning.tune import TuneResult, tune, validate

__all__ = ["ReplayResult", "TuneResult", "replay", "tune", "validate"]
