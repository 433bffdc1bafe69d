"""What ``make demo`` reaches: the whole job on the yes-man world, nothing cached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Figure


def run() -> dict[str, Figure]:
    """One run of ``rootward demo`` with an empty cache; its own figures and bars."""
    command = Path(sys.executable).with_name("rootward")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(command), "demo", "--json", "--out", f"{folder}/run"],
            env={**os.environ, "XDG_CACHE_HOME": f"{folder}/cache"},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode not in (0, 3):
        raise RuntimeError(f"rootward demo ended with exit code {done.returncode}: {done.stdout[-500:]}")
    figures = json.loads(done.stdout)["figures"]
    return {n: Figure(f["value"], f["low"], f["high"], f["n"], f["bar"]) for n, f in figures.items()}
