"""EK-FAC with some entries taken jointly: the exact matrix with all of them, EK-FAC with none of consequence."""

from __future__ import annotations

import pytest
import torch

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping
from rootward.curvature.joint import JointCurvature, largest_entries
from rootward.curvature.kronecker import KroneckerBlock, KroneckerCurvature

LAYOUT = ParamLayout(("w", "b"), ((4, 3), (4,)))
WHOLE = Damping(0.3, 0.0, "whole")


def orthogonal(d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def rows(count: int = 40) -> torch.Tensor:
    """Gradients ``[n, 16]`` whose entries are correlated, within a parameter and between the two."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(16, 16, generator=g, dtype=torch.float64)
    return torch.randn(count, 16, generator=g, dtype=torch.float64) @ mix


def basis() -> torch.Tensor:
    """The eigenbasis of all parameters, ``[16, 16]``."""
    found = torch.zeros(16, 16, dtype=torch.float64)
    found[:12, :12] = torch.kron(orthogonal(4, 1), orthogonal(3, 2))
    found[12:, 12:] = orthogonal(4, 3)
    return found


def ekfac() -> KroneckerCurvature:
    squares = (rows() @ basis()).square().mean(0)
    blocks = {
        "w": KroneckerBlock((orthogonal(4, 1), orthogonal(3, 2)), squares[:12].view(4, 3)),
        "b": KroneckerBlock((None, orthogonal(4, 3)), squares[12:].view(1, 4)),
    }
    return KroneckerCurvature(LAYOUT, "ekfac", blocks, WHOLE)


def joint(count: int) -> JointCurvature:
    entries = largest_entries(ekfac(), count)
    places = torch.cat([entries["w"], 12 + entries["b"]])
    turned = (rows() @ basis())[:, places]
    return JointCurvature.of(ekfac(), entries, turned.T @ turned / len(turned))


def gradients(q: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return {n: torch.randn(q, *LAYOUT.shape(n), generator=g, dtype=torch.float64) for n in LAYOUT.names}


def flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([named[n].flatten(1) for n in LAYOUT.names], 1)


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.5])
def test_with_all_entries_it_is_the_exact_matrix(power):
    exact = rows().T @ rows() / 40
    values, vectors = torch.linalg.eigh(exact)
    lam = 0.3 * float(values.mean())
    expected = flat(gradients()) @ vectors @ torch.diag((values + lam) ** power) @ vectors.T
    torch.testing.assert_close(flat(joint(16).apply(gradients(), power)), expected)


@pytest.mark.parametrize("count", [1, 5, 9])
def test_it_is_the_matrix_with_the_other_entries_diagonal(count):
    chosen = joint(count)
    places = torch.cat([chosen.entries["w"], 12 + chosen.entries["b"]])
    assert len(places) == count
    turned = rows() @ basis()
    matrix = torch.diag(turned.square().mean(0))
    matrix[places[:, None], places[None, :]] = turned[:, places].T @ turned[:, places] / 40
    lam = 0.3 * float(matrix.diagonal().mean())
    dense = basis() @ (matrix + lam * torch.eye(16, dtype=torch.float64)) @ basis().T
    torch.testing.assert_close(flat(chosen.apply(gradients())), torch.linalg.solve(dense, flat(gradients()).T).T)


def test_one_entry_alone_is_ekfac_and_more_come_closer_to_the_exact_inverse():
    x = gradients()
    torch.testing.assert_close(flat(joint(1).apply(x)), flat(ekfac().apply(x)))
    exact = flat(joint(16).apply(x))
    errors = [float((flat(joint(k).apply(x)) - exact).norm()) for k in (1, 8, 14, 16)]
    assert errors[0] > errors[2] > errors[3] == 0


def test_powers_compose():
    x, c = gradients(), joint(6)
    torch.testing.assert_close(flat(c.apply(c.apply(x, -0.5), -0.5)), flat(c.apply(x)))
    torch.testing.assert_close(flat(c.apply(c.apply(x, 0.5), -0.5)), flat(x))


def test_the_largest_entries_are_chosen_over_all_parameters():
    every = torch.cat([ekfac().blocks[n].eigenvalues.flatten() for n in LAYOUT.names])
    entries = largest_entries(ekfac(), 7)
    chosen = torch.cat([entries["w"], 12 + entries["b"]])
    assert set(chosen.tolist()) == set(every.topk(7).indices.tolist())
    assert len(torch.cat(list(largest_entries(ekfac(), 99).values()))) == 16


def test_bad_input_is_named():
    c = joint(4)
    with pytest.raises(InputError, match="scope = 'whole'"):
        c.apply(gradients(), -1.0, Damping(0.1))
    with pytest.raises(InputError, match="power"):
        c.apply(gradients(), 2.0)
    with pytest.raises(LayoutMismatch, match=r"expected second moments \(4, 4\), got \(3, 3\)"):
        JointCurvature.of(ekfac(), c.entries, torch.eye(3))
    with pytest.raises(LayoutMismatch, match="expected entries of 2 parameters, got 1"):
        JointCurvature.of(ekfac(), {"w": torch.arange(4)}, torch.eye(4))
    with pytest.raises(NumericalError, match="not finite"):
        JointCurvature.of(ekfac(), c.entries, torch.full((4, 4), torch.nan))
