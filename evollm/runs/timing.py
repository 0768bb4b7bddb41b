"""Where time and memory go, one lap for each event of a run."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


class Stopwatch:
    """Measures from lap to lap.

    Args:
        cuda_peak: The most bytes that were allocated on CUDA at once since the process began; None: no CUDA.
    """

    def __init__(self, cuda_peak: Callable[[], int] | None = None) -> None:
        self._process = psutil.Process()
        self._cuda_peak = cuda_peak
        self._since = time.perf_counter()

    def lap(self) -> dict[str, float | int]:
        """Start a new lap.

        Returns:
            `seconds` of the lap that ends; `resident_bytes`, the memory that the process has now; on CUDA
            `cuda_peak_bytes`.
        """
        now = time.perf_counter()
        found: dict[str, float | int] = {
            "seconds": round(now - self._since, 6),
            "resident_bytes": self._process.memory_info().rss,
        }
        if self._cuda_peak is not None:
            found["cuda_peak_bytes"] = self._cuda_peak()
        self._since = now
        return found
