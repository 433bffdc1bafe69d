"""Arnoldi influence: exact where everything is spanned, else the formula with eigenpairs from dense linear algebra."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rootward.core.errors import NumericalError
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject
from tests.capture.test_hvp import naive_ggn, naive_hessian
from tests.methods.attribution import supervised as s
from tests.methods.contract import close
from tests.methods.contract import run as attributed

ASKED = s.outputs(s.randn(4, 5, seed=9))
NAME = "arnoldi"


def run(subject: Subject, asked: Behaviour, name: str, **options: Any) -> Scores:
    """With a row for each query, unless another is asked for."""
    return attributed(subject, asked, name, **{"queries": "each", **options})


def test_queries_are_averaged_unless_a_score_for_each_is_asked_for():
    subject = s.classifier()
    each, mean = run(subject, ASKED, NAME, iterations=40, top=4), attributed(subject, ASKED, NAME, iterations=40, top=4)
    assert (len(each.queries), mean.queries) == (len(ASKED), ("mean",))
    close(mean.values[0], each.mean, 1e-5)


def matrix_of(subject: Subject, curvature: str) -> Tensor:
    if curvature == "hessian":
        return naive_hessian(subject.model, subject.objective, subject.encoded)
    names = [n for n, _ in subject.model.named_parameters()]
    return naive_ggn(subject.model, subject.objective, subject.encoded, names)


def by_magnitude(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    order = values.abs().argsort(descending=True)
    return values[order], vectors[:, order]


def formula(subject: Subject, curvature: str, top: int, damping: float = 0.0) -> Tensor:
    values, vectors = by_magnitude(matrix_of(subject, curvature))
    p, inverse = vectors[:, :top], 1 / (values[:top] + damping * values[:top].sign())
    return -(s.query_rows(subject, ASKED) @ p * inverse) @ (s.document_rows(subject) @ p).T


def test_as_many_steps_as_parameters_are_the_exact_influence_function():
    """A Hessian without null space: its true inverse. The Gauss-Newton matrix of 6 documents: its pseudo-inverse."""
    model = nn.Linear(5, 3, bias=False).double()
    subject = s.classifier(12, model)
    # softmax does not see a shift of all logits, so one direction for each input has no curvature
    matrix = matrix_of(subject, "hessian")
    expected = -s.query_rows(subject, ASKED) @ torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10)
    expected = expected @ s.document_rows(subject).T
    for curvature in ("hessian", "ggn"):
        found = run(subject, ASKED, NAME, curvature=curvature, iterations=15, top=15)
        close(found.values, expected, 1e-5)
        assert found.notes[0].startswith("10 eigenvalues from")
    network = s.classifier()
    inverse = torch.linalg.pinv(matrix_of(network, "ggn"), hermitian=True, rtol=1e-10)
    expected = -s.query_rows(network, ASKED) @ inverse @ s.document_rows(network).T
    close(run(network, ASKED, NAME, iterations=115, top=115).values, expected, 1e-5)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_largest_pairs_against_the_formula(curvature: str, damping: float):
    subject = s.classifier()
    options: dict[str, Any] = {"curvature": curvature, "damping": damping, "iterations": 60, "top": 4}
    found = run(subject, ASKED, NAME, **options)
    close(found.values, formula(subject, curvature, 4, damping), 1e-5)
    other = run(subject, ASKED, NAME, seed=5, **options)
    close(other.values, found.values, 1e-5)
    assert np.abs(found.values / formula(subject, curvature, 5, damping).numpy() - 1).max() > 0.01


def test_negative_eigenvalues_and_unconverged_pairs_are_said():
    subject = s.classifier()
    values, _ = by_magnitude(matrix_of(subject, "hessian"))
    below = int((values[:40] < 0).sum())
    assert below
    found = run(subject, ASKED, NAME, curvature="hessian", iterations=115, top=40)
    assert any(note.startswith(f"{below} of them are negative") for note in found.notes)
    few = run(subject, ASKED, NAME, curvature="hessian", iterations=5, top=5)
    assert any("have not converged in 5 iterations" in note for note in few.notes)
    assert not any("converged" in note for note in found.notes)


def test_a_loss_without_curvature_is_an_error():
    model = nn.Linear(5, 1).double()  # one class: it is always right
    subject = Subject(model, [{"x": [1.0] * 5, "y": 0}, {"x": [2.0] * 5, "y": 0}], Classification(), parameters=".*")
    with pytest.raises(NumericalError, match="an eigenvalue other than 0, got none"):
        run(subject, ASKED, NAME)


def test_one_document_and_the_curvature_of_some():
    one = s.classifier(1)
    found = run(one, ASKED, NAME)
    assert found.notes[0].startswith("2 eigenvalues")  # three classes, of which one direction has no curvature
    close(found.values, formula(one, "ggn", 2), 1e-5)
    subject = s.classifier()
    part = run(subject, ASKED, NAME, documents=2)
    assert part.notes[0].startswith("4 eigenvalues")
