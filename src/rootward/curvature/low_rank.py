"""The largest eigenpairs of a curvature and a rest, per parameter or over the whole layout.

    G  ~  diag(d) + V^T diag(s) V        V [k, p] orthonormal rows, s [k] what they add to the rest d

The rest is one number or a number for each entry. As one number r it is the mean of the eigenvalues that were left out,
``r + s`` are those that were kept, and every power is exact for the matrix as it is kept:

    (G + lam)^power x  =  (r + lam)^power x + V^T ((r + s + lam)^power - (r + lam)^power) V x

A vector is the diagonal of what the eigenpairs leave out, so that the whole diagonal of G is right. The inverse is
exact then too, by Woodbury's identity with ``E = diag(d) + lam`` and ``F = diag(s)^1/2 V E^-1/2 [k, p]``:

    (G + lam)^-1 x  =  E^-1/2 (I - F^T (I + F F^T)^-1 F) E^-1/2 x

Its roots have no such form and are refused. Both kinds of rest keep the trace (and so the mean eigenvalue that a
damping is relative to). Curvatures of different documents are merged without going back to the gradients.
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
from rootward.curvature.gram import require_small
from rootward.curvature.kronecker import JITTERED, eigenbasis
from rootward.curvature.solvers import Eigenpairs


@dataclass(frozen=True)
class LowRankBlock:
    """``values[k]`` falling, ``vectors[k, p]`` orthonormal rows over ``layout``, and what they are added to.

    ``rest`` is a multiple of the identity, or a diagonal ``[p]``; neither it nor the values are below 0. ``notes`` are
    what happened when it was made.
    """

    layout: ParamLayout
    values: Tensor
    vectors: Tensor
    rest: float | Tensor
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = (len(self.values), self.layout.size)
        if tuple(self.vectors.shape) != expected:
            raise LayoutMismatch(f"low rank: expected vectors {expected}, got {tuple(self.vectors.shape)}")
        if isinstance(self.rest, Tensor) and tuple(self.rest.shape) != (self.layout.size,):
            raise LayoutMismatch(f"low rank: expected a rest [{self.layout.size}], got {tuple(self.rest.shape)}")
        if not bool((self.diagonal >= 0).all()) or not bool((self.values >= 0).all()):
            rest, lowest = float(self.diagonal.min()), float(self.values.min()) if len(self.values) else 0.0
            raise NumericalError(
                f"low rank: expected 0 <= rest <= every eigenvalue, got a rest of {rest:.4g} and an eigenvalue of "
                f"{lowest:.4g} more; take fewer eigenpairs, or the Gauss-Newton matrix instead of a Hessian"
            )

    @property
    def diagonal(self) -> Tensor:
        """The rest as ``[p]``."""
        if isinstance(self.rest, Tensor):
            return self.rest
        return self.vectors.new_full((self.layout.size,), self.rest)

    @cached_property
    def mean(self) -> float:
        """Mean of all p eigenvalues."""
        return (float(self.values.sum()) + float(self.diagonal.sum())) / self.layout.size

    def apply(self, x: Tensor, power: float, lam: float) -> Tensor:
        """``(G + lam I)^power x`` for every row of ``x[q, p]``; errors as `LowRankCurvature.apply`."""
        if isinstance(self.rest, Tensor):
            return self._inverse(self.rest, x, power, lam)
        rest = damped_power(torch.tensor(self.rest, dtype=torch.float64), lam, power).to(x)
        scales = damped_power(self.values + self.rest, lam, power) - rest
        return rest * x + (x @ self.vectors.T * scales) @ self.vectors

    def _inverse(self, rest: Tensor, x: Tensor, power: float, lam: float) -> Tensor:
        if power != -1.0:
            raise InputError(
                f"low rank: power {power} of a diagonal and eigenpairs has no closed form; use power -1, or a rest "
                "that is one number (rest = 'mean')"
            )
        half = damped_power(rest, lam, -0.5)
        factor = self.values.sqrt().unsqueeze(1) * self.vectors
        # where nothing is on the diagonal and the pairs have nothing either, G is 0 and so is its pseudo-inverse
        bare = factor.square().sum(0)[half == 0]
        if bool((bare > negligible(self.values, self.layout.size)).any()):
            raise InputError(
                f"low rank: the diagonal rest is 0 in {len(bare)} of {self.layout.size} entries in which the "
                "eigenpairs are not: expected a damping above 0, or fewer eigenpairs"
            )
        factor = factor * half
        inner = factor @ factor.T + torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inside = x * half
        solved: Tensor = cast(Any, torch.linalg).solve(inner, factor @ inside.T)
        return (inside - solved.T @ factor) * half


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
        rest: Literal["mean", "diagonal"] = "mean",
        damping: Damping | None = None,
    ) -> LowRankCurvature:
        """From gradients ``[m, P]`` with ``G = rows^T rows / documents``; ``documents`` is m if not given.

        What ``rank`` eigenpairs of a block leave out is kept as its mean, or as its diagonal
        ``diag(G) - diag(V^T diag(s) V)``.

        Raises:
            LayoutMismatch: rows of another width. InputError: no rows, a rank below 1, or a block with more than
                `LARGEST` rows and entries. NumericalError: not finite.
        """
        if rows.dim() != 2 or rows.shape[1] != layout.size:
            raise LayoutMismatch(f"low rank: expected rows [m, {layout.size}], got {tuple(rows.shape)}")
        count = len(rows) if documents is None else documents
        if len(rows) == 0 or count < 1 or rank < 1:
            raise InputError(f"low rank: expected rows, documents and a rank, got {len(rows)}, {count} and {rank}")
        parts = [layout] if by == "whole" else [ParamLayout((n,), (layout.shape(n),)) for n in layout.names]
        require_small("low rank", len(rows), max(part.size for part in parts))
        wide = rows.double() / count**0.5
        columns = [wide if by == "whole" else wide[:, layout.slices[part.names[0]]] for part in parts]
        blocks = [
            _block(part, factor, rank, 0.0 if rest == "mean" else factor.new_zeros(part.size))
            for part, factor in zip(parts, columns, strict=True)
        ]
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
        block = LowRankBlock(layout, values - rest, pairs.vectors.double(), rest, pairs.notes)
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
        """``(G + lam I)^power x`` for every query, in float64 inside; undamped it is the pseudo-inverse.

        Raises:
            LayoutMismatch, NumericalError: see `check_gradients`. InputError: where the rest is a diagonal, a power
                other than -1, or no damping while the diagonal is 0 somewhere.
        """
        check_gradients(self.layout, gradients, "low rank")
        check_power(power)
        result: dict[str, Tensor] = {}
        for block in self.blocks:
            x = as_rows(block.layout, gradients).to(block.vectors.device)
            result |= as_named(block.layout, block.apply(x, power, self.lam(block, damping)), gradients)
        return {name: result[name] for name in self.layout.names}

    def merge(self, other: LowRankCurvature, rank: int) -> LowRankCurvature:
        """The mean over both sets of documents, each weighted by their number, with at most ``rank`` pairs a block.

        Exact where ``rank`` is at least the sum of both ranks; else what the pairs left out had goes to the rest. That
        is a diagonal where one of the two has one.
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
            factor = torch.cat([(w * b.values).sqrt().unsqueeze(1) * b.vectors for b, w in pair])
            rest = shares[0] * mine.rest + shares[1] * theirs.rest
            found = _block(mine.layout, factor, rank, rest)
            said = tuple(dict.fromkeys((*mine.notes, *theirs.notes, *found.notes)))
            blocks.append(replace(found, notes=said))
        return LowRankCurvature(self.layout, tuple(blocks), total, self.damping)


