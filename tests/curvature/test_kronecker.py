"""Kronecker curvatures: rotations, powers, damping, and the cases in which K-FAC is exact."""

from __future__ import annotations

import pytest
import torch

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.core.layout import ParamLayout
from rootward.curvature import kronecker
from rootward.curvature.base import DEFAULT, Damping, check_power, damped_power
from rootward.curvature.kronecker import (
    Covariance,
    Covariances,
    Eigenbases,
    KroneckerBlock,
    KroneckerCurvature,
    eigenbasis,
)

LAYOUT = ParamLayout(("w", "b"), ((5, 4), (5,)))


def orthogonal(d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def curvature(damping: Damping = DEFAULT) -> KroneckerCurvature:
    generator = torch.Generator().manual_seed(7)
    values = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    blocks = {
        "w": KroneckerBlock((orthogonal(5, 0), orthogonal(4, 1)), values),
        "b": KroneckerBlock((None, orthogonal(5, 2)), torch.rand(1, 5, generator=generator, dtype=torch.float64)),
    }
    return KroneckerCurvature(LAYOUT, "ekfac", blocks, damping)


def gradients(count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(count, *LAYOUT.shape(n), generator=generator, dtype=torch.float64) for n in LAYOUT.names}


def dense(c: KroneckerCurvature, name: str, damping: Damping | None = None) -> torch.Tensor:
    """The block as a matrix over the row-major flattened parameter."""
    left, right = c.blocks[name].basis
    rows, cols = c.blocks[name].eigenvalues.shape
    left = torch.eye(rows, dtype=torch.float64) if left is None else left
    right = torch.eye(cols, dtype=torch.float64) if right is None else right
    basis = torch.kron(left, right)
    return basis @ torch.diag(c.blocks[name].eigenvalues.flatten() + c.lam(name, damping)) @ basis.T


@pytest.mark.parametrize("scope", ["block", "whole"])
def test_the_inverse_is_that_of_the_dense_matrix(scope):
    c = curvature(Damping(0.3, 0.01, scope))
    found, x = c.apply(gradients()), gradients()
    for name in LAYOUT.names:
        expected = torch.linalg.solve(dense(c, name), x[name].flatten(1).T).T.reshape(x[name].shape)
        torch.testing.assert_close(found[name], expected)


def test_powers_compose():
    c, x = curvature(), gradients()
    twice = c.apply(c.apply(x, -0.5), -0.5)
    back = c.apply(c.apply(x, 0.5), -0.5)
    once = c.apply(x, -1.0)
    for name in LAYOUT.names:
        torch.testing.assert_close(twice[name], once[name])
        torch.testing.assert_close(back[name], x[name])
        assert not torch.allclose(once[name], x[name])


def test_damping_is_relative_to_the_mean_eigenvalue_of_block_or_whole():
    c = curvature()
    w, b = c.blocks["w"].eigenvalues.mean(), c.blocks["b"].eigenvalues.mean()
    assert c.lam("w", Damping(0.1)) == pytest.approx(0.1 * float(w))
    whole = (20 * w + 5 * b) / 25
    assert c.lam("b", Damping(0.1, 0.5, "whole")) == pytest.approx(0.1 * float(whole) + 0.5)
    assert float(w) != pytest.approx(float(b))


def test_identity_leaves_gradients_as_they_are():
    c, x = KroneckerCurvature.identity(LAYOUT), gradients()
    for power in (-1.0, -0.5, 0.5):
        for name, value in c.apply(x, power).items():
            assert torch.equal(value, x[name])


def test_diagonal_divides_entry_by_entry():
    x = gradients()
    moments = {name: value.square().mean(0) for name, value in x.items()}
    c = KroneckerCurvature.diagonal(LAYOUT, moments, Damping(0.0, 0.5))
    for name, value in c.apply(x).items():
        torch.testing.assert_close(value, x[name] / (moments[name] + 0.5))
    with pytest.raises(NumericalError, match="at least 0"):
        KroneckerCurvature.diagonal(LAYOUT, {**moments, "w": -moments["w"]}, Damping())
    with pytest.raises(LayoutMismatch, match=r"w: expected second moments \(5, 4\), got \(4, 5\)"):
        KroneckerCurvature.diagonal(LAYOUT, {**moments, "w": moments["w"].T}, Damping())


def covariances(inputs: torch.Tensor, outputs: torch.Tensor) -> Covariances:
    layout = ParamLayout(("w",), ((outputs.shape[1], inputs.shape[1]),))
    n = len(inputs)
    sides = {"s": Covariance(outputs.T @ outputs / n, n), "a": Covariance(inputs.T @ inputs / n, n)}
    return Covariances(layout, sides, {"w": "s"}, {"w": "a"}, {"w": 1.0})


def test_kfac_is_exact_where_inputs_and_output_gradients_are_independent():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    g = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    # every input with every output gradient: independent exactly
    inputs, outputs = a.repeat_interleave(4, 0), g.repeat(6, 1)
    rows = torch.einsum("no,ni->noi", outputs, inputs).flatten(1)
    exact = rows.T @ rows / len(rows)
    bases = Eigenbases.of(covariances(inputs, outputs), torch.float64)
    kfac = bases.kfac(Damping(0.0))
    torch.testing.assert_close(dense(kfac, "w"), exact)
    basis = torch.kron(bases.basis("w")[0], bases.basis("w")[1])
    corrected = ((rows @ basis) ** 2).mean(0).view(2, 3)
    ekfac = bases.corrected({"w": corrected}, Damping(0.0))
    torch.testing.assert_close(dense(ekfac, "w"), exact)


def test_ekfac_is_closer_to_the_exact_matrix_than_kfac():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    outputs = torch.randn(200, 3, generator=generator, dtype=torch.float64) * inputs[:, :1].abs() ** 2  # dependent
    rows = torch.einsum("no,ni->noi", outputs, inputs).flatten(1)
    exact = rows.T @ rows / len(rows)
    bases = Eigenbases.of(covariances(inputs, outputs), torch.float64)
    basis = torch.kron(bases.basis("w")[0], bases.basis("w")[1])
    ekfac = bases.corrected({"w": ((rows @ basis) ** 2).mean(0).view(3, 4)}, Damping(0.0))
    kfac = bases.kfac(Damping(0.0))
    assert (dense(ekfac, "w") - exact).norm() < 0.9 * (dense(kfac, "w") - exact).norm()


def test_rank_deficient_and_zero_matrices_have_finite_inverses():
    one = torch.zeros(6, 3, dtype=torch.float64)
    one[:, 0] = 1.0
    for inputs in (one, torch.zeros_like(one)):
        c = Eigenbases.of(covariances(inputs, torch.ones(6, 2, dtype=torch.float64)), torch.float64).kfac(Damping(0.1))
        found = c.apply({"w": torch.ones(1, 2, 3, dtype=torch.float64)})["w"]
        assert bool(torch.isfinite(found).all())
        assert (c.dead == ("w",)) == (not inputs.any())
        if c.dead:
            assert not found.any()  # nothing is known there: no document's gradient reaches it


def test_an_eigendecomposition_that_fails_is_retried_with_a_jitter(monkeypatch):
    real, calls = torch.linalg.eigh, []

    def failing(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    matrix = torch.diag(torch.tensor([1.0, 2.0]))
    values, vectors, jittered = eigenbasis(matrix)
    assert jittered and len(calls) == 2 and calls[0].dtype == torch.float64
    torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, matrix.double())
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (_ for _ in ()).throw(torch.linalg.LinAlgError("never")))
    with pytest.raises(NumericalError, match="width 2 failed, also with a jitter"):
        eigenbasis(matrix)


