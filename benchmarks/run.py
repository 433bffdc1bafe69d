"""Run a benchmark: ``python benchmarks/run.py NAME [--json]``; without a name, list them.

``--json`` prints one document: ``{"benchmark", "figures": {id: {"value", "low", "high", "n", "bar", "holds"}},
"seconds", "machine", "versions"}``. Without it a table. The exit code is 3 where a bar does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.figures import Figure  # noqa: E402 - the folder above holds the package

NAMES = sorted(p.stem for p in HERE.glob("bench_*.py"))


def table(document: dict[str, object], figures: dict[str, Figure]) -> str:
    """The figures as plain text."""
    lines = [f"{document['benchmark']}  ({document['seconds']:.0f} s)"]
    for name, figure in figures.items():
        interval = f"[{figure.low:.3f}, {figure.high:.3f}]" if figure.n > 1 else ""
        verdict = "" if figure.holds is None else ("holds" if figure.holds else "MISSED")
        lines.append(f"  {name:28} {figure.value:9.3f} {interval:18} n={figure.n:<5} {figure.bar:12} {verdict}")
    return "\n".join(lines)


def main() -> int:
    """Parse the arguments, run, print, and say by the exit code whether every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=[n.removeprefix("bench_") for n in NAMES])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if arguments.name is None:
        print("\n".join(n.removeprefix("bench_") for n in NAMES))
        return 0
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from rootward.core.records import machine, versions

    start = time.perf_counter()
    figures: dict[str, Figure] = importlib.import_module(f"benchmarks.bench_{arguments.name}").run()
    document = {
        "benchmark": arguments.name,
        "figures": {name: figure.document() for name, figure in figures.items()},
        "seconds": round(time.perf_counter() - start, 2),
        "machine": machine(),
        "versions": versions(),
    }
    print(json.dumps(document, indent=1) if arguments.json else table(document, figures))
    return 0 if all(figure.holds is not False for figure in figures.values()) else 3


if __name__ == "__main__":
    sys.exit(main())
