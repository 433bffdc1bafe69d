"""Intervals and agreement with a known truth. The maths is scipy's and sklearn's; here is what they are applied to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rootward.core.errors import InputError
from rootward.core.records import Interval

LEVEL = 0.95


def interval(values: Sequence[float] | NDArray[Any]) -> Interval:
    """Mean and 95 % t interval over repetitions.

    One value has no spread: ``low = high = value`` and ``n = 1``, and callers say "no interval". Raises `InputError`
    for no value or one that is not finite.
    """
    found = _numbers(values, "values")
    mean = float(found.mean())
    if len(found) == 1:
        return Interval(value=mean, low=mean, high=mean, n=1)
    half = float(stats.t.ppf(0.5 + LEVEL / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return Interval(value=mean, low=mean - half, high=mean + half, n=len(found))


def paired_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """95 % t interval of ``b - a``, paired by place (the same seed at the same place)."""
    first, second = _pair(a, b, "a", "b")
    return interval(second - first)


def cut_interval(full: Sequence[float], removed: Sequence[float]) -> Interval | None:
    """Share of the full set's value that went away: 95 % t interval of ``(full - removed) / full`` per seed.

    None where the full set's value is not above 0 for every seed: there is nothing to cut a share of.
    """
    before, after = _pair(full, removed, "full", "removed")
    return interval((before - after) / before) if bool((before > 0).all()) else None


def auroc(scores: ArrayLike, positive: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Chance that a positive document has a higher score than another one (ties count half).

    The 95 % interval is the percentile bootstrap over documents, positives and others resampled apart. ``n`` is the
    number of documents. Raises `InputError` without a document of either kind.
    """
    values, truth = _labelled(scores, positive)
    group = np.unique(values, return_inverse=True)[1]
    groups, ups, downs = int(group.max()) + 1, int(truth.sum()), int((~truth).sum())

    def area(up: NDArray[Any], down: NDArray[Any]) -> float:
        high, low = np.bincount(up, minlength=groups), np.bincount(down, minlength=groups)
        return float(high @ (np.cumsum(low) - 0.5 * low) / (ups * downs))

    up, down = group[truth], group[~truth]
    generator = np.random.default_rng(seed)
    drawn = [
        area(up[generator.integers(ups, size=ups)], down[generator.integers(downs, size=downs)])
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=area(up, down), low=float(low), high=float(high), n=len(values))


def average_precision(scores: ArrayLike, positive: ArrayLike) -> float:
    """Mean of the precision at each positive document, from the highest score down; chance is their share."""
    from sklearn.metrics import average_precision_score  # half a second that few callers need

    values, truth = _labelled(scores, positive)
    return float(average_precision_score(truth, values))


def precision_at(scores: ArrayLike, positive: ArrayLike, count: int | None = None) -> float:
    """Share of positives among the ``count`` highest scores (default: as many as there are positives).

    Ties keep the documents' order, as `Scores.top` does.
    """
    values, truth = _labelled(scores, positive)
    chosen = int(truth.sum()) if count is None else count
    if not 1 <= chosen <= len(values):
        raise InputError(f"count: expected 1 to {len(values)} documents, got {count}")
    return float(truth[np.argsort(-values, kind="stable")[:chosen]].mean())


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Rank correlation, -1 to 1; None where one side is constant and ranks nothing."""
    first, second = _pair(a, b, "a", "b")
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    result: Any = stats.spearmanr(first, second)
    return float(result.statistic)


def _numbers(values: ArrayLike, name: str) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise InputError(f"{name}: expected a list of at least one number, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise InputError(f"{name}: expected finite numbers, got {found[~np.isfinite(found)][0]}")
    return found


def _pair(a: ArrayLike, b: ArrayLike, name: str, other: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _numbers(a, name), _numbers(b, other)
    if len(first) != len(second):
        raise InputError(f"expected as many {name} as {other}, got {len(first)} and {len(second)}")
    return first, second


def _labelled(scores: ArrayLike, positive: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, truth = _numbers(scores, "scores"), np.asarray(positive, dtype=bool)
    if truth.shape != values.shape:
        raise InputError(f"positive: expected one flag per score, got {truth.shape} for {values.shape}")
    if truth.all() or not truth.any():
        raise InputError(f"positive: expected documents of both kinds, got {int(truth.sum())} of {len(truth)} positive")
    return values, truth
