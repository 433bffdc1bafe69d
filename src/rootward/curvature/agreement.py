"""How far scores can be relied on when the curvature behind them was fitted to a sample.

Everything here asks: if the same thing were fitted twice, to two halves of the sample, how would the two sets of scores
correlate over documents? The query is taken to have the same second moments as the documents. For a damped curvature
``C_1`` of one half, ``C_2`` of the other and ``L`` their mean, scores ``q^T C^-1 g`` correlate at

    tr(L C_1^-1 L C_2^-1) / sqrt( tr(L C_1^-1 L C_1^-1) tr(L C_2^-1 L C_2^-1) )

It is 1 where the halves agree. The damping counts: it decides how much of the noise in small eigenvalues is heard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping, damped_power

QUANTILES = 4
"""Groups of the other side's eigenvalues, each with its mean, that a side's agreement is worked out for."""


@dataclass(frozen=True)
class Overlap:
    """The three traces; those of several blocks add up."""

    both: float = 0.0
    first: float = 0.0
    second: float = 0.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.both + other.both, self.first + other.first, self.second + other.second)

    @property
    def correlation(self) -> float:
        """Of the scores from the two halves; 1 where there is no curvature at all."""
        size = self.first * self.second
        return self.both / size**0.5 if size > 0 else 1.0


def of_eigenvalues(layout: ParamLayout, a: Mapping[str, Tensor], b: Mapping[str, Tensor], damping: Damping) -> float:
    """Correlation of scores from two sets of eigenvalues ``[rows, cols]`` in one basis."""
    means = {name: float(((a[name] + b[name]) / 2).double().mean()) for name in layout.names}
    whole = sum(means[name] * layout.sizes[name] for name in layout.names) / layout.size
    total = Overlap()
    for name in layout.names:
        lam = damping.of(means[name], whole)
        size = ((a[name] + b[name]) / 2).double()
        x, y = size * damped_power(a[name], lam, -1), size * damped_power(b[name], lam, -1)
        total += Overlap(float((x * y).sum()), float(x.square().sum()), float(y.square().sum()))
    return total.correlation


def of_side(a: Tensor, b: Tensor, others: Tensor, lam: float) -> Overlap:
    """Overlap of a block whose one side has the covariance ``a`` in one half and ``b`` in the other, ``[d, d]``.

    The other side is the same in both; ``others`` are its eigenvalues, times whatever else the block's eigenvalues have
    (tokens per document). They are put into `QUANTILES` groups of equal number.
    """
    mean = (a + b) / 2
    unit = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    total = Overlap()
    for group in others.clamp_min(0).sort().values.tensor_split(QUANTILES):
        if not len(group) or float(group.max()) <= 0 or not bool(mean.any()):
            continue
        scale = float(group.square().mean().sqrt())
        # without damping, directions within rounding of none at all decide: below its root they are not told apart
        floor = max(lam, torch.finfo(mean.dtype).eps ** 0.5 * scale * float(mean.diagonal().mean()))
        x, y = (_solved(scale * half + floor * unit, scale * mean) for half in (a, b))
        traces = [float((p.T * q).sum()) for p, q in ((x, y), (x, x), (y, y))]
        total += Overlap(*(len(group) * trace for trace in traces))
    return total


def reached(half: float) -> float:
    """Correlation of the scores from the whole sample with those from an endless one, from that of two halves.

    The noise of a half is twice that of the whole: ``half = 1 / (1 + 2 v)`` gives ``v``, the answer is
    ``(1 + v)^-1/2`` (Spearman-Brown's formula, and the root for one noisy side instead of two).
    """
    return (1 + _noise(half)) ** -0.5


def needed(half: float, documents: int, target: float) -> int:
    """Documents with which the target should be reached; the noise falls with their number."""
    noise, allowed = _noise(half), target**-2 - 1
    return documents if noise <= allowed else max(documents + 1, int(documents * min(noise / allowed, 16.0)) + 1)


def combined(first: float, second: float) -> float:
    """What two sources of noise leave together: their variances add up."""
    return (1 + (first**-2 - 1) + (second**-2 - 1)) ** -0.5


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.solve(matrix, right))  # type: ignore[reportUnknownMemberType]


def _noise(half: float) -> float:
    return max(1 / max(half, 1e-6) - 1, 0.0) / 2
