"""The curvature of projected rows against the dense matrix, in both of its forms."""

from __future__ import annotations

import pytest
import torch

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.curvature import projected
from rootward.curvature.base import Damping
from rootward.curvature.dense import DenseCurvature
from rootward.curvature.gram import GramCurvature
from rootward.curvature.projected import ProjectedCurvature

PARTS = [slice(0, 4), slice(4, 12), slice(12, 13)]


def rows(n: int, width: int = 13, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, width).double()


def naive(r: torch.Tensor, parts: list[slice], damping: Damping, power: float) -> torch.Tensor:
    """``(G + lam)^power`` as a matrix; undamped the pseudo-inverse's."""
    full = r.T @ r / len(r)
    whole, result = float(full.diagonal().mean()), torch.zeros_like(full)
    for part in parts:
        block = full[part, part]
        lam = damping.of(float(block.diagonal().mean()), whole)
        values, vectors = torch.linalg.eigh(block)
        values = torch.where(values < 1e-10 * values.max(), 0.0, values) + lam
        raised = torch.where(values > 0, values.clamp_min(1e-300) ** power, 0.0)
        result[part, part] = (vectors * raised) @ vectors.T
    return result


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5])
@pytest.mark.parametrize("damping", [Damping(0.1), Damping(0.0), Damping(0.3, 0.2, "whole")])
@pytest.mark.parametrize("n", [3, 6, 40])
def test_against_the_dense_matrix(n: int, damping: Damping, power: float):
    r, x = rows(n), rows(5, seed=1)
    for parts in (None, PARTS):
        found = ProjectedCurvature.of(r, parts, damping).apply(x, power)
        expected = x @ naive(r, parts or [slice(0, 13)], damping, power)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_few_rows_and_many_rows_take_different_ways_to_the_same_matrix():
    r, x = rows(9), rows(4, seed=1)
    few, many = ProjectedCurvature.of(r), ProjectedCurvature.of(torch.cat([r, r]))  # copies: the same mean
    assert isinstance(few.blocks[0][1], GramCurvature)
    assert isinstance(many.blocks[0][1], DenseCurvature)
    torch.testing.assert_close(few.apply(x), many.apply(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(few.eigenvalues, many.eigenvalues)
    assert len(few.eigenvalues) == 9
    assert few.mean == pytest.approx(float(r.square().mean()))


def test_minus_a_half_twice_is_minus_one():
    r, x = rows(7), rows(3, seed=2)
    curvature = ProjectedCurvature.of(r, PARTS)
    torch.testing.assert_close(curvature.apply(curvature.apply(x, -0.5), -0.5), curvature.apply(x))


def test_large_damping_leaves_the_direction_alone():
    r, x = rows(7), rows(3, seed=2)
    found = ProjectedCurvature.of(r).damped(Damping(0.0, 1e9)).apply(x)
    torch.testing.assert_close(found * 1e9, x, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(LayoutMismatch, match=r"expected rows \[n, width\]"):
        ProjectedCurvature.of(torch.zeros(3))
    with pytest.raises(InputError, match="at least one row"):
        ProjectedCurvature.of(torch.zeros(0, 3))
    with pytest.raises(NumericalError, match="row 1 is not finite"):
        ProjectedCurvature.of(torch.tensor([[1.0], [torch.nan]]))
    for parts in ([slice(0, 5)], [slice(0, 5), slice(6, 13)], [slice(5, 13), slice(0, 5)]):
        with pytest.raises(LayoutMismatch, match="cover 13 columns"):
            ProjectedCurvature.of(rows(3), parts)
    with pytest.raises(LayoutMismatch, match=r"expected rows \[q, 13\], got \(2, 12\)"):
        ProjectedCurvature.of(rows(3)).apply(torch.zeros(2, 12))
    monkeypatch.setattr(projected, "LARGEST", 4)
    ProjectedCurvature.of(rows(4))
    ProjectedCurvature.of(rows(9), [slice(n, n + 1) for n in range(13)])
    with pytest.raises(InputError, match="at most 4 rows or columns in a block, got 5"):
        ProjectedCurvature.of(rows(5))
