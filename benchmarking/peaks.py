"""Peak memory of processes, and of members, each number of them in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

MIB = 2**20


def peak_rss_mib() -> float:
    """The largest resident set of this process so far, in MiB.

    Linux counts into `ru_maxrss` what the process held that started this one, before it ran another program: a child
    of a large process would report its parent. `VmHWM` begins with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) * 1024 / MIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def peak_mib(device_type: str, before: float = 0.0) -> float:
    """Peak MiB of this process, less what it had before; on a GPU that of the allocator."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return peak_rss_mib() - before


def peak_elsewhere(members: int) -> float:
    """What this script prints in a process of its own with `--measure MEMBERS`, and the same arguments besides."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--measure", str(members)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))
