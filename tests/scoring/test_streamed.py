"""Streamed products against the whole matrix."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rootward.core.errors import LayoutMismatch
from rootward.scoring.streamed import streamed_products

ROWS = torch.randn(11, 6, generator=torch.Generator().manual_seed(0))
QUERIES = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
DENSE = QUERIES.double() @ ROWS.double().T
LENGTHS = ROWS.double().norm(dim=1)


def cut(rows: Tensor, borders: list[int]) -> list[tuple[int, Tensor]]:
    edges = sorted({0, len(rows), *borders})
    return [(a, rows[a:b]) for a, b in pairwise(edges)]


@given(st.lists(st.integers(0, 11), max_size=6), st.booleans())
def test_any_partition_gives_the_dense_product(borders: list[int], backwards: bool):
    blocks = cut(ROWS, borders)
    dots, norms = streamed_products(blocks[::-1] if backwards else blocks, QUERIES, 11, norms=True)
    assert dots.dtype == torch.float64
    assert norms is not None
    torch.testing.assert_close(dots, DENSE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms, LENGTHS, rtol=1e-5, atol=1e-5)


def test_norms_only_where_asked():
    assert streamed_products([(0, ROWS)], QUERIES, 11)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_of_rows_are_summed_in_float32(dtype: torch.dtype):
    rows = ROWS.to(dtype)
    dots, norms = streamed_products(cut(rows, [4]), QUERIES.double(), 11, norms=True)
    assert norms is not None
    torch.testing.assert_close(dots, QUERIES.double() @ rows.double().T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms, rows.double().norm(dim=1), rtol=1e-5, atol=1e-5)


def test_half_rows_do_not_overflow_in_the_sum():
    rows = torch.full((2, 6), 30000.0, dtype=torch.float16)
    dots, norms = streamed_products([(0, rows)], torch.ones(1, 6), 2, norms=True)
    assert dots.tolist() == [[180000.0, 180000.0]]
    assert norms is not None
    torch.testing.assert_close(norms, torch.full((2,), 30000.0 * 6**0.5, dtype=torch.float64))


def test_unlike_widths_are_refused():
    with pytest.raises(LayoutMismatch, match="width 6, got 5"):
        streamed_products([(0, ROWS), (11, ROWS[:, :5])], QUERIES, 22)


@pytest.mark.parametrize("documents", [10, 12])
def test_rows_that_are_missing_or_too_many_are_refused(documents: int):
    with pytest.raises(LayoutMismatch, match=f"{documents} rows"):
        streamed_products([(0, ROWS)], QUERIES, documents)
