"""Numbers as a person reads them. ``assets/base.js`` holds the same rules for the page."""

from __future__ import annotations

import math

SHARE_UNITS = frozenset({"share", "rate", "fraction", "proportion", "probability"})
"""Units whose values between 0 and 1 are written as per cent."""

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def is_share(unit: str) -> bool:
    """Whether values of this unit are written as per cent: "share", "share of probes", "rate", ..."""
    return unit.strip().lower().split(" ")[0] in SHARE_UNITS


def count(value: int) -> str:
    """1300 -> "1,300"."""
    return f"{value:,}"


def number(value: float) -> str:
    """Three significant digits, without an exponent where a person would not write one."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.3g}"


def quantity(value: float, unit: str) -> str:
    """A measured value with its unit: 0.82 of unit "share" is "82 %"."""
    if is_share(unit):
        percent = 100 * value
        return f"{percent:.0f} %" if abs(percent) >= 10 or percent == round(percent) else f"{percent:.1f} %"
    return f"{number(value)} {unit}".strip()


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def mean_interval(values: list[float]) -> tuple[float, float | None, float | None]:
    """Mean and its 95 % interval by Student's t over the repetitions; no interval where there is one value."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, None, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    half = t * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def significant(value: float | None, digits: int = 5) -> float | None:
    """Rounded to so many significant digits; what is missing or not finite becomes None, which JSON can hold."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
