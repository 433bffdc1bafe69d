"""Curvature of projected gradients: the second moment of rows ``[n, width]``, as a whole or in blocks of columns.

Each block is decomposed in float64 in the cheaper of two ways: from its matrix where there are more rows than columns
(`DenseCurvature`), else from the products of rows with one another (`GramCurvature`), which gives the same. It acts on
rows, not on gradients by name: a projected row has no shape but its width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import DEFAULT, Damping
from rootward.curvature.dense import LARGEST, DenseCurvature
from rootward.curvature.gram import GramCurvature

NAME = "rows"


@dataclass(frozen=True)
class ProjectedCurvature:
    """Blocks of columns ``start:stop`` that cover ``width`` columns, each a curvature of its own."""

    width: int
    blocks: tuple[tuple[slice, DenseCurvature | GramCurvature], ...]
    damping: Damping = DEFAULT

    @classmethod
    def of(
        cls, rows: Tensor, parts: Sequence[slice] | None = None, damping: Damping | None = None
    ) -> ProjectedCurvature:
        """``R^T R / n`` of rows ``[n, width]``; ``parts`` are its diagonal blocks, one for all columns by default.

        Raises:
            LayoutMismatch: not a matrix, or parts that do not cover its columns one after another.
            InputError: no rows, or a block in which both rows and columns are more than `LARGEST`.
            NumericalError: a row is not finite.
        """
        if rows.dim() != 2 or not rows.shape[1]:
            raise LayoutMismatch(f"projected curvature: expected rows [n, width], got {tuple(rows.shape)}")
        count, width = rows.shape
        if not count:
            raise InputError("projected curvature: expected at least one row, got none")
        bad = (~torch.isfinite(rows).all(1)).nonzero().flatten()
        if len(bad):
            raise NumericalError(f"projected curvature: row {int(bad[0])} is not finite ({len(bad)} rows in all)")
        parts = [slice(0, width)] if parts is None else list(parts)
        ends = [0, *(part.stop for part in parts)]
        if [part.start for part in parts] != ends[:-1] or ends[-1] != width:
            raise LayoutMismatch(f"projected curvature: expected parts that cover {width} columns in order")
        smaller = max(min(count, part.stop - part.start) for part in parts)
        if smaller > LARGEST:
            raise InputError(
                f"projected curvature: expected at most {LARGEST} rows or columns in a block, got {smaller} of both; "
                "project to fewer dimensions"
            )
        return cls(width, tuple((part, _block(rows[:, part])) for part in parts), damping or DEFAULT)

    @cached_property
    def mean(self) -> float:
        """Mean eigenvalue over all columns."""
        return sum(block.mean * (part.stop - part.start) for part, block in self.blocks) / self.width

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Those that are not 0 by rounding, of all blocks, the largest first."""
        found = torch.cat([block.eigenvalues for _, block in self.blocks])
        return found[found > 0].sort(descending=True).values

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened when the blocks were decomposed, and in how many of them."""
        said = Counter(note for _, block in self.blocks for note in block.notes)
        return tuple(f"{count} of {len(self.blocks)} blocks: {note}" for note, count in said.items())

    def damped(self, damping: Damping) -> ProjectedCurvature:
        """The same with another damping."""
        return replace(self, damping=damping)

    def apply(self, rows: Tensor, power: float = -1.0, damping: Damping | None = None) -> Tensor:
        """``(G + lam I)^power x`` for every row ``[q, width]``, in its dtype; undamped it is the pseudo-inverse.

        Raises:
            LayoutMismatch: rows of another width. InputError: another power than -1, -1/2, 1/2.
            NumericalError: a row is not finite.
        """
        if rows.dim() != 2 or rows.shape[1] != self.width:
            raise LayoutMismatch(f"projected curvature: expected rows [q, {self.width}], got {tuple(rows.shape)}")
        damping = damping or self.damping
        result = torch.empty_like(rows)
        for part, block in self.blocks:
            lam = damping.of(block.mean, self.mean)
            result[:, part] = block.apply({NAME: rows[:, part]}, power, Damping(0.0, lam))[NAME]
        return result


def _block(rows: Tensor) -> DenseCurvature | GramCurvature:
    count, width = rows.shape
    layout = ParamLayout((NAME,), ((width,),))
    if count < width:
        return GramCurvature.of(layout, rows)
    wide = rows.double()
    return DenseCurvature.of(layout, wide.T @ wide / count, "empirical")
