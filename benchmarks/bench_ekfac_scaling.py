"""Whether EK-FAC influence costs the same per document whatever their number, in seconds and in memory.

The setting is `bench_ekfac_speed`'s, with 500 and with 8,000 documents, factors and scores with the method's defaults.
Each size is a process of its own, in alternation; seconds per document are medians.
"""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.figures import Figure, median, single

SMALL, LARGE, ROUNDS = 500, 8000, 3


def one(documents: int) -> None:
    """Print seconds and this process's peak MB for so many documents."""
    import benchmarks.bench_collect as collect
    from benchmarks.bench_collect import Setting, _seconds

    collect.DOCUMENTS = documents
    setting = Setting()

    from benchmarks.bench_ekfac_speed import Ekfac
    from rootward.api import peak_memory_mb

    taken, _ = _seconds(Ekfac(setting).ekfac)
    print(json.dumps([taken, peak_memory_mb()]))


def _run(documents: int) -> tuple[float, float]:
    code = f"from benchmarks.bench_ekfac_scaling import one; one({documents})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds / documents, peak


def run() -> dict[str, Figure]:
    """The small size in every round, the large one once in the middle: it takes several minutes."""
    small: list[tuple[float, float]] = [_run(SMALL)]
    large = _run(LARGE)
    small += [_run(SMALL) for _ in range(ROUNDS - 1)]
    each = [seconds for seconds, _ in small]
    return {
        "per_document_growth": median([large[0] / seconds for seconds in each], "<= 1.10"),
        "memory_growth": single(large[1] / sorted(peak for _, peak in small)[len(small) // 2], "<= 1.10"),
        "small_ms_per_document": median([1e3 * seconds for seconds in each]),
        "large_ms_per_document": single(1e3 * large[0]),
        "small_peak_mb": median([peak for _, peak in small]),
        "large_peak_mb": single(large[1]),
    }
