"""Correlation of rows ``[q, s]`` with bootstrap intervals: what LDS and leave-one-out are made of.

The bootstrap draws items (subsets of documents, or documents) and queries with replacement, both in the same
resample. Drawing an item w times is the same as weighing it w, so the ranks of a resample follow from the order of the
whole sample and the cumulated weights, without sorting again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rootward.core.records import Interval
from rootward.verification.stats import LEVEL

Kind = Literal["spearman", "pearson"]
Floats = NDArray[np.float64]
RESAMPLES = 1000
_FLAT = 1e-13
"""A spread of values below this share of their size is rounding: the row ranks nothing."""


class Rows:
    """Rows ``[q, s]`` whose ranks (or values) can be had under any weights of the items."""

    def __init__(self, values: NDArray[Any], kind: Kind) -> None:
        self.values, self.kind = np.asarray(values, dtype=np.float64), kind
        spread, size = np.ptp(self.values, axis=1), np.abs(self.values).max(axis=1)
        self.flat: NDArray[np.bool_] = spread <= _FLAT * size
        if kind == "spearman":
            self._order = np.argsort(self.values, axis=1, kind="stable")
            self._first, self._last = _tie_groups(self.values, self._order)

    def at(self, weights: NDArray[np.int64]) -> Floats:
        """Values, or mid-ranks among the items as often as ``weights`` says, ``[q, s]``."""
        if self.kind == "pearson":
            return self.values
        ends = np.zeros((len(self.values), len(weights) + 1))
        np.cumsum(weights[self._order], axis=1, out=ends[:, 1:])
        before, through = (np.take_along_axis(ends, places, 1) for places in (self._first, self._last))
        return (before + through + 1) / 2


def _tie_groups(values: Floats, order: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every item, the sorted place at which its group of equal values begins, and the one after its end."""
    ordered = np.take_along_axis(values, order, 1)
    places = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    change = ordered[:, 1:] != ordered[:, :-1]
    edge = np.ones((len(values), 1), dtype=bool)
    begins = np.maximum.accumulate(np.where(np.hstack([edge, change]), places, 0), axis=1)
    stops = np.where(np.hstack([change, edge]), places + 1, values.shape[1])
    stops = np.minimum.accumulate(stops[:, ::-1], axis=1)[:, ::-1]
    first, last = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(first, order, begins, 1)
    np.put_along_axis(last, order, stops, 1)
    return first, last


def correlate(a: Rows, b: Rows, weights: NDArray[np.int64] | None = None) -> Floats:
    """Correlation of each row of ``a`` with that of ``b``, ``[q]``; 0 where one of them ranks nothing."""
    weight = np.ones(a.values.shape[1], dtype=np.int64) if weights is None else weights
    x, y = a.at(weight), b.at(weight)
    share = weight / weight.sum()
    size_x, size_y = np.abs(x).max(1), np.abs(y).max(1)
    x, y = x - (x @ share)[:, None], y - (y @ share)[:, None]
    sx, sy = np.sqrt(np.square(x) @ share), np.sqrt(np.square(y) @ share)
    flat = a.flat | b.flat | (sx <= _FLAT * size_x) | (sy <= _FLAT * size_y)
    found = np.where(flat, 0.0, ((x * y) @ share) / np.where(flat, 1.0, sx * sy))
    return np.clip(found, -1.0, 1.0)


def draws(items: int, queries: int, resamples: int, seed: int) -> Iterator[tuple[NDArray[np.int64], Floats]]:
    """For each resample: how often each item is drawn ``[s]``, and each query's share of the mean ``[q]``."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        weights = np.bincount(generator.integers(items, size=items), minlength=items)
        chosen = np.bincount(generator.integers(queries, size=queries), minlength=queries)
        yield weights, chosen / queries


def resampled(a: Rows, b: Rows, resamples: int, seed: int) -> Floats:
    """Mean correlation over queries in each resample, ``[resamples]``; the same seed gives the same resamples."""
    queries, items = a.values.shape
    return np.array([share @ correlate(a, b, weights) for weights, share in draws(items, queries, resamples, seed)])


def percentiles(value: float, drawn: NDArray[Any] | list[float], n: int) -> Interval:
    """``value`` with the percentile interval of what was drawn."""
    low, high = np.quantile(np.asarray(drawn, dtype=np.float64), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=value, low=float(low), high=float(high), n=n)
