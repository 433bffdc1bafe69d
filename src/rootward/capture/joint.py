"""Fit the joint part of a `JointCurvature`: one more pass over documents, in the eigenbasis of an EK-FAC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rootward.capture.fit import Fit
from rootward.capture.sinks import BUFFER, BaseSink
from rootward.core.block import Block, Factor, MatrixFactor, widened
from rootward.core.errors import InputError
from rootward.curvature.joint import JointCurvature, largest_entries
from rootward.curvature.kronecker import KroneckerCurvature, flat, rotate

ROWS_PER_ENTRY = 4
"""Gradients that the joint second moments need for each entry; with fewer gradients there are fewer entries."""


class JointMoments(BaseSink):
    """Second moments ``[k, k]`` of chosen entries of documents' gradients in an eigenbasis.

    Only the rows and columns of the bases that some entry uses are rotated into.
    """

    positions = True

    def __init__(self, base: KroneckerCurvature, entries: Mapping[str, Tensor]) -> None:
        super().__init__(base.layout)
        self.base, self.entries = base, entries
        self._names = frozenset(name for name, places in entries.items() if len(places))
        self.documents = 0
        self.moment: Tensor | None = None
        self._columns: dict[str, Tensor] = {}

    def begin(self, block: Block) -> None:
        """Start a block; the same documents with other labels count once."""
        super().begin(block)
        self._columns.clear()
        self.documents += len(block) if block.turn == 0 else 0

    def consume(self, name: str, factors: Sequence[Factor]) -> None:
        """One parameter's entries ``[n, k]`` of the block."""
        wide = [widened(factor) for factor in factors]
        cols = flat(self.layout, name)[1]
        first = wide[0]
        places = self.entries[name].to(first.left.device if isinstance(first, MatrixFactor) else "cpu")
        p, q = places // cols, places % cols
        if len(wide) == 1 and isinstance(first, MatrixFactor):
            self._columns[name] = self._matrix(first, name, p, q)
            return
        found: list[Tensor] = []
        assert self.block is not None
        for n in range(len(self.block)):
            gradient = sum(factor.take(slice(n, n + 1)).gradient() for factor in wide)
            assert isinstance(gradient, Tensor)
            turned = rotate(gradient.reshape(1, *flat(self.layout, name)), self.base.blocks[name].basis)
            found.append(turned[:, p, q])
        self._columns[name] = torch.cat(found)

    def _matrix(self, factor: MatrixFactor, name: str, p: Tensor, q: Tensor) -> Tensor:
        rows, row_of = p.unique(return_inverse=True)
        cols, col_of = q.unique(return_inverse=True)
        left_basis, right_basis = self.base.blocks[name].basis
        left = factor.left[..., rows] if left_basis is None else factor.left @ left_basis[:, rows].to(factor.left)
        right = factor.right[..., cols] if right_basis is None else factor.right @ right_basis[:, cols].to(factor.right)
        if left.shape[1] == 1:
            return left[:, 0, row_of] * right[:, 0, col_of]
        step = max(1, BUFFER // (len(rows) * len(cols)))
        parts = [
            torch.bmm(left[start : start + step].transpose(1, 2), right[start : start + step])[:, row_of, col_of]
            for start in range(0, len(left), step)
        ]
        return torch.cat(parts)

    def end(self) -> None:
        """Add the block's products of entries with entries."""
        names = [name for name in self.layout.names if name in self._names]
        like = next(iter(self._columns.values()))
        rows = torch.cat(
            [
                self._columns[n] if n in self._columns else like.new_zeros(len(like), len(self.entries[n]))
                for n in names
            ],
            1,
        )
        if self.moment is None:
            self.moment = torch.zeros(rows.shape[1], rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.moment.addmm_(rows.T, rows)
        self._columns.clear()
        super().end()

    def merge(self, other: JointMoments) -> None:
        """Add a twin that saw other documents with the same entries."""
        self.layout.require(other.layout, "merge")
        self.documents += other.documents
        if other.moment is not None:
            self.moment = other.moment.clone() if self.moment is None else self.moment + other.moment


def fit_joint(fit: Fit, base: KroneckerCurvature, count: int, documents: int | None = None) -> JointCurvature:
    """Take the ``count`` largest entries of an EK-FAC jointly.

    Args:
        fit: the model, its documents and the labels that the EK-FAC was fitted with.
        base: the EK-FAC.
        count: number of entries; at most a quarter of the gradients there are (documents times labels or draws).
        documents: how many documents to look at, in the order of the fit's sample; all by default.

    Raises:
        InputError: ``count`` below 1.
    """
    if count < 1:
        raise InputError(f"joint: expected at least 1 entry, got {count}")
    labels = fit.labels()
    rows = fit.sample(documents)
    gradients = len(rows) * fit.labels_per_document(labels)
    entries = largest_entries(base, max(1, min(count, gradients // ROWS_PER_ENTRY)))
    sink = JointMoments(base, entries)
    fit.feed(rows, [sink], labels, "joint entries")
    assert sink.moment is not None
    return JointCurvature.of(base, entries, sink.moment / sink.documents)
