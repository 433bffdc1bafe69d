"""Influence functions against leave-one-out in closed form, refits, and dense matrices."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rootward.capture.inputs import MethodInputs, tracked_of
from rootward.core.errors import InputError, NumericalError
from rootward.core.registry import get
from rootward.core.scores import Scores
from rootward.curvature.dense import as_named, as_rows
from rootward.curvature.solvers import mean_eigenvalue
from rootward.methods.attribution.exact_influence_koh2017 import Config
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject
from tests.capture.test_hvp import naive_ggn, naive_hessian
from tests.methods.attribution import supervised as s
from tests.methods.contract import World, close, contrast
from tests.methods.contract import run as attributed

POINTS = s.randn(2, 3, seed=7)
ASKED = s.outputs(s.randn(4, 5, seed=9))
NAME = "exact_influence"
SOLVERS: dict[str, dict[str, Any]] = {
    "cg": {"tolerance": 1e-12},
    "cg on the hessian": {"tolerance": 1e-12, "curvature": "hessian"},
    "dense": {"solver": "dense"},
    "dense hessian": {"solver": "dense", "curvature": "hessian"},
    "dense fisher": {"solver": "dense", "curvature": "fisher"},
}


def run(subject: Subject, asked: Behaviour, name: str, **options: Any) -> Scores:
    """With a row for each query, unless another is asked for."""
    return attributed(subject, asked, name, **{"queries": "each", **options})


def test_queries_are_averaged_unless_a_score_for_each_is_asked_for():
    subject = s.classifier()
    each, mean = (
        run(subject, ASKED, NAME, solver="dense", damping=0.1),
        attributed(subject, ASKED, NAME, solver="dense", damping=0.1),
    )
    assert (len(each.queries), mean.queries) == (len(ASKED), ("mean",))
    close(mean.values[0], each.mean, 1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_ridge_regression_has_its_leave_one_out_in_closed_form(solver: str):
    """Leaving row i out moves an output by exactly ``-score / n / (1 - h_i)``, with the row's leverage ``h_i``."""
    subject, x, y = s.ridge()
    found = run(subject, s.outputs(POINTS), NAME, damping=s.RIDGE, **SOLVERS[solver]).values.astype(np.float64)
    inverse = torch.linalg.inv(x.T @ x / len(x) + s.RIDGE * torch.eye(3, dtype=torch.float64))
    leverage = (x @ inverse * x).sum(1) / len(x)
    whole = s.fit(x, y, torch.ones(len(x), dtype=torch.float64))
    for i in range(len(x)):
        weights = torch.ones(len(x), dtype=torch.float64)
        weights[i] = 0
        change = (POINTS @ (s.fit(x, y, weights) - whole)).flatten()
        close(-found[:, i] / len(x) / (1 - float(leverage[i])), change)


def test_the_score_is_the_derivative_of_a_refit_with_one_document_upweighted():
    subject, x, y = s.ridge()
    found = run(subject, s.outputs(POINTS), NAME, damping=s.RIDGE, tolerance=1e-12).values
    for i in range(len(x)):
        sides = []
        for eps in (1e-5, -1e-5):
            weights = torch.ones(len(x), dtype=torch.float64)
            weights[i] += len(x) * eps  # the document's loss enters the mean loss with the weight 1/n + eps
            sides.append(POINTS @ s.fit(x, y, weights))
        close(found[:, i], ((sides[0] - sides[1]) / 2e-5).flatten(), 1e-5)


@pytest.mark.parametrize("lam", [0.05, 5.0])
@pytest.mark.parametrize("solver", ["cg", "dense", "dense fisher", "dense hessian"])
def test_a_network_against_dense_matrices(solver: str, lam: float):
    subject = s.classifier()
    names = [n for n, _ in subject.model.named_parameters()]
    if "hessian" in solver:
        matrix = naive_hessian(subject.model, subject.objective, subject.encoded)
    else:
        matrix = naive_ggn(subject.model, subject.objective, subject.encoded, names)
    damped = matrix + lam * torch.eye(len(matrix), dtype=torch.float64)
    expected = -s.query_rows(subject, ASKED) @ torch.linalg.solve(damped, s.document_rows(subject).T)
    found = run(subject, ASKED, NAME, damping=lam, **SOLVERS[solver])
    close(found.values, expected, 1e-5)
    indefinite = "hessian" in solver and float(torch.linalg.eigvalsh(damped).min()) < 0
    assert any("eigenvalues below 0" in note for note in found.notes) == indefinite
    assert indefinite == (solver == "dense hessian" and lam == 0.05)


