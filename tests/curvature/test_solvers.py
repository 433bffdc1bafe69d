"""Iterative solvers converge to what dense linear algebra gives, and say where they do not."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rootward.core.errors import InputError, LayoutMismatch, NumericalError
from rootward.curvature.base import Damping
from rootward.curvature.dense import DenseCurvature
from rootward.curvature.solvers import arnoldi, conjugate_gradients, lissa, mean_eigenvalue
from tests.curvature.small import LAYOUT, P, close, flat, gradients, operator, power, randn, second_moment

G = second_moment(randn(80, P))
LARGEST = float(torch.linalg.eigvalsh(G).max())


# --- conjugate gradients ------------------------------------------------------------------------------------


def test_conjugate_gradients_give_the_dense_solution():
    found = conjugate_gradients(LAYOUT, operator(G), gradients(), 0.1, tolerance=1e-11)
    close(flat(found.values), flat(gradients()) @ power(G, 0.1, -1.0))
    assert found.notes == ()
    assert float(found.residual.max()) < 1e-10
    assert found.steps < P


def test_every_query_is_solved_as_if_it_were_alone():
    """Queries converge at different steps; the operator is not asked for those that have."""
    easy = LAYOUT.unflatten(torch.linalg.eigh(G)[1][:, :1].T)  # an eigenvector: one step
    mixed = {n: torch.cat([easy[n], gradients(2)[n], torch.zeros_like(easy[n])]) for n in LAYOUT.names}
    asked: list[int] = []

    def counting(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        asked.append(len(x["bias"]))
        return operator(G)(x)

    found = conjugate_gradients(LAYOUT, counting, mixed, 0.1, tolerance=1e-10)
    assert asked[:2] == [3, 2]
    close(flat(found.values), flat(mixed) @ power(G, 0.1, -1.0))
    assert not flat(found.values)[3].any()
    alone = conjugate_gradients(LAYOUT, operator(G), gradients(2), 0.1, tolerance=1e-10)
    close(flat(found.values)[1:3], flat(alone.values), 1e-12)


def test_too_few_steps_are_noted_with_the_true_residual():
    found = conjugate_gradients(LAYOUT, operator(G), gradients(), 0.0, tolerance=1e-10, steps=3)
    assert found.steps == 3
    assert "3 of 3 queries did not reach the tolerance" in found.notes[0]
    error = flat(found.values) @ G - flat(gradients())
    close(found.residual, error.norm(dim=1) / flat(gradients()).norm(dim=1))
    assert float(found.residual.min()) > 1e-3


def test_a_preconditioner_that_is_the_matrix_needs_one_step():
    exact = DenseCurvature.of(LAYOUT, G, damping=Damping(0.0, 0.1))
    found = conjugate_gradients(LAYOUT, operator(G), gradients(), 0.1, tolerance=1e-10, preconditioner=exact)
    assert found.steps == 1
    close(flat(found.values), flat(gradients()) @ power(G, 0.1, -1.0))
    rough = DenseCurvature.of(LAYOUT, torch.diag(G.diagonal()))
    found = conjugate_gradients(LAYOUT, operator(G), gradients(), 0.1, tolerance=1e-10, preconditioner=rough)
    close(flat(found.values), flat(gradients()) @ power(G, 0.1, -1.0))


def test_negative_curvature_and_a_zero_matrix_are_errors():
    indefinite = G - 0.5 * LARGEST * torch.eye(P, dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"expected positive curvature.*raise the damping"):
        conjugate_gradients(LAYOUT, operator(indefinite), gradients(), 0.0)
    close(
        flat(conjugate_gradients(LAYOUT, operator(indefinite), gradients(), LARGEST, tolerance=1e-10).values),
        flat(gradients()) @ power(indefinite, LARGEST, -1.0),
    )
    with pytest.raises(NumericalError, match="expected positive curvature"):
        conjugate_gradients(LAYOUT, operator(0 * G), gradients(), 0.0)
    with pytest.raises(NumericalError, match="expected positive curvature"):
        conjugate_gradients(LAYOUT, operator(torch.nan * G), gradients(), 0.1)


def test_a_singular_matrix_without_damping_does_not_pretend():
    found = conjugate_gradients(LAYOUT, operator(second_moment(randn(3, P))), gradients(), 1e-12, steps=20)
    assert "3 of 3 queries" in found.notes[0]
    assert float(found.residual.max()) > 1e-4


def test_single_precision_comes_back_as_it_was_given():
    x = {n: v.float() for n, v in gradients().items()}
    found = conjugate_gradients(
        LAYOUT, lambda y: {n: v.float() for n, v in operator(G)({n: v.double() for n, v in y.items()}).items()}, x, 0.1
    )
    assert {v.dtype for v in found.values.values()} == {torch.float32}
    close(flat(found.values).double(), flat(gradients()) @ power(G, 0.1, -1.0), 1e-4)


# --- LiSSA --------------------------------------------------------------------------------------------------


def test_lissa_converges_to_the_dense_solution():
    found = lissa(LAYOUT, operator(G), gradients(), 0.5, scale=LARGEST, depth=400)
    close(flat(found.values), flat(gradients()) @ power(G, 0.5, -1.0), 1e-8)
    assert float(found.residual.max()) < 1e-8


def test_lissa_is_the_truncated_series():
    step = torch.eye(P, dtype=torch.float64) - (G + 0.5 * torch.eye(P, dtype=torch.float64)) / 9
    series = sum(torch.linalg.matrix_power(step, j) for j in range(5)) / 9
    close(flat(lissa(LAYOUT, operator(G), gradients(), 0.5, scale=9, depth=4).values), flat(gradients()) @ series)


def test_lissa_with_drawn_estimates_has_the_solution_as_its_mean():
    """Independent unbiased estimates in each step: the mean over repeats comes closer with their number."""
    rows, generator = randn(40, P), torch.Generator().manual_seed(3)
    matrix = second_moment(rows)

    def draw(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chosen = rows[torch.randint(40, (10,), generator=generator)]
        return operator(second_moment(chosen))(x)

    truth, errors = flat(gradients()) @ power(matrix, 1.0, -1.0), []
    for repeats in (2, 128):
        found = lissa(LAYOUT, operator(matrix), gradients(), 1.0, scale=15, depth=80, repeats=repeats, draw=draw)
        errors.append(float((flat(found.values) - truth).norm() / truth.norm()))
    assert errors[1] < 0.03 < errors[0]


@pytest.mark.parametrize("matrix", [G, -0.03 * G])
def test_lissa_that_diverges_is_an_error_that_names_the_scale(matrix: Tensor):
    scale = 0.49 * LARGEST  # so slowly that infinity is far away
    with pytest.raises(NumericalError, match=rf"diverged at step \d+ of 500 with scale {scale:.4g}.*raise scale"):
        lissa(LAYOUT, operator(matrix), gradients(), 0.0, scale=scale, depth=500)


def test_lissa_is_not_called_divergent_while_it_converges():
    """The null direction grows by b in every step, the most that is possible with a scale that is large enough."""
    singular = torch.zeros(P, P, dtype=torch.float64)
    singular[0, 0] = 2.0
    found = lissa(LAYOUT, operator(singular), gradients(), 0.0, scale=1.0, depth=200)
    assert bool(torch.isfinite(flat(found.values)).all())


# --- eigenpairs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["positive", "indefinite", "repeated", "identity", "low rank"])
def test_as_many_steps_as_parameters_give_every_eigenpair(name: str):
    noise = randn(P, P, seed=4)
    matrix = {
        "positive": G,
        "indefinite": noise + noise.T,
        "repeated": torch.diag((torch.arange(P, dtype=torch.float64) / 8).floor() - 2),
        "identity": 3 * torch.eye(P, dtype=torch.float64),
        "low rank": second_moment(randn(5, P)),
    }[name]
    found = arnoldi(LAYOUT, operator(matrix), P)
    assert found.complete
    close(found.vectors @ found.vectors.T, torch.eye(len(found.values), dtype=torch.float64))
    close(found.vectors.T @ torch.diag(found.values) @ found.vectors, matrix, 1e-8)
    if name == "low rank":
        assert len(found.values) < 10


def test_a_few_steps_give_the_largest_pairs_and_how_good_they_are():
    matrix = torch.diag(torch.tensor([100.0, -50.0, 20.0] + [1.0 / k for k in range(1, P - 2)], dtype=torch.float64))
    found = arnoldi(LAYOUT, operator(matrix), 20).largest(3)
    close(found.values, torch.tensor([100.0, -50.0, 20.0], dtype=torch.float64))
    assert not found.complete
    few = arnoldi(LAYOUT, operator(G), 8)
    true = (few.vectors @ G - few.values.unsqueeze(1) * few.vectors).norm(dim=1)
    close(few.residuals, true, 1e-8)
    assert float(true.max()) > 1e-3


def test_the_seed_decides_the_start_alone():
    a, b, c = (arnoldi(LAYOUT, operator(G), 6, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.vectors, b.vectors)
    assert not torch.equal(a.values, c.values)


def test_a_zero_matrix_is_one_zero_pair():
    found = arnoldi(LAYOUT, operator(0 * G), 10)
    assert found.values.tolist() == [0.0]
    assert found.complete


def test_the_mean_eigenvalue_is_the_trace_over_the_width():
    assert mean_eigenvalue(LAYOUT, operator(torch.diag(G.diagonal())), probes=1) == pytest.approx(
        float(G.trace()) / P,
        rel=1e-12,  # signs make a diagonal matrix exact
    )
    values = [mean_eigenvalue(LAYOUT, operator(G), probes=5, seed=seed) for seed in range(40)]
    spread = torch.tensor(values, dtype=torch.float64)
    error = float(spread.mean()) - float(G.trace()) / P
    assert abs(error) < 4 * float(spread.std()) / 40**0.5


# --- bad input ----------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    with pytest.raises(LayoutMismatch, match="first that differs"):
        conjugate_gradients(LAYOUT, operator(G), {"weight": randn(1, 5, 10)}, 0.1)
    with pytest.raises(InputError, match="damping: expected at least 0"):
        conjugate_gradients(LAYOUT, operator(G), gradients(), -0.1)
    for options in ({"scale": 0.0, "depth": 3}, {"scale": 1.0, "depth": 0}, {"scale": 1.0, "depth": 1, "repeats": 0}):
        with pytest.raises(InputError, match="LiSSA: expected"):
            lissa(LAYOUT, operator(G), gradients(), 0.1, **options)
    with pytest.raises(InputError, match="at least 1 step"):
        arnoldi(LAYOUT, operator(G), 0)
    with pytest.raises(NumericalError, match="step 1 is not finite"):
        arnoldi(LAYOUT, operator(torch.nan * G), 3)
