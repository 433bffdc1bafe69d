"""Solvers that know a matrix by its products alone: conjugate gradients, LiSSA, Krylov eigenpairs, the mean eigenvalue.

An operator maps ``{name: [q, *shape]}`` to the same shapes: ``A x`` for every q. Solvers solve ``(A + lam I) x = b``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rootward.core.errors import InputError, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Curvature, Gradients, check_gradients
from rootward.curvature.dense import as_named, as_rows
from rootward.curvature.kronecker import JITTERED, eigenbasis

Operator = Callable[[Gradients], dict[str, Tensor]]
"""``A x`` for every query: ``{name: [q, *shape]}`` to the same."""


@dataclass(frozen=True)
class Solution:
    """``values`` ``{name: [q, *shape]}`` and the relative residuals ``|(A + lam) x - b| / |b|`` ``[q]``."""

    values: dict[str, Tensor]
    residual: Tensor
    steps: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """An operator on rows ``[q, P]``, with the gradients' own dtypes and devices on the inside."""

    layout: ParamLayout
    operator: Operator
    like: Gradients
    lam: float = 0.0

    @classmethod
    def over(cls, layout: ParamLayout, operator: Operator, gradients: Gradients, lam: float) -> tuple[_Rows, Tensor]:
        """The operator, and the gradients as rows in float64 if they are, else in float32."""
        if not lam >= 0:
            raise InputError(f"damping: expected at least 0, got {lam}")
        check_gradients(layout, gradients, "solver")
        first = gradients[layout.names[0]]
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        return cls(layout, operator, gradients, lam), as_rows(layout, gradients, wide)

    def __call__(self, rows: Tensor) -> Tensor:
        result = as_rows(self.layout, self.operator(as_named(self.layout, rows, self.like)), rows.dtype)
        return result + self.lam * rows

    def solution(self, x: Tensor, b: Tensor, steps: int, notes: tuple[str, ...] = ()) -> Solution:
        size = _norm(b)
        residual = _norm(self(x) - b) / torch.where(size > 0, size, 1.0)
        return Solution(as_named(self.layout, x, self.like), residual, steps, notes)


def _norm(rows: Tensor) -> Tensor:
    return rows.double().square().sum(1).sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(1)


def conjugate_gradients(
    layout: ParamLayout,
    operator: Operator,
    gradients: Gradients,
    lam: float,
    *,
    tolerance: float = 1e-5,
    steps: int = 100,
    preconditioner: Curvature | None = None,
) -> Solution:
    """Solve ``(A + lam) x = b`` for a positive matrix (Hestenes & Stiefel 1952), every query with its own steps.

    Args:
        layout: the parameters.
        operator: ``A x``; asked only for the queries that have not converged.
        gradients: ``b`` by name ``[q, *shape]``.
        lam: the damping.
        tolerance: stop a query at this relative residual ``|(A + lam) x - b| / |b|``.
        steps: at most so many products. What has not converged by then is said in ``notes``, with its residual.
        preconditioner: a curvature like ``A``, applied with power -1 and its own damping.

    Raises:
        NumericalError: a direction of negative curvature was found (the matrix is not positive), or the products are
            not finite.
    """
    apply, b = _Rows.over(layout, operator, gradients, lam)

    def precondition(rows: Tensor) -> Tensor:
        if preconditioner is None:
            return rows
        return as_rows(layout, preconditioner.apply(as_named(layout, rows, gradients)), rows.dtype)

    x, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    p, rz, aim = z.clone(), _dot(r, z), tolerance * _norm(b)
    done = 0
    for done in range(steps + 1):
        active = (_norm(r) > aim).nonzero().flatten()
        if len(active) == 0 or done == steps:
            break
        product = apply(p[active])
        curved = _dot(p[active], product)
        if not bool((curved > 0).all()):
            raise NumericalError(
                f"conjugate gradients, step {done + 1}: expected positive curvature p^T (A + lam) p along every "
                f"direction, got {float(curved.min()):.3g} with damping {lam:.3g}; raise the damping, or use the "
                "Gauss-Newton matrix (ggn), which is never negative"
            )
        alpha = (rz[active] / curved).to(b.dtype).unsqueeze(1)
        x[active] += alpha * p[active]
        r[active] -= alpha * product
        z[active] = precondition(r[active])
        fresh = _dot(r[active], z[active])
        p[active] = z[active] + (fresh / rz[active]).to(b.dtype).unsqueeze(1) * p[active]
        rz[active] = fresh
    found = apply.solution(x, b, done)
    # of ill-conditioned matrices the residual that the steps carry along may fall without the true one
    late = int(((_norm(r) > aim) | (found.residual > 10 * tolerance)).sum())
    if not late:
        return found
    note = (
        f"conjugate gradients: {late} of {len(b)} queries did not reach the tolerance {tolerance:.1g} in {done} steps "
        f"(largest residual {float(found.residual.max()):.2g}); raise the damping or `steps`"
    )
    return Solution(found.values, found.residual, found.steps, (note,))


