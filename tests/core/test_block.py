"""Factors against dense gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rootward.core.block import (
    Factor,
    LookupFactor,
    MatrixFactor,
    VectorFactor,
    factor_inner,
    total_gradient,
    widened,
)
from rootward.core.errors import LayoutMismatch

N, T, ROWS, COLS = 3, 4, 6, 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(seed: int = 0) -> MatrixFactor:
    return MatrixFactor(normal(N, T, ROWS, seed=seed), normal(N, T, COLS, seed=seed + 100))


def lookup(seed: int = 0) -> LookupFactor:
    ids = torch.randint(ROWS, (N, T), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = ids[:, 0]  # a token twice in a document
    return LookupFactor(ids, normal(N, T, COLS, seed=seed + 200), ROWS)


def vector(seed: int = 0) -> VectorFactor:
    return VectorFactor(normal(N, T, COLS, seed=seed + 300))


def dense(factor: Factor) -> Tensor:
    """Token by token, entry by entry."""
    result = torch.zeros(N, *factor.gradient_shape(), dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            if isinstance(factor, MatrixFactor):
                result[n] += torch.outer(factor.left[n, t], factor.right[n, t])
            elif isinstance(factor, LookupFactor):
                result[n, factor.ids[n, t]] += factor.right[n, t]
            else:
                result[n] += factor.rows[n, t]
    return result


FACTORS = [matrix(), lookup(), vector()]


@pytest.mark.parametrize("factor", FACTORS, ids=lambda f: type(f).__name__)
def test_gradient_is_the_sum_over_tokens(factor: Factor):
    torch.testing.assert_close(factor.gradient(), dense(factor))


@pytest.mark.parametrize("factor", FACTORS, ids=lambda f: type(f).__name__)
def test_token_products_sum_to_the_product_with_the_gradient(factor: Factor):
    query = normal(2, *factor.gradient_shape(), seed=7)
    each = factor.dot_tokens(query)
    assert each.shape == (2, N, T)
    expected = query.flatten(1) @ dense(factor).flatten(1).T
    torch.testing.assert_close(each.sum(-1), expected)


@pytest.mark.parametrize("factor", FACTORS, ids=lambda f: type(f).__name__)
def test_take_gives_the_documents_of_a_slice(factor: Factor):
    torch.testing.assert_close(factor.take(slice(1, 3)).gradient(), dense(factor)[1:3])


@pytest.mark.parametrize("a", [matrix(1), lookup(1)], ids=["matrix", "lookup"])
@pytest.mark.parametrize("b", [matrix(2), lookup(2)], ids=["matrix", "lookup"])
def test_inner_products_without_gradients(a: Factor, b: Factor):
    torch.testing.assert_close(factor_inner(a, b), (dense(a) * dense(b)).sum((1, 2)))


def test_inner_products_of_vectors():
    a, b = vector(1), vector(2)
    torch.testing.assert_close(factor_inner(a, b), (dense(a) * dense(b)).sum(1))
    with pytest.raises(LayoutMismatch, match="a vector and a matrix"):
        factor_inner(a, matrix())


def test_a_parameter_that_is_used_twice_has_the_sum():
    found = total_gradient({"tied": [matrix(), lookup()], "bias": [vector()]})
    torch.testing.assert_close(found["tied"], dense(matrix()) + dense(lookup()))
    torch.testing.assert_close(found["bias"], dense(vector()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_widened_before_summing_and_the_rest_is_left(dtype: torch.dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m, e, v = matrix(), lookup(), vector()
    a = widened(MatrixFactor(m.left.to(dtype), m.right.to(dtype), True))
    b = widened(LookupFactor(e.ids, e.right.to(dtype), ROWS))
    c = widened(VectorFactor(v.rows.to(dtype)))
    assert isinstance(a, MatrixFactor)
    assert a.transposed
    assert [x.gradient().dtype for x in (a, b, c)] == [wide] * 3
