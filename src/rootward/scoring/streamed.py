"""Inner products of stored rows with queries, a block at a time: memory is one block, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rootward.core.errors import LayoutMismatch


def streamed_products(
    blocks: Iterable[tuple[int, Tensor]], queries: Tensor, documents: int, *, norms: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``dots[q, n] = queries[q] . rows[n]`` and, where asked, ``norms[n] = |rows[n]|``, in float64.

    Args:
        blocks: (first row, rows ``[n, width]``), any float dtype.
        queries: ``[q, width]``.
        documents: number of rows in all.
        norms: whether the rows' norms are wanted.

    Raises:
        LayoutMismatch: rows and queries of unlike width, or not as many rows as ``documents``.
    """
    dots = torch.zeros(queries.shape[0], documents, dtype=torch.float64)
    lengths = torch.zeros(documents, dtype=torch.float64) if norms else None
    wide, seen = queries.float(), 0
    for first, rows in blocks:
        if rows.shape[1] != queries.shape[1]:
            raise LayoutMismatch(f"expected rows of width {queries.shape[1]}, got {rows.shape[1]}")
        seen += rows.shape[0]
        if first + rows.shape[0] > documents:
            raise LayoutMismatch(f"expected {documents} rows, got at least {first + rows.shape[0]}")
        part = slice(first, first + rows.shape[0])
        values = rows.float()
        dots[:, part] = (wide @ values.T).double()
        if lengths is not None:
            lengths[part] = values.square().sum(1).sqrt().double()
    if seen != documents:
        raise LayoutMismatch(f"expected {documents} rows, got {seen}")
    return dots, lengths
