"""Peak memory of members, each number of them in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch

MIB = 2**20


def peak_mib(device_type: str, before: float) -> float:
    """Peak MiB of this process, less what it had before; on a GPU that of the allocator."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB - before


def peak_elsewhere(members: int) -> float:
    """What this script prints in a process of its own with `--measure MEMBERS`, and the same arguments besides."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--measure", str(members)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))
