"""A measured figure, with its interval and the bar that it has to clear."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """``bar`` is "", "<= x" or ">= x"; ``holds`` is None where there is no bar. The value itself is held against it."""

    value: float
    low: float
    high: float
    n: int
    bar: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the value clears the bar."""
        if not self.bar:
            return None
        sign, number = self.bar.split()
        return self.value <= float(number) if sign == "<=" else self.value >= float(number)

    def document(self) -> dict[str, object]:
        """As it is printed."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "bar": self.bar,
            "holds": self.holds,
        }


def median(values: Sequence[float], bar: str = "") -> Figure:
    """Median with the range of the repetitions."""
    return Figure(statistics.median(values), min(values), max(values), len(values), bar)


def single(value: float, bar: str = "") -> Figure:
    """One measurement without repetition."""
    return Figure(value, value, value, 1, bar)