def lissa(
    layout: ParamLayout,
    operator: Operator,
    gradients: Gradients,
    lam: float,
    *,
    scale: float,
    depth: int,
    repeats: int = 1,
    draw: Operator | None = None,
) -> Solution:
    """Solve ``(A + lam) x = b`` by the truncated series of Agarwal et al. 2017 (arXiv:1602.03943), as Koh & Liang do.

    ``h <- b + h - (A_j + lam) h / scale``, repeated ``depth`` times from ``h = b``; ``x = h / scale``, averaged over
    ``repeats``. ``A_j`` is a fresh estimate of ``A`` in each step where ``draw`` makes one.

    It converges where all eigenvalues of ``(A_j + lam) / scale`` lie between 0 and 2, slowly where they are near 0:
    an eigenvalue mu is inverted to within ``(1 - (mu + lam) / scale)^depth``. With such eigenvalues the norm of h
    cannot exceed ``j + 1`` times that of b after j steps, so a larger norm is proof of divergence.

    Raises:
        NumericalError: it diverges; the message gives the scale.
    """
    if not scale > 0 or depth < 1 or repeats < 1:
        raise InputError(
            f"LiSSA: expected scale > 0, depth and repeats of at least 1, got {scale}, {depth} and {repeats}"
        )
    apply, b = _Rows.over(layout, operator, gradients, lam)
    drawn = _Rows(layout, draw, gradients, lam) if draw is not None else apply
    size, total = _norm(b), torch.zeros_like(b)
    for _ in range(repeats):
        h = b.clone()
        for j in range(1, depth + 1):
            h = b + h - drawn(h) / scale
            if not bool((_norm(h) <= (1 + 1e-3) * (j + 1) * size).all()):
                raise NumericalError(
                    f"LiSSA diverged at step {j} of {depth} with scale {scale:.4g} and damping {lam:.3g}: expected all "
                    "eigenvalues of the damped matrix between 0 and 2 x scale; raise scale, or the damping if the "
                    "matrix is a Hessian (the Gauss-Newton matrix, ggn, is never negative)"
                )
        total += h / scale
    return apply.solution(total / repeats, b, depth * repeats)


