"""How long ``rootward --help`` takes, as a whole process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.figures import Figure, median


def run() -> dict[str, Figure]:
    """Seven runs after one warm-up."""
    command = [str(Path(sys.executable).with_name("rootward")), "--help"]
    seconds: list[float] = []
    for _ in range(8):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return {"help_seconds": median(seconds[1:], "<= 0.5")}
