"""The exact matrix over a whole layout ``[P, P]`` by its eigendecomposition: for small models, and a measure of others.

    (G + lam)^power x  =  V ((Lam + lam)^power * V^T x)

Everything inside is float64. Eigenvalues within rounding of 0 (``P`` machine epsilons of the largest) count as 0, so
that without damping the powers below 0 are those of the pseudo-inverse.

A Hessian may have eigenvalues below 0. It is not clamped: with power -1 the inverse is that of ``H + lam I`` as it is,
and `DenseCurvature.remarks` says so where the damping leaves it indefinite; powers 1/2 and -1/2 of such a matrix are
refused. The mean eigenvalue that a damping is relative to is that of the absolute eigenvalues.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from rootward.core.errors import ArtefactError, InputError, LayoutMismatch, NumericalError, StorageError
from rootward.core.layout import ParamLayout
from rootward.core.records import whole_or_absent
from rootward.curvature.base import Damping, Gradients, check_gradients, check_power, damped_power
from rootward.curvature.kronecker import JITTERED, eigenbasis

SCHEMA = 1
HESSIAN = "hessian"
LARGEST = 12_000
"""Rows and columns of a matrix that is decomposed at most: some minutes, and 4.6 GB in float64, at this size."""


def as_rows(layout: ParamLayout, gradients: Gradients, dtype: torch.dtype = torch.float64) -> Tensor:
    """``{name: [q, *shape]}`` to rows ``[q, P]`` in the layout's order."""
    return torch.cat([gradients[name].flatten(1).to(dtype) for name in layout.names], 1)


def as_named(layout: ParamLayout, rows: Tensor, like: Gradients) -> dict[str, Tensor]:
    """Rows ``[q, P]`` to ``{name: [q, *shape]}`` with the dtypes and devices of ``like``."""
    return {name: value.to(like[name]) for name, value in layout.unflatten(rows).items()}


