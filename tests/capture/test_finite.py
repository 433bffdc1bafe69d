"""Documents whose loss or gradient is not finite are named, or left out, and then all is as if they had never been."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rootward.api import attribute
from rootward.capture.finite import GRADIENT, LOSS, without_not_finite
from rootward.core.errors import ArtefactError, InputError, NumericalError
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject
from tests.methods.attribution.supervised import outputs, randn

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


@pytest.mark.parametrize("bad", [{"loss": 7}, {"gradient": 7}])
@pytest.mark.parametrize("method", ["gradient_dot", "ekfac", "trak"])
def test_by_default_it_is_named(method: str, bad: dict[str, int]):
    broken = subject(rows(**bad))
    expected = f"first document {broken.encoded[7].id} " if method != "ekfac" or "loss" in bad else "not finite"
    with pytest.raises(NumericalError, match=expected):
        attribute(broken, ASKED, method)


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
