"""Gradients in coordinates in which the optimiser takes plain steps.

Adam moves a parameter by ``- eta g / (sqrt(v) + eps)``. With ``D = (sqrt(v) + eps)^-1/2`` and ``theta = D u`` that is
a plain step in ``u``, where gradients are ``D g``. To keep them factored, the second moments of a matrix are
approximated by a product of its rows' and columns' means (`rank_one`): then ``D`` scales rows and columns, that is
output gradients and inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rootward.capture.sinks import BaseSink
from rootward.core.block import Block, Factor, LookupFactor, MatrixFactor, VectorFactor, widened
from rootward.core.errors import LayoutMismatch
from rootward.core.layout import ParamLayout
from rootward.curvature.kronecker import flat
from rootward.subject.checkpoints import Moments

Scale = tuple[Tensor, Tensor]
"""Factors of a matrix's rows ``[rows]`` and columns ``[cols]``; a vector is one row."""
FLOOR = 1e-12
"""Smallest second moment, over the parameter's mean: where no gradient ever came the scale is of no consequence."""


def rank_one(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the rows ``[rows]``, of the columns ``[cols]`` and of all of a matrix of second moments.

    ``row_i col_j / mean`` is the approximation of rank one that keeps the sums of rows and columns (Adafactor, Shazeer
    & Stern 2018, arXiv:1804.04235, algorithm 1), exact for a matrix of rank one.
    """
    return moments.mean(1), moments.mean(0), moments.mean()


def adam_scales(layout: ParamLayout, moments: Moments) -> dict[str, Scale]:
    """``D`` of every parameter of the layout as rows times columns, from Adam's second moments (bias corrected).

    Raises:
        ArtefactError: the optimiser was SGD. LayoutMismatch: a parameter has no moments.
    """
    values, found = moments.values, dict[str, Scale]()
    for name in layout.names:
        if name not in values:
            raise LayoutMismatch(f"the optimiser's state has no moments of {name}; attribute what was trained only")
        second = values[name][1].double() / (1 - moments.betas[1] ** max(moments.step, 1))
        rows, cols, mean = rank_one(second.reshape(flat(layout, name)))
        mean = mean.clamp_min(torch.finfo(torch.float64).tiny)
        rows, cols = rows.clamp_min(float(mean) * FLOOR) / mean, cols.clamp_min(float(mean) * FLOOR)
        # sqrt(v) + eps with v = rows cols; eps counts as a part of each entry that has no direction
        root = rows.sqrt(), cols.sqrt() + moments.eps
        found[name] = (root[0].rsqrt(), root[1].rsqrt())
    return found


def rescaled(
    layout: ParamLayout, gradients: Mapping[str, Tensor], scales: Mapping[str, Scale], power: float = 1.0
) -> dict[str, Tensor]:
    """``D^power g`` for ``{name: [q, *shape]}``."""
    result: dict[str, Tensor] = {}
    for name in layout.names:
        rows, cols = scales[name]
        value = gradients[name].reshape(-1, *flat(layout, name))
        scale = torch.outer(rows**power, cols**power).to(value)
        result[name] = (value * scale).reshape(gradients[name].shape)
    return result


def rescaled_factor(factor: Factor, scale: Scale) -> Factor:
    """A factor of ``D g``."""
    wide = widened(factor)
    rows, cols = scale
    if isinstance(wide, MatrixFactor):
        return MatrixFactor(wide.left * rows.to(wide.left), wide.right * cols.to(wide.right), wide.transposed)
    if isinstance(wide, LookupFactor):
        own = rows.to(wide.right)[wide.ids].unsqueeze(-1)
        return LookupFactor(wide.ids, wide.right * own * cols.to(wide.right), wide.vocabulary)
    return VectorFactor(wide.rows * cols.to(wide.rows))


class Rescaled:
    """A sink of ``D g`` in place of g: whatever the inner sink makes of gradients, it makes of rescaled ones."""

    modules: tuple[str, ...] = ()
    positions = True

    def __init__(self, inner: BaseSink, scales: Mapping[str, Scale]) -> None:
        self.inner, self.layout, self.scales = inner, inner.layout, scales
        self.backward, self.inputs = inner.backward, inner.inputs

    def wants(self, name: str) -> bool:
        """As the inner sink."""
        return self.inner.wants(name)

    def begin(self, block: Block) -> None:
        """As the inner sink."""
        self.inner.begin(block)

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """Scale, then hand over."""
        self.inner.consume(name, [rescaled_factor(factor, self.scales[name]) for factor in factors])

    def activation(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Wants none."""

    def end(self) -> None:
        """As the inner sink."""
        self.inner.end()
