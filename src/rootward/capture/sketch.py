"""Linear maps from gradients to short rows, beside the Kronecker `Projection`: see `Sketch` for what they share.

    Whole     one dense matrix over the whole gradient (Gaussian, Rademacher) or a hash of its entries (SJLT)
    Masked    a few entries of each side of a matrix, then a hash of their products (FactGraSS)
    Scaled    the gradient's entries times given numbers, then a `Projection`

All random choices depend on the parameter's name and the seed alone. Inner products are unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from rootward.capture.projection import Projection, Sides
from rootward.capture.rescaling import rank_one
from rootward.capture.sinks import BUFFER
from rootward.core.block import Factor, LookupFactor, VectorFactor
from rootward.core.errors import InputError, LayoutMismatch
from rootward.core.hashing import digest
from rootward.core.layout import ParamLayout
from rootward.curvature.kronecker import flat

DENSE_ENTRIES = 2**28
"""Entries of a dense matrix that is kept: 1 GB in float32."""
Hash = tuple[Tensor, Tensor]
"""For every entry the column that it is added to, and its sign."""


def _generator(*what: object) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest("|".join(map(str, what)))[:15], 16))


def hashing(width: int, dimension: int, generator: torch.Generator) -> Hash:
    """A sparse Johnson-Lindenstrauss transform with one entry per input: random columns and signs, ``[width]`` each."""
    columns = torch.randint(0, dimension, (width,), generator=generator)
    signs = torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8) * 2 - 1
    return columns, signs


def hashed(values: Tensor, table: Hash, dimension: int) -> Tensor:
    """Rows ``[n, width]`` to ``[n, dimension]``: every entry goes to its column with its sign."""
    columns, signs = table[0].to(values.device), table[1].to(values)
    return values.new_zeros(len(values), dimension).index_add_(1, columns, values * signs)


def _in_pieces(factor: Factor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """``make`` of the dense per-document gradients ``[n, *shape]``, of a few documents at a time."""
    count = len(factor.rows if isinstance(factor, VectorFactor) else factor.right)
    step = max(1, BUFFER // math.prod(factor.gradient_shape()))
    return torch.cat([make(factor.take(slice(n, n + step)).gradient()) for n in range(0, count, step)])


@dataclass(frozen=True)
class Whole:
    """The whole gradient ``[P]`` to ``dimension`` entries, all parameters into the same columns.

    "gaussian" and "rademacher" keep a matrix ``[P, dimension]``, which is refused where it has more than
    `DENSE_ENTRIES`; "sjlt" adds every entry with a random sign to one random column.
    """

    layout: ParamLayout
    dimension: int
    kind: Literal["gaussian", "rademacher", "sjlt"] = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise InputError(f"projection dimension: expected at least 1, got {self.dimension}")
        entries = self.layout.size * self.dimension
        if self.kind != "sjlt" and entries > DENSE_ENTRIES:
            raise InputError(
                f"projection {self.kind!r}: expected at most {DENSE_ENTRIES} entries (parameters x dimension), got "
                f"{entries}; use 'sjlt' or 'kronecker', a lower dimension, or fewer parameters"
            )

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.dimension

    @property
    def slices(self) -> dict[str, slice]:
        """All columns for every parameter."""
        return dict.fromkeys(self.layout.names, slice(0, self.dimension))

    def describe(self) -> dict[str, Any]:
        """What decides the columns."""
        return {"kind": self.kind, "dimension": self.dimension, "seed": self.seed, "layout": self.layout.hash}

    @cached_property
    def _matrices(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, size in self.layout.sizes.items():
            generator, shape = _generator(self.seed, name, self.kind), (size, self.dimension)
            if self.kind == "gaussian":
                matrix = torch.randn(shape, generator=generator, dtype=torch.float32)
            else:
                matrix = torch.randint(0, 2, shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1)
            found[name] = matrix.div_(math.sqrt(self.dimension))
        return found

    @cached_property
    def _hashes(self) -> dict[str, Hash]:
        sizes = self.layout.sizes.items()
        return {n: hashing(size, self.dimension, _generator(self.seed, n, self.kind)) for n, size in sizes}

    def project(self, name: str, factor: Factor) -> Tensor:
        """Rows ``[n, dimension]``; the gradient is formed, of a few documents at a time."""
        return _in_pieces(factor, lambda gradients: self.project_one(name, gradients))

    def project_one(self, name: str, gradients: Tensor) -> Tensor:
        """Rows ``[q, dimension]`` of dense gradients."""
        rows = gradients.flatten(1)
        if self.kind == "sjlt":
            return hashed(rows, self._hashes[name], self.dimension)
        return rows @ self._matrices[name].to(rows)


@dataclass(frozen=True)
class Masked:
    """Per parameter: a mask of each side, the product of what is left, and a hash of it to ``dimension`` entries.

    A side keeps ``sqrt(blow_up * dimension)`` of its entries, a vector ``blow_up * dimension``; one that has no more
    is kept whole, and products that are no more than ``dimension`` are not hashed. ``chosen`` gives kept entries by
    parameter in place of random ones. What a random mask keeps is scaled up, so that inner products are unbiased.
    """

    layout: ParamLayout
    dimension: int = 256
    blow_up: int = 4
    seed: int = 0
    chosen: Mapping[str, Sides] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.dimension < 1 or self.blow_up < 1:
            raise InputError(
                f"masked projection: expected a dimension and blow_up of at least 1, got {self.dimension} and "
                f"{self.blow_up}"
            )

    @property
    def kept(self) -> int:
        """Entries that are kept of a matrix's side."""
        return math.ceil(math.sqrt(self.blow_up * self.dimension))

    def describe(self) -> dict[str, Any]:
        """What decides the columns."""
        found: dict[str, Any] = {
            "kind": "masked",
            "dimension": self.dimension,
            "blow_up": self.blow_up,
            "seed": self.seed,
            "layout": self.layout.hash,
        }
        if self.chosen is not None:
            kept = {name: [None if s is None else s.tolist() for s in sides] for name, sides in self.masks.items()}
            found["chosen"] = digest(str(sorted(kept.items())))[:16]
        return found

    @cached_property
    def masks(self) -> dict[str, Sides]:
        """Kept entries of both sides, in order; None keeps all."""
        found: dict[str, Sides] = {}
        for name in self.layout.names:
            rows, cols = flat(self.layout, name)
            vector = len(self.layout.shape(name)) == 1
            given = self.chosen[name] if self.chosen is not None else (None, None)
            left = None if vector else self._mask(name, "left", rows, self.kept, given[0])
            found[name] = left, self._mask(name, "right", cols, self.kept**2 if vector else self.kept, given[1])
        return found

    def _mask(self, name: str, side: str, width: int, kept: int, given: Tensor | None) -> Tensor | None:
        if width <= kept:
            return None
        if given is not None:
            if given.dim() != 1 or len(given) != kept or int(given.max()) >= width:
                raise LayoutMismatch(f"masked projection: {name}: expected {kept} of {width} entries on the {side}")
            return given.sort().values
        return torch.randperm(width, generator=_generator(self.seed, name, side))[:kept].sort().values

    @cached_property
    def _scales(self) -> dict[str, float]:
        """Root of the product of the shares that the random masks keep."""
        found: dict[str, float] = {}
        for name, masks in self.masks.items():
            pairs = zip(masks, flat(self.layout, name), strict=True)
            shares = [width / len(mask) for mask, width in pairs if mask is not None]
            found[name] = 1.0 if self.chosen is not None else math.sqrt(math.prod(shares))
        return found

    @cached_property
    def _products(self) -> dict[str, int]:
        """Entries of each parameter between mask and hash."""
        found: dict[str, int] = {}
        for name, masks in self.masks.items():
            pairs = zip(masks, flat(self.layout, name), strict=True)
            found[name] = math.prod(width if mask is None else len(mask) for mask, width in pairs)
        return found

    @property
    def slices(self) -> dict[str, slice]:
        """Columns of each parameter."""
        return self._slices

    @cached_property
    def _slices(self) -> dict[str, slice]:
        found: dict[str, slice] = {}
        start = 0
        for name, entries in self._products.items():
            found[name] = slice(start, start + min(entries, self.dimension))
            start = found[name].stop
        return found

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.slices[self.layout.names[-1]].stop

    @cached_property
    def _hashes(self) -> dict[str, Hash]:
        products = {name: entries for name, entries in self._products.items() if entries > self.dimension}
        return {n: hashing(e, self.dimension, _generator(self.seed, n, "hash")) for n, e in products.items()}

    def _finish(self, name: str, products: Tensor) -> Tensor:
        scaled = products * self._scales[name]
        return hashed(scaled, self._hashes[name], self.dimension) if name in self._hashes else scaled

    def project(self, name: str, factor: Factor) -> Tensor:
        """Rows of one factor; only the kept entries of the gradient are ever formed."""
        left, right = self.masks[name]
        if isinstance(factor, VectorFactor):
            return self._finish(name, _picked(factor.rows.sum(1), right))
        cols = _picked(factor.right, right)
        if not isinstance(factor, LookupFactor):
            rows = _picked(factor.left, left)
        elif left is None:
            return self._finish(name, LookupFactor(factor.ids, cols, factor.vocabulary).gradient().flatten(1))
        else:
            rows = (factor.ids.unsqueeze(-1) == left.to(factor.ids.device)).to(cols.dtype)
        return self._finish(name, torch.bmm(rows.transpose(1, 2), cols).flatten(1))

    def project_one(self, name: str, gradients: Tensor) -> Tensor:
        """Rows of dense gradients."""
        left, right = self.masks[name]
        value = _picked(gradients.reshape(len(gradients), *flat(self.layout, name)), right)
        if left is not None:
            value = value[:, left.to(value.device)]
        return self._finish(name, value.flatten(1))


