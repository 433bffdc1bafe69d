"""Do two methods say the same? Rank correlation and overlap of the top documents, for every pair of methods.

Agreement is not correctness: two methods can be wrong alike. It tells which methods are worth comparing by retraining,
and whether a cheap one can stand for a dear one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rootward.core.errors import InputError
from rootward.core.records import SCHEMA_VERSION, Interval, Model
from rootward.core.scores import Scores, parse_count
from rootward.verification.resampling import Rows, correlate
from rootward.verification.stats import interval
from rootward.verification.subsets import joined

Floats = NDArray[np.float64]
Matrix = list[list[Interval]]


class Agreement(Model):
    """Symmetric matrices ``[method][method]``: means over queries with 95 % t intervals over queries.

    With one query there is no interval (``n`` is 1). ``spearman`` and ``kendall`` (tau-b) are over all documents, 0
    where a method ranks nothing; ``overlap`` is the share of the ``top`` documents that both have, towards the goal.
    ``chance`` is the overlap of a random ranking with any other.
    """

    schema_version: int = SCHEMA_VERSION
    methods: list[str]
    documents: int
    queries: list[str]
    top: int
    chance: float
    spearman: Matrix
    kendall: Matrix
    overlap: Matrix


def agree(scores: Mapping[str, Scores], *, top: int | str = "5%") -> Agreement:
    """Agreement of every pair of methods, query by query.

    Args:
        scores: methods by name, all of the same documents (in any order) and goal; one ranking for all queries stands
            for each of them.
        top: how many documents make the top: a number or a share.

    Raises:
        InputError: fewer than two methods, unlike documents, queries or goals, or a top of no or all documents.
    """
    if len(scores) < 2:
        raise InputError(f"scores: expected at least two methods, got {list(scores)}")
    first = max(scores.values(), key=lambda one: len(one.queries))
    for name, one in scores.items():
        if Counter(one.document_ids) != Counter(first.document_ids):
            raise InputError(f"{name}: its scores are of other documents than those of {first.method}")
        if one.goal != first.goal:
            raise InputError(f"{name}: its goal is {one.goal!r}, that of {first.method} is {first.goal!r}")
    total = len(first.document_ids)
    count = parse_count(top, total)
    if not 0 < count < total:
        raise InputError(f"top: expected 1 to {total - 1} of {total} documents, got {top!r}")
    sign = -1.0 if first.goal == "lower" else 1.0
    # in the order of the ids, so that ties are broken alike whatever order the methods have
    ids = sorted(first.document_ids)
    tables = [sign * joined(one, first.queries, ids) for one in scores.values()]
    return Agreement(
        methods=list(scores),
        documents=total,
        queries=list(first.queries),
        top=count,
        chance=count / total,
        spearman=_matrix(tables, lambda a, b: correlate(Rows(a, "spearman"), Rows(b, "spearman"))),
        kendall=_matrix(tables, _kendall),
        overlap=_matrix(tables, lambda a, b: (_top(a, count) & _top(b, count)).sum(1) / count),
    )


def _matrix(tables: list[Floats], compare: Callable[[Floats, Floats], Floats]) -> Matrix:
    found: dict[tuple[int, int], Interval] = {}
    for i, a in enumerate(tables):
        for j in range(i, len(tables)):
            found[i, j] = found[j, i] = interval(compare(a, tables[j]))
    return [[found[i, j] for j in range(len(tables))] for i in range(len(tables))]


def _kendall(a: Floats, b: Floats) -> Floats:
    values: list[float] = []
    for x, y in zip(a, b, strict=True):
        flat = np.ptp(x) == 0 or np.ptp(y) == 0
        result: Any = None if flat else stats.kendalltau(x, y)
        values.append(0.0 if flat else float(result.statistic))
    return np.array(values)


def _top(table: Floats, count: int) -> NDArray[np.bool_]:
    """Whether each document is among the ``count`` highest of its row; ties keep the columns' order."""
    chosen = np.zeros(table.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(-table, axis=1, kind="stable")[:, :count], True, axis=1)
    return chosen
