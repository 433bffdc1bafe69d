"""Kronecker random projection: a gradient matrix ``G[rows, cols]`` becomes ``P^T G R`` with ``k x k`` entries.

Both sides are Gaussian with variance 1/k, so inner products are unbiased whatever the module's shape:
``E <P^T G R, P^T H R> = <G, H>`` (LoGra, Choe et al. 2024, arXiv:2405.13954, with random rather than PCA sides). A
document's gradient is never formed: ``sum_t (left_t P)^T (right_t R)``. A side no wider than ``k`` is kept as it is, a
vector no wider than ``k * k`` too; rank None keeps everything (small models). The random sides depend on the
parameter's name and the seed alone, not on order or on what else is projected. Sides may also be given, such as the
covariances' leading eigenvectors; then inner products are those of what the sides let through.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from rootward.core.block import Factor, LookupFactor, VectorFactor
from rootward.core.errors import InputError, LayoutMismatch
from rootward.core.hashing import digest
from rootward.core.layout import ParamLayout
from rootward.curvature.kronecker import flat

Sides = tuple[Tensor | None, Tensor | None]
"""``left[rows, k]`` and ``right[cols, m]`` of one parameter; None leaves a side as it is."""


class Sketch(Protocol):
    """Any linear map from gradients of a layout to rows of ``width`` entries, parameter by parameter.

    A parameter's part is *added* to its ``slices`` of the row, which parameters may share. `project` and `project_one`
    are the same map of factored and of dense gradients.
    """

    @property
    def layout(self) -> ParamLayout:
        """The parameters."""
        ...

    @property
    def width(self) -> int:
        """Entries of a row."""
        ...

    @property
    def slices(self) -> dict[str, slice]:
        """Columns that each parameter goes to."""
        ...

    def describe(self) -> dict[str, Any]:
        """What decides the columns."""
        ...

    def project(self, name: str, factor: Factor) -> Tensor:
        """Rows ``[n, slice]`` of one factor."""
        ...

    def project_one(self, name: str, gradients: Tensor) -> Tensor:
        """Rows ``[q, slice]`` of dense gradients ``[q, *shape]`` of one parameter."""
        ...


def sketch_dense(sketch: Sketch, gradients: Mapping[str, Tensor]) -> Tensor:
    """Rows ``[q, width]`` of dense gradients ``[q, *shape]`` of every parameter."""
    first = gradients[sketch.layout.names[0]]
    rows = first.new_zeros(len(first), sketch.width)
    for name in sketch.layout.names:
        rows[:, sketch.slices[name]] += sketch.project_one(name, gradients[name])
    return rows


@dataclass(frozen=True)
class Projection:
    """Maps gradients of a layout to rows of ``width`` entries; ``rank`` None is the identity.

    ``given`` holds sides for some or all parameters in place of the random ones; a vector has a right side only.
    """

    layout: ParamLayout
    rank: int | None = 16
    seed: int = 0
    device: str = "cpu"
    given: Mapping[str, Sides] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise InputError(f"projection rank: expected at least 1, or none, got {self.rank}")
        for name, sides in (self.given or {}).items():
            rows, cols = flat(self.layout, name)
            for side, width in zip(sides, (rows, cols), strict=True):
                if side is not None and (side.dim() != 2 or side.shape[0] != width):
                    raise LayoutMismatch(
                        f"projection: {name}: expected sides [{rows}, k] and [{cols}, m], got {tuple(side.shape)}"
                    )
            if len(self.layout.shape(name)) == 1 and sides[0] is not None:
                raise LayoutMismatch(f"projection: {name}: a vector has a right side only, got a left one")

    def describe(self) -> dict[str, Any]:
        """What decides the columns; part of an index's fingerprint."""
        found: dict[str, Any] = {
            "kind": "none" if self.rank is None else "kronecker",
            "rank": self.rank,
            "seed": self.seed,
            "layout": self.layout.hash,
        }
        return found if self.given is None else {**found, "given": self._fingerprint}

    @cached_property
    def _fingerprint(self) -> str:
        """Hash of the sides that were given."""
        result = hashlib.sha256()
        for name, sides in sorted((self.given or {}).items()):
            for place, side in zip(("left", "right"), sides, strict=True):
                if side is not None:
                    result.update(f"{name}|{place}|{tuple(side.shape)}|{side.dtype}\n".encode())
                    result.update(side.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return result.hexdigest()[:16]

    @cached_property
    def _sides(self) -> dict[str, Sides]:
        return {name: self._side_pair(name) for name in self.layout.names}

    def sides(self, name: str) -> Sides:
        """Both sides of one parameter."""
        return self._sides[name]

    def _side_pair(self, name: str) -> Sides:
        if self.given is not None and name in self.given:
            left, right = self.given[name]
            return (left.to(self.device) if left is not None else None), (
                right.to(self.device) if right is not None else None
            )
        if self.rank is None:
            return None, None
        rows, cols = flat(self.layout, name)
        if len(self.layout.shape(name)) == 1:
            return None, self._gaussian(name, "vector", cols, self.rank * self.rank)
        return self._gaussian(name, "left", rows, self.rank), self._gaussian(name, "right", cols, self.rank)

    def _gaussian(self, name: str, side: str, width: int, rank: int) -> Tensor | None:
        if width <= rank:
            return None
        generator = torch.Generator().manual_seed(int(digest(f"{self.seed}|{name}|{side}")[:15], 16))
        return (torch.randn(width, rank, generator=generator, dtype=torch.float32) / math.sqrt(rank)).to(self.device)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Projected shape of each parameter."""
        result: dict[str, tuple[int, int]] = {}
        for name in self.layout.names:
            rows, cols = flat(self.layout, name)
            left, right = self._sides[name]
            result[name] = (
                rows if left is None else left.shape[1],
                cols if right is None else right.shape[1],
            )
        return result

    @property
    def slices(self) -> dict[str, slice]:
        """Columns of each parameter in a projected row."""
        return self._slices

    @cached_property
    def _slices(self) -> dict[str, slice]:
        result: dict[str, slice] = {}
        start = 0
        for name, (rows, cols) in self.shapes.items():
            result[name] = slice(start, start + rows * cols)
            start += rows * cols
        return result

    @property
    def width(self) -> int:
        """Entries of a projected row."""
        return sum(rows * cols for rows, cols in self.shapes.values())

    def project(self, name: str, factor: Factor) -> Tensor:
        """Projected per-document gradient ``[n, rows * cols]`` of one factor, never forming the gradient itself."""
        left, right = self._sides[name]
        if isinstance(factor, VectorFactor):
            total = factor.rows.sum(1)
            return total if right is None else total @ right.to(total.dtype)
        if isinstance(factor, LookupFactor):
            if left is None:
                dense = factor.gradient()
                return (dense if right is None else dense @ right.to(dense.dtype)).flatten(1)
            rows = left[factor.ids].to(factor.right.dtype)
        else:
            rows = factor.left if left is None else factor.left @ left.to(factor.left.dtype)
        cols = factor.right if right is None else factor.right @ right.to(factor.right.dtype)
        return torch.bmm(rows.transpose(1, 2), cols).flatten(1)

    def project_one(self, name: str, gradients: Tensor) -> Tensor:
        """Project dense gradients ``[q, *shape]`` of one parameter to ``[q, rows * cols]``."""
        left, right = self._sides[name]
        rows, cols = flat(self.layout, name)
        value = gradients.reshape(-1, rows, cols)
        if left is not None:
            value = left.to(value.dtype).T @ value
        if right is not None:
            value = value @ right.to(value.dtype)
        return value.flatten(1)

    def project_dense(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Project dense gradients ``[q, *shape]`` of every parameter to rows ``[q, width]``."""
        return torch.cat([self.project_one(name, gradients[name]) for name in self.layout.names], 1)

    def lift(self, rows: Tensor) -> dict[str, Tensor]:
        """Queries ``[q, *shape]`` whose products with gradients are those of ``rows[q, width]`` with projected ones.

        ``<project(G), row> = <G, lift(row)>``: the projection's transpose, for a matrix ``P row R^T``.
        """
        result: dict[str, Tensor] = {}
        for name, (k, m) in self.shapes.items():
            left, right = self._sides[name]
            value = rows[:, self.slices[name]].detach().reshape(-1, k, m)
            if left is not None:
                value = left.to(value) @ value
            if right is not None:
                value = value @ right.to(value).T
            result[name] = value.reshape(-1, *self.layout.shape(name))
        return result
