"""The Gram curvature is the exact one of the same rows."""

from __future__ import annotations

import pytest
import torch

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping
from rootward.curvature.dense import DenseCurvature
from rootward.curvature.gram import GramCurvature
from tests.curvature.small import LAYOUT, P, close, flat, gradients, randn, second_moment


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5])
@pytest.mark.parametrize("damping", [Damping(), Damping(0.0), Damping(0.0, 1e-4), Damping(0.0, 100.0)])
@pytest.mark.parametrize("count", [1, 4, 70])
def test_it_equals_the_exact_curvature_of_the_same_rows(exponent: float, damping: Damping, count: int):
    rows, x = randn(count, P, seed=2), gradients(6)  # one document, fewer documents than queries, more than parameters
    exact = DenseCurvature.of(LAYOUT, second_moment(rows)).apply(x, exponent, damping)
    found = GramCurvature.of(LAYOUT, rows).apply(x, exponent, damping)
    close(flat(found), flat(exact), 1e-7)


def test_powers_agree_with_one_another():
    curvature, x = GramCurvature.of(LAYOUT, randn(4, P)), gradients()
    close(flat(curvature.apply(curvature.apply(x, -0.5), -0.5)), flat(curvature.apply(x)))
    close(flat(curvature.apply(curvature.apply(x, 0.5), -0.5)), flat(x))


def test_one_document_is_the_closed_form_of_sherman_and_morrison():
    g, x = randn(P, seed=3), flat(gradients())
    found = GramCurvature.of(LAYOUT, g.unsqueeze(0)).apply(gradients(), -1.0, Damping(0.0, 0.5))
    close(flat(found), (x - torch.outer(x @ g, g) / (0.5 + g @ g)) / 0.5)


def test_rows_of_several_labels_are_divided_by_the_documents():
    rows = randn(6, P)
    found = GramCurvature.of(LAYOUT, rows, documents=2)
    close(flat(found.apply(gradients())), flat(GramCurvature.of(LAYOUT, 3**0.5 * rows).apply(gradients())))
    assert found.mean == pytest.approx(float(rows.square().sum()) / 2 / P)
    assert found.damped(Damping(0.0, 2.0)).lam() == 2.0


def test_copies_of_a_row_and_zero_rows_are_no_trouble():
    rows = torch.cat([randn(2, P), randn(2, P), torch.zeros(1, P, dtype=torch.float64)])
    exact = DenseCurvature.of(LAYOUT, second_moment(rows))
    for damping in (Damping(), Damping(0.0)):
        close(
            flat(GramCurvature.of(LAYOUT, rows).apply(gradients(), -1.0, damping)),
            flat(exact.apply(gradients(), -1.0, damping)),
            1e-7,
        )
    nothing = GramCurvature.of(LAYOUT, rows[-1:])
    assert not flat(nothing.apply(gradients())).any()
    close(flat(nothing.apply(gradients(), -1.0, Damping(0.0, 0.5))), 2 * flat(gradients()))


def test_wrong_input_is_refused():
    with pytest.raises(LayoutMismatch, match=r"expected rows \[m, 55\], got \(2, 4\)"):
        GramCurvature.of(LAYOUT, randn(2, 4))
    with pytest.raises(InputError, match="at least one row"):
        GramCurvature.of(LAYOUT, randn(0, P))
    rows = randn(3, P)
    rows[1, 0] = torch.inf
    with pytest.raises(NumericalError, match="row 1 is not finite"):
        GramCurvature.of(LAYOUT, rows)
    other = ParamLayout(("bias", "weight"), ((5,), (5, 9)))
    with pytest.raises(LayoutMismatch, match="expected shape"):
        GramCurvature.of(LAYOUT, randn(3, P)).apply({n: randn(1, *other.shape(n)) for n in other.names})
