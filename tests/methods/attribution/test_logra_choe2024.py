"""LoGra: exact block-diagonal influence where nothing is projected away, and its formula where something is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from rootward.capture.inputs import MethodInputs, tracked_of
from rootward.capture.projected import covariances, principal
from rootward.capture.projection import Projection
from rootward.capture.store import build_store
from rootward.core.errors import InputError
from rootward.core.layout import ParamLayout
from rootward.curvature.kronecker import Covariances, Eigenbases
from tests.methods.contract import World, close, contrast, loss, naive_gradients, naive_queries, run, scalar

BEHAVIOURS = {"contrast": contrast, "loss": loss, "scalar": scalar}
SMALL = r"layers\.1\.(self_attn\.[qk]|.*norm)"


def influence(
    g: torch.Tensor, q: torch.Tensor, parts: list[slice], damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-q (F + lam)^-1 g`` and ``g (F + lam)^-1 g`` with the empirical Fisher matrix of each part as a matrix."""
    scores, own = torch.zeros(len(q), len(g), dtype=g.dtype), torch.zeros(len(g), dtype=g.dtype)
    for part in parts:
        fisher = g[:, part].T @ g[:, part] / len(g)
        lam = damping * float(fisher.diagonal().mean())
        solved = torch.linalg.solve(fisher + lam * torch.eye(len(fisher), dtype=g.dtype), g[:, part].T)
        scores -= q[:, part] @ solved
        own += (g[:, part] * solved.T).sum(1)
    return scores, own


@pytest.mark.parametrize("kind", BEHAVIOURS)
@pytest.mark.parametrize("init", ["pca", "random"])
def test_without_a_wider_side_it_is_exact_block_influence(world: World, kind: str, init: str):
    subject, behaviour = world.subject(parameters=SMALL), BEHAVIOURS[kind]()
    layout = tracked_of(subject).layout
    assert len(layout.names) >= 3
    g, q = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, behaviour, layout.names)
    expected, own = influence(g, q, list(layout.slices.values()), 0.1)
    close(run(subject, behaviour, "logra", init=init, rank=64).values, expected, rtol=1e-5)
    relative = run(subject, behaviour, "logra_relatif", init=init, rank=64)
    close(relative.values, expected / own.sqrt(), rtol=1e-5)
    assert relative.unit != run(subject, behaviour, "logra", init=init, rank=64).unit


@pytest.mark.parametrize("init", ["pca", "random"])
@pytest.mark.parametrize("fisher", ["raw", "ekfac"])
def test_projected_it_is_the_formula_of_projected_gradients(world: World, init: str, fisher: str):
    subject = world.subject(parameters=".*")  # a table of one-hot inputs among them
    inputs = MethodInputs(subject, contrast(), 500)
    layout = inputs.tracked.layout
    found = covariances(inputs)
    projection = Projection(layout, 3, 2)
    if init == "pca":
        projection = principal(projection, Eigenbases.of(found, torch.float64))
    dense = naive_gradients(subject, subject.encoded, layout.names), naive_queries(subject, contrast(), layout.names)
    g, q = (projection.project_dense(layout.unflatten(part)) for part in dense)
    expected = torch.zeros(len(q), len(g), dtype=g.dtype)
    for name, part in projection.slices.items():
        if fisher == "raw":
            expected += influence(g, q, [part], 0.1)[0]
            continue
        turn = turned(projection, found, name)
        a, b = g[:, part] @ turn, q[:, part] @ turn
        moments = a.square().mean(0)
        expected -= (b / (moments + 0.1 * moments.mean())) @ a.T
    values = run(subject, contrast(), "logra", init=init, fisher=fisher, rank=3, seed=2).values
    close(values, expected, rtol=1e-5)


def turned(projection: Projection, found: Covariances, name: str) -> torch.Tensor:
    """Eigenvectors of the projected covariances' Kronecker product."""
    result = torch.ones(1, 1, dtype=torch.float64)
    for key, side, width in zip(
        (found.left[name], found.right[name]), projection.sides(name), projection.shapes[name], strict=True
    ):
        basis = torch.eye(width, dtype=torch.float64)
        if key is not None:
            moment = found.sides[key].moment.double()
            moment = torch.diag(moment) if moment.dim() == 1 else moment
            projected = moment if side is None else side.double().T @ moment @ side.double()
            basis = torch.linalg.eigh(projected).eigenvectors
        result = torch.kron(result, basis)
    return result


def test_principal_sides_keep_more_of_the_gradients_than_random_ones(world: World):
    subject = world.subject()
    inputs = MethodInputs(subject, contrast(), 500)
    layout = inputs.tracked.layout
    random = Projection(layout, 3)
    leading = principal(random, Eigenbases.of(covariances(inputs), torch.float64))
    assert leading.describe() != random.describe()
    assert leading.width == random.width
    gradients = layout.unflatten(naive_gradients(subject, subject.encoded, layout.names))

    def kept(projection: Projection) -> float:
        """Share of the squared norm that lies in the span of the sides."""
        inside = total = 0.0
        for name in layout.names:
            left, right = (None if s is None else torch.linalg.qr(s.double())[0] for s in projection.sides(name))
            only = Projection(ParamLayout((name,), (layout.shape(name),)), 3, given={name: (left, right)})
            inside += float(only.project_one(name, gradients[name]).square().sum())
            total += float(gradients[name].square().sum())
        return inside / total

    assert kept(leading) > 1.5 * kept(random)


def test_large_damping_ranks_as_the_gradient_product_of_the_projection(world: World):
    subject = world.subject(parameters=r"layers\.1\.self_attn\.q")  # one block, so one damping
    found = run(subject, contrast(), "logra", rank=64, damping=1e9).values
    plain = run(subject, contrast(), "gradient_dot").values
    for mine, theirs in zip(found, plain, strict=True):
        assert spearmanr(mine, theirs).statistic == pytest.approx(1)


@pytest.mark.parametrize("fisher", ["raw", "ekfac"])
def test_an_index_gives_what_random_sides_give(world: World, tmp_path: Path, fisher: str):
    subject = world.subject()
    store = build_store(
        tmp_path / "index", subject.model, subject.objective, subject.encoded, tracked_of(subject),
        subject.fingerprint(), rank=3, seed=5,
    )  # fmt: skip
    stored = run(subject, contrast(), "logra_random", source="index", index=store, fisher=fisher)
    passed = run(subject, contrast(), "logra_random", rank=3, seed=5, fisher=fisher)
    close(stored.values, passed.values, rtol=1e-4)
    assert "index, rank 3" in stored.notes[0]
    with pytest.raises(InputError, match="use init = 'random'"):
        run(subject, contrast(), "logra", source="index", index=store)
    with pytest.raises(InputError, match="leave out rank"):
        run(subject, contrast(), "logra_random", source="index", index=store, rank=3)
