"""Rescaled coordinates: Adam's steps are plain ones in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rootward.capture.moments import CovarianceSums, SecondMoments
from rootward.capture.rescaling import Rescaled, adam_scales, rank_one, rescaled, rescaled_factor
from rootward.core.block import Block, LookupFactor, MatrixFactor, VectorFactor
from rootward.core.errors import ArtefactError, LayoutMismatch
from rootward.core.layout import ParamLayout
from rootward.subject.checkpoints import Moments

LAYOUT = ParamLayout(("w", "b"), ((3, 4), (3,)))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def moments(layout: ParamLayout, second: dict[str, torch.Tensor], step: int = 10) -> Moments:
    return Moments(step, (0.9, 0.999), 1e-8, {n: torch.zeros(layout.shape(n)) for n in layout.names}, second)


def test_scales_are_exact_where_second_moments_are_of_rank_one():
    rows, cols = torch.tensor([0.5, 1.0, 3.0]).double(), torch.tensor([1.0, 2.0, 0.1, 4.0]).double()
    second = {"w": torch.outer(rows, cols), "b": torch.tensor([0.3, 1.0, 2.0]).double()}
    found = adam_scales(LAYOUT, moments(LAYOUT, second))
    corrected = 1 - 0.999**10
    expected = {n: ((v / corrected).sqrt() + 1e-8).rsqrt() for n, v in second.items()}
    torch.testing.assert_close(torch.outer(*found["w"]), expected["w"], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.outer(*found["b"])[0], expected["b"], rtol=1e-6, atol=0)


def test_the_approximation_of_rank_one_keeps_the_sums_of_rows_and_columns():
    matrix = torch.rand(3, 4, generator=generator(), dtype=torch.float64)
    rows, cols, mean = rank_one(matrix)
    approximate = torch.outer(rows, cols) / mean
    torch.testing.assert_close(approximate.sum(1), matrix.sum(1))
    torch.testing.assert_close(approximate.sum(0), matrix.sum(0))
    assert not torch.allclose(approximate, matrix, rtol=0.05)


def test_a_step_of_adam_is_a_plain_step_in_rescaled_coordinates():
    """With a gradient that does not change, Adam's step is ``-eta g / (|g| + eps)``, bias correction and all."""
    torch.manual_seed(0)
    rows, cols = torch.rand(3).double() + 0.5, torch.rand(4).double() + 0.5
    gradient = torch.outer(rows, cols)
    w = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimiser = torch.optim.AdamW([w], lr=0.01, weight_decay=0.0)
    for _ in range(5):
        w.grad = gradient.clone()
        optimiser.step()
    before = w.detach().clone()
    state = optimiser.state[w]
    layout = ParamLayout(("w",), ((3, 4),))
    kept = Moments(5, (0.9, 0.999), 1e-8, {"w": state["exp_avg"]}, {"w": state["exp_avg_sq"].clone()})
    scales = adam_scales(layout, kept)
    w.grad = gradient.clone()
    optimiser.step()
    twice = rescaled(layout, rescaled(layout, {"w": gradient[None]}, scales), scales)["w"][0]
    torch.testing.assert_close(w.detach() - before, -0.01 * twice, rtol=1e-6, atol=0)


def test_there_and_back_is_the_identity():
    scales = adam_scales(LAYOUT, moments(LAYOUT, {n: torch.rand(LAYOUT.shape(n)) for n in LAYOUT.names}))
    x = {n: torch.randn(2, *LAYOUT.shape(n), dtype=torch.float64) for n in LAYOUT.names}
    back = rescaled(LAYOUT, rescaled(LAYOUT, x, scales), scales, -1.0)
    for name in LAYOUT.names:
        torch.testing.assert_close(back[name], x[name])


def test_entries_without_any_gradient_have_finite_scales():
    second = {"w": torch.zeros(3, 4), "b": torch.zeros(3)}
    second["w"][0, 0] = 1.0
    for rows, cols in adam_scales(LAYOUT, moments(LAYOUT, second)).values():
        assert bool(torch.isfinite(rows).all()) and bool(torch.isfinite(cols).all())


def test_errors_name_what_is_missing():
    with pytest.raises(LayoutMismatch, match="no moments of b"):
        adam_scales(LAYOUT, moments(ParamLayout(("w",), ((3, 4),)), {"w": torch.ones(3, 4)}))
    with pytest.raises(ArtefactError, match="SGD"):
        adam_scales(LAYOUT, replace(moments(LAYOUT, {}), second={}))


def test_factors_and_sinks_see_the_rescaled_gradient():
    layout = ParamLayout(("w", "e", "b"), ((3, 4), (5, 2), (3,)))
    second = {n: torch.rand(layout.shape(n), generator=generator(), dtype=torch.float64) for n in layout.names}
    scales = adam_scales(layout, moments(layout, second))
    g = generator()
    factors = {
        "w": MatrixFactor(
            torch.randn(6, 7, 3, generator=g, dtype=torch.float64),
            torch.randn(6, 7, 4, generator=g, dtype=torch.float64),
        ),
        "e": LookupFactor(torch.randint(0, 5, (6, 7), generator=g), torch.randn(6, 7, 2, generator=g).double(), 5),
        "b": VectorFactor(torch.randn(6, 7, 3, generator=g, dtype=torch.float64)),
    }
    bases = {name: (None, None) for name in layout.names}
    inner = SecondMoments(layout, bases)
    sums = CovarianceSums(layout)
    for sink in (Rescaled(inner, scales), Rescaled(sums, scales)):
        mask = torch.ones(6, 7, dtype=torch.bool)
        sink.begin(Block(torch.arange(6), tuple("abcdef"), mask, torch.zeros(6), torch.ones(6)))
        for name, factor in factors.items():
            sink.consume(name, [factor])
        sink.end()
    for name, factor in factors.items():
        dense = rescaled(layout, {n: f.gradient() for n, f in factors.items()}, scales)[name]
        torch.testing.assert_close(rescaled_factor(factor, scales[name]).gradient(), dense)
        torch.testing.assert_close(inner.result()[name].flatten(), dense.square().mean(0).flatten())
    _, cols = scales["w"]
    inputs = (factors["w"].right * cols).flatten(0, 1)
    found = sums.result()
    key = found.right["w"]
    assert key is not None
    torch.testing.assert_close(found.sides[key].moment, inputs.T @ inputs / 42)
