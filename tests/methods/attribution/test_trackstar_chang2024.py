"""TrackStar against its formula on dense gradients, one entry at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from rootward.capture.inputs import tracked_of
from rootward.core.errors import InputError
from rootward.core.layout import ParamLayout
from rootward.subject.checkpoints import Checkpoint, Moments
from rootward.subject.subject import Subject
from tests.methods.contract import World, close, contrast, loss, naive_gradients, naive_queries, run, scalar

BEHAVIOURS = {"contrast": contrast, "loss": loss, "scalar": scalar}
SMALL = r"layers\.1\.(self_attn\.[qk]|.*norm)"


def layout_of(subject: Subject) -> ParamLayout:
    return tracked_of(subject).layout


def scales(layout: ParamLayout, v: torch.Tensor, scaling: str) -> torch.Tensor:
    """``1 / sqrt(v) [P]``; factored: of ``row col^T / mean``."""
    v = v.clamp_min(1e-8 * v.mean())
    if scaling == "none":
        return torch.ones_like(v)
    if scaling == "factored":
        named = layout.unflatten(v)
        for name, value in named.items():
            if value.dim() == 2:
                named[name] = torch.outer(value.mean(1), value.mean(0)) / value.mean()
        v = layout.flatten(named)
    return v.rsqrt()


def naive(g: torch.Tensor, q: torch.Tensor, parts: list[slice], share: float, damping: float) -> torch.Tensor:
    a, b = torch.zeros_like(q), torch.zeros_like(g)
    for part in parts:
        mixed = share * q[:, part].T @ q[:, part] / len(q) + (1 - share) * g[:, part].T @ g[:, part] / len(g)
        values, vectors = torch.linalg.eigh(mixed)
        root = (vectors * (values.clamp_min(0) + damping * values.mean()).rsqrt()) @ vectors.T
        a[:, part], b[:, part] = q[:, part] @ root, g[:, part] @ root
    return -torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T


@pytest.mark.parametrize("kind", BEHAVIOURS)
@pytest.mark.parametrize("scaling", ["factored", "exact", "none"])
def test_without_projection_it_is_the_formula(world: World, kind: str, scaling: str):
    subject, behaviour = world.subject(parameters=SMALL), BEHAVIOURS[kind]()
    layout = layout_of(subject)
    assert {len(shape) for shape in layout.shapes} == {1, 2}
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, behaviour, layout.names)
    scale = scales(layout, g.square().mean(0), scaling)
    expected = naive(g * scale, q * scale, list(layout.slices.values()), 0.3, 0.1)
    found = run(
        subject, behaviour, "trackstar", rank=None, scaling=scaling, moments="documents", query_share=0.3
    )  # fmt: skip
    close(found.values, expected, rtol=1e-5)
    assert found.unit == "cosine"
    assert float(np.abs(found.values).max()) <= 1 + 1e-6


@pytest.mark.parametrize("scaling", ["factored", "exact"])
def test_projected_it_is_the_formula_of_projected_gradients(world: World, scaling: str):
    from rootward.capture.projection import Projection

    subject = world.subject()
    layout = layout_of(subject)
    projection = Projection(layout, 3, 4)
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, contrast(), layout.names)
    scale = scales(layout, g.square().mean(0), scaling)
    rows = [projection.project_dense(layout.unflatten(part * scale)) for part in (g, q)]
    expected = naive(rows[0], rows[1], list(projection.slices.values()), 0.5, 0.1)
    found = run(
        subject, contrast(), "trackstar", rank=3, seed=4, scaling=scaling, moments="documents", query_share=0.5
    )  # fmt: skip
    close(found.values, expected, rtol=1e-5)


def test_the_spectra_meet_at_the_component(world: World):
    subject = world.subject(parameters=SMALL)
    layout = layout_of(subject)
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, contrast(), layout.names)
    place = round(layout.size * 1000 / 65536) - 1
    spectra = []
    for rows in (q, g):
        blocks = [rows[:, p].T @ rows[:, p] / len(rows) for p in layout.slices.values()]
        spectra.append(torch.cat([torch.linalg.eigvalsh(b) for b in blocks]).sort(descending=True).values)
    assert 0 < place < len(q) * len(layout.names)
    share = float(spectra[1][place] / (spectra[0][place] + spectra[1][place]))
    found = run(subject, contrast(), "trackstar", rank=None, scaling="none")
    given = run(subject, contrast(), "trackstar", rank=None, scaling="none", query_share=share)
    close(found.values, given.values, rtol=1e-5)
    assert f"R is {share:.3g} of the queries'" in found.notes[1]
    assert 0 < share < 1


def test_the_optimisers_second_moments_are_used_where_they_were_kept(world: World):
    generator = torch.Generator().manual_seed(0)
    state = {name: value.clone() for name, value in world.model.state_dict().items()}
    second = {n: torch.rand(p.shape, generator=generator) + 0.01 for n, p in world.model.named_parameters()}
    moments = Moments(7, (0.9, 0.999), 1e-8, {n: torch.zeros_like(v) for n, v in second.items()}, second)
    subject = world.subject(parameters=SMALL, checkpoints=[Checkpoint(7, state, moments)])
    layout = layout_of(subject)
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, contrast(), layout.names)
    scale = scales(layout, layout.flatten({n: second[n].double() for n in layout.names}), "exact")
    expected = naive(g * scale, q * scale, list(layout.slices.values()), 0.0, 0.1)
    found = run(subject, contrast(), "trackstar", rank=None, scaling="exact", query_share=0.0)
    close(found.values, expected, rtol=1e-5)
    assert "from the optimiser (step 7)" in found.notes[0]
    without = world.subject(parameters=SMALL, checkpoints=())
    assert "from the documents' gradients" in run(without, contrast(), "trackstar").notes[0]
    with pytest.raises(InputError, match="moments = 'optimiser': expected second moments"):
        run(without, contrast(), "trackstar", moments="optimiser")


def test_without_scaling_large_damping_ranks_as_the_cosine(world: World):
    subject = world.subject(parameters=r"layers\.1\.self_attn\.q")
    found = run(subject, contrast(), "trackstar", rank=None, scaling="none", damping=1e9).values
    plain = run(subject, contrast(), "gradient_cosine").values
    for mine, theirs in zip(found, plain, strict=True):
        assert spearmanr(mine, theirs).statistic == pytest.approx(1)
