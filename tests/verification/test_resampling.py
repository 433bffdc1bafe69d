"""Correlations under resampling: the same as sorting every resample again."""

import numpy as np
import pytest
from scipy import stats

from rootward.verification.resampling import Kind, Rows, correlate, draws, percentiles, resampled

NAIVE = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_every_resample_has_the_correlation_of_its_repeated_items(kind: Kind) -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(0, 6, size=(4, 12)).astype(float)  # with ties
    b = a + 2 * generator.normal(size=(4, 12))
    drawn = resampled(Rows(a, kind), Rows(b, kind), 20, seed=3)
    for value, (weights, share) in zip(drawn, draws(12, 4, 20, 3), strict=True):
        items = np.repeat(np.arange(12), weights)
        each = [NAIVE[kind](a[q, items], b[q, items]).statistic for q in range(4)]
        assert weights.sum() == 12
        assert share.sum() == pytest.approx(1)
        assert value == pytest.approx(share @ np.array(each), abs=1e-12)
    each = [NAIVE[kind](x, y).statistic for x, y in zip(a, b, strict=True)]
    assert correlate(Rows(a, kind), Rows(b, kind)) == pytest.approx(each, abs=1e-12)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_a_row_without_differences_ranks_nothing(kind: Kind) -> None:
    values = np.array([[1.0, 2.0, 3.0], [0.1, 0.1, 0.1 + 1e-17], [0.0, 0.0, 0.0]])
    other = np.array([[3.0, 2.0, 1.0]] * 3)
    rows = Rows(values, kind)
    assert rows.flat.tolist() == [False, True, True]
    assert correlate(rows, Rows(other, kind)).tolist() == pytest.approx([-1, 0, 0])
    alone = np.array([3, 0, 0])  # a resample of one item three times
    assert correlate(rows, Rows(other, kind), alone).tolist() == [0, 0, 0]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, inside = np.random.default_rng(0), 0
    true = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman of a bivariate normal with correlation 0.6
    for trial in range(60):
        a = generator.normal(size=(1, 80))
        b = 0.6 * a + 0.8 * generator.normal(size=(1, 80))
        x, y = Rows(a, "spearman"), Rows(b, "spearman")
        found = percentiles(float(correlate(x, y)[0]), resampled(x, y, 200, trial), 80)
        inside += found.low <= true <= found.high
    assert 51 <= inside <= 60  # 57 expected
