"""Low rank and a number for the rest: exact where nothing is left out, and in all powers of what is kept."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.curvature.base import Damping
from rootward.curvature.dense import DenseCurvature
from rootward.curvature.gram import GramCurvature
from rootward.curvature.low_rank import LowRankCurvature
from rootward.curvature.solvers import arnoldi
from tests.curvature.small import LAYOUT, P, close, flat, gradients, operator, power, randn, second_moment

ROWS = randn(6, P) * torch.arange(1, 7, dtype=torch.float64).unsqueeze(1)


def kept(curvature: LowRankCurvature) -> Tensor:
    """The matrix as it is kept, by its definition."""
    result = torch.zeros(P, P, dtype=torch.float64)
    for block in curvature.blocks:
        inside = block.rest * torch.eye(block.layout.size, dtype=torch.float64)
        inside += block.vectors.T @ torch.diag(block.values - block.rest) @ block.vectors
        names = block.layout.names
        part = LAYOUT.slices[names[0]] if len(names) == 1 else slice(0, P)
        result[part, part] = inside
    return result


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5])
@pytest.mark.parametrize("by", ["parameter", "whole"])
@pytest.mark.parametrize("rank", [2, 6])
def test_every_power_is_that_of_the_matrix_as_it_is_kept(exponent: float, by: Literal["parameter", "whole"], rank: int):
    curvature = LowRankCurvature.of_rows(LAYOUT, ROWS, rank, by=by)
    found = curvature.apply(gradients(), exponent, Damping(0.0, 0.3))
    close(flat(found), flat(gradients()) @ power(kept(curvature), 0.3, exponent), 1e-8)


@pytest.mark.parametrize("damping", [Damping(), Damping(0.0), Damping(0.0, 0.5)])
def test_with_the_full_rank_nothing_is_lost(damping: Damping):
    exact = GramCurvature.of(LAYOUT, ROWS)
    found = LowRankCurvature.of_rows(LAYOUT, ROWS, 6, by="whole")
    assert found.blocks[0].rest == 0
    for exponent in (-1.0, -0.5, 0.5):
        a, b = (c.apply(gradients(), exponent, damping) for c in (found, exact))
        close(flat(a), flat(b), 1e-8)


def test_blocks_are_those_of_each_parameter_with_their_own_damping():
    found = LowRankCurvature.of_rows(LAYOUT, ROWS, 6).apply(gradients(), -1.0, Damping(0.1))
    for name in LAYOUT.names:
        matrix = second_moment(ROWS[:, LAYOUT.slices[name]])
        lam = 0.1 * float(matrix.trace()) / len(matrix)
        close(found[name].flatten(1), gradients()[name].flatten(1) @ power(matrix, lam, -1.0), 1e-8)
    whole = LowRankCurvature.of_rows(LAYOUT, ROWS, 6).apply(gradients(), -1.0, Damping(0.1, scope="whole"))
    lam = 0.1 * float(second_moment(ROWS).trace()) / P
    matrix = second_moment(ROWS[:, LAYOUT.slices["bias"]])
    close(whole["bias"], gradients()["bias"] @ power(matrix, lam, -1.0), 1e-8)


def test_truncation_keeps_the_largest_pairs_and_the_trace():
    values = torch.linalg.eigvalsh(second_moment(ROWS)).flip(0)
    curvature = LowRankCurvature.of_rows(LAYOUT, ROWS, 2, by="whole")
    close(curvature.blocks[0].values, values[:2])
    assert curvature.blocks[0].rest == pytest.approx(float(values[2:].mean()))
    assert curvature.mean == pytest.approx(float(values.mean()))


def test_eigenpairs_of_products_give_the_same_curvature():
    matrix = second_moment(ROWS)
    pairs = arnoldi(LAYOUT, operator(matrix), P)
    found = LowRankCurvature.of_eigenpairs(LAYOUT, pairs.largest(2), documents=6, mean=float(matrix.trace()) / P)
    expected = LowRankCurvature.of_rows(LAYOUT, ROWS, 2, by="whole")
    close(flat(found.apply(gradients())), flat(expected.apply(gradients())), 1e-8)
    whole = LowRankCurvature.of_eigenpairs(LAYOUT, pairs, documents=6)
    close(flat(whole.apply(gradients())), flat(DenseCurvature.of(LAYOUT, matrix).apply(gradients())), 1e-8)


def test_a_merge_is_the_curvature_of_all_documents():
    parts = [LowRankCurvature.of_rows(LAYOUT, rows, 6, by="whole") for rows in (ROWS[:4], ROWS[4:])]
    merged = parts[0].merge(parts[1], 6)
    assert merged.documents == 6
    close(kept(merged), second_moment(ROWS))
    # with a rest on both sides it is the mean of what was kept, weighted by the documents
    parts = [LowRankCurvature.of_rows(LAYOUT, rows, 1) for rows in (ROWS[:4], ROWS[4:])]
    assert min(block.rest for part in parts for block in part.blocks) > 0
    close(kept(parts[0].merge(parts[1], 2)), (4 * kept(parts[0]) + 2 * kept(parts[1])) / 6)
    short = parts[0].merge(parts[1], 1)
    assert [len(block.values) for block in short.blocks] == [1, 1]
    assert float(kept(short).trace()) == pytest.approx(float(kept(parts[0].merge(parts[1], 2)).trace()))


def test_a_zero_matrix_has_no_pairs():
    nothing = LowRankCurvature.of_rows(LAYOUT, torch.zeros(2, P), 3)
    assert [len(block.values) for block in nothing.blocks] == [0, 0]
    assert not flat(nothing.apply(gradients())).any()
    close(flat(nothing.apply(gradients(), -1.0, Damping(0.0, 0.5))), 2 * flat(gradients()))
    both = nothing.merge(LowRankCurvature.of_rows(LAYOUT, ROWS, 6), 6)
    close(kept(both), 6 / 8 * kept(LowRankCurvature.of_rows(LAYOUT, ROWS, 6)))


def test_equal_eigenvalues_are_no_trouble():
    alike = LowRankCurvature.of_rows(LAYOUT, torch.eye(P, dtype=torch.float64), 3, by="whole")
    close(kept(alike), torch.eye(P, dtype=torch.float64) / P)


def test_wrong_input_is_refused():
    with pytest.raises(LayoutMismatch, match="expected rows"):
        LowRankCurvature.of_rows(LAYOUT, randn(2, 3), 2)
    with pytest.raises(InputError, match="expected rows, documents and a rank"):
        LowRankCurvature.of_rows(LAYOUT, ROWS, 0)
    with pytest.raises(NumericalError, match="not finite"):
        LowRankCurvature.of_rows(LAYOUT, ROWS * torch.nan, 2)
    with pytest.raises(LayoutMismatch, match="the same blocks"):
        LowRankCurvature.of_rows(LAYOUT, ROWS, 2).merge(LowRankCurvature.of_rows(LAYOUT, ROWS, 2, by="whole"), 2)
    negative = arnoldi(LAYOUT, operator(-second_moment(ROWS)), 6)
    with pytest.raises(NumericalError, match="rest <= every eigenvalue"):
        LowRankCurvature.of_eigenpairs(LAYOUT, negative, documents=6)
