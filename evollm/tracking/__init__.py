"""Where a run's events are written: files, the console, and optional trackers."""

from evollm.tracking.console import Console
from evollm.tracking.run_folder import RunFolder
from evollm.tracking.trackers import TensorBoard, WeightsAndBiases

__all__ = ["Console", "RunFolder", "TensorBoard", "WeightsAndBiases"]