def test_a_preconditioner_takes_fewer_steps_to_the_same_scores():
    """Inputs from 0.01 to 10 in one layer, whose curvature is nearly a Kronecker product."""
    x, model = s.randn(60, 8, seed=4) * torch.logspace(-2, 1, 8, dtype=torch.float64), nn.Linear(8, 3).double()
    model.weight.data, model.bias.data = 0.1 * s.randn(3, 8, seed=5), 0.1 * s.randn(3, seed=6)
    items = [{"x": x[n], "y": n % 3} for n in range(60)]
    subject, asked = Subject(model, items, Classification(), parameters=".*"), s.outputs(s.randn(4, 8, seed=9))
    exact = run(subject, asked, NAME, damping=1e-3, solver="dense")
    plain, shorter = (
        run(subject, asked, NAME, damping=1e-3, tolerance=1e-9, preconditioner=given) for given in ("none", "ekfac")
    )
    for found in (plain, shorter):
        close(found.values, exact.values, 1e-6)
    steps = [int(re.findall(r"cg: (\d+) steps", "; ".join(found.notes))[0]) for found in (plain, shorter)]
    assert steps[1] < 0.5 * steps[0]
    assert "preconditioner: ekfac from 60 of 60 documents" in shorter.notes[0]
    half = {"damping": 1e-3, "relative": 0.5, "tolerance": 1e-9}
    close(
        run(subject, asked, NAME, preconditioner="ekfac", **half).values, run(subject, asked, NAME, **half).values, 1e-6
    )


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_the_gram_matrix_of_the_documents_gradients_is_the_same_matrix(curvature: str):
    subject, options = s.classifier(), {"damping": 0.05, "relative": 0.3, "curvature": curvature}
    exact = run(subject, ASKED, NAME, solver="dense", **options)
    found = run(subject, ASKED, NAME, solver="gram", **options)
    close(found.values, exact.values, 1e-6)
    assert "gram: 18 rows of 6 documents" in found.notes[0]  # three labels each
    few = run(subject, ASKED, NAME, solver="gram", documents=2, **options)
    close(few.values, run(subject, ASKED, NAME, solver="dense", documents=2, **options).values, 1e-6)


@pytest.mark.parametrize("rank", [1, 2, 40])
def test_low_rank_is_top_eigenpairs_and_the_diagonal_of_each_parameter(rank: int):
    subject = s.classifier()
    model, objective, examples = subject.model, subject.objective, list(subject.encoded)
    layout = tracked_of(subject).layout
    whole = naive_ggn(model, objective, examples, layout.names)
    approximate = torch.zeros_like(whole)
    for part in layout.slices.values():
        values, vectors = torch.linalg.eigh(whole[part, part])
        top = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        approximate[part, part] = top + torch.diag(whole[part, part].diagonal() - top.diagonal())
    inputs = MethodInputs(subject, ASKED)
    query = as_rows(layout, inputs.query_gradients(layout, mean=False))
    solved = query @ torch.linalg.inv(approximate + 0.05 * torch.eye(len(whole), dtype=whole.dtype))
    expected = -inputs.products(as_named(layout, solved, inputs.query_gradients(layout, mean=False)), examples).dots
    found = run(subject, ASKED, NAME, solver="low_rank", rank=rank, damping=0.05)
    close(found.values, expected.numpy(), 1e-6)
    assert f"eigenpairs of {len(layout.names)} parameters and the diagonal, 6 documents" in found.notes[0]


def test_documents_of_several_targets_have_a_gram_matrix_of_sampled_labels(world: World):
    subject = world.subject()
    with pytest.raises(InputError, match="'fisher' with sampled labels"):
        run(subject, contrast(), NAME, solver="gram")
    found = run(subject, contrast(), NAME, solver="gram", curvature="fisher", damping=0.1)
    count = len(subject.encoded)
    assert f"gram: {count} rows of {count} documents" in found.notes[0]
    assert np.isfinite(found.values).all()


def test_lissa_approaches_the_dense_scores():
    subject = s.classifier()
    exact = run(subject, ASKED, NAME, damping=0.5, solver="dense").values
    found = run(subject, ASKED, NAME, damping=0.5, solver="lissa", depth=200, batch=12)
    assert np.corrcoef(found.values.flatten(), exact.flatten())[0, 1] > 0.99
    assert any("LiSSA's scale" in note for note in found.notes)
    with pytest.raises(NumericalError, match=r"diverged at step .* raise scale"):
        run(subject, ASKED, NAME, damping=0.5, solver="lissa", depth=200, scale=0.2)


def test_under_heavy_damping_it_is_the_gradient_dot_product():
    subject = s.classifier()
    found = run(subject, ASKED, NAME, damping=1e9).values.astype(np.float64) * 1e9
    close(found, run(subject, ASKED, "gradient_dot").values, 1e-5)


