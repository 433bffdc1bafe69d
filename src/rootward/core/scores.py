"""`Scores`: what each document does to what was asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rootward.core.errors import InputError, NumericalError
from rootward.core.records import Cost, Coverage


@dataclass(frozen=True)
class Scores:
    """``values[q, n]``: **positive = training more on document n raises measurement q**.

    ``document_ids[n]`` are content hashes in the order of the columns; duplicates share an id and have equal scores.
    ``unit`` says what one unit of the score is ("nats per unit of loss weight", "BM25", ...), ``method`` is the
    registered name. Joining two results goes by id (`aligned`);
    ``rows`` are the documents' places in their file, for display.

    ``goal`` says which direction of the measurement is more of the behaviour. It leaves ``values`` as they are and
    decides which end of the ranking is the top: `order`, `top` and `bottom` go from the documents that cause the
    behaviour the most (with the goal "lower", as for a loss, those with the most negative scores) to those that
    oppose it.
    """

    values: NDArray[np.float32]
    queries: tuple[str, ...]
    document_ids: tuple[str, ...]
    method: str
    unit: str
    behaviour: str = ""
    cost: Cost = field(default_factory=lambda: Cost(seconds=0.0))
    coverage: Coverage | None = None
    rows: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    goal: Literal["raise", "lower"] = "raise"

    def __post_init__(self) -> None:
        expected = (len(self.queries), len(self.document_ids))
        if self.values.shape != expected or 0 in expected:
            raise InputError(f"Scores: expected values of shape [q, n] = {expected}, got {self.values.shape}")
        if self.goal not in ("raise", "lower"):
            raise InputError(f"Scores: expected the goal 'raise' or 'lower', got {self.goal!r}")
        if self.rows and len(self.rows) != len(self.document_ids):
            raise InputError(f"Scores: expected one row per document ({len(self.document_ids)}), got {len(self.rows)}")
        if not np.isfinite(self.values).all():
            q, n = np.argwhere(~np.isfinite(self.values))[0]
            raise NumericalError(
                f"{self.method}: the score of document {self.document_ids[n]} for query {self.queries[q]!r} is not "
                "finite; look at that document's loss"
            )

    @property
    def mean(self) -> NDArray[np.float32]:
        """Mean over queries, ``[n]``."""
        return self.values.mean(0)

    @property
    def toward(self) -> NDArray[np.float32]:
        """Mean over queries towards the goal, ``[n]``: positive = training more on the document makes *more* of it."""
        return -self.mean if self.goal == "lower" else self.mean

    def order(self) -> NDArray[np.int64]:
        """Columns from the document that causes the behaviour the most to the one that opposes it the most.

        By mean score: descending, and ascending where the goal is "lower". Ties keep the documents' order.
        """
        return np.argsort(-self.toward, kind="stable")

    def top(self, count: int | str) -> tuple[str, ...]:
        """Ids of the ``count`` documents that cause the behaviour most: a number, or a share such as ``"5%"``.

        These raise the measurement most or, where the goal is "lower", lower it most. Copies of a document are
        listed as often as they occur among them.
        """
        return self._ids(self.order()[: self._count(count)])

    def bottom(self, count: int | str) -> tuple[str, ...]:
        """Ids of the ``count`` documents that oppose the behaviour most, the strongest first."""
        return self._ids(self.order()[::-1][: self._count(count)])

    def _ids(self, columns: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(self.document_ids[int(n)] for n in columns)

    def _count(self, count: int | str) -> int:
        total = len(self.document_ids)
        number = parse_count(count, total)
        if not 0 < number < total:
            raise InputError(f"expected between 1 and {total - 1} of {total} documents, got {count!r}")
        return number

    def aligned(self, document_ids: Sequence[str]) -> NDArray[np.float32]:
        """``values`` with columns for ``document_ids`` in that order, joined by id."""
        column = {name: n for n, name in reversed(list(enumerate(self.document_ids)))}
        missing = [name for name in document_ids if name not in column]
        if missing:
            raise InputError(f"{self.method}: no score for {len(missing)} documents, first {missing[0]}")
        return self.values[:, [column[name] for name in document_ids]]


def parse_count(count: int | str, total: int) -> int:
    """A number of documents, or a share of ``total`` written as ``"5%"`` (rounded to the nearest whole)."""
    if isinstance(count, int | np.integer) and not isinstance(count, bool):
        return int(count)
    text = str(count).strip()
    try:
        return round(float(text[:-1]) / 100 * total) if text.endswith("%") else int(text)
    except (ValueError, OverflowError) as error:
        raise InputError(f"expected a number of documents or a share such as '5%', got {count!r}") from error
