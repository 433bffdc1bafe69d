"""bfloat16 products: close to float32's, only where they are wide, and scores that hardly differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from rootward.api import attribute
from rootward.capture.moments import CovarianceSums, SecondMoments, _add_symmetric
from rootward.capture.precision import native_bfloat16, product
from rootward.core.block import Block, MatrixFactor
from rootward.core.layout import ParamLayout
from rootward.subject.behaviour import Behaviour
from rootward.subject.objectives import Classification
from rootward.subject.subject import Subject

LAYOUT = ParamLayout(("w",), ((8, 512),))


def feed(sink, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3.0, 0.01, 512)
    for start in range(0, 64, 16):
        right = torch.randn(16, 32, 512, generator=g) * scale + 0.5
        factor = MatrixFactor(torch.randn(16, 32, 8, generator=g), right)
        mask = torch.ones(16, 32, dtype=torch.bool)
        sink.begin(Block(torch.arange(start, start + 16), tuple("x" * 16), mask, torch.zeros(16), torch.ones(16)))
        sink.consume("w", [factor])
        sink.end()
    return sink


def test_wide_float32_products_are_rounded_and_no_others():
    g = torch.Generator().manual_seed(0)
    wide, narrow = torch.randn(20, 512, generator=g), torch.randn(20, 64, generator=g)
    exact = wide @ wide.T[:, :20]
    assert torch.equal(product(narrow, narrow.T, quick=True), narrow @ narrow.T)
    assert torch.equal(product(wide, wide.T, quick=False), exact)
    assert torch.equal(product(wide.double(), wide.double().T, quick=True), wide.double() @ wide.double().T)
    rounded = product(wide, wide.T, quick=True)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_covariances_and_eigenvalues_are_within_a_hundredth():
    exact, quick = (feed(CovarianceSums(LAYOUT, quick=q)).result().sides["w:right"].moment for q in (False, True))
    assert float((exact - quick).norm() / exact.norm()) < 3e-3
    values, vectors = torch.linalg.eigh(exact.double())
    basis = {"w": (torch.eye(8), vectors.float())}
    plain, fast = (feed(SecondMoments(LAYOUT, basis, quick=q)).result()["w"] for q in (False, True))
    floor = 0.1 * float(plain.mean())  # the damping under which the eigenvalues are used
    assert float(((fast + floor) / (plain + floor) - 1).abs().max()) < 0.02
    assert float(values[0]) < 1e-2 * float(values.mean())  # there are directions that rounding could drown


def test_devices_without_it_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert not native_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert native_bfloat16(torch.device("cpu"))
    assert not native_bfloat16(torch.device("meta"))


def test_a_sum_over_many_tokens_is_not_rounded_as_a_whole():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8192, 512, generator=g) + 1.0
    rounded = x.bfloat16()
    exact = (rounded.double().T @ rounded.double()).triu()
    total = torch.zeros(512, 512)
    _add_symmetric(total, x, quick=True)
    once = (rounded.T @ rounded).float().triu()
    assert float((total.triu() - exact).norm()) < 0.4 * float((once - exact).norm())


@pytest.mark.skipif(not native_bfloat16(torch.device("cpu")), reason="this processor multiplies no bfloat16")
def test_scores_of_ill_conditioned_wide_inputs_rank_as_in_float32():
    """Variances over four decades in rotated directions: rounding falls on the small ones."""
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(512, 512, generator=g))[0]
    x = (torch.randn(700, 512, generator=g) * torch.logspace(0, -2, 512)) @ turn.T * 3
    torch.manual_seed(0)
    teacher, model = nn.Linear(512, 4), nn.Sequential(nn.Linear(512, 12), nn.Tanh(), nn.Linear(12, 4))
    y = teacher(x).argmax(1).tolist()
    rows = [{"x": point, "y": label} for point, label in zip(x, y, strict=True)]
    subject = Subject(model, rows[:600], Classification(), parameters=".*")
    asked = Behaviour.loss("held out", rows[600:])
    found = {
        setting: attribute(subject, asked, "ekfac", options={"fit_bf16": setting, "sensitivity": False}).mean
        for setting in ("auto", "never")
    }
    assert not np.array_equal(found["auto"], found["never"])  # it was on
    result: Any = spearmanr(found["auto"], found["never"])
    assert result.statistic > 0.99
    plain = attribute(subject, asked, "gradient_dot").mean
    result = spearmanr(plain, found["never"])
    assert result.statistic < 0.99  # the curvature matters here
