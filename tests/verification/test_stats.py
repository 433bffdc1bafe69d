"""Intervals against closed forms, agreement against sklearn and scipy, and what chance gives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import average_precision_score, roc_auc_score

from rootward.core.errors import InputError
from rootward.verification import stats


def test_interval_is_the_t_interval() -> None:
    found = stats.interval([1.0, 2.0, 3.0])
    assert (found.value, found.n) == (2.0, 3)
    assert found.high - 2.0 == pytest.approx(4.302652729911275 / np.sqrt(3))  # t(0.975, 2), spread 1
    low, high = scipy_stats.t.interval(0.95, 4, loc=3, scale=scipy_stats.sem([1, 2, 3, 4, 5]))
    found = stats.interval([1, 2, 3, 4, 5])
    assert (found.low, found.high) == pytest.approx((low, high))


def test_interval_covers_the_truth_in_95_of_100() -> None:
    generator = np.random.default_rng(0)
    found = [stats.interval(generator.normal(2.0, 1.0, 3)) for _ in range(2000)]
    assert np.mean([part.low <= 2.0 <= part.high for part in found]) == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    found = stats.interval([0.4])
    assert (found.low, found.high, found.n) == (0.4, 0.4, 1)
    for wrong in ([], [float("nan")], [[1.0]]):
        with pytest.raises(InputError):
            stats.interval(wrong)  # type: ignore[arg-type]


def test_paired_and_cut() -> None:
    full, after = [0.8, 0.5, 0.4], [0.4, 0.25, 0.2]
    effect = stats.paired_interval(full, after)
    assert effect.value == pytest.approx(-np.mean([0.4, 0.25, 0.2]))
    cut = stats.cut_interval(full, after)
    assert cut is not None
    assert (cut.value, cut.low, cut.high) == pytest.approx((0.5, 0.5, 0.5))
    assert stats.cut_interval([0.8, 0.0], [0.4, 0.0]) is None
    with pytest.raises(InputError, match="as many"):
        stats.paired_interval([1.0], [1.0, 2.0])


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40))
def test_auroc_and_precisions_equal_sklearn_with_ties(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = [float(a) for a, _ in pairs], [b for _, b in pairs]
    if len(set(truth)) < 2:
        with pytest.raises(InputError, match="both kinds"):
            stats.auroc(scores, truth)
        return
    found = stats.auroc(scores, truth, resamples=20)
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    assert 0 <= found.low <= found.high <= 1
    assert stats.average_precision(scores, truth) == pytest.approx(average_precision_score(truth, scores))


def test_auroc_interval_of_gaussians_holds_the_closed_form_and_is_seeded() -> None:
    generator = np.random.default_rng(1)
    truth = np.arange(600) < 200
    scores = generator.normal(size=600) + truth
    found = stats.auroc(scores, truth)
    assert found.low < scipy_stats.norm.cdf(1 / np.sqrt(2)) < found.high  # P(N(1,1) > N(0,1))
    a = found.value  # Hanley and McNeil's standard error
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = np.sqrt((a * (1 - a) + 199 * (q1 - a * a) + 399 * (q2 - a * a)) / (200 * 400))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert stats.auroc(scores, truth) == found


def test_null_controls() -> None:
    generator = np.random.default_rng(2)
    truth = np.arange(500) < 50
    noise = [stats.auroc(generator.normal(size=500), truth, resamples=200) for _ in range(40)]
    assert np.mean([found.value for found in noise]) == pytest.approx(0.5, abs=0.03)
    assert sum(found.low <= 0.5 <= found.high for found in noise) >= 34
    assert stats.auroc(np.zeros(500), truth, resamples=20).value == 0.5
    found = [stats.spearman(generator.normal(size=50), generator.normal(size=50)) for _ in range(100)]
    assert np.mean([value for value in found if value is not None]) == pytest.approx(0, abs=0.05)


def test_precision_at_and_spearman() -> None:
    assert stats.precision_at([4, 3, 2, 1], [True, False, True, False]) == 0.5
    assert stats.precision_at([4, 3, 2, 1], [True, False, True, False], 1) == 1.0
    assert stats.precision_at([0, 0, 0, 0], [True, True, False, False]) == 1.0  # ties: the documents' order
    with pytest.raises(InputError, match="1 to 2"):
        stats.precision_at([1, 0], [True, False], 3)
    assert stats.spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert stats.spearman([1, 1, 1], [1, 2, 3]) is None
