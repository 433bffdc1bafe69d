"""The largest eigenpairs of a curvature and one number for all the rest, per parameter or over the whole layout.

    G  ~  r I + V^T diag(s - r) V        V [k, p] orthonormal rows, s [k] eigenvalues, r the mean of the others

Since the rest is a multiple of the identity, every power is exact for the matrix as it is kept:

    (G + lam)^power x  =  (r + lam)^power x + V^T ((s + lam)^power - (r + lam)^power) V x

``r`` keeps the trace (and so the mean eigenvalue that a damping is relative to). Curvatures of different documents are
merged without going back to the gradients.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping, Gradients, check_gradients, check_power, damped_power
from rootward.curvature.dense import as_named, as_rows, negligible
from rootward.curvature.kronecker import JITTERED, eigenbasis
from rootward.curvature.solvers import Eigenpairs


@dataclass(frozen=True)
class LowRankBlock:
    """``values[k]`` falling, ``vectors[k, p]`` orthonormal rows over ``layout``, ``rest`` in all other directions.

    ``notes`` are what happened when it was made.
    """

    layout: ParamLayout
    values: Tensor
    vectors: Tensor
    rest: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = (len(self.values), self.layout.size)
        if tuple(self.vectors.shape) != expected:
            raise LayoutMismatch(f"low rank: expected vectors {expected}, got {tuple(self.vectors.shape)}")
        if not self.rest >= 0 or not bool((self.values >= self.rest).all()):
            lowest = float(self.values.min()) if len(self.values) else 0.0
            raise NumericalError(
                f"low rank: expected 0 <= rest <= every eigenvalue, got rest {self.rest:.4g} and lowest {lowest:.4g}; "
                "take fewer eigenpairs, or the Gauss-Newton matrix instead of a Hessian"
            )

    @cached_property
    def mean(self) -> float:
        """Mean of all p eigenvalues."""
        others = self.layout.size - len(self.values)
        return (float(self.values.sum()) + self.rest * others) / self.layout.size


@dataclass(frozen=True)
class LowRankCurvature:
    """Blocks whose layouts together are the layout; ``documents`` is what the mean is over, the weight in a merge."""

    layout: ParamLayout
    blocks: tuple[LowRankBlock, ...]
    documents: int
    damping: Damping = field(default_factory=Damping)

    def __post_init__(self) -> None:
        names = [name for block in self.blocks for name in block.layout.names]
        if sorted(names) != sorted(self.layout.names):
            raise LayoutMismatch(
                f"low rank: expected blocks of {len(self.layout.names)} parameters, each once, got {len(names)}"
            )
        if self.documents < 1:
            raise InputError(f"low rank: expected at least 1 document, got {self.documents}")

    @classmethod
    def of_rows(
        cls,
        layout: ParamLayout,
        rows: Tensor,
        rank: int,
        *,
        documents: int | None = None,
        by: Literal["parameter", "whole"] = "parameter",
        damping: Damping | None = None,
    ) -> LowRankCurvature:
        """From gradients ``[m, P]`` with ``G = rows^T rows / documents``; ``documents`` is m if not given.

        Raises:
            LayoutMismatch: rows of another width. InputError: no rows, or a rank below 1. NumericalError: not finite.
        """
        if rows.dim() != 2 or rows.shape[1] != layout.size:
            raise LayoutMismatch(f"low rank: expected rows [m, {layout.size}], got {tuple(rows.shape)}")
        count = len(rows) if documents is None else documents
        if len(rows) == 0 or count < 1 or rank < 1:
            raise InputError(f"low rank: expected rows, documents and a rank, got {len(rows)}, {count} and {rank}")
        parts = [layout] if by == "whole" else [ParamLayout((n,), (layout.shape(n),)) for n in layout.names]
        wide = rows.double() / count**0.5
        columns = [wide if by == "whole" else wide[:, layout.slices[part.names[0]]] for part in parts]
        blocks = [_block(part, factor, rank, 0.0) for part, factor in zip(parts, columns, strict=True)]
        return cls(layout, tuple(blocks), count, damping or Damping())

    @classmethod
    def of_eigenpairs(
        cls,
        layout: ParamLayout,
        pairs: Eigenpairs,
        *,
        documents: int,
        mean: float | None = None,
        damping: Damping | None = None,
    ) -> LowRankCurvature:
        """From Krylov eigenpairs of the whole matrix; ``mean``: its mean eigenvalue, if known, else the rest is 0."""
        values, others = pairs.values.to(pairs.vectors.device).double(), layout.size - len(pairs.values)
        values = torch.where(values.abs() <= negligible(values, layout.size), 0.0, values)
        left = 0.0 if mean is None else mean * layout.size - float(values.sum())
        rest = max(left, 0.0) / others if others else 0.0
        block = LowRankBlock(layout, values, pairs.vectors.double(), rest, pairs.notes)
        return cls(layout, (block,), documents, damping or Damping())

    @property
    def kind(self) -> str:
        """Always "low_rank"."""
        return "low_rank"

    @cached_property
    def mean(self) -> float:
        """Mean eigenvalue over all parameters."""
        return sum(block.mean * block.layout.size for block in self.blocks) / self.layout.size

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened when the blocks were made, and in how many of them."""
        said = Counter(note for block in self.blocks for note in block.notes)
        return tuple(f"{count} of {len(self.blocks)} blocks: {note}" for note, count in said.items())

    def damped(self, damping: Damping) -> LowRankCurvature:
        """The same with another damping."""
        return replace(self, damping=damping)

    def lam(self, block: LowRankBlock, damping: Damping | None = None) -> float:
        """What is added to every eigenvalue of a block."""
        return (damping or self.damping).of(block.mean, self.mean)

    def apply(self, gradients: Gradients, power: float = -1.0, damping: Damping | None = None) -> dict[str, Tensor]:
        """``(G + lam I)^power x`` for every query, in float64 inside; errors as `check_gradients`."""
        check_gradients(self.layout, gradients, "low rank")
        check_power(power)
        result: dict[str, Tensor] = {}
        for block in self.blocks:
            lam = self.lam(block, damping)
            x = as_rows(block.layout, gradients).to(block.vectors.device)
            rest = damped_power(torch.tensor(block.rest, dtype=torch.float64), lam, power).to(x)
            scales = damped_power(block.values, lam, power) - rest
            found = rest * x + (x @ block.vectors.T * scales) @ block.vectors
            result |= as_named(block.layout, found, gradients)
        return {name: result[name] for name in self.layout.names}

    def merge(self, other: LowRankCurvature, rank: int) -> LowRankCurvature:
        """The mean over both sets of documents, each weighted by their number, with at most ``rank`` pairs a block.

        Exact where ``rank`` is at least the sum of both ranks; else the pairs left out are spread over the rest.
        """
        self.layout.require(other.layout, "merge")
        if [b.layout for b in self.blocks] != [b.layout for b in other.blocks]:
            raise LayoutMismatch("merge: expected the same blocks (by parameter, or whole) in both curvatures")
        if rank < 1:
            raise InputError(f"merge: expected a rank of at least 1, got {rank}")
        total = self.documents + other.documents
        shares = self.documents / total, other.documents / total
        blocks: list[LowRankBlock] = []
        for mine, theirs in zip(self.blocks, other.blocks, strict=True):
            pair = list(zip((mine, theirs), shares, strict=True))
            factor = torch.cat([(w * (b.values - b.rest)).sqrt().unsqueeze(1) * b.vectors for b, w in pair])
            found = _block(mine.layout, factor, rank, sum(w * b.rest for b, w in pair))
            said = tuple(dict.fromkeys((*mine.notes, *theirs.notes, *found.notes)))
            blocks.append(replace(found, notes=said))
        return LowRankCurvature(self.layout, tuple(blocks), total, self.damping)


