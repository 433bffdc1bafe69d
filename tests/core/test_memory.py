"""The peak of memory counts what was held for a moment, until it is forgotten."""

import numpy as np
import pytest

from rootward.core.memory import forget_peak, highest_memory_mb, peak_memory_mb


def test_a_peak_is_seen_and_forgotten():
    if not forget_peak():
        pytest.skip("this system cannot reset the peak")
    before = peak_memory_mb()
    held = np.ones(10_000_000)  # 80 MB
    assert peak_memory_mb() > before + 60
    del held
    assert peak_memory_mb() > before + 60
    assert forget_peak()
    assert peak_memory_mb() < before + 40
    assert highest_memory_mb() > before + 60
    assert forget_peak()
    assert highest_memory_mb() > before + 60  # a second forgetting does not lose it