def test_the_damping_may_be_relative_to_the_mean_eigenvalue():
    subject = s.classifier()
    names = [n for n, _ in subject.model.named_parameters()]
    matrix = naive_ggn(subject.model, subject.objective, subject.encoded, names)
    lam = 0.01 + 0.5 * float(matrix.trace()) / len(matrix)
    explicit = run(subject, ASKED, NAME, solver="dense", damping=lam)
    close(run(subject, ASKED, NAME, solver="dense", damping=0.01, relative=0.5).values, explicit.values)
    estimated = run(subject, ASKED, NAME, damping=0.01, relative=0.5)
    (noted,) = re.findall(r"damping ([\d.]+), with the mean eigenvalue estimated", estimated.notes[0])
    layout = tracked_of(subject).layout
    mean = mean_eigenvalue(layout, lambda x: as_named(layout, as_rows(layout, x) @ matrix, x))
    assert float(noted) == pytest.approx(0.01 + 0.5 * mean, rel=1e-3)
    close(run(subject, ASKED, NAME, solver="dense", damping=float(noted)).values, estimated.values, 1e-2)


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_the_curvature_may_be_that_of_some_documents(solver: str):
    subject = s.classifier()
    few = run(subject, ASKED, NAME, damping=0.1, documents=2, **SOLVERS[solver]).values
    pairs = [(a, b) for a in range(6) for b in range(a)]
    names, lam = [n for n, _ in subject.model.named_parameters()], 0.1
    matches = []
    for pair in pairs:
        matrix = naive_ggn(subject.model, subject.objective, [subject.encoded[n] for n in pair], names)
        damped = matrix + lam * torch.eye(len(matrix), dtype=torch.float64)
        expected = -s.query_rows(subject, ASKED) @ torch.linalg.solve(damped, s.document_rows(subject).T)
        matches.append(np.allclose(few, expected.numpy(), rtol=1e-4))
    assert sum(matches) == 1


def test_the_notes_say_how_far_the_solver_came():
    subject = s.classifier()
    found = run(subject, ASKED, NAME, damping=0.1)
    (steps,) = re.findall(r"cg: (\d+) steps, largest relative residual [\d.e-]+", found.notes[0])
    assert 1 < int(steps) < 30
    short = run(subject, ASKED, NAME, damping=1e-6, steps=2)
    assert "4 of 4 queries did not reach the tolerance" in short.notes[1]


def test_a_hessian_that_is_not_positive_is_an_error_of_the_iterative_solvers():
    with pytest.raises(NumericalError, match=r"positive curvature.*ggn"):
        run(s.classifier(), ASKED, NAME, curvature="hessian", damping=1e-3)


def test_contradictions_and_too_large_models_are_refused_before_anything_is_run():
    class Untouched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 2500)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += len(x)
            return self.linear(x)

    subject = s.classifier()
    with pytest.raises(InputError, match="curvature = 'fisher' is for solver = 'dense', 'gram' or 'low_rank'"):
        run(subject, ASKED, NAME, curvature="fisher")
    with pytest.raises(InputError, match="relative = 0 is needed"):
        run(subject, ASKED, NAME, curvature="hessian", relative=0.1)
    with pytest.raises(InputError, match="damping: "):
        run(subject, ASKED, NAME, damping=-1.0)
    with pytest.raises(InputError, match="a Hessian has no rows"):
        run(subject, ASKED, NAME, curvature="hessian", solver="gram")
    with pytest.raises(InputError, match="solver = 'low_rank' is for"):
        run(subject, ASKED, NAME, curvature="hessian", solver="low_rank")
    for solver, idle in (("dense", "rank"), ("cg", "depth"), ("low_rank", "steps"), ("gram", "scale")):
        with pytest.raises(InputError, match=f"solver = '{solver}' does not read {idle} .*leave that out"):
            run(subject, ASKED, NAME, solver=solver, **{idle: 7})
    with pytest.raises(InputError, match=r"'lissa' does not read tolerance, rank \(read by cg, low_rank\)"):
        run(subject, ASKED, NAME, solver="lissa", rank=2, tolerance=1e-3)
    for options in ({"solver": "dense"}, {"damping": 0.0}):
        with pytest.raises(InputError, match="preconditioner = 'ekfac' is for solver = 'cg' with a damping above 0"):
            run(subject, ASKED, NAME, preconditioner="ekfac", **options)
    large = Untouched().double()
    with pytest.raises(InputError, match="at most 12,000 parameters, got 15,000"):
        run(s.classifier(40, large), ASKED, NAME, solver="dense")
    assert large.calls < 40  # the measure of which parameters can be attributed, and the queries


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_documents_than_queries(rows: int):
    subject = s.classifier(rows)
    close(
        run(subject, ASKED, NAME, damping=0.1, tolerance=1e-10).values,
        run(subject, ASKED, NAME, damping=0.1, solver="dense").values,
    )


def test_a_document_that_is_not_finite_is_named():
    subject, bad = s.overflowing()
    for solver in ("cg", "lissa", "dense"):
        with pytest.raises(NumericalError, match=f"not finite, first document {bad}"):
            run(subject, ASKED, NAME, solver=solver)


def test_token_scores_sum_to_the_documents_score(world: World):
    subject, options = world.subject(), {"damping": 100.0, "tolerance": 1e-9}
    scores = run(subject, contrast(), NAME, **options)
    method = get(NAME)[0]
    assert method.tokens is not None
    tokens = method.tokens(MethodInputs(subject, contrast(), 500), Config(**options), [1, 4])
    for n in (1, 4):
        assert len(tokens[n]) == subject.encoded[n].length
        close([tokens[n].sum()], scores.mean[[n]], 1e-5)