def _block(layout: ParamLayout, factor: Tensor, rank: int, rest: float) -> LowRankBlock:
    """Top pairs of ``rest I + factor^T factor`` for ``factor[m, p]``; what they leave out is added to the rest.

    The leading directions come from the Gram matrix. They are made orthonormal and the matrix is decomposed once more
    within them, so that small eigenvalues do not suffer from the square root of the machine's precision.
    """
    trace = float(factor.square().sum())
    values, vectors, first = eigenbasis(factor @ factor.T)
    keep = min(rank, len(values), layout.size)
    values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
    vectors = vectors[:, values > negligible(values, len(factor))]
    if vectors.shape[1] == 0:
        empty, rest = factor.new_zeros(0, layout.size), rest + trace / layout.size
        return LowRankBlock(layout, factor.new_zeros(0), empty, rest, (JITTERED,) if first else ())
    basis: Tensor = cast(Any, torch.linalg).qr(factor.T @ vectors)[0]
    values, turned, second = eigenbasis(basis.T @ (factor.T @ (factor @ basis)))
    values, rows = values.flip(0).clamp_min(0), (basis @ turned.flip(1)).T
    others = layout.size - len(values)
    spread = max(trace - float(values.sum()), 0.0) / others if others else 0.0
    # what is left of the trace by rounding alone is nothing, and rounding makes no rest larger than what was kept
    spread = 0.0 if spread <= negligible(values, len(factor)) else min(spread, float(values[-1]))
    return LowRankBlock(layout, values + rest, rows, rest + spread, (JITTERED,) if first or second else ())
