"""The exact curvature against plain linear algebra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rootward.core.errors import ArtefactError, InputError, LayoutMismatch, NumericalError, StorageError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping
from rootward.curvature.dense import DenseCurvature
from tests.curvature.small import LAYOUT, P, close, flat, gradients, power, randn, second_moment

G = second_moment(randn(80, P))
NONE = Damping(0.0)


def hessian() -> Tensor:
    matrix = randn(P, P, seed=5)
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_powers_are_those_of_the_matrix(exponent: float, lam: float):
    found = DenseCurvature.of(LAYOUT, G).apply(gradients(), exponent, Damping(0.0, lam))
    assert {n: tuple(v.shape) for n, v in found.items()} == {"weight": (3, 5, 10), "bias": (3, 5)}
    close(flat(found), flat(gradients()) @ power(G, lam, exponent), 1e-7)


def test_the_power_minus_one_half_twice_is_the_inverse_and_one_half_goes_back():
    curvature, x = DenseCurvature.of(LAYOUT, G), gradients()
    close(flat(curvature.apply(curvature.apply(x, -0.5), -0.5)), flat(curvature.apply(x, -1.0)))
    close(flat(curvature.apply(curvature.apply(x, 0.5), -0.5)), flat(x))


def test_damping_is_relative_to_the_mean_eigenvalue_in_either_scope():
    curvature, x = DenseCurvature.of(LAYOUT, G), gradients()
    lam = 0.1 * float(G.trace()) / P + 0.02
    expected = flat(x) @ power(G, lam, -1.0)
    for scope in ("block", "whole"):
        close(flat(curvature.apply(x, -1.0, Damping(0.1, 0.02, scope))), expected)
    close(flat(curvature.damped(Damping(0.1, 0.02)).apply(x)), expected)
    assert curvature.lam() == pytest.approx(0.1 * float(G.trace()) / P)


def test_one_document_is_the_closed_form_of_sherman_and_morrison():
    g, x = randn(P, seed=3), flat(gradients())
    found = DenseCurvature.of(LAYOUT, torch.outer(g, g)).apply(gradients(), -1.0, Damping(0.0, 0.5))
    expected = (x - torch.outer(x @ g, g) / (0.5 + g @ g)) / 0.5
    close(flat(found), expected)


def test_without_damping_a_singular_matrix_has_the_pseudo_inverse():
    rows, x = randn(4, P), gradients()
    singular = second_moment(rows)
    curvature = DenseCurvature.of(LAYOUT, singular)
    found = flat(curvature.apply(x, -1.0, NONE))
    close(found, flat(x) @ torch.linalg.pinv(singular, hermitian=True, rtol=1e-10), 1e-7)
    half = curvature.apply(curvature.apply(x, -0.5, NONE), 0.5, NONE)
    close(flat(half), flat(x) @ torch.linalg.pinv(rows) @ rows, 1e-7)  # the projection onto the rows


def test_the_zero_matrix_gives_nothing_or_what_the_damping_says():
    zero = DenseCurvature.of(LAYOUT, torch.zeros(P, P, dtype=torch.float64))
    assert not flat(zero.apply(gradients())).any()
    close(flat(zero.apply(gradients(), -1.0, Damping(0.1, 0.5))), 2 * flat(gradients()))


def test_a_hessian_keeps_its_negative_eigenvalues_and_says_so():
    matrix, x = hessian(), gradients()
    curvature = DenseCurvature.of(LAYOUT, matrix, "hessian", Damping(0.0, 0.01))
    damped = matrix + 0.01 * torch.eye(P, dtype=torch.float64)
    close(flat(curvature.apply(x)), flat(x) @ torch.linalg.inv(damped), 1e-7)
    assert any(f"of {P} eigenvalues below 0" in note for note in curvature.remarks())
    with pytest.raises(InputError, match=r"power -0.5 of a Hessian.*below 0.*raise the damping"):
        curvature.apply(x, -0.5)
    # once the damping makes it positive there are roots, and they are not those of a clamped matrix
    enough = Damping(0.0, 1.01 * float(-torch.linalg.eigvalsh(matrix).min()) + 1)
    assert curvature.remarks(enough) == ()
    half = curvature.apply(curvature.apply(x, -0.5, enough), -0.5, enough)
    close(flat(half), flat(x) @ power(matrix, enough.absolute, -1.0), 1e-7)
    assert curvature.mean == pytest.approx(float(torch.linalg.eigvalsh(matrix).abs().mean()))


def test_a_negative_matrix_that_is_not_called_a_hessian_is_refused():
    with pytest.raises(NumericalError, match=r"no negative eigenvalue of a ggn matrix.*source = 'hessian'"):
        DenseCurvature.of(LAYOUT, hessian())


def test_single_precision_comes_back_as_it_was_given():
    found = DenseCurvature.of(LAYOUT, G).apply({n: v.float() for n, v in gradients().items()})
    assert {v.dtype for v in found.values()} == {torch.float32}


def test_a_failed_decomposition_is_repeated_with_a_jitter_and_reported(monkeypatch: pytest.MonkeyPatch):
    real, calls = torch.linalg.eigh, [0]

    def fails(matrix: Tensor, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    curvature = DenseCurvature.of(LAYOUT, G)
    assert "jitter" in curvature.remarks()[0]
    close(flat(curvature.apply(gradients())), flat(DenseCurvature.of(LAYOUT, G).apply(gradients())), 1e-5)

    def always(matrix: Tensor, **options: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", always)
    with pytest.raises(NumericalError, match="failed, also with a jitter"):
        DenseCurvature.of(LAYOUT, G)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path):
    path = tmp_path / "deep" / "exact.safetensors"
    first = DenseCurvature.of(LAYOUT, hessian(), "hessian", Damping(0.2, 0.1, "whole"))
    first.save(path)
    second = DenseCurvature.load(path, LAYOUT)
    assert (second.source, second.damping, second.notes) == (first.source, first.damping, first.notes)
    assert torch.equal(flat(second.apply(gradients())), flat(first.apply(gradients())))
    assert [p.name for p in path.parent.iterdir()] == ["exact.safetensors"]
    first.save(path)  # over the old one


def test_files_of_another_layout_or_that_are_damaged_are_refused(tmp_path: Path):
    path = tmp_path / "exact.safetensors"
    DenseCurvature.of(LAYOUT, G).save(path)
    with pytest.raises(LayoutMismatch, match="exact curvature .*expected parameter layout"):
        DenseCurvature.load(path, ParamLayout(("weight", "bias"), ((10, 5), (5,))))
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ArtefactError, match="expected an exact curvature at"):
        DenseCurvature.load(path, LAYOUT)
    with pytest.raises(ArtefactError, match="expected an exact curvature at"):
        DenseCurvature.load(tmp_path / "none", LAYOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        DenseCurvature.of(LAYOUT, G).save(tmp_path / "file" / "exact.safetensors")


def test_wrong_input_is_refused():
    with pytest.raises(LayoutMismatch, match=r"expected a matrix \[55, 55\], got \(4, 4\)"):
        DenseCurvature.of(LAYOUT, torch.eye(4))
    with pytest.raises(NumericalError, match="not finite"):
        DenseCurvature.of(LAYOUT, G * torch.nan)
    curvature = DenseCurvature.of(LAYOUT, G)
    with pytest.raises(LayoutMismatch, match="first that differs: bias"):
        curvature.apply({"weight": randn(1, 5, 10)})
    with pytest.raises(NumericalError, match="gradient of bias is not finite"):
        curvature.apply({"weight": randn(1, 5, 10), "bias": torch.full((1, 5), torch.nan)})
    with pytest.raises(InputError, match="power: expected"):
        curvature.apply(gradients(), 2.0)
    with pytest.raises(LayoutMismatch, match="expected 55 eigenvalues"):
        DenseCurvature(LAYOUT, torch.ones(3), torch.eye(3))
