"""Low rank and a rest: exact where nothing is left out, and in all powers of what is kept that it has."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.curvature.base import Damping
from rootward.curvature.dense import DenseCurvature
from rootward.curvature.gram import GramCurvature
from rootward.curvature.low_rank import LowRankBlock, LowRankCurvature
from rootward.curvature.solvers import arnoldi
from tests.curvature.small import LAYOUT, P, close, flat, gradients, operator, power, randn, second_moment

ROWS = randn(6, P) * torch.arange(1, 7, dtype=torch.float64).unsqueeze(1)


def kept(curvature: LowRankCurvature) -> Tensor:
    """The matrix as it is kept, by its definition."""
    result = torch.zeros(P, P, dtype=torch.float64)
    for block in curvature.blocks:
        inside = block.rest * torch.eye(block.layout.size, dtype=torch.float64)
        inside += block.vectors.T @ torch.diag(block.values) @ block.vectors
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
    close(curvature.blocks[0].values + curvature.blocks[0].rest, values[:2])
    assert curvature.blocks[0].rest == pytest.approx(float(values[2:].mean()))
    assert curvature.mean == pytest.approx(float(values.mean()))


@pytest.mark.parametrize("by", ["parameter", "whole"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("lam", [1e-6, 0.3])
def test_a_diagonal_rest_has_the_top_pairs_and_the_whole_diagonal(
    by: Literal["parameter", "whole"], rank: int, lam: float
):
    curvature = LowRankCurvature.of_rows(LAYOUT, ROWS, rank, by=by, rest="diagonal")
    expected = torch.zeros(P, P, dtype=torch.float64)
    for part in [slice(0, P)] if by == "whole" else LAYOUT.slices.values():
        matrix = second_moment(ROWS)[part, part]
        values, vectors = torch.linalg.eigh(matrix)
        top = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        expected[part, part] = top + torch.diag(matrix.diagonal() - top.diagonal())
    close(kept(curvature), expected)
    close(expected.diagonal(), second_moment(ROWS).diagonal())
    assert curvature.mean == pytest.approx(float(second_moment(ROWS).trace()) / P)
    found = flat(curvature.apply(gradients(), -1.0, Damping(0.0, lam)))
    close(found, flat(gradients()) @ power(expected, lam, -1.0), 1e-8)
    mean = LowRankCurvature.of_rows(LAYOUT, ROWS, rank, by=by)
    assert not torch.allclose(found, flat(mean.apply(gradients(), -1.0, Damping(0.0, lam))), rtol=0.01)


def test_an_equal_number_in_every_entry_is_the_rest_as_one_number():
    vectors = torch.linalg.qr(randn(P, 3, seed=4))[0].T
    values = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
    rests = 0.7, torch.full((P,), 0.7, dtype=torch.float64)
    one, every = (LowRankCurvature(LAYOUT, (LowRankBlock(LAYOUT, values, vectors, r),), 1) for r in rests)
    assert one.mean == pytest.approx(every.mean)
    for damping in (Damping(0.0), Damping(0.1)):
        close(flat(one.apply(gradients(), -1.0, damping)), flat(every.apply(gradients(), -1.0, damping)), 1e-12)


def test_with_the_full_rank_nothing_is_left_for_the_diagonal():
    exact, found = (
        GramCurvature.of(LAYOUT, ROWS),
        LowRankCurvature.of_rows(LAYOUT, ROWS, 6, by="whole", rest="diagonal"),
    )
    assert not found.blocks[0].diagonal.any()
    close(flat(found.apply(gradients())), flat(exact.apply(gradients())), 1e-8)
    with pytest.raises(InputError, match="expected a damping above 0, or fewer eigenpairs"):
        found.apply(gradients(), -1.0, Damping(0.0))


def test_entries_without_any_gradient_count_nothing_without_damping():
    """The pseudo-inverse: 0 there, and what it was without them elsewhere."""
    rows = ROWS.clone()
    dead = torch.zeros(P, dtype=torch.bool)
    dead[[0, 7, P - 1]] = True
    rows[:, dead] = 0
    curvature = LowRankCurvature.of_rows(LAYOUT, rows, 2, rest="diagonal", damping=Damping(0.0))
    found, matrix = flat(curvature.apply(gradients())), kept(curvature)
    assert not found[:, dead].any()
    alive = matrix[~dead][:, ~dead]
    close(found[:, ~dead], flat(gradients())[:, ~dead] @ torch.linalg.inv(alive), 1e-8)
    nothing = LowRankCurvature.of_rows(LAYOUT, torch.zeros(2, P), 3, rest="diagonal")
    assert not flat(nothing.apply(gradients())).any()


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


def test_a_merge_keeps_the_diagonal():
    whole = LowRankCurvature.of_rows(LAYOUT, ROWS, 1, rest="diagonal")
    parts = [LowRankCurvature.of_rows(LAYOUT, rows, 1, rest="diagonal") for rows in (ROWS[:4], ROWS[4:])]
    close(kept(parts[0].merge(parts[1], 2)), (4 * kept(parts[0]) + 2 * kept(parts[1])) / 6)
    short = kept(parts[0].merge(parts[1], 1))
    close(short.diagonal(), second_moment(ROWS).diagonal())
    assert not torch.allclose(short, kept(whole), rtol=1e-3)  # the pairs are those of what was kept of each half
    other = LowRankCurvature.of_rows(LAYOUT, ROWS[4:], 1)
    close(kept(parts[0].merge(other, 2)), (4 * kept(parts[0]) + 2 * kept(other)) / 6)


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
    diagonal = LowRankCurvature.of_rows(LAYOUT, ROWS, 2, rest="diagonal")
    for exponent in (-0.5, 0.5):
        with pytest.raises(InputError, match=f"power {exponent} of a diagonal and eigenpairs has no closed form"):
            diagonal.apply(gradients(), exponent)
    block = diagonal.blocks[0]
    with pytest.raises(LayoutMismatch, match=r"expected a rest \[50\], got \(3,\)"):
        replace(block, rest=torch.ones(3))
    with pytest.raises(NumericalError, match="expected 0 <= rest"):
        replace(block, rest=-block.diagonal)
    negative = arnoldi(LAYOUT, operator(-second_moment(ROWS)), 6)
    with pytest.raises(NumericalError, match="rest <= every eigenvalue"):
        LowRankCurvature.of_eigenpairs(LAYOUT, negative, documents=6)
