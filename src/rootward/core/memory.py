"""The largest memory that this process had."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_forgotten = [0.0]
"""The highest peak that was forgotten."""


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MB: with all that ran in it before (or since `forget_peak`)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure begins with that of the process that started this one
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def highest_memory_mb() -> float:
    """Largest resident size of this process so far, in MB, whatever was forgotten."""
    return max(_forgotten[0], peak_memory_mb())


def forget_peak() -> bool:
    """Let the peak begin anew at what is held now; False where the system cannot (it can on most Linux)."""
    _forgotten[0] = highest_memory_mb()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets the peak resident set size
        return True
    return False