def negligible(values: Tensor, width: int) -> float:
    """Eigenvalues of a matrix of this width that are no larger than this are rounding."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return width * torch.finfo(torch.float64).eps * largest


@dataclass(frozen=True)
class DenseCurvature:
    """Eigenvalues ``[P]`` and eigenvectors ``[P, P]`` (columns) of a symmetric matrix; see the head of this file.

    ``source`` says what it is the matrix of: "ggn", "fisher", "empirical" or "hessian". ``notes`` are what happened
    when it was made. The scopes of a damping are the same: there is one block.
    """

    layout: ParamLayout
    eigenvalues: Tensor
    eigenvectors: Tensor
    source: str = "ggn"
    damping: Damping = field(default_factory=Damping)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        width = self.layout.size
        shapes = tuple(self.eigenvalues.shape), tuple(self.eigenvectors.shape)
        if shapes != ((width,), (width, width)):
            raise LayoutMismatch(
                f"exact curvature: expected {width} eigenvalues and eigenvectors [{width}, {width}] for layout "
                f"{self.layout.hash}, got {shapes[0]} and {shapes[1]}"
            )

    @classmethod
    def of(
        cls, layout: ParamLayout, matrix: Tensor, source: str = "ggn", damping: Damping | None = None
    ) -> DenseCurvature:
        """Decompose a symmetric matrix ``[P, P]``.

        Raises:
            LayoutMismatch: another width than the layout's. NumericalError: not finite, or no decomposition was found.
        """
        if tuple(matrix.shape) != (layout.size, layout.size):
            raise LayoutMismatch(
                f"exact curvature: expected a matrix [{layout.size}, {layout.size}], got {tuple(matrix.shape)}"
            )
        values, vectors, jittered = eigenbasis(matrix)
        values = torch.where(values.abs() <= negligible(values, layout.size), 0.0, values)
        notes = (JITTERED,) if jittered else ()
        if source != HESSIAN and float(values.min()) < -1e-6 * float(values.abs().max()):
            raise NumericalError(
                f"exact curvature: expected no negative eigenvalue of a {source} matrix, got {float(values.min()):.3g} "
                f"beside {float(values.max()):.3g}; give source = 'hessian' if it is one"
            )
        return cls(layout, values, vectors.contiguous(), source, damping or Damping(), notes)

    @property
    def kind(self) -> str:
        """Always "exact"."""
        return "exact"

    @cached_property
    def mean(self) -> float:
        """Mean absolute eigenvalue; for all but a Hessian the trace over P."""
        return float(self.eigenvalues.abs().mean())

    def lam(self, damping: Damping | None = None) -> float:
        """What is added to every eigenvalue."""
        return (damping or self.damping).of(self.mean, self.mean)

    def damped(self, damping: Damping) -> DenseCurvature:
        """The same with another damping."""
        return replace(self, damping=damping)

    def matrix(self) -> Tensor:
        """The undamped matrix ``[P, P]``."""
        return (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def _below_zero(self, damping: Damping | None) -> int:
        return int((self.eigenvalues + self.lam(damping) < 0).sum()) if self.source == HESSIAN else 0

    def remarks(self, damping: Damping | None = None) -> tuple[str, ...]:
        """``notes``, and whether the damped matrix is still indefinite."""
        below = self._below_zero(damping)
        if not below:
            return self.notes
        return (
            *self.notes,
            f"the Hessian with damping {self.lam(damping):.3g} has {below} of {self.layout.size} eigenvalues below 0: "
            "the inverse is that of an indefinite matrix, and the sign of scores is not to be relied upon",
        )

    def apply(self, gradients: Gradients, power: float = -1.0, damping: Damping | None = None) -> dict[str, Tensor]:
        """``(G + lam I)^power x`` for every query, in float64 inside.

        Raises:
            LayoutMismatch, NumericalError: see `check_gradients`. InputError: a root of an indefinite matrix.
        """
        check_gradients(self.layout, gradients, "exact curvature")
        check_power(power)
        rows = as_rows(self.layout, gradients).to(self.eigenvectors.device)
        scales = self._scales(power, damping)
        return as_named(self.layout, (rows @ self.eigenvectors * scales) @ self.eigenvectors.T, gradients)

    def _scales(self, power: float, damping: Damping | None) -> Tensor:
        lam = self.lam(damping)
        if self.source != HESSIAN:
            return damped_power(self.eigenvalues, lam, power)
        below, total = self._below_zero(damping), self.eigenvalues + lam
        if below and power != -1.0:
            raise InputError(
                f"power {power} of a Hessian with {below} eigenvalues below 0 (lowest {float(total.min()):.3g} with "
                f"damping {lam:.3g}): expected a positive matrix; raise the damping, or use source = 'ggn'"
            )
        null = total.abs() <= negligible(self.eigenvalues, self.layout.size)
        return torch.where(null, 0.0, torch.where(null, 1.0, total) ** power)

    def save(self, path: Path) -> None:
        """Write one safetensors file; the layout and its hash are in its header."""
        header = {
            "schema": SCHEMA,
            "hash": self.layout.hash,
            "names": self.layout.names,
            "shapes": self.layout.shapes,
            "source": self.source,
            "damping": [self.damping.relative, self.damping.absolute, self.damping.scope],
            "notes": self.notes,
        }
        tensors = {"eigenvalues": self.eigenvalues.cpu(), "eigenvectors": self.eigenvectors.cpu()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_absent(path) as temporary:
                save_file(tensors, temporary, {"rootward": json.dumps(header)})
        except OSError as error:
            raise StorageError(f"could not write {path}: {error}; free space and run the same command again") from error

    @classmethod
    def load(cls, path: Path, layout: ParamLayout) -> DenseCurvature:
        """Read what `save` wrote.

        Raises:
            ArtefactError: there is no such file, or it is damaged. LayoutMismatch: it is of other parameters.
        """
        try:
            with cast(Any, safe_open)(path, "pt") as file:
                header: dict[str, Any] = json.loads(str(file.metadata()["rootward"]))
                tensors: Mapping[str, Tensor] = {k: file.get_tensor(k) for k in ("eigenvalues", "eigenvectors")}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"expected an exact curvature at {path}, got {error!r}; fit it again") from error
        if header.get("schema") != SCHEMA:
            raise ArtefactError(f"{path}: expected schema {SCHEMA}, got {header.get('schema')}; fit it again")
        found = ParamLayout(tuple(header["names"]), tuple(tuple(shape) for shape in header["shapes"]))
        layout.require(found, f"exact curvature {path}")
        relative, absolute, scope = header["damping"]
        damping = Damping(relative, absolute, scope)
        values, vectors = tensors["eigenvalues"], tensors["eigenvectors"]
        return cls(layout, values, vectors, header["source"], damping, tuple(header["notes"]))