def _block(layout: ParamLayout, factor: Tensor, rank: int, rest: float | Tensor) -> LowRankBlock:
    """Top pairs of ``rest + factor^T factor`` for ``factor[m, p]``; what they leave out is added to the rest.

    With more rows than entries the matrix itself is decomposed. Else the leading directions come from the Gram matrix;
    they are made orthonormal and the matrix is decomposed once more within them, so that small eigenvalues do not
    suffer from the square root of the machine's precision.
    """
    if len(factor) > layout.size:
        values, vectors, jittered = eigenbasis(factor.T @ factor)
        kept = slice(layout.size - min(rank, int((values > negligible(values, layout.size)).sum())), None)
        return _with_rest(layout, factor, values[kept].flip(0), vectors[:, kept].flip(1).T, rest, jittered)
    values, vectors, first = eigenbasis(factor @ factor.T)
    keep = min(rank, len(values), layout.size)
    values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
    vectors = vectors[:, values > negligible(values, len(factor))]
    values, rows, second = factor.new_zeros(0), factor.new_zeros(0, layout.size), False
    if vectors.shape[1]:
        basis: Tensor = cast(Any, torch.linalg).qr(factor.T @ vectors)[0]
        values, turned, second = eigenbasis(basis.T @ (factor.T @ (factor @ basis)))
        values, rows = values.flip(0).clamp_min(0), (basis @ turned.flip(1)).T
    return _with_rest(layout, factor, values, rows, rest, first or second)


def _with_rest(
    layout: ParamLayout, factor: Tensor, values: Tensor, rows: Tensor, rest: float | Tensor, jittered: bool
) -> LowRankBlock:
    """The block of these pairs, with what they leave out of ``factor^T factor`` added to the rest."""
    notes = (JITTERED,) if jittered else ()
    rounding = negligible(values, len(factor))
    if isinstance(rest, Tensor):
        left = factor.square().sum(0) - values @ rows.square()
        return LowRankBlock(layout, values, rows, rest + torch.where(left <= rounding, 0.0, left), notes)
    trace, others = float(factor.square().sum()), layout.size - len(values)
    spread = max(trace - float(values.sum()), 0.0) / others if others else 0.0
    # what is left of the trace by rounding alone is nothing, and rounding makes no rest larger than what was kept
    if len(values):
        spread = 0.0 if spread <= rounding else min(spread, float(values[-1]))
    return LowRankBlock(layout, values - spread, rows, rest + spread, notes)
