"""The exact matrix of a few documents' gradients, by the products of the gradients with one another.

With rows ``R [m, P]`` and ``n`` documents ``G = R^T R / n`` has at most m eigenvalues that are not 0. They are those of
the Gram matrix ``R R^T / n = U S U^T [m, m]``, so that no matrix of width P is ever formed (Woodbury's identity for
power -1; the same holds for the other powers):

    (G + lam)^power x  =  lam^power x + R^T U f(S) U^T R x / n,     f(s) = ((s + lam)^power - lam^power) / s

Without damping it is the pseudo-inverse, ``f(s) = s^(power - 1)``, and eigenvalues within rounding of 0 count as 0. A
damping far below the eigenvalues costs digits: for power -1 the two terms cancel to ``lam / (s + lam)`` of their size.
Where there are more rows than parameters the smaller ``R^T R / n = V S V^T [P, P]`` is decomposed, and the P rows
``(n S)^1/2 V^T`` of the same second moment, whose Gram matrix is the diagonal S, are kept in place of R.

Memory: the rows in float64. One row per document for the empirical Fisher matrix; one for each class of each document
for the Gauss-Newton matrix, scaled by the root of the class's probability.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping, Gradients, check_gradients, check_power
from rootward.curvature.dense import LARGEST, as_named, as_rows, negligible
from rootward.curvature.kronecker import JITTERED, eigenbasis


def require_small(name: str, rows: int, width: int) -> None:
    """`InputError` where neither side of ``[rows, width]`` has a matrix small enough to be decomposed."""
    if min(rows, width) > LARGEST:
        raise InputError(
            f"{name}: {rows:,} rows (documents x labels) of {width:,} entries: expected at most {LARGEST:,} of one of "
            "them, as a matrix of the smaller side is decomposed; take fewer documents (`documents`) or parameters, or "
            "solver 'cg'"
        )


@dataclass(frozen=True)
class GramCurvature:
    """Rows ``[m, P]`` in float64, and eigenvalues ``[m]`` and eigenvectors ``[m, m]`` of their Gram matrix over n."""

    layout: ParamLayout
    rows: Tensor
    documents: int
    eigenvalues: Tensor
    eigenvectors: Tensor
    damping: Damping = field(default_factory=Damping)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, layout: ParamLayout, rows: Tensor, documents: int | None = None, damping: Damping | None = None
    ) -> GramCurvature:
        """From gradients as rows in the layout's order; ``documents`` is the number to divide by, m if not given.

        Raises:
            LayoutMismatch: rows of another width. InputError: no rows, or more than `LARGEST` rows and parameters.
            NumericalError: a row is not finite.
        """
        if rows.dim() != 2 or rows.shape[1] != layout.size:
            raise LayoutMismatch(f"gram: expected rows [m, {layout.size}], got {tuple(rows.shape)}")
        documents = len(rows) if documents is None else documents
        if len(rows) == 0 or documents < 1:
            raise InputError(f"gram: expected at least one row and document, got {len(rows)} and {documents}")
        bad = (~torch.isfinite(rows).all(1)).nonzero().flatten()
        if len(bad):
            raise NumericalError(f"gram: the gradient of row {int(bad[0])} is not finite ({len(bad)} rows in all)")
        require_small("gram", len(rows), layout.size)
        wide = rows.double()
        tall = len(rows) > layout.size
        values, vectors, jittered = eigenbasis((wide.T @ wide if tall else wide @ wide.T) / documents)
        values = torch.where(values <= negligible(values, len(rows)), 0.0, values)
        if tall:
            wide = (documents * values).sqrt().unsqueeze(1) * vectors.T
            vectors = torch.eye(layout.size, dtype=wide.dtype, device=wide.device)
        notes = (JITTERED,) if jittered else ()
        return cls(layout, wide, documents, values, vectors, damping or Damping(), notes)

    @property
    def kind(self) -> str:
        """Always "gram"."""
        return "gram"

    @cached_property
    def mean(self) -> float:
        """Mean of all P eigenvalues, of which most are 0."""
        return float(self.eigenvalues.sum()) / self.layout.size

    def lam(self, damping: Damping | None = None) -> float:
        """What is added to every eigenvalue."""
        return (damping or self.damping).of(self.mean, self.mean)

    def damped(self, damping: Damping) -> GramCurvature:
        """The same with another damping."""
        return replace(self, damping=damping)

    def apply(self, gradients: Gradients, power: float = -1.0, damping: Damping | None = None) -> dict[str, Tensor]:
        """``(G + lam I)^power x`` for every query, in float64 inside; errors as `check_gradients`."""
        check_gradients(self.layout, gradients, "gram")
        check_power(power)
        lam = self.lam(damping)
        x = as_rows(self.layout, gradients).to(self.rows.device)
        inner = (x @ self.rows.T @ self.eigenvectors) * self._slopes(lam, power) @ self.eigenvectors.T
        result = inner @ self.rows / self.documents
        return as_named(self.layout, result + lam**power * x if lam > 0 else result, gradients)

    def _slopes(self, lam: float, power: float) -> Tensor:
        """``((s + lam)^power - lam^power) / s``, 0 where s is 0."""
        s = self.eigenvalues
        safe = torch.where(s > 0, s, 1.0)
        slope = ((safe + lam) ** power - lam**power) / safe if lam > 0 else safe ** (power - 1)
        return torch.where(s > 0, slope, 0.0)
