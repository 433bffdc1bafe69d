"""DataInf against its formula in loops, and against the exact inverse where the two are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rootward.capture.inputs import tracked_of
from rootward.core.errors import InputError, NumericalError
from rootward.core.scores import Scores
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject
from tests.capture import worlds as w
from tests.methods.attribution import supervised as s
from tests.methods.contract import World, close, contrast, naive_gradients, naive_queries
from tests.methods.contract import run as attributed

ASKED = s.outputs(s.randn(4, 5, seed=9))
NAME = "datainf"


def run(subject: Subject, asked: Behaviour, name: str, **options: Any) -> Scores:
    """With a row for each query, unless another is asked for."""
    return attributed(subject, asked, name, **{"queries": "each", **options})


def test_queries_are_averaged_unless_a_score_for_each_is_asked_for():
    subject = s.classifier()
    each, mean = run(subject, ASKED, NAME), attributed(subject, ASKED, NAME)
    assert (len(each.queries), mean.queries) == (len(ASKED), ("mean",))
    close(mean.values[0], each.mean, 1e-5)


def slices(subject: Subject) -> list[slice]:
    return list(tracked_of(subject).layout.slices.values())


def loops(documents: Tensor, queries: Tensor, parts: list[slice], damping: float) -> Tensor:
    """The paper's equation 5 one document at a time, with every document's inverse as a matrix product."""
    total = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for part in parts:
        g, v = documents[:, part], queries[:, part]
        lam = damping * float(g.square().sum(1).mean()) / g.shape[1]
        mean = torch.zeros_like(v)
        for row in g:
            mean += (v - torch.outer(v @ row, row) / (lam + row @ row)) / lam / len(g)
        total -= mean @ g.T
    return total


def exact(documents: Tensor, queries: Tensor, parts: list[slice], damping: float) -> Tensor:
    """The inverse of the mean, block by block."""
    total = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for part in parts:
        g, v = documents[:, part], queries[:, part]
        matrix = g.T @ g / len(g)
        lam = damping * float(matrix.trace()) / len(matrix)
        total -= v @ torch.linalg.solve(matrix + lam * torch.eye(len(matrix), dtype=torch.float64), g.T)
    return total


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_a_network_against_loops(damping: float):
    subject = s.classifier()
    expected = loops(s.document_rows(subject), s.query_rows(subject, ASKED), slices(subject), damping)
    close(run(subject, ASKED, NAME, damping=damping).values, expected, 1e-5)


def test_a_language_model_against_loops(world: World):
    subject = world.subject()
    names = tracked_of(subject).layout.names
    documents = naive_gradients(subject, subject.encoded, names)
    expected = loops(documents, naive_queries(subject, contrast(), names), slices(subject), 0.1)
    close(run(subject, contrast(), NAME).values, expected, 1e-5)


def test_one_document_and_copies_of_it_are_exact():
    x = s.randn(1, 5, seed=4)[0].tolist()
    for copies in (1, 3):
        subject = Subject(w.perceptron(), [{"x": x, "y": 2}] * copies, Classification(), parameters=".*")
        expected = exact(s.document_rows(subject), s.query_rows(subject, ASKED), slices(subject), 0.1)
        close(run(subject, ASKED, NAME).values, expected, 1e-5)


def test_documents_that_differ_are_not_exact_but_come_close_under_heavy_damping():
    subject = s.classifier()
    arguments = s.document_rows(subject), s.query_rows(subject, ASKED), slices(subject)
    error = {}
    for damping in (0.1, 1e4):
        found, truth = run(subject, ASKED, NAME, damping=damping).values, exact(*arguments, damping).numpy()
        error[damping] = float(np.abs(found - truth).max() / np.abs(truth).max())
    assert error[0.1] > 0.1
    assert error[1e4] < 1e-3


def test_a_parameter_that_no_document_reaches_counts_nothing_and_is_reported():
    subject = s.classifier()
    subject.model[4].weight.data.zero_()  # what lies below the last layer has no gradient
    found = run(subject, ASKED, NAME)
    assert found.notes == ("no document's gradient reaches 3 parameters, first 0.weight: they count nothing",)
    documents, queries = s.document_rows(subject), s.query_rows(subject, ASKED)
    close(found.values, loops(documents, queries, slices(subject)[3:], 0.1), 1e-5)
    subject.model[4].bias.data = torch.tensor([0.0, -1e4, -1e4], dtype=torch.float64)
    certain = Subject(subject.model, [{"x": [1.0] * 5, "y": 0}], Classification(), parameters=".*")
    nothing = run(certain, ASKED, NAME)
    assert not nothing.values.any()
    assert "reaches 5 parameters" in nothing.notes[0]


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_documents_than_queries(rows: int):
    subject = s.classifier(rows)
    expected = loops(s.document_rows(subject), s.query_rows(subject, ASKED), slices(subject), 0.1)
    close(run(subject, ASKED, NAME).values, expected, 1e-5)


def test_wrong_input_is_refused():
    with pytest.raises(InputError, match="damping: "):
        run(s.classifier(), ASKED, NAME, damping=0.0)
    broken, bad = s.overflowing()
    with pytest.raises(NumericalError, match=f"not finite, first document {bad}"):
        run(broken, ASKED, NAME)


def test_the_sign_is_that_of_training_on_the_document():
    """A document's own loss falls when it is trained on more."""
    subject = s.classifier()
    for n in range(3):
        example = subject.encoded[n]

        def own(model: torch.nn.Module, example: object = example) -> Tensor:
            return subject.objective.losses(model, subject.objective.collate([example]))  # type: ignore[list-item]

        assert run(subject, Behaviour.scalar("own", own, ["own"]), NAME).values[0, n] < 0
