"""Documents whose loss or gradient is not finite are named, or left out, and then all is as if they had never been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rootward.api import attribute, compare, trace
from rootward.capture.finite import GRADIENT, LOSS, without_not_finite
from rootward.capture.inputs import MethodInputs
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.plan import Recipe
from rootward.subject.subject import Subject
from tests.methods.attribution.supervised import outputs, randn
from tests.methods.contract import GRADIENT as GRADIENT_METHODS

ASKED = outputs(randn(3, 4, seed=9))


class Root(nn.Module):
    """``sqrt(|W x|) + sqrt(50 - x_0)``: at x = 0 the output is finite and the gradient is not; at x_0 > 50 neither."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).abs().sqrt() + (50 - x[:, :1]).sqrt())


def rows(count: int = 12, **bad: int) -> list[dict[str, Any]]:
    x = randn(count, 4, seed=3)
    for kind, n in bad.items():
        x[n] = 99.0 if kind == "loss" else 0.0
    return [{"x": x[n], "y": n % 3} for n in range(count)]


def subject(items: list[dict[str, Any]]) -> Subject:
    return Subject(Root().double(), items, Classification(), parameters=".*")


OPTIONS: dict[str, dict[str, Any]] = {
    "exact_influence_koh2017": {"damping": 1.0},
    "arnoldi_schioppa2022": {"iterations": 3, "top": 2},
}
TWICE = [
    ("exact_influence", {"solver": solver, "damping": 1.0}) for solver in ("lissa", "dense", "gram", "low_rank")
] + [
    ("exact_influence", {"curvature": "hessian", "damping": 10.0}), ("arnoldi", {"curvature": "hessian"}),
    ("trackstar", {"scaling": "exact"}), ("logra", {"fisher": "ekfac"}), ("trak", {"projection": "sjlt"}),
]  # fmt: skip


def start() -> nn.Module:
    return Root().double()


@pytest.fixture(scope="module")
def trained() -> Subject:
    recipe = Recipe(dtype="float64", checkpoints=2, batch_size=4, lr=1e-3)
    return Subject.trained(start, rows(), Classification(), recipe, parameters=".*")


@pytest.mark.parametrize("bad", [{"loss": 7}, {"gradient": 7}], ids=["loss", "gradient"])
@pytest.mark.parametrize(("method", "options"), [(n, OPTIONS.get(n, {})) for n in GRADIENT_METHODS] + TWICE)
def test_by_default_it_is_named(method: str, options: dict[str, Any], bad: dict[str, int], trained: Subject):
    """Every method that takes gradients: a training of finite documents, of which one is another by now."""
    broken = Subject(
        trained.model, rows(**bad), Classification(), recipe=trained.recipe, checkpoints=trained.checkpoints,
        start=start, parameters=".*",
    )  # fmt: skip
    name = broken.encoded[7].id
    with pytest.raises(
        NumericalError, match=f"first document {name}|document {name} .*not finite|of its batch: .*{name}"
    ):
        attribute(broken, ASKED, method, options=options)


@pytest.mark.parametrize("places", [(0, 1), (11, 4)])
@pytest.mark.parametrize("method", ["gradient_dot", "ekfac", "trak", "loss"])
def test_without_them_the_others_score_as_if_they_had_never_been_there(method: str, places: tuple[int, int]):
    whole = rows(loss=places[0], gradient=places[1])
    broken, clean = subject(whole), subject([row for n, row in enumerate(whole) if n not in places])
    found = attribute(broken, ASKED, method, skip_not_finite=True)
    expected = attribute(clean, ASKED, method)
    assert found.document_ids == expected.document_ids
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)
    assert found.coverage is not None
    assert found.coverage.dropped == {LOSS: 1, GRADIENT: 1}
    assert (found.coverage.documents, found.coverage.used) == (12, 10)
    assert len(broken.encoded) == 12  # the subject itself is as it was


def test_what_is_left_out_is_said_and_part_of_the_fingerprint():
    broken = subject(rows(loss=3))
    found = without_not_finite(broken)
    assert found.notes == (f"1 documents left out, {LOSS}: first document {broken.encoded[3].id} (row 3)",)
    assert found.fingerprint() != broken.fingerprint()
    clean = subject(rows())
    assert without_not_finite(clean) is clean


def test_none_left_is_an_error():
    with pytest.raises(InputError, match=f"none of 2 can .{LOSS}"):
        without_not_finite(subject(rows(2, loss=0)[:1] + rows(2, loss=1)[1:]))


def test_a_wrong_pattern_is_still_an_error():
    broken = Subject(Root().double(), rows(), Classification(), parameters="nothing")
    with pytest.raises((InputError, ArtefactError)):
        without_not_finite(broken)


def test_it_cannot_be_asked_of_inputs_that_are_given():
    whole = subject(rows(loss=3))
    with pytest.raises(InputError, match="skip_not_finite: `inputs` hold their own documents"):
        attribute(whole, ASKED, inputs=MethodInputs(whole, ASKED), skip_not_finite=True)


def test_a_trace_and_a_comparison_leave_them_out_too(trained: Subject, tmp_path: Path):
    broken = Subject(
        trained.model, rows(gradient=7, loss=2), Classification(), recipe=trained.recipe, start=start, parameters=".*"
    )
    options: dict[str, Any] = {"token_budget": 100, "skip_not_finite": True}
    _, scores = trace(broken, ASKED, tmp_path / "trace", methods=["gradient_dot"], token_documents=0, **options)
    gone = {broken.encoded[7].id, broken.encoded[2].id}
    assert set(scores["gradient_dot"].document_ids) == set(broken.encoded.ids) - gone
    asked = Behaviour.loss("loss", [{"x": row, "y": 1, "name": str(n)} for n, row in enumerate(randn(4, 4, seed=9))])
    options |= {"subsets": 3, "allow_few": True, "tune": False, "workers": 0}
    record, scores = compare(broken, asked, tmp_path / "compare", methods=["gradient_dot"], **options)
    assert (record.documents, len(scores["gradient_dot"].document_ids)) == (10, 10)
    with pytest.raises(NumericalError, match="leave such documents out"):
        trace(broken, ASKED, tmp_path / "again", methods=["gradient_dot"], token_budget=100, measure_plain=False)
