from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peaks
import pytest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the system's own figure is all there is")
def test_a_process_does_not_report_the_memory_of_the_one_that_started_it() -> None:
    held = bytearray(2**30)
    code = "from peaks import peak_rss_mib; print(peak_rss_mib())"
    folder = Path(peaks.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert len(held) / peaks.MIB <= peaks.peak_rss_mib()
    assert 0 < float(done.stdout) < 1000