@dataclass(frozen=True)
class Eigenpairs:
    """``values[k]`` by falling magnitude, ``vectors[k, P]`` as rows, and ``residuals[k] = |A v - value v|``.

    ``complete``: nothing of the matrix is left outside the vectors. ``notes`` are what happened on the way.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    complete: bool = False
    notes: tuple[str, ...] = ()

    def largest(self, count: int) -> Eigenpairs:
        """The ``count`` largest by magnitude."""
        whole = self.complete and count >= len(self.values)
        return Eigenpairs(self.values[:count], self.vectors[:count], self.residuals[:count], whole, self.notes)


def arnoldi(
    layout: ParamLayout, operator: Operator, steps: int, *, seed: int = 0, like: Gradients | None = None
) -> Eigenpairs:
    """Ritz pairs of a symmetric operator in the Krylov space of a random start (Arnoldi 1951; Lanczos 1950).

    Every new vector is orthogonalised twice against all before it, so rounding leaves no ghost copies. Where the space
    is exhausted (repeated eigenvalues, low rank) a fresh random direction continues it, and if the operator sends that
    to nothing, all that is left is null space and the search is over: at most ``steps`` products, P pairs. The part of
    the projected matrix that is not symmetric is dropped.

    Args:
        layout: the parameters.
        operator: ``A x``, asked for one vector at a time.
        steps: size of the Krylov space.
        seed: of the random start.
        like: gradients whose dtypes and devices the operator wants; by default float64 on the CPU.

    Raises:
        NumericalError: a product is not finite.
    """
    if steps < 1:
        raise InputError(f"arnoldi: expected at least 1 step, got {steps}")
    like = like or {n: torch.zeros(1, *layout.shape(n), dtype=torch.float64) for n in layout.names}
    apply, start = _Rows.over(layout, operator, like, 0.0)
    generator = torch.Generator().manual_seed(seed)
    size = min(steps, layout.size)
    basis = start.new_zeros(size + 1, layout.size)
    inner = torch.zeros(size + 1, size, dtype=torch.float64)
    rounding = layout.size**0.5 * 10 * torch.finfo(start.dtype).eps
    basis[0] = _fresh(basis[:0], generator)
    found, largest, restarted, left = 0, 0.0, True, 0.0
    complete = False
    for k in range(size):
        product = apply(basis[k : k + 1])[0]
        length = float(_norm(product.unsqueeze(0)))
        if not length < float("inf"):
            raise NumericalError(f"arnoldi: the product of step {k + 1} is not finite; look at the documents' losses")
        if restarted and length <= rounding * largest:
            complete = True  # a random direction outside the space is sent to nothing: so is all of the outside
            break
        largest = max(largest, length)
        weights, product = _orthogonal(basis[: k + 1], product)
        inner[: k + 1, k] = weights.double().cpu()
        left = float(_norm(product.unsqueeze(0)))
        found, restarted = k + 1, left <= rounding * largest
        if found == size:
            break
        if restarted:
            left = 0.0
            basis[found] = _fresh(basis[:found], generator)
        else:
            inner[found, k] = left
            basis[found] = product / left
    if found == 0:  # the matrix is zero
        return Eigenpairs(start.new_zeros(1).double(), basis[:1], start.new_zeros(1).double(), True)
    small = (inner[:found, :found] + inner[:found, :found].T) / 2
    values, vectors, jittered = eigenbasis(small)
    order = values.abs().argsort(descending=True)
    values, vectors = values[order], vectors[:, order]
    complete = complete or found == layout.size
    residuals = torch.zeros_like(values) if complete else left * vectors[-1].abs()
    notes = (f"arnoldi: {JITTERED}",) if jittered else ()
    return Eigenpairs(values, vectors.T.to(basis) @ basis[:found], residuals, complete, notes)


def _orthogonal(basis: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Weights on the basis rows and what is left of the vector, orthogonalised twice."""
    weights = basis @ vector
    vector = vector - weights @ basis
    again = basis @ vector
    return weights + again, vector - again @ basis


def _fresh(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows."""
    vector = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64).to(basis)
    vector = _orthogonal(basis, vector)[1]
    return vector / _norm(vector.unsqueeze(0)).to(vector)


def mean_eigenvalue(
    layout: ParamLayout, operator: Operator, *, probes: int = 10, seed: int = 0, like: Gradients | None = None
) -> float:
    """Trace over P from random signs: the mean of ``z^T A z / P`` (Hutchinson 1989); unbiased, one product a probe.

    Its relative standard deviation is at most ``sqrt(2 / probes)``, for a matrix of rank 1, and far less for others.
    """
    like = like or {n: torch.zeros(1, *layout.shape(n), dtype=torch.float64) for n in layout.names}
    apply, start = _Rows.over(layout, operator, like, 0.0)
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(probes):
        signs = torch.randint(0, 2, (1, layout.size), generator=generator, dtype=torch.int64).to(start) * 2 - 1
        total += float(_dot(signs, apply(signs)))
    return total / probes / layout.size
