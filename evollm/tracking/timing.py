"""Where time and memory go, one lap for each event of a run."""

from __future__ import annotations

import time

import psutil
import torch


class Stopwatch:
    """Measures from lap to lap.

    Args:
        on_cuda: Whether to note the peak of CUDA's memory too.
    """

    def __init__(self, on_cuda: bool) -> None:
        self._process = psutil.Process()
        self._on_cuda = on_cuda and torch.cuda.is_available()
        self._since = time.perf_counter()

    def lap(self) -> dict[str, float | int]:
        """Start a new lap.

        Returns:
            `seconds` of the lap that ends; `resident_bytes`, the memory that the process has now; on CUDA
            `cuda_peak_bytes`, the most that torch had allocated at once since the process began.
        """
        now = time.perf_counter()
        found: dict[str, float | int] = {
            "seconds": round(now - self._since, 6),
            "resident_bytes": self._process.memory_info().rss,
        }
        if self._on_cuda:
            found["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
        self._since = now
        return found
