"""Callbacks that show a run: the console, and the optional trackers."""

from evollm.tracking.console import Console
from evollm.tracking.trackers import TRACKERS, TensorBoard, Tracker, Trackio, WeightsAndBiases, tracker_names

__all__ = [
    "TRACKERS",
    "Console",
    "TensorBoard",
    "Tracker",
    "Trackio",
    "WeightsAndBiases",
    "tracker_names",
]
