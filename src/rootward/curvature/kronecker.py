"""Curvatures that are block-diagonal over parameters, each block with a basis that is a Kronecker product.

For a matrix of ``rows`` x ``cols`` the block is ``(U (x) V) diag(Lam) (U (x) V)^T`` with orthogonal ``U [rows, rows]``,
``V [cols, cols]`` and eigenvalues ``Lam [rows, cols]``, so that

    (G + lam)^power X  =  U [ (U^T X V) * (Lam + lam)^power ] V^T

    identity   no rotation, Lam = 1
    diagonal   no rotation, Lam = second moments of the gradient's entries
    kfac       U, V from the covariances S of output gradients and A of inputs; Lam = tokens * l_S l_A^T
               (Martens & Grosse 2015, arXiv:1503.05671; sequences: Grosse et al. 2023, arXiv:2308.03296, section 2.4)
    ekfac      the same bases, Lam[p, q] = E_n[(U^T G_n V)[p, q]^2] (George et al. 2018, arXiv:1806.03884)

``Lam`` is a mean over documents of losses summed over their tokens. A vector is a matrix of one row; a table's rows
(embeddings) are not rotated, since one-hot inputs have a diagonal covariance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from rootward.core.errors import LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import DEFAULT, Damping, Gradients, check_gradients, check_power, damped_power

JITTERED = "the eigendecomposition failed and was repeated with a jitter on the diagonal"
"""What is said of a matrix for which `eigenbasis` needed one."""
Basis = tuple[Tensor | None, Tensor | None]
"""Eigenvectors as columns on both sides of a matrix; None leaves a side as it is."""


def flat(layout: ParamLayout, name: str) -> tuple[int, int]:
    """A parameter as a matrix (rows, cols): a vector is one row, trailing dimensions are columns."""
    shape = layout.shape(name)
    return (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))


def rotate(x: Tensor, basis: Basis, *, back: bool = False) -> Tensor:
    """``U^T X V`` for ``x[q, rows, cols]``; ``back``: ``U X V^T``."""
    left, right = basis
    if left is not None:
        left = left.to(x)
        x = (left if back else left.T) @ x
    if right is not None:
        right = right.to(x)
        x = x @ (right.T if back else right)
    return x


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)  # type: ignore[reportUnknownMemberType]
    return cast("Tensor", values), cast("Tensor", vectors)


def eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Eigenvalues ``[d]`` and eigenvectors ``[d, d]`` of a symmetric matrix in float64, and whether it needed a jitter.

    Raises:
        NumericalError: the matrix is not finite, or even with a jitter of 1e-6 of its mean diagonal it fails.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise NumericalError("a covariance is not finite; look for a document whose gradients are not finite")
    wide = covariance.double()
    wide = (wide + wide.T) / 2
    try:
        values, vectors = _eigh(wide)
        return values, vectors, False
    except RuntimeError:  # torch's error of linear algebra is one
        jitter = 1e-6 * float(wide.diagonal().mean().abs()) + torch.finfo(torch.float64).tiny
        try:
            values, vectors = _eigh(wide + jitter * torch.eye(len(wide), dtype=wide.dtype, device=wide.device))
        except RuntimeError as error:
            raise NumericalError(
                f"the eigendecomposition of a covariance of width {len(wide)} failed, also with a jitter: {error}; "
                "leave that module out with `parameters`, or use curvature = 'diagonal'"
            ) from error
    return values - jitter, vectors, True


@dataclass(frozen=True)
class KroneckerBlock:
    """One parameter: its basis and eigenvalues ``[rows, cols]``."""

    basis: Basis
    eigenvalues: Tensor

    @cached_property
    def mean(self) -> float:
        """Mean eigenvalue."""
        return float(self.eigenvalues.double().mean())


@dataclass(frozen=True)
class KroneckerCurvature:
    """Blocks by parameter name. See the head of this file."""

    layout: ParamLayout
    kind: str
    blocks: Mapping[str, KroneckerBlock]
    damping: Damping = DEFAULT

    def __post_init__(self) -> None:
        if set(self.blocks) != set(self.layout.names):
            raise LayoutMismatch(
                f"{self.kind}: expected blocks of {len(self.layout.names)} parameters, got {len(self.blocks)}"
            )
        for name, block in self.blocks.items():
            expected = flat(self.layout, name)
            if tuple(block.eigenvalues.shape) != expected:
                raise LayoutMismatch(
                    f"{self.kind}: {name}: expected eigenvalues {expected}, got {tuple(block.eigenvalues.shape)}"
                )

    @classmethod
    def identity(cls, layout: ParamLayout) -> KroneckerCurvature:
        """The unit matrix, undamped: influence by plain gradient products."""
        blocks = {n: KroneckerBlock((None, None), torch.ones(flat(layout, n))) for n in layout.names}
        return cls(layout, "identity", blocks, Damping(0.0))

    @classmethod
    def diagonal(cls, layout: ParamLayout, moments: Mapping[str, Tensor], damping: Damping) -> KroneckerCurvature:
        """Second moments ``[*shape]`` of every entry: of documents' gradients, or an optimiser's."""
        blocks: dict[str, KroneckerBlock] = {}
        for name in layout.names:
            if name not in moments or tuple(moments[name].shape) != layout.shape(name):
                got = tuple(moments[name].shape) if name in moments else "none"
                raise LayoutMismatch(f"diagonal: {name}: expected second moments {layout.shape(name)}, got {got}")
            if not bool((moments[name] >= 0).all()):
                raise NumericalError(f"diagonal: {name}: expected second moments of at least 0 and no NaN")
            blocks[name] = KroneckerBlock((None, None), moments[name].reshape(flat(layout, name)))
        return cls(layout, "diagonal", blocks, damping)

    @cached_property
    def mean(self) -> float:
        """Mean eigenvalue over all parameters."""
        total = sum(block.mean * block.eigenvalues.numel() for block in self.blocks.values())
        return total / self.layout.size

    @property
    def dead(self) -> tuple[str, ...]:
        """Parameters without any curvature: no document's gradient reaches them."""
        return tuple(name for name in self.layout.names if self.blocks[name].mean == 0)

    def damped(self, damping: Damping) -> KroneckerCurvature:
        """The same with another damping."""
        return replace(self, damping=damping)

    def lam(self, name: str, damping: Damping | None = None) -> float:
        """The damping of one parameter's block."""
        return (damping or self.damping).of(self.blocks[name].mean, self.mean)

    def apply(self, gradients: Gradients, power: float = -1.0, damping: Damping | None = None) -> dict[str, Tensor]:
        """``(G + lam I)^power x`` for ``{name: [q, *shape]}``; a dead block gives 0 where undamped.

        Raises:
            LayoutMismatch: gradients of another layout. NumericalError: one is not finite.
            InputError: another power than -1, -1/2, 1/2.
        """
        check_power(power)
        return self._turned(gradients, lambda name, values: damped_power(values, self.lam(name, damping), power))

    def function(self, gradients: Gradients, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """``f(G) x`` for a function of the eigenvalues (float64, those below 0 as 0), without damping."""
        return self._turned(gradients, lambda _, values: of(values.double().clamp_min(0)))

    def _turned(self, gradients: Gradients, scale: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        count = check_gradients(self.layout, gradients, self.kind)
        result: dict[str, Tensor] = {}
        for name in self.layout.names:
            block = self.blocks[name]
            x = gradients[name].reshape(count, *flat(self.layout, name))
            factor = scale(name, block.eigenvalues).to(x)
            result[name] = rotate(rotate(x, block.basis) * factor, block.basis, back=True).reshape(
                gradients[name].shape
            )
        return result

    def project(self, gradients: Gradients) -> dict[str, Tensor]:
        """Gradients in the eigenbasis, ``[q, rows, cols]``: where the curvature is diagonal."""
        count = check_gradients(self.layout, gradients, self.kind)
        return {
            name: rotate(gradients[name].reshape(count, *flat(self.layout, name)), self.blocks[name].basis)
            for name in self.layout.names
        }


@dataclass(frozen=True)
class Covariance:
    """Second moment over tokens ``[d, d]`` of one side of a matrix, or its diagonal ``[d]``; ``tokens`` were summed."""

    moment: Tensor
    tokens: int


@dataclass(frozen=True)
class Covariances:
    """Of both sides of every matrix, and how many tokens a document has on average.

    ``left[name]`` and ``right[name]`` are keys of ``sides``: matrices with the same input share one. None is a side of
    width 1, or a vector's.
    """

    layout: ParamLayout
    sides: Mapping[str, Covariance]
    left: Mapping[str, str | None]
    right: Mapping[str, str | None]
    tokens: Mapping[str, float]


@dataclass(frozen=True)
class Eigenbases:
    """The covariances' eigenvectors and eigenvalues by side, and the sides that needed a jitter."""

    covariances: Covariances
    vectors: Mapping[str, Tensor | None]
    values: Mapping[str, Tensor]
    jittered: tuple[str, ...]

    @classmethod
    def of(cls, covariances: Covariances, dtype: torch.dtype = torch.float32) -> Eigenbases:
        """Decompose every side in float64 once, and keep the vectors in ``dtype``."""
        vectors: dict[str, Tensor | None] = {}
        values: dict[str, Tensor] = {}
        jittered: list[str] = []
        for key, side in covariances.sides.items():
            if side.moment.dim() == 1:
                vectors[key], values[key] = None, side.moment.double()
                continue
            try:
                found, basis, jitter = eigenbasis(side.moment)
            except NumericalError as error:
                raise NumericalError(f"{key}: {error}") from error
            vectors[key], values[key] = basis.to(dtype).contiguous(), found.clamp_min(0)
            if jitter:
                jittered.append(key)
        return cls(covariances, vectors, values, tuple(jittered))

    def basis(self, name: str) -> Basis:
        """Both sides' eigenvectors of one parameter."""
        left, right = self.covariances.left[name], self.covariances.right[name]
        return (None if left is None else self.vectors[left], None if right is None else self.vectors[right])

    def kfac(self, damping: Damping) -> KroneckerCurvature:
        """K-FAC: eigenvalues are products of the sides', times the tokens of a document."""
        layout, blocks = self.covariances.layout, dict[str, KroneckerBlock]()
        for name in layout.names:
            rows, cols = flat(layout, name)
            left, right = self.covariances.left[name], self.covariances.right[name]
            a = self.values[left] if left is not None else torch.ones(rows, dtype=torch.float64)
            b = self.values[right] if right is not None else torch.ones(cols, dtype=torch.float64)
            eigenvalues = torch.outer(a, b.to(a)) * self.covariances.tokens[name]
            vectors = self.basis(name)
            like = next((v for v in vectors if v is not None), None)
            blocks[name] = KroneckerBlock(vectors, eigenvalues.to(like.dtype if like is not None else torch.float32))
        return KroneckerCurvature(layout, "kfac", blocks, damping)

    def corrected(self, eigenvalues: Mapping[str, Tensor], damping: Damping) -> KroneckerCurvature:
        """EK-FAC: the same bases with second moments of documents' gradients in them."""
        layout = self.covariances.layout
        blocks = {name: KroneckerBlock(self.basis(name), eigenvalues[name]) for name in layout.names}
        return KroneckerCurvature(layout, "ekfac", blocks, damping)