def _picked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Some of the last axis's entries."""
    return values if mask is None else values.index_select(-1, mask.to(values.device))


@dataclass(frozen=True)
class Scaled:
    """Gradients' entries times ``scales[*shape]`` by parameter, then ``projection``; the gradients are formed."""

    projection: Projection
    scales: Mapping[str, Tensor] = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in self.layout.names:
            if name not in self.scales or tuple(self.scales[name].shape) != self.layout.shape(name):
                raise LayoutMismatch(f"scaled projection: {name}: expected scales {self.layout.shape(name)}")

    @property
    def layout(self) -> ParamLayout:
        """The parameters."""
        return self.projection.layout

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.projection.width

    @property
    def slices(self) -> dict[str, slice]:
        """Columns of each parameter."""
        return self.projection.slices

    def describe(self) -> dict[str, Any]:
        """What decides the columns."""
        every = torch.cat([self.scales[name].detach().double().cpu().flatten() for name in self.layout.names])
        return {**self.projection.describe(), "scales": digest(every.numpy().tobytes())[:16]}

    def project(self, name: str, factor: Factor) -> Tensor:
        """Rows of one factor, of a few documents at a time."""
        return _in_pieces(factor, lambda gradients: self.project_one(name, gradients))

    def project_one(self, name: str, gradients: Tensor) -> Tensor:
        """Rows of dense gradients."""
        shaped = gradients.reshape(len(gradients), *self.layout.shape(name))
        return self.projection.project_one(name, shaped * self.scales[name].to(shaped))


def scaled_sides(projection: Projection, moments: Mapping[str, Tensor]) -> Projection:
    """``projection`` after every entry was divided by the root of a moment of rank one, as given sides.

    A matrix's moments are taken as ``row_i col_j / mean`` (`rank_one`), so that gradients stay factored:
    ``diag(row)^-1/2 P`` and ``diag(col / mean)^-1/2 R``. A vector has all of its moments. They must be above 0.
    """
    given: dict[str, Sides] = {}
    for name in projection.layout.names:
        shape = projection.layout.shape(name)
        left, right = projection.sides(name)
        v = moments[name].detach().double().to(projection.device)
        if len(shape) == 1:
            given[name] = None, _scaled_side(v.rsqrt(), right)
            continue
        row, col, mean = rank_one(v.reshape(shape[0], -1))
        given[name] = _scaled_side(row.rsqrt(), left), _scaled_side((col / mean).rsqrt(), right)
    return Projection(projection.layout, projection.rank, projection.seed, projection.device, given)


def _scaled_side(scale: Tensor, side: Tensor | None) -> Tensor:
    return torch.diag(scale) if side is None else scale.unsqueeze(1) * side.double()
