"""The joint second moments of chosen entries, against dense per-document gradients in the eigenbasis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rootward.capture.fit import Fit, FitConfig
from rootward.capture.joint import JointMoments, fit_joint
from rootward.capture.run import run_pass
from rootward.capture.sites import track
from rootward.core.errors import InputError
from rootward.core.layout import ParamLayout
from rootward.curvature.base import Damping
from rootward.curvature.joint import largest_entries
from rootward.curvature.kronecker import KroneckerBlock, KroneckerCurvature, flat, rotate
from rootward.subject.objectives import Classification
from tests.capture import worlds as w


def random_basis(layout: ParamLayout) -> KroneckerCurvature:
    g = torch.Generator().manual_seed(4)

    def orthogonal(d: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]

    blocks = {}
    for name in layout.names:
        rows, cols = flat(layout, name)
        left = None if len(layout.shape(name)) == 1 else orthogonal(rows)
        values = torch.rand(rows, cols, generator=g, dtype=torch.float64)
        blocks[name] = KroneckerBlock((left, orthogonal(cols)), values)
    return KroneckerCurvature(layout, "ekfac", blocks, Damping(0.1, 0.0, "whole"))


@pytest.mark.parametrize("make", [w.llama, w.gpt2], ids=["llama", "gpt2-tied"])
@pytest.mark.parametrize("budget", [1, 40])
def test_moments_are_those_of_dense_gradients(make, budget):
    model, objective, examples = make(), w.causal(), w.documents([5, 9, 7, 3])
    tracked = track(model, ".*")
    base = random_basis(tracked.layout)
    entries = largest_entries(base, 60)
    sink = JointMoments(base, entries)
    run_pass(model, objective, examples, [sink], tracked=tracked, token_budget=budget)
    dense = []
    for example in examples:
        loss = objective.losses(model, objective.collate([example])).sum()
        named = {n: p for n, p in model.named_parameters() if n in tracked.layout.sizes}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        gradient = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
        dense.append(
            torch.cat(
                [
                    rotate(gradient[n].reshape(1, *flat(tracked.layout, n)), base.blocks[n].basis).flatten()[entries[n]]
                    for n in tracked.layout.names
                ]
            )
        )
    rows = torch.stack(dense)
    assert sink.documents == 4 and sink.moment is not None
    torch.testing.assert_close(sink.moment, rows.T @ rows, rtol=1e-6, atol=1e-9)


def perceptron() -> tuple[Fit, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (30,), generator=g)
    fit = Fit(model, Classification(), w.pairs(x, y), track(model, ".*"), FitConfig(documents=30))
    return fit, model


def test_all_entries_with_every_label_are_the_gauss_newton_matrix():
    fit, model = perceptron()
    joint = fit_joint(fit, fit.run().curvature, 10_000)
    size = fit.tracked.layout.size
    # as many entries as gradients allow, and no more than there are: 30 documents x 3 labels / 4
    assert len(joint.eigenvalues) == 22 < size
    params = list(model.parameters())
    matrix = torch.zeros(size, size, dtype=torch.float64)
    x = torch.stack([e.x for e in fit.examples])
    for n in range(30):
        logits = model(x[n : n + 1])[0]
        jacobian = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(z, params, retain_graph=True)]) for z in logits]
        )
        p = logits.detach().softmax(0)
        matrix += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / 30
    names = [name for name, _ in model.named_parameters()]
    layout = fit.tracked.layout
    assert names == list(layout.names)
    unit = torch.eye(size, dtype=torch.float64)
    turned = joint.base.project(layout.unflatten(unit))
    basis = torch.cat([turned[n].flatten(1) for n in layout.names], 1)
    starts = [layout.slices[n].start for n in layout.names]
    places = torch.cat([joint.entries[n] + s for n, s in zip(layout.names, starts, strict=True)])
    inside = (basis.T @ matrix @ basis)[places[:, None], places[None, :]]
    found = joint.vectors @ torch.diag(joint.eigenvalues) @ joint.vectors.T
    torch.testing.assert_close(found, inside, rtol=1e-6, atol=1e-10)


def test_it_is_closer_to_the_exact_inverse_than_ekfac():
    fit, _ = perceptron()
    from rootward.capture.dense import exact_curvature

    damping = Damping(0.0, 0.02, "whole")
    exact = exact_curvature(fit.model, fit.objective, fit.examples, fit.tracked, "ggn")
    base = fit.run().curvature.damped(damping)
    joint = fit_joint(fit, base, 22)
    g = torch.Generator().manual_seed(2)
    layout = fit.tracked.layout
    x = {n: torch.randn(5, *layout.shape(n), generator=g, dtype=torch.float64) for n in layout.names}

    def distance(c) -> float:
        return sum(float((c.apply(x, -1.0, damping)[n] - truth[n]).square().sum()) for n in layout.names) ** 0.5

    truth = exact.apply(x, -1.0, damping)
    assert distance(joint) < 0.8 * distance(base)


def test_numbers_below_one_are_refused():
    fit, _ = perceptron()
    with pytest.raises(InputError, match="at least 1 entry, got 0"):
        fit_joint(fit, fit.run().curvature, 0)