def test_bad_input_is_named():
    c, x = curvature(), gradients()
    with pytest.raises(InputError, match="power: expected -1, -1/2 or 1/2, got 2"):
        check_power(2)
    with pytest.raises(InputError, match="power"):
        c.apply(x, 1.0)
    with pytest.raises(LayoutMismatch, match="expected gradients of 2 parameters, got 1"):
        c.apply({"w": x["w"]})
    with pytest.raises(LayoutMismatch, match=r"w: expected shape \(3, 5, 4\), got \(3, 4, 5\)"):
        c.apply({**x, "w": x["w"].transpose(1, 2)})
    with pytest.raises(NumericalError, match="the gradient of b is not finite"):
        c.apply({**x, "b": x["b"] * torch.nan})
    with pytest.raises(NumericalError, match="a covariance is not finite"):
        eigenbasis(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]))
    with pytest.raises(InputError, match="damping: expected numbers of at least 0"):
        Damping(-0.1)
    with pytest.raises(LayoutMismatch, match=r"w: expected eigenvalues \(5, 4\)"):
        KroneckerCurvature(LAYOUT, "ekfac", {**c.blocks, "w": c.blocks["b"]})


def test_a_table_keeps_its_rows_and_a_vector_is_one_row():
    layout = ParamLayout(("e",), ((7, 3),))
    inputs = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([0.2, 0.1, 0.0, 0.3, 0.1, 0.1, 0.2], dtype=torch.float64)
    sides = {"l": Covariance(counts, 20), "r": Covariance(inputs.T @ inputs / 20, 20)}
    bases = Eigenbases.of(Covariances(layout, sides, {"e": "l"}, {"e": "r"}, {"e": 2.0}), torch.float64)
    assert bases.basis("e")[0] is None
    expected = torch.kron(torch.diag(counts), inputs.T @ inputs / 20) * 2
    torch.testing.assert_close(dense(bases.kfac(Damping(0.0)), "e"), expected)


def test_power_of_eigenvalues_below_zero_counts_them_as_zero():
    values = torch.tensor([-1e-9, 0.0, 4.0])
    assert damped_power(values, 0.0, -0.5).tolist() == [0.0, 0.0, 0.5]
    assert damped_power(values, 1.0, -1.0).tolist() == pytest.approx([1.0, 1.0, 0.2])


def test_rotation_and_back_is_the_identity():
    x = gradients()["w"]
    basis = (orthogonal(5, 0), orthogonal(4, 1))
    torch.testing.assert_close(kronecker.rotate(kronecker.rotate(x, basis), basis, back=True), x)
